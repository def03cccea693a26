"""HQQ: half-quadratic quantization, which takes no calibration."""

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from protocol import Request, load_dense, main, peer_actions
from torch import nn
from transformers import PreTrainedModel

DTYPE = torch.bfloat16


def quantize(request: Request) -> None:
    """Quantize and save in hqq's own format."""
    model = load_dense(request.model)
    config = BaseQuantizeConfig(nbits=request.setting["wbits"], group_size=request.setting["group_size"])
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=DTYPE, device="cpu")
    request.checkpoint.mkdir(parents=True, exist_ok=True)
    AutoHQQHFModel.save_quantized(model, str(request.checkpoint))


def load(checkpoint: Path) -> nn.Module:
    """The checkpoint by hqq's own loader."""
    model: PreTrainedModel = AutoHQQHFModel.from_quantized(str(checkpoint), compute_dtype=DTYPE, device="cpu")
    model.tie_weights()
    return model


if __name__ == "__main__":
    main(peer_actions(quantize, load))
