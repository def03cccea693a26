"""A model without weights: its configuration, its modules, and the tables that are computed from both.

Configuration and tokenizer may have been written by anybody: nothing in them runs code, reaches for the network, or
takes more memory than the weights beside them are meant for.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.initialization import meta_device_safe_creation_ops

from compress.calib.model_files import MEND, check_text_files, first_line, read_object
from compress.errors import InputError

COUNT = re.compile(r"(^|[_.])(layers?|labels|dense_replace|block_count)$")  # what configurations make lists of
MOST = 10_000  # of these; the deepest language models have hundreds
OWN_ATTENTION = (None, "eager", "sdpa")  # torch's; other names may be of code on the hub
TENSORS = 16  # of a model for each of its files' at most, such as experts that files keep in one
PROBE = "Once upon a time, 1 < 2: \u00e9 \u4e2d \U0001f600"  # what a tokenizer has to be able to read
TABLES = 1 << 30  # bytes that a model may compute from its configuration alone


def load_config(folder: Path) -> transformers.PretrainedConfig:
    """A model folder's configuration, without its quantization: our readers present dense tensors.

    How attention is computed is left to transformers unless the file asks for one of torch's ways.
    Raises InputError if it is missing or damaged, or asks for code of the hub's. Remote code is never run.
    """
    file = folder / "config.json"
    check_counts(read_object(file), str(file))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each configuration class checks its own values and raises its own errors
        raise InputError(f"{file} does not describe a model ({first_line(error)}): {MEND}") from error
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        asked = getattr(part, "_attn_implementation", None)
        if "/" in str(asked):
            raise InputError(f"{file} asks for attention by code of {asked}, which is never run: take that key away")
        if asked not in OWN_ATTENTION:
            part._attn_implementation = None
    config._experts_implementation = None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def check_counts(settings: Any, where: str) -> None:
    """Raise InputError for a number of layers that no model has, anywhere in a tree of settings: it is a list's length."""
    values = settings.items() if isinstance(settings, dict) else enumerate(settings)
    for key, value in values:
        if isinstance(value, dict | list):
            check_counts(value, where)
        elif isinstance(value, int) and value > MOST and COUNT.search(str(key)):
            raise InputError(f"{where} says {key} is {value}, which no model has: {MEND}")


def skeleton(
    config: transformers.PretrainedConfig, dtype: torch.dtype, n_tensors: int, where: str = "config.json"
) -> transformers.PreTrainedModel:
    """The model with its parameters on the meta device and its computed buffers (rotary tables) real.

    `n_tensors`: how many the model's files hold; `where`: what errors call the configuration.
    Raises InputError for a configuration that makes no model, or one far larger than such files are for.
    """
    try:
        with torch.device("meta"), meta_device_safe_creation_ops(), _at_most(TENSORS * (n_tensors + TENSORS), where):
            tables = sum(buffer.nbytes for buffer in _build(config, dtype).buffers())
        if tables > TABLES:
            raise InputError(f"{where} asks for tables of {tables} bytes, which no model has: {MEND}")
        with init_empty_weights(include_buffers=False):
            lm = _build(config, dtype)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{config.model_type} is not a causal language model: {first_line(error)}") from error
    except Exception as error:  # each architecture meets a value it did not expect in its own way
        raise InputError(f"{where} makes no {config.model_type} model ({first_line(error)}): restore it") from error
    return lm.eval().requires_grad_(False)


def _build(config: transformers.PretrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


@contextlib.contextmanager
def _at_most(most: int, where: str) -> Iterator[None]:
    """Stop building a model that gets more parameters."""
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise InputError(f"{where} asks for more than {most} tensors, and its files have far fewer: {MEND}")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, without code of the folder's own. Raises InputError if it does not load."""
    check_text_files(folder)
    with tokenizer_errors(str(folder)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        tokenizer.decode(tokenizer(PROBE, verbose=False)["input_ids"])
    return tokenizer


@contextlib.contextmanager
def tokenizer_errors(where: str) -> Iterator[None]:
    """Raise InputError for whatever a tokenizer's class meets first in a damaged file."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # what Rust's panics become
            raise
        raise InputError(f"{where}: its tokenizer does not load ({first_line(error)}): restore it") from error


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
