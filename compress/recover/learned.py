"""What methods share that learn how packed weights are decoded: rounding that lets gradients pass, and layers that learn."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels.linear import recomputed_linear
from compress.kernels.weights import storable
from compress.recovery import Learner, ParameterGroup, Recovered, StudentLayer


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        return None, grad if ctx.slope == 1.0 else grad * ctx.slope, None


def straight_through(value: Tensor, source: Tensor, slope: float = 1.0) -> Tensor:
    """`value`, to the bit, with a gradient that enters `source` of the same shape, times `slope`.

    The straight-through estimator (Bengio et al., arXiv:1308.3432) of a `value` that was made of `source` by rounding.
    """
    result: Tensor = _StraightThrough.apply(value.detach(), source, slope)
    return result


def stored_scale(scale: Tensor, dtype: torch.dtype, slope: float = 1.0) -> Tensor:
    """A positive scale as files of `dtype` hold it, float32, with the gradient of one that is not rounded, times `slope`."""
    return straight_through(storable(scale.detach(), dtype), scale, slope)


class LearnedLinear(nn.Module, ABC):
    """A linear layer over a weight that is decoded each time it is used, of what learns and of what stays."""

    def __init__(self, layer: StudentLayer):
        super().__init__()
        self.bias = layer.module.bias

    @abstractmethod
    def learning(self) -> dict[str, nn.Parameter]:
        """What learns, by name, float32."""

    @abstractmethod
    def weight_of(self, *learning: Tensor) -> Tensor:
        """The weight [out, in] float32, differentiable in `learning`, which is in the order of `learning()`."""

    @abstractmethod
    def recovered(self) -> Recovered:
        """What the layer has become: it decodes to `weight_of(...)`, bit for bit."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        out = recomputed_linear(x, self.weight_of, *self.learning().values())
        return out if self.bias is None else out + self.bias


class LayersLearner(Learner):
    """Layers that learn, and how."""

    def __init__(self, layers: Mapping[str, LearnedLinear], groups: list[ParameterGroup]):
        self.layers, self._groups = layers, groups

    def groups(self) -> list[ParameterGroup]:
        """What Adam updates."""
        return self._groups

    def tensors(self) -> dict[str, Tensor]:
        """What learns in each layer."""
        parts = ((name, layer.learning()) for name, layer in self.layers.items())
        return {f"{name}.{part}": tensor.detach() for name, learning in parts for part, tensor in learning.items()}

    @torch.no_grad()
    def results(self) -> dict[str, Recovered]:
        """What became of each layer."""
        return {name: layer.recovered() for name, layer in self.layers.items()}
