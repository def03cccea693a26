"""Linear layers whose weight is made when it is needed, in forward and once more in backward.

INT2.1's memory-efficient fine-tuning (EMEF, arXiv:2306.08162): neither the dense weight nor, unless something in the
weight itself learns, the input is kept for backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from compress.kernels.correction import Correction
from compress.kernels.weights import PackedWeight

MakeWeight = Callable[..., Tensor]  # parameters to a weight [out, in]


def _made(make: MakeWeight, parameters: Sequence[Tensor], device: torch.device) -> Tensor:
    """The weight in the precision that `make` asks for: under autocast its products would be rounded, and be others in backward."""
    with torch.autocast(device.type, enabled=False):
        return make(*parameters)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: MakeWeight, *parameters: Tensor) -> Tensor:
        learns = any(parameter.requires_grad for parameter in parameters)
        ctx.make, ctx.learns = make, learns
        ctx.save_for_backward(*((x, *parameters) if learns else parameters))
        return nn.functional.linear(x, _made(make, parameters, x.device).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        saved = ctx.saved_tensors
        if not ctx.learns:
            return grad @ _made(ctx.make, saved, grad.device).to(grad.dtype), None, *(None for _ in saved)
        x, parameters = (
            saved[0],
            [parameter.detach().requires_grad_(parameter.requires_grad) for parameter in saved[1:]],
        )
        with torch.enable_grad():
            weight = _made(ctx.make, parameters, grad.device)
        into_x = grad @ weight.detach().to(grad.dtype) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad.dtype)
        into_weight = rows[0].T @ rows[1]  # [out, in], gone once the parameters have theirs
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        found = iter(torch.autograd.grad(weight, learning, into_weight.to(weight.dtype)))
        return into_x, None, *(next(found) if parameter.requires_grad else None for parameter in parameters)


def recomputed_linear(x: Tensor, make: MakeWeight, *parameters: Tensor) -> Tensor:
    """x Wᵀ with W = make(*parameters), differentiable in `x` and in the parameters that require it.

    `x`: [..., in]; `make` returns [out, in] of any float dtype and is called again in backward: it must give the same.
    Saved for backward: the parameters, and `x` only if one of them learns. Returns [..., out] in the dtype of `x`.
    """
    result: Tensor = _Recomputed.apply(x, make, *parameters)
    return result


class PackedLinear(nn.Linear):
    """A linear layer over a packed weight, which is decoded each time it is used and never kept.

    It is an `nn.Linear` with integers for a `weight`, which is how PEFT knows it as a layer to attach adapters to.
    `correction`: what is added to the weight; it does not learn either.
    """

    correction: Correction | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.dtype, self.correction = dtype, None
        self._kind, self._description = type(packed), packed.description()
        tensors = packed.tensors()
        first, *others = tensors
        self._held = {first: "weight", **{name: name for name in others}}
        self.weight = nn.Parameter(tensors[first], requires_grad=False)
        for name in others:
            self.register_buffer(name, tensors[name])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def packed(self) -> PackedWeight:
        """The weight in its memory layout. Where ranks have a share of it each, all of them have to ask."""
        tensors = {name: _whole(getattr(self, held)) for name, held in self._held.items()}
        return self._kind.from_tensors(tensors, self._description)

    def as_parameters(self) -> list[nn.Parameter]:
        """All that the packed weight is made of, as frozen parameters, which is what `fully_shard` shares out."""
        for name in self._held.values():
            if name in self._buffers:
                tensor = self.get_buffer(name)
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return [self.get_parameter(name) for name in self._held.values()]

    def values(self) -> Tensor:
        """The weight and what is added to it, float32 [out, in]."""
        weight = self.packed.dequantize()
        return weight if self.correction is None else weight + self.correction.delta().to(weight.device)

    def dequantize(self) -> Tensor:
        """[out, in] in the model's dtype."""
        return self.values().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """What `.to` and its kin do, but for dtypes: a scale in another dtype would be another scale."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        out = recomputed_linear(x, self.dequantize)
        return out if self.bias is None else out + self.bias


def _whole(tensor: Tensor) -> Tensor:
    """A tensor's values, fetched from the other ranks where each has a share (torch's `fully_shard`)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.data
