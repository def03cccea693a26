"""A model without weights: its configuration, its modules, and the tables that are computed from both."""

from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import InputError


def load_config(folder: Path) -> transformers.PretrainedConfig:
    """A model folder's configuration, without its quantization: our readers present dense tensors.

    Raises InputError if it is missing or damaged. Remote code is never run.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json does not describe a model: {first_line(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def skeleton(config: transformers.PretrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model with its parameters on the meta device and its computed buffers (rotary tables) real."""
    try:
        with init_empty_weights(include_buffers=False), quiet():
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"{config.model_type} is not a causal language model: {first_line(error)}") from error
    except (TypeError, RuntimeError, ArithmeticError, KeyError, IndexError) as error:
        reason = f"config.json makes no {config.model_type} model ({first_line(error)})"
        raise InputError(f"{reason}: restore it") from error
    return lm.eval().requires_grad_(False)


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class quiet:
    """Silence transformers' own progress bars and reports while it builds or fills one piece of a model."""

    def __enter__(self) -> None:
        self.level = transformers.logging.get_verbosity()
        self.bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers.logging.set_verbosity(self.level)
        if self.bars:
            transformers.utils.logging.enable_progress_bar()
