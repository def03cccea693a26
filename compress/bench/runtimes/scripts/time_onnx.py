"""onnxruntime-genai, whose generator keeps keys and values."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from turns import serve


class Genai:
    """A folder of its builder."""

    cached = True

    def __init__(self, request: dict[str, Any]):
        folder = Path(request["file"])
        config = onnxruntime_genai.Config(str(folder))
        threads = {"intra_op_num_threads": request["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = onnxruntime_genai.Model(config)
        window = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"].get("sliding_window", {})
        self._parameters = onnxruntime_genai.GeneratorParams(self._model)
        text = len(request["prompt"]) + request["new_tokens"] + 1
        longest = max(text, window.get("window_size", 0))
        self._parameters.set_search_options(max_length=longest, min_length=longest, do_sample=False)  # no end before

    def begin(self) -> None:
        """A new generator, with room for the text."""
        self._generator = onnxruntime_genai.Generator(self._model, self._parameters)

    def prompt(self, ids: Sequence[int]) -> int:
        """Take a text; the most likely token after it."""
        self._generator.append_tokens(np.array([ids], dtype=np.int32))
        return self.token()

    def token(self) -> int:
        """Take the token given last, which it does only now; the most likely one after it."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


if __name__ == "__main__":
    serve(Genai, ("onnxruntime-genai", "onnxruntime"))
