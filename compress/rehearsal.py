"""How long a recipe's steps take for a layer, from how long they take for a small one on this machine.

A small layer has as many outputs as are solved together, and few inputs. What it takes grows with the number of weights;
what grows faster, products with [in, in] matrices, is counted in operations and taken off first.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress.calib.stats import LayerStats
from compress.plan import PlannedLayer
from compress.solve import WEIGHTS_AT_ONCE, run_step
from compress.steps import Step
from compress.task import LayerPlan, LayerTask

INPUTS = 512  # of a small layer, about
FACTOR = 1.3  # times in³: operations of an inverse factor of a Hessian, as many as large products would do meanwhile
THIN = 0.35  # of the speed of large products, what thin ones reach: those with a panel of a matrix, or a few columns
TOKENS = 64  # that it has seen

MEMORY = 1e-8  # seconds that a weight of a large layer takes longer, as it comes through memory

Seconds = dict[str, float]  # by method


@dataclass
class Rehearsal:
    """The steps of a recipe, gone over for small layers; each kind of layer once."""

    steps: Sequence[Step]  # of layers
    dtype: torch.dtype
    flops: float  # of this machine, a second, in products of float32
    device: str = "cpu"
    _known: dict[tuple[object, ...], Seconds] = field(default_factory=dict)  # for a weight

    def seconds(self, layer: PlannedLayer) -> Seconds:
        """What each step takes for a layer; nothing of one that its plan does not ask for."""
        out_features, in_features = layer.shape
        plan, shape = layer.plan, _small(layer)
        kind = (shape, plan.sparsity > 0, plan.pattern, plan.block, plan.wbits, plan.group_size)
        if not self._known:
            self._go_over(plan, shape)  # what is done for the first time takes longer
        if kind not in self._known:
            self._known[kind] = self._go_over(plan, shape)
        counted = {step.name: flops_of(step, out_features, in_features) for step in self.steps if step.applies(plan)}
        return {
            name: (self._known[kind][name] + MEMORY) * layer.n_weights + flops / (THIN * self.flops)
            for name, flops in counted.items()
        }

    def _go_over(self, plan: LayerPlan, shape: tuple[int, int]) -> Seconds:
        """Seconds for each weight beyond what is counted in operations."""
        task, found = _task(plan, shape, self.dtype, self.device), {}
        for step in self.steps:
            if step.applies(plan):
                started = time.monotonic()
                (task,) = run_step(step, [task])
                counted = (flops_of(step, *shape) + factor_flops(step, shape[1])) / (THIN * self.flops)
                found[step.name] = max(0.0, time.monotonic() - started - counted) / math.prod(shape)
                task = replace(task, notes=())
        return found


def flops_of(step: Step, out_features: int, in_features: int) -> float:
    """Operations of one layer that grow faster than its weights: a sweep's products, and what the method says itself."""
    swept = out_features * in_features**2 if "hessian" in step.needs else 0
    return swept + step.flops(out_features, in_features)


def factor_flops(step: Step, in_features: int) -> float:
    """Operations of an inverse factor of the Hessian (calib/stats.py), if the step reads Hessians."""
    return FACTOR * in_features**3 if "hessian" in step.needs else 0.0


def _small(layer: PlannedLayer) -> tuple[int, int]:
    """Outputs and inputs of a layer of this kind to go over."""
    (out_features, in_features), plan = layer.shape, layer.plan
    high, wide = plan.block or (1, plan.pattern[1] if plan.pattern else 1)
    unit = math.lcm(wide, 1 if plan.group_size == -1 else plan.group_of(in_features))
    rows = min(out_features, max(1, WEIGHTS_AT_ONCE // in_features))
    return -(-rows // high) * high, min(in_features, -(-INPUTS // unit) * unit)


def _task(plan: LayerPlan, shape: tuple[int, int], dtype: torch.dtype, device: str) -> LayerTask:
    """A layer of random weights that has seen random inputs, with all statistics there are."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    weight, x = normal(*shape), normal(TOKENS, shape[1])
    low, high = x.aminmax(dim=0)
    stats = LayerStats(
        TOKENS, x.sum(0), x.square().sum(0), low, high, x.T @ x, sample=x, grad_sq=normal(*shape).square(),
        grad_abs=normal(*shape).abs(),
    )  # fmt: skip
    return LayerTask("a layer to go over", weight, weight, stats, plan, dtype)
