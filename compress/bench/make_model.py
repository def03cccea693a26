"""`compress bench make-model`: an ordinary model folder of a true shape with random weights, to measure memory and time.

What a run takes does not depend on the values of the weights, so a machine without the model can be measured as well.
Weights are what the architecture itself begins a training with (normal, with the config's `initializer_range`, 0.02
unless it says otherwise, which is also the scale of trained Llamas' weights), made and written a module at a time. The
tokenizer is a byte-level BPE trained on Python's own docstrings; the model's ids beyond it are never used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from compress.calib.builtin_text import calibration_text
from compress.calib.model_files import first_line, read_object
from compress.calib.skeleton import check_counts, load_config, skeleton
from compress.checkpoint.writer import SHARD_BYTES, ShardWriter
from compress.errors import InputError
from compress.files import disk_errors
from compress.report import Report, size

SHAPES: dict[str, dict[str, Any]] = {  # for `AutoConfig.for_model`; all else is the architecture's own default
    "llama-7b": {"model_type": "llama"},
    "llama-13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
    },
    "olmoe-1b-7b": {"model_type": "olmoe", "intermediate_size": 1024},
}
WORDS = 8192  # of the tokenizer, where the model has room for them
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
BYTES = 256  # words that every byte-level tokenizer has
TENSORS = 100_000  # more than any shape has


@dataclass(frozen=True)
class RandomModel:
    """A model to be made."""

    config: PretrainedConfig
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    shard_bytes: int = SHARD_BYTES


def bench_make_model(shape: str, out: Path, layers: int | None, seed: int) -> Report:
    """Make a model of `shape` (a name of SHAPES, or a config.json or a folder with one), of `layers` blocks if given.

    Raises InputError for an unknown shape, or for a folder that holds something already.
    """
    config = _config(shape)
    if layers is not None:
        config.num_hidden_layers = layers
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = kinds[:layers]
    nbytes = make_model(RandomModel(config, seed), out)
    blocks = config.num_hidden_layers
    data = {"folder": str(out), "shape": shape, "layers": blocks, "seed": seed, "bytes": nbytes}
    return Report(data, [f"{out}: random weights of the shape of {shape}, {blocks} blocks, {size(nbytes)}"])


def make_model(asked: RandomModel, out: Path) -> int:
    """Write the folder; bytes of its weight files. The same config and seed give the same bytes.

    Raises InputError if `out` holds something, or the model is too small for a byte-level tokenizer.
    """
    config = asked.config
    if config.vocab_size < (least := BYTES + len(SPECIAL)):
        raise InputError(f"a vocabulary of {config.vocab_size} has no room for {least} bytes and special tokens")
    with disk_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} holds something already: choose another folder")
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, None
    lm = skeleton(config, asked.dtype, TENSORS)
    writer = ShardWriter(out, asked.shard_bytes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        for name, tensor in _tensors(lm):
            writer.add(name, tensor)
    nbytes = writer.finish()
    with disk_errors(out):
        _tokenizer(min(WORDS, config.vocab_size)).save_pretrained(out)
        config.architectures, config.dtype = [type(lm).__name__], asked.dtype
        config.save_pretrained(out)
    return nbytes


def _config(shape: str) -> PretrainedConfig:
    if shape in SHAPES:
        return AutoConfig.for_model(**SHAPES[shape])
    path = Path(shape)
    if path.is_file():
        check_counts(values := read_object(path), str(path))
        try:
            return AutoConfig.for_model(**values)
        except Exception as error:  # each configuration class raises its own errors
            raise InputError(f"{path} does not describe a model ({first_line(error)}): take another") from error
    if (path / "config.json").is_file():
        return load_config(path)
    raise InputError(f"there is no shape {shape!r}: give one of {', '.join(SHAPES)}, or a config.json")


def _tensors(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, as the hub has them; those of one module are in memory at a time."""
    tied = lm.all_tied_weights_keys
    for path, module in lm.named_modules():
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        for name, parameter in own.items():  # zeros: what an architecture does not begin itself is not left to chance
            made = torch.zeros(parameter.shape, dtype=parameter.dtype)
            module._parameters[name] = nn.Parameter(made, requires_grad=False)
        if own:
            lm._init_weights(module)
        state = {f"{path}.{name}": module._parameters[name].detach() for name in own}
        module._parameters.update(own)
        kept = {name: tensor for name, tensor in state.items() if name not in tied}
        lm._weight_conversions = None  # of this module alone
        yield from revert_weight_conversion(lm, kept).items()


def _tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `words` tokens, and a BOS put first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(calibration_text().split("\n\n"), trainer)
    unknown, bos, eos = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unknown)
