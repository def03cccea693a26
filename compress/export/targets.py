"""What a checkpoint can be exported to: the file compress/export/<name>.py is `--to <name>`.

A runtime is a module with NEEDS (what has to be installed), EXTRA (which extra brings it), SUFFIX (of the file it
writes, "" for a folder), `refusal`, `write` and `verify`.
"""

import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import compress.export
from compress.errors import InputError
from compress.export.source import ExportLayer, Source

LOSSY = "--lossy writes it all the same"


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    files: list[Path]
    kinds: Counter[str]  # how many parameters there are of each type of the runtime
    notes: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """How far what the runtime reads is from the checkpoint."""

    packed: int = 0  # parameters that were packed
    exact: int = 0  # of them equal bit for bit
    largest: float = 0.0  # difference of a packed weight
    others: float = 0.0  # difference of any other
    logits: float | None = None  # largest difference of logits from torch's on the same weights; None: it was not run
    notes: list[str] = field(default_factory=list)

    def add(self, packed: bool, ours: Tensor, theirs: Tensor) -> None:
        """Take one parameter."""
        difference = _largest(ours, theirs)
        if packed:
            self.packed += 1
            self.exact += int(torch.equal(ours.float(), theirs.float()))
            self.largest = max(self.largest, difference)
        else:
            self.others = max(self.others, difference)


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return (ours.float() - theirs.float()).abs().max().item() if ours.numel() else 0.0


def target_names() -> list[str]:
    """Every runtime there is a file for, sorted."""
    names = (module.name for module in pkgutil.iter_modules(compress.export.__path__))
    return sorted(name for name in names if hasattr(_load(name), "NEEDS"))


def find_target(name: str) -> ModuleType:
    """The module of a runtime. Raises InputError if there is none of this name, or its library is not installed."""
    if name not in (known := target_names()):
        raise InputError(f'there is no export to "{name}": choose {", ".join(known)}')
    target = _load(name)
    if lacking := [package for module, package in target.NEEDS.items() if find_spec(module) is None]:
        raise InputError(f"exporting to {name} needs {', '.join(lacking)}: pip install 'compress-llm[{target.EXTRA}]'")
    return target


def check_out(target: ModuleType, name: str, out: Path) -> None:
    """Raise InputError where `out` cannot be what the runtime's files are called."""
    if target.SUFFIX and (out.suffix != target.SUFFIX or out.is_dir()):
        raise InputError(f"--to {name} writes one file: give -o a name that ends in {target.SUFFIX}")
    if not target.SUFFIX and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise InputError(f"--to {name} writes a folder, and {out} is a file or has something in it: choose another -o")


def check_layers(
    layers: Sequence[ExportLayer], refusal: Callable[[ExportLayer], str | None], lossy: bool
) -> dict[str, str]:
    """Why layers cannot be exact, by name. Raises InputError with the first of the reasons unless `lossy`."""
    reasons = {layer.name: reason for layer in layers if (reason := refusal(layer)) is not None}
    if reasons and not lossy:
        name, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise InputError(f"{name}{more} would not be exact: {reason}; or {LOSSY}")
    return reasons


def input_refusal(layer: ExportLayer, runtime: str) -> str | None:
    """Why the layer's inputs keep a runtime from doing the same as we; None: nothing enters it rounded."""
    if layer.inputs is None:
        return None
    return (
        f"what enters it is rounded to {layer.inputs.bits} bits, which {runtime} does not do: quantize without --abits"
    )


def check_shift(source: Source) -> None:
    """Raise InputError where a layer subtracts something from its inputs, which no runtime is told of."""
    for layer in source.layers:
        if layer.inputs is not None and layer.inputs.shift is not None:
            raise InputError(
                f"{layer.name} subtracts a shift from its inputs, which only compress does: serve it instead"
            )


def notes_of(reasons: dict[str, str]) -> list[str]:
    """One line for each reason for which layers are not exact."""
    counts = Counter(reasons.values())
    return [f"{count} layers are not exact: {reason}" for reason, count in counts.items()]


def compare(source: Source, theirs: Iterable[tuple[str, Tensor]]) -> Comparison:
    """Parameters of the checkpoint against those of the runtime, by name, one at a time.

    Raises InputError for a parameter that the checkpoint does not have.
    """
    result, left = Comparison(), set(source.names())
    for name, tensor in theirs:
        if name not in left:
            raise InputError(f"{source.folder} has no {name} to compare with: leave --verify out")
        left.remove(name)
        result.add(name in source.packed, source.read(name), tensor)
    if missing := sorted(left & set(source.packed)):
        result.notes.append(f"{len(missing)} packed parameters were not found again, {missing[0]} the first")
    return result


def _load(name: str) -> ModuleType:
    return import_module(f"{compress.export.__name__}.{name}")
