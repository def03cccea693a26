"""llama.cpp's converter, as a reader: the weights it would write to a GGUF file."""

from typing import Any

import gguf
import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from protocol import Request, keep, main


@torch.inference_mode()
def read(request: Request) -> dict[str, Any]:
    """Its float32 weights of the layers that a quantized checkpoint packs."""
    architecture = get_model_architecture(ModelBase.load_hparams(request.checkpoint, False), ModelType.TEXT)
    converter = get_model_class(architecture)(
        request.checkpoint, gguf.LlamaFileType.ALL_F32, request.checkpoint / "unwritten.gguf", eager=True
    )
    stored = set(converter.model_tensors)
    converter.dequant_model()
    decoded = {name: tensor for name, tensor in converter.model_tensors.items() if name not in stored}
    return keep(request, {name.removesuffix(".weight"): tensor() for name, tensor in decoded.items()})


if __name__ == "__main__":
    main({"read": read})
