"""PV: scales and codebooks learn, and a few codes change with each step of them.

PV-Tuning (Malinovskii et al., PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression,
arXiv:2405.14852). The P step is Adam's on scales and codebooks, with the exact gradient. The V step takes the same
gradient of the weight as it stands, and moves codes to the nearest of a reference that follows it, a float32 buffer that
starts as the weight: but only a few, and only so far that the weight changes by a small share of its norm. That sets it
apart from straight-through estimation, which is `max_code_change=1 trust_ratio=0 order=distance`. `delta_decay=1` does
without a buffer (published with `max_code_change=1e-3`): the reference is the weight after one step, and codes change to
the next one. Published code picks the places that are farthest from the reference (`order=distance`); here those first
whose change the gradient says lowers the loss most, and none that it says raises it.

For grids of integers no code was published. A code is a place of its own here. With a trust ratio none moves by more
than one, and the buffer of what could not change waits half a step off: going on, it would take as long to come back
once the gradient turns, and the loss drifts up. Rates are relative (LAMB): a learning rate is the share of its size by
which something moves in a step, so that the first codes of a 2-bit grid change after some 0.6 / code_lr steps.

Norms, embeddings and head do not learn. Takes layers quantized to a grid or codebooks, and keeps what is pruned at zero.
Needs about 13 bytes a quantized weight beside the model's activations (the weight and its gradient in the model's dtype,
the buffer, the mean of squared gradients, codes), and 9 for the best state.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import InputError
from compress.recover.codes import Limits, taken_apart
from compress.recovery import Learner, ParameterGroup, Recovered, Student, StudentLayer, TrainOptions

NEEDS: frozenset[str] = frozenset()
PACKED_ONLY = True  # there is nothing to do where no layer is quantized
EPSILON = 1e-16  # added to the root of mean squared gradients, which may be as small as 1e-10


class Options(TrainOptions):
    """Options of PV-Tuning, as published but for the amount of text."""

    lr: float = Field(3e-4, gt=0, description="highest learning rate of scales and codebooks, relative to their size")
    code_lr: float = Field(3e-3, gt=0, description="the same of what codes follow; it rises and falls with `lr`")
    code_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean squared gradient of what codes follow")
    delta_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the way back to the weight that the buffer goes after a step; 1: no buffer",
    )
    max_code_change: float = Field(
        0.01, gt=0, le=1, description="largest share of a layer's codes that change in a step"
    )
    trust_ratio: float = Field(
        0.01, ge=0, description="longest change of a weight by its codes in a step, as a share of its norm; 0: no bound"
    )
    order: Literal["gain", "distance"] = Field(
        "gain",
        description="which codes change first: by what the loss gains to first order, or by distance, as published",
    )

    @property
    def limits(self) -> Limits:
        """How far codes may move in a step."""
        return Limits(self.max_code_change, self.trust_ratio, force=self.delta_decay == 1)


def recover_model(student: Student, options: Options) -> Learner:
    """Put a weight that has a gradient in the place of every quantized layer. Raises InputError if there is none."""
    layers = {name: Tuned(layer, options) for name, layer in student.layers.items() if layer.quantized}
    if not layers:
        raise InputError("pv changes codes, and no layer of this recipe is quantized: add --wbits")
    return PVLearner(layers, options)


class Tuned:
    """One layer while it is tuned. What stands in the model is at every time what its codes decode to, rounded to its dtype."""

    def __init__(self, layer: StudentLayer, options: Options):
        packed = layer.packed
        assert packed is not None
        self.codes, self.correction, self.options = taken_apart(packed, layer.keep), layer.correction, options
        values = self.codes.values().detach()
        self.live = nn.Parameter(values.to(layer.dtype))
        self.refresh()
        self.buffer = None if options.delta_decay == 1 else values.clone()
        self.mean_square = torch.zeros_like(values)
        self.steps = torch.zeros((), dtype=torch.int64)
        layer.put(_linear(self.live, layer.module.bias))

    def complete_gradients(self) -> None:
        """Give the parameters the gradients that follow from the weight's."""
        if self.live.grad is not None:
            for name, gradient in self.codes.gradients(self.live.grad).items():
                self.codes.parameters[name].grad = gradient

    @torch.no_grad()
    def update(self, code_lr: float) -> float:
        """The V step, after the P step. Returns the share of codes that changed; none if the layer was not used."""
        changed = 0.0
        if self.live.grad is not None:
            reference = self.codes.values() if self.buffer is None else self.buffer
            reference -= self._step(reference, self.live.grad.float(), code_lr)
            gradient = self.live.grad.float() if self.options.order == "gain" else None
            changed = self.codes.approach(reference, self.options.limits, gradient)
            self.live.grad = None
            if self.buffer is not None:
                self._settle(self.buffer)
        self.refresh()
        return changed

    def _step(self, reference: Tensor, gradient: Tensor, lr: float) -> Tensor:
        """What Adam without momentum would go down, as long as `lr` times the reference [out, in]."""
        if self.codes.keep is not None:
            gradient = gradient.masked_fill(~self.codes.keep, 0.0)
        beta = self.options.code_beta2
        self.steps += 1
        self.mean_square.lerp_(gradient.square(), 1 - beta)
        step = gradient / (self.mean_square / (1 - beta ** int(self.steps))).sqrt_().add_(EPSILON)
        return step.mul_(lr * reference.norm() / step.norm().clamp(min=EPSILON))

    def _settle(self, buffer: Tensor) -> None:
        """Bring the buffer nearer to the weight, as the options say."""
        if self.options.trust_ratio:
            buffer.copy_(self.codes.confined(buffer))
        if self.options.delta_decay:
            buffer.lerp_(self.codes.values(), self.options.delta_decay)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weight in the model what its codes decode to, and what an earlier method adds to that."""
        weight = self.codes.values()
        self.live.copy_(weight if self.correction is None else weight + self.correction.delta().to(weight.device))

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on; the weight in the model follows from it."""
        parts = {name: parameter.data for name, parameter in self.codes.parameters.items()}
        parts |= {"codes": self.codes.codes, "mean_square": self.mean_square, "steps": self.steps}
        return parts if self.buffer is None else parts | {"buffer": self.buffer}


class PVLearner(Learner):
    """P steps by the trainer's Adam, and V steps after them."""

    def __init__(self, layers: dict[str, Tuned], options: Options):
        self.layers, self.options = layers, options

    def groups(self) -> list[ParameterGroup]:
        """Scales and codebooks."""
        return [ParameterGroup([p for layer in self.layers.values() for p in layer.codes.parameters.values()])]

    def complete_gradients(self) -> None:
        """Those of scales and codebooks follow from the weights'."""
        for layer in self.layers.values():
            layer.complete_gradients()

    def update(self, progress: float, lr: float) -> Mapping[str, float]:
        """Change codes. Returns the mean share of a layer's codes that changed."""
        code_lr = self.options.code_lr * lr / self.options.lr
        shares = [layer.update(code_lr) for layer in self.layers.values()]
        return {"changed": sum(shares) / len(shares)}

    def tensors(self) -> dict[str, Tensor]:
        """Codes, parameters and buffers of all layers."""
        return {f"{name}.{part}": t for name, layer in self.layers.items() for part, t in layer.tensors().items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `tensors` gave."""
        super().load(tensors)
        for layer in self.layers.values():
            layer.refresh()

    def results(self) -> dict[str, Recovered]:
        """Every quantized layer, packed in the layout it had."""
        return {
            name: Recovered(layer.codes.packed(), correction=layer.correction) for name, layer in self.layers.items()
        }


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer around what there is."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear
