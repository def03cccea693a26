"""GPTQModel: its GPTQ, with its defaults (group-aware activation order)."""

from pathlib import Path

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from protocol import Request, linear_weights, main, peer_actions
from torch import Tensor, nn


def quantize(request: Request) -> None:
    """Quantize and save in the format that the setting names, gptq (version 1) where it names none."""
    setting = request.setting
    config = QuantizeConfig(
        bits=setting["wbits"],
        group_size=setting["group_size"],
        sym=setting["symmetric"],
        format=setting.get("format", "gptq" if setting["symmetric"] else "gptq_v2"),
    )
    model = GPTQModel.load(str(request.model), config)
    model.quantize(request.examples, batch_size=1)
    model.save(str(request.checkpoint))


def load(checkpoint: Path) -> nn.Module:
    """The checkpoint with the kernel that is written in torch."""
    return GPTQModel.load(str(checkpoint), device="cpu", backend=BACKEND.GPTQ_TORCH).model


def decoded(model: nn.Module) -> dict[str, Tensor]:
    """Weights [out, in] by layer, as its kernel decodes them."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
    return {name: module.dequantize_weight().T for name, module in layers.items()} or linear_weights(model)


if __name__ == "__main__":
    main(peer_actions(quantize, load, decoded))
