"""Which format a checkpoint is written in, and which reader an existing one takes.

The file name is the format name: checkpoint/compressed_tensors.py is `--format compressed-tensors`. A format is a
module with QUANT_METHOD, READER, `refusal`, `held`, `layer_tensors`, `quantization_config` and `side_files`; those of
AUTO have `unread`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import compress.checkpoint
from compress.calib.weight_files import WeightFiles
from compress.checkpoint.dense_view import quantization_settings, read_config
from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError

AUTO = ("compressed-tensors", "native")  # the first that can hold everything
DENSE = "dense"  # an ordinary checkpoint: nothing in it is packed


def format_names() -> list[str]:
    """Every format there is a file for, sorted."""
    names = (module.name for module in pkgutil.iter_modules(compress.checkpoint.__path__))
    return sorted(name.replace("_", "-") for name in names if hasattr(_load(name), "QUANT_METHOD"))


def find_format(name: str) -> ModuleType:
    """The module of a format. Raises InputError if there is none of this name, listing those there are."""
    if name not in (known := format_names()):
        raise InputError(f'there is no checkpoint format "{name}": choose {", ".join(known)} or auto')
    return _load(name.replace("-", "_"))


def choose_format(
    requested: str, layers: Sequence[StoredLayer], too_large: Callable[[str], str | None] | None = None
) -> tuple[str, str]:
    """The name of the format to write, and why that one; "dense" if no layer is quantized.

    `too_large` may say why a format that could hold the layers is not to have them.
    Raises InputError if the requested format does not exist, cannot hold a layer, or has none to hold.
    """
    if requested != "auto" and (reason := find_format(requested).refusal(layers)):
        raise InputError(f"{reason}; choose another --format, or auto")
    if not layers and requested != "auto":
        raise InputError(f"nothing is quantized that --format {requested} could hold: leave it out, or give --wbits")
    if not layers:
        return DENSE, "no layer is quantized"
    if requested != "auto":
        return requested, "as asked"
    reasons: list[str] = []
    for name in AUTO:
        found = find_format(name)
        reason = found.refusal(layers) or found.unread(layers) or (too_large(name) if too_large else None)
        if reason is None:
            return name, "; ".join(reasons) or "the most widely read format that holds every layer"
        reasons.append(reason)
    raise InputError("; ".join(reasons))


def as_held(format_name: str, layer: StoredLayer) -> StoredLayer:
    """A quantized layer as a format stores it: with or without the zeros of a pruned weight, say."""
    held: StoredLayer = find_format(format_name).held(layer)
    return held


def open_weights(folder: Path) -> WeightFiles:
    """A checkpoint folder as dense tensors, whatever format its config.json names.

    Raises InputError for a quantization method that no format here reads.
    """
    settings = quantization_settings(read_config(folder))
    if not settings:
        return WeightFiles(folder)
    method = settings.get("quant_method")
    formats = {module.QUANT_METHOD: module for module in map(find_format, format_names())}
    if not isinstance(method, str) or method not in formats:
        raise InputError(
            f'{folder} is quantized by "{method}", which is not read: use its unquantized original, or one quantized by '
            f"{', '.join(sorted(formats))}"
        )
    return formats[method].READER(folder)


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{compress.checkpoint.__name__}.{name}")
