"""A GGUF file as an ordinary model folder: dequantized once, cached, and from then on safetensors like any other.

Configuration and tokenizer are read as transformers reads them. Only data is taken from the file, never code.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from filelock import FileLock
from transformers import (
    TOKENIZER_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version
from transformers.integrations import GGUF_CONFIG_MAPPING

from compress.calib.skeleton import check_counts, skeleton, tokenizer_errors
from compress.errors import InputError
from compress.files import PARTIAL, disk_errors, sha256, sync, write_text
from compress.gguf_file import GgufFile, Skipped, read_gguf
from compress.gguf_weights import Progress, write_weights

ALIASES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}  # llama.cpp's name -> the key in transformers' table
INSTEAD = "pass the model's safetensors folder instead"


def import_gguf(path: Path, cache_dir: Path, progress: Progress | None = None, digest: str | None = None) -> Path:
    """Dequantize a .gguf file into a folder under `cache_dir`, or find the folder that an earlier call made.

    The folder holds model.safetensors (bfloat16, or the file's own float type if nothing in it is quantized),
    config.json, generation_config.json and the tokenizer. It is keyed by the file's sha256 and renamed into place when
    whole. `progress` is called with (tensors done, tensors in all); `digest` is the sha256 if it is known already.
    Raises InputError if the file is damaged or holds what transformers cannot turn into a causal language model.
    """
    folder = imported_folder(path.stem, digest or _digest(path, cache_dir), cache_dir)
    if folder.is_dir():
        return folder
    with disk_errors(folder), FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        aside = folder.with_name(folder.name + PARTIAL)
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed import
        try:
            aside.mkdir()
            _convert(read_gguf(path), aside, progress)
            aside.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def imported_folder(stem: str, digest: str, cache_dir: Path) -> Path:
    """Where the import of a file with this sha256 lies, or will lie."""
    return cache_dir / "gguf" / f"{stem}-{digest[:16]}"


def _digest(path: Path, cache_dir: Path) -> str:
    """The file's sha256, remembered by name, size, time and inode: hashing 40 GB takes a minute."""
    if not path.is_file():
        raise InputError(f"cannot read {path}: there is no ordinary file of that name")
    try:
        stat = path.stat()
        seen = cache_dir / "gguf" / "sha256" / f"{path.name}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
        if seen.is_file():
            return seen.read_text()
        digest = sha256(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    with disk_errors(seen):
        seen.parent.mkdir(parents=True, exist_ok=True)
    write_text(seen, digest)
    return digest


def open_gguf(path: Path) -> tuple[GgufFile, PreTrainedModel]:
    """The header of a .gguf file, and its model on the meta device. Raises InputError as `import_gguf` does."""
    file = read_gguf(path)
    return file, _skeleton(file, _config(file))


def _convert(file: GgufFile, folder: Path, progress: Progress | None) -> None:
    """Write the whole model folder."""
    config = _config(file)
    model = _skeleton(file, config)
    weights = folder / "model.safetensors"
    write_weights(file, model, weights, progress)
    sync(weights)
    config.architectures = [type(model).__name__]
    config.dtype = file.dtype()
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # AutoTokenizer would read the whole file again for a config of its own (10 s) and then choose just this class
    tokenizer_class = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    with tokenizer_errors(str(file.path)):
        tokenizer = tokenizer_class.from_pretrained(file.path.parent, gguf_file=file.path.name)
        tokenizer.save_pretrained(folder)


def _skeleton(file: GgufFile, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device."""
    model = skeleton(config, file.dtype(), len(file.tensors), str(file.path))
    model.tie_weights()
    return model


def _config(file: GgufFile) -> PreTrainedConfig:
    """The configuration as transformers reads it.

    It is read from a copy of the header without the vocabulary, which transformers would unpack token by token (15 s).
    """
    architecture = ALIASES.get(file.architecture, file.architecture)
    if architecture not in GGUF_CONFIG_MAPPING:
        raise InputError(
            f"{file.path} is of architecture {file.architecture}, "
            f"which transformers {transformers_version} does not read from GGUF: {INSTEAD}"
        )
    known = GGUF_CONFIG_MAPPING[architecture]
    check_counts(file.metadata, str(file.path))
    _refuse_lost_rope_scaling(file, known)
    with tempfile.TemporaryDirectory() as folder:
        _write_slim_header(file, Path(folder) / "header.gguf", known)
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file="header.gguf")
        except Exception as error:  # each configuration class checks its own values and raises its own errors
            raise InputError(
                f"{file.path}: transformers {transformers_version} cannot read its settings: {error}"
            ) from error
    config.name_or_path = ""
    _restore_llama3_rope(file, config)
    return config


def _refuse_lost_rope_scaling(file: GgufFile, known: dict[str, Any]) -> None:
    """Refuse a file whose rope scaling transformers would leave out without a word."""
    prefix = f"{file.architecture}.rope.scaling."
    set_keys = [key for key in file.metadata if key.startswith(prefix)]
    if file.metadata.get(f"{prefix}type") == "none":
        return
    if lost := [key for key in set_keys if key.removeprefix(f"{file.architecture}.") not in known]:
        raise InputError(
            f"{file.path} sets {lost[0]}, which transformers {transformers_version} does not read from GGUF: {INSTEAD}"
        )


def _restore_llama3_rope(file: GgufFile, config: PreTrainedConfig) -> None:
    """Llama 3.1 and later: llama.cpp stores one divisor a frequency, transformers wants the rule that made them."""
    tensor = next((tensor for tensor in file.tensors if tensor.name == "rope_freqs.weight"), None)
    if tensor is None:
        return
    low, high, original, factor = 1.0, 4.0, 8192, 0.0  # the same in every Llama 3, but for the factor
    if config.model_type == "llama" and len(tensor.shape) == 1:
        divisors = tensor.dequantized()
        theta, factor = config.rope_parameters["rope_theta"], float(divisors.max())
        wavelengths = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not factor > 0 or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise InputError(f"{file.path} scales its rotary frequencies in a way other than Llama 3's: {INSTEAD}")
    config.rope_parameters = dict(config.rope_parameters) | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _write_slim_header(file: GgufFile, path: Path, known: dict[str, Any]) -> None:
    """A GGUF file with the same settings and tensor names, but without vocabulary and weights."""
    writer = gguf.GGUFWriter(path, file.architecture)
    for key, value in file.metadata.items():
        vocabulary = key.startswith("tokenizer.") and isinstance(value, list)
        if not (vocabulary or isinstance(value, Skipped) or value == [] or key == "general.architecture"):
            writer.add_key_value(key, value, *_value_types(value))
    size, tokens = f"{file.architecture}.vocab_size", file.metadata.get("tokenizer.ggml.tokens")
    if (
        isinstance(tokens, Skipped) and "vocab_size" not in known
    ):  # GPT-2 and StarCoder 2: transformers counts the tokens
        writer.add_token_list([""] * tokens.length)
    elif isinstance(tokens, Skipped) and size not in file.metadata:
        writer.add_uint32(size, tokens.length)
    for tensor in file.tensors:
        writer.add_tensor(tensor.name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value_types(value: Any) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]:
    """The GGUF type of a metadata value, and of its elements if it is a list. Integers are written wide enough for all."""
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.INT64, float: gguf.GGUFValueType.FLOAT64}
    kinds[str] = gguf.GGUFValueType.STRING
    values = value if isinstance(value, list) else [value]
    kind = kinds[type(values[0])]
    if kind == gguf.GGUFValueType.INT64 and max(values) >= 2**63:
        kind = gguf.GGUFValueType.UINT64
    return (gguf.GGUFValueType.ARRAY, kind) if isinstance(value, list) else (kind, None)
