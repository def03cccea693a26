"""Students of a few random layers, to try methods of recovery on."""

from collections.abc import Callable
from dataclasses import replace

import torch
from tasks import random_task
from torch import nn

from compress.kernels.linear import PackedLinear
from compress.recovery import Learner, Student, StudentLayer
from compress.task import LayerPlan, LayerTask


class SideBySide(nn.ModuleDict):
    """Layers that all read the same: embeddings of tokens below 50, drawn once."""

    def base_model(self, input_ids: torch.Tensor, use_cache: bool) -> None:
        """Let every layer read tokens [n, seqlen]."""
        first, random = next(iter(self.values())), torch.Generator().manual_seed(3)
        for layer in self.values():
            layer(torch.randn(50, first.in_features, generator=random)[input_ids].to(_dtype(layer)))


def _dtype(layer: nn.Module) -> torch.dtype:
    return layer.dtype if isinstance(layer, PackedLinear) else layer.weight.dtype


def student_of(*tasks: LayerTask, dtype: torch.dtype = torch.float32, bias: bool = False) -> Student:
    """Layers side by side in one module, by their tasks' names; those that are packed as `PackedLinear`."""
    lm, layers = SideBySide(), {}
    for task in tasks:
        out, inputs = task.weight.shape
        b = torch.linspace(-1, 1, out).to(dtype) if bias else None
        if task.packed is None:
            module = nn.Linear(inputs, out, bias=bias, dtype=dtype)
            module.weight.data = task.weight.to(dtype)
        else:
            module = PackedLinear(task.packed, b, dtype)
        lm[task.name] = module.requires_grad_(False)
        put = _putter(lm, task.name)
        dense = task.original.clone
        layers[task.name] = StudentLayer(task.name, lm[task.name], task.keep, None, dtype, dense, put)
    return Student(lm, layers, windows=torch.arange(48).view(2, 24))


def _putter(lm: nn.ModuleDict, name: str) -> Callable[[nn.Module], None]:
    return lambda module: lm.update({name: module})


def inputs_of(task: LayerTask, tokens: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random inputs [tokens, in] with the second moments that calibration saw."""
    values, vectors = torch.linalg.eigh(task.stats.hessian.double() / task.stats.n_tokens)
    x = torch.randn(tokens, len(values), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x * values.clamp(min=0).sqrt() @ vectors.T).to(dtype)


def random_layer(
    plan: LayerPlan, quantize: Callable[[LayerTask], LayerTask], name: str = "layer", **sizes
) -> LayerTask:
    """A layer packed by `quantize`; where the plan prunes, its smallest weights are pruned first."""
    task = replace(random_task(plan, **sizes), name=name)
    if plan.pattern:
        n, m = plan.pattern
        order = task.weight.abs().unflatten(1, (-1, m)).argsort(-1).argsort(-1)
        task = task.pruned(task.weight, (order >= m - n).flatten(1))
    elif plan.sparsity:
        task = task.pruned(task.weight, task.weight.abs() > task.weight.abs().quantile(plan.sparsity))
    return quantize(task)


def train(learner: Learner, loss: Callable[[], torch.Tensor], steps: int, lr: float) -> list[float]:
    """Adam for some steps at one learning rate, each completed as a trainer does; the losses before each, and after."""
    groups = learner.groups()
    optimizer = torch.optim.Adam([{"params": group.parameters, "lr": lr * group.lr} for group in groups])
    losses = []
    for step in range(steps):
        for group, options in zip(groups, optimizer.param_groups, strict=True):
            options["lr"] = lr * group.lr * (step >= group.begins * steps)
        value = loss()
        losses.append(value.item())
        value.backward()
        optimizer.step()
        learner.update(step / steps, lr)
        optimizer.zero_grad()
    return [*losses, loss().item()]
