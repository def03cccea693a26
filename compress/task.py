"""One linear layer on its way through the steps, and what it is asked to become."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.kernels.weights import IntWeight


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

    def group_of(self, in_features: int) -> int:
        """How many inputs of a layer share a scale: a layer with fewer than `group_size` is one group."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)


@dataclass(frozen=True)
class LayerTask:
    """One linear layer on its way through the steps. A step returns a new one; it never changes a tensor in place."""

    name: str
    weight: Tensor  # [out, in] float32, as the last step left it
    original: Tensor  # [out, in] float32, as it came
    stats: LayerStats
    plan: LayerPlan
    dtype: torch.dtype = torch.bfloat16  # what the model computes in, and the checkpoint stores scales in
    keep: Tensor | None = None  # [out, in] bool, False where pruned; None: nothing is
    packed: IntWeight | None = None
    notes: tuple[str, ...] = ()  # what went otherwise than asked, and why; they go to the journal

    @property
    def group_size(self) -> int:
        """The number of inputs that share a scale, with "per channel" resolved."""
        return self.plan.group_of(self.weight.shape[1])

    def pruned(self, weight: Tensor, keep: Tensor) -> "LayerTask":
        """The task with new weights, zero where `keep` is False."""
        return replace(self, weight=weight.masked_fill(~keep, 0.0), keep=keep)

    def quantized(self, packed: IntWeight) -> "LayerTask":
        """The task with packed weights, and `weight` what they decode to."""
        return replace(self, packed=packed, weight=packed.dequantize())

    def noted(self, note: str) -> "LayerTask":
        """The task with one more line for the journal."""
        return replace(self, notes=(*self.notes, note))
