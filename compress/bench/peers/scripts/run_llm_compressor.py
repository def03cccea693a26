"""llm-compressor: GPTQ, round to nearest, SparseGPT then GPTQ, SmoothQuant then GPTQ."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from protocol import Request, load_dense, main, peer_actions
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

IGNORED = ["lm_head"]


def quantize(request: Request) -> None:
    """Run the recipe and save it as compressed-tensors."""
    model = load_dense(request.model)
    calibration = {
        "dataset": Dataset.from_list(request.examples),
        "num_calibration_samples": len(request.calibration),
        "max_seq_length": request.calibration.shape[1],
        "shuffle_calibration_samples": False,
    }
    if request.setting["method"] == "rtn" and request.setting.get("abits", 16) == 16:
        calibration = {}
    oneshot(model=model, recipe=recipe(request.setting), **calibration)
    model.save_pretrained(request.checkpoint, save_compressed=True)


def recipe(setting: dict[str, Any]) -> list[Any]:
    """The modifiers of a setting, with their defaults."""
    steps: list[Any] = []
    if pattern := setting.get("pattern"):
        steps.append(SparseGPTModifier(sparsity=0.5, mask_structure=pattern, ignore=IGNORED))
    elif sparsity := setting.get("sparsity"):
        steps.append(SparseGPTModifier(sparsity=sparsity, ignore=IGNORED))
    if setting["method"] == "smoothquant":
        steps.append(SmoothQuantModifier(smoothing_strength=setting["smoothing_strength"]))
    modifier = QuantizationModifier if setting["method"] == "rtn" else GPTQModifier
    return [*steps, modifier(config_groups={"group_0": scheme(setting)}, ignore=IGNORED)]


def scheme(setting: dict[str, Any]) -> dict[str, Any]:
    """A quantization scheme as compressed-tensors spells it; inputs are quantized for each token."""
    channel = setting["group_size"] == -1
    weights = {
        "num_bits": setting["wbits"],
        "type": "int",
        "symmetric": setting["symmetric"],
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else setting["group_size"],
    }
    inputs = {
        "num_bits": setting.get("abits", 16),
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs if inputs["num_bits"] < 16 else None}


def load(checkpoint: Path) -> nn.Module:
    """Plain transformers; quantized inputs stay quantized in the forward."""
    decompressed = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", quantization_config=decompressed)


if __name__ == "__main__":
    os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
    main(peer_actions(quantize, load))
