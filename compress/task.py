"""One linear layer on its way through the steps, what it is asked to become, and what enters it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.kernels.correction import Correction
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight, PackedWeight, stacked_rows


@dataclass(frozen=True)
class LayerPlan:
    """What one linear layer is asked to become."""

    sparsity: float = 0.0  # share of weights to prune
    pattern: tuple[int, int] | None = None  # (n, m): n kept of every m inputs
    block: tuple[int, int] | None = None  # (outputs, inputs): blocks of that many go or stay whole
    compare: str | None = None  # unstructured scores compete within an output "row" or the "layer"; None: as published
    wbits: int = 16  # 16: not quantized
    group_size: int = 128  # inputs that share a scale; -1: all of them
    symmetric: bool = True
    abits: int = 16  # of what enters the layer; 16: not quantized

    @property
    def changes(self) -> bool:
        """Whether anything is asked for that changes the weights."""
        return self.wbits < 16 or self.sparsity > 0

    @property
    def compares_rows(self) -> bool:
        """Whether a mask is asked for in which outputs may depend on one another: n:m alone is each output's own."""
        return self.sparsity > 0 and self.pattern is None

    def group_of(self, in_features: int) -> int:
        """How many inputs of a layer share a scale: a layer with fewer than `group_size` is one group."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)


@dataclass(frozen=True)
class LayerTask:
    """One linear layer on its way through the steps. A step returns a new one; it never changes a tensor in place."""

    name: str
    weight: Tensor  # [out, in] float32, as the last step left it
    original: Tensor  # [out, in] float32, what the layer is to do: as it came, or made up for drift and folded
    stats: LayerStats
    plan: LayerPlan
    dtype: torch.dtype = torch.bfloat16  # what the model computes in, and the checkpoint stores scales in
    keep: Tensor | None = None  # [out, in] bool, False where pruned; None: nothing is
    packed: PackedWeight | None = None
    correction: Correction | None = None  # what `weight` is beside `packed`
    adapter_bits: int = 16  # of each number of a correction's factors in the checkpoint; 16: of the model's dtype
    notes: tuple[str, ...] = ()  # what went otherwise than asked, and why; they go to the journal

    @property
    def group_size(self) -> int:
        """The number of inputs that share a scale, with "per channel" resolved."""
        return self.plan.group_of(self.weight.shape[1])

    def pruned(self, weight: Tensor, keep: Tensor) -> "LayerTask":
        """The task with new weights, zero where `keep` is False."""
        return replace(self, weight=weight.masked_fill(~keep, 0.0), keep=keep)

    def quantized(self, packed: PackedWeight) -> "LayerTask":
        """The task with packed weights, and `weight` what they decode to. What is pruned 2:4 is packed without its zeros."""
        if isinstance(packed, IntWeight) and self.keep is not None and self.plan.pattern == (2, 4):
            packed = Sparse24IntWeight.from_int(packed, self.keep)
        return replace(self, packed=packed, correction=None, weight=packed.dequantize())

    def corrected(self, correction: Correction) -> "LayerTask":
        """The packed task with something added to its weight, rounded as the checkpoint will keep it."""
        assert self.packed is not None  # a quantizer ran
        kept = correction.rounded(self.dtype, self.adapter_bits)
        return replace(self, correction=kept, weight=self.packed.dequantize().add_(kept.delta()))

    def noted(self, note: str) -> "LayerTask":
        """The task with one more line for the journal."""
        return replace(self, notes=(*self.notes, note))

    def rows(self, which: slice) -> "LayerTask":
        """Some of the layer's outputs, as a layer of their own, before it is packed; without notes, which stay with the layer."""
        keep = None if self.keep is None else self.keep[which]
        return replace(self, weight=self.weight[which], original=self.original[which], keep=keep, notes=())


def stacked(tasks: Sequence[LayerTask]) -> LayerTask:
    """Layers of one plan that read one input, as one layer with all their outputs, before they are packed."""
    if len(tasks) == 1:
        return tasks[0]
    weight, original = (torch.cat([getattr(task, name) for task in tasks]) for name in ("weight", "original"))
    keeps = [task.keep for task in tasks if task.keep is not None]
    return replace(tasks[0], weight=weight, original=original, keep=torch.cat(keeps) if keeps else None)


def split(pieces: Iterable[LayerTask], tasks: Sequence[LayerTask]) -> list[LayerTask]:
    """The inverse: what became of `tasks`, from packed `pieces` whose rows are theirs in order; they are taken one by one."""
    parts, keeps, notes = list[PackedWeight](), list[Tensor](), dict[str, None]()
    for piece in pieces:
        assert piece.packed is not None  # a quantizer ran
        parts.append(piece.packed)
        keeps += [] if piece.keep is None else [piece.keep]
        notes |= dict.fromkeys(piece.notes)
    packed, keep = stacked_rows(parts), torch.cat(keeps) if keeps else None
    done, start = [], 0
    for task in tasks:
        which = slice(start, start + len(task.weight))
        own = replace(task, keep=None if keep is None else keep[which], notes=(*task.notes, *notes))
        done.append(own.quantized(packed.rows(which)))
        start = which.stop
    return done


@dataclass(frozen=True)
class InputTask:
    """What enters some linear layers, on its way to codes.

    The layers go on to see (x - shift) / scale. Scales are folded in the norm that emits x and in the columns of the
    weights, and so is the shift, in biases, where `shiftable`; elsewhere the layers subtract it themselves.
    """

    stats: LayerStats  # of x
    weights: tuple[Tensor, ...]  # [out, in] in the model's dtype, of every layer that reads it
    abits: int
    foldable: bool  # a norm emits it, and nothing but these layers reads it
    shiftable: bool  # foldable, and the norm and all these layers have biases
    scale: Tensor | None = None  # [in] float32, positive; None: as it comes. Only of a foldable input
    shift: Tensor | None = None  # [in] float32, in units of x; only of an input that becomes static
    static: bool = False  # the code is the nearest whole number; otherwise each token has a scale of its own

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.abits - 1) - 1

    def scaled(self, scale: Tensor, shift: Tensor | None = None, static: bool = False) -> "InputTask":
        """The task with what its layers go on to see, and how that becomes codes."""
        return replace(self, scale=scale, shift=shift, static=static)
