"""OpenVINO's CPU plug-in; the graph has no cache, and gives logits of the whole text."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from turns import WholeTexts, serve


def load(request: dict[str, Any]) -> WholeTexts:
    """The model of a folder, compiled with the properties in `setting`."""
    file = Path(request["file"]) / "openvino_model.xml"
    properties = {"INFERENCE_NUM_THREADS": request["threads"], **request["setting"]}
    compiled = openvino.Core().compile_model(file, "CPU", properties)
    asked = compiled.create_infer_request()

    def next_token(ids: list[int]) -> int:
        asked.infer([np.array([ids])])
        return int(asked.get_output_tensor().data[0, -1].argmax())

    return WholeTexts(next_token)


if __name__ == "__main__":
    serve(load, ("openvino",))
