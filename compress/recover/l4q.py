"""L4Q: learn a low-rank update of the dense weights and the step sizes of their grids, with the sum quantized in every step.

Jeon et al., L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models, arXiv:2402.04902: the weight is
s round(clamp((W + alpha / rank B A) / s)), and the gradient passes the rounding as in LSQ (Esser et al., arXiv:1902.08153,
eqs. 3 and 5). The layer ends as packed as it began: no adapter is left, and pruned weights stay zero.

What differs from the paper: zero points stay whole numbers and as they are, since that is what formats hold. W does not
start from the dense weight, which at 2 bits would undo what a quantizer such as gptq gained, but from the dense weight moved
into the cell of the code it was given, `margin` away from borders. So B = 0 is exactly the packed model, and W lies near a
border where the dense weight wanted another code. W is kept in steps, as fixed-point numbers of 16 bits, which hold it apart from borders as
bfloat16 does not. Step sizes learn as shares of where they began, so that one learning rate fits all, and are used as they
will be stored.

Needs integer weights; layers in codebooks stay as they are. Beside the activations of a block and LoRA's parameters it
holds 2 bytes a weight, and 1 more for the mask of a pruned model. A step costs that of LoRA and a product of every layer's
inputs with the gradient of its outputs.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import InputError
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import Grid, IntWeight
from compress.recover.learned import LayersLearner, LearnedLinear, stored_scale, straight_through
from compress.recovery import Learner, ParameterGroup, Recovered, Student, StudentLayer, TrainOptions

NEEDS: frozenset[str] = frozenset()
PACKED_ONLY = True  # there is nothing to do where no layer is quantized
SEED = 0


class Options(TrainOptions):
    """The low-rank update, where it starts, and how it trains."""

    lr: float = Field(1e-3, gt=0, description="highest learning rate")
    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="the update is alpha / rank times B A")
    start: Literal["cell", "dense"] = Field(
        "cell", description="cell: dense weights moved into the cells of their codes; dense: as they are, as published"
    )
    margin: float = Field(0.1, ge=0, le=0.5, description="how far from a cell's borders a weight starts, in steps")
    freeze: float = Field(0.1, ge=0, lt=1, description="share of the steps before which step sizes stay")


def recover_model(student: Student, options: Options) -> Learner:
    """Put layers that learn in place of all that are packed as integers.

    Raises InputError if there is none, or one has a correction: it would be left beside codes that no longer need it.
    """
    packed = [each for each in student.layers.values() if isinstance(each.packed, IntWeight | Sparse24IntWeight)]
    if not packed:
        raise InputError(
            "l4q has no layer of integer codes to learn: quantize with --wbits by rtn or gptq, or use grid"
        )
    for layer in packed:
        if layer.correction is not None:
            raise InputError(
                f"l4q leaves no adapter, and {layer.name} has one: name l4q before the method that made it"
            )
    generator = torch.Generator().manual_seed(SEED)
    layers = {}
    for layer in packed:
        layers[layer.name] = MergedLinear(layer, options, generator)
        layer.put(layers[layer.name])
    factors = [factor for layer in layers.values() for factor in (layer.a, layer.b)]
    steps = [layer.step for layer in layers.values()]
    return LayersLearner(layers, [ParameterGroup(factors), ParameterGroup(steps, begins=options.freeze)])


def nearest_levels(weight: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """The whole numbers of steps nearest to weights [out, groups, group_size], within the grid.

    `scale`: [out, groups]; `lowest`, `highest`: [out, groups], the ends of the grid in steps. Times the scale, their
    gradients are LSQ's: into the weight 1 inside the grid and 0 outside, into the scale round(w / s) - w / s inside and
    the end outside.
    """
    inside = (weight / scale.unsqueeze(-1)).clamp(lowest.unsqueeze(-1), highest.unsqueeze(-1))
    return straight_through(inside.round(), inside)


def in_cells(dense: Tensor, levels: Tensor, ends: tuple[Tensor, Tensor], margin: float, one: int) -> Tensor:
    """Weights moved into the cells of their codes: int16, `one` a step.

    `dense`: [out, groups, group_size] float32, in steps; `levels`: of the codes, whole numbers of steps; `ends`: the
    grid's first and last level, [out, groups] each, whose cells are open to the outside. `margin`: how far from a
    border they come at least, in steps; never onto it.
    """
    middle, half = levels * one, min(int((0.5 - margin) * one), one // 2 - 1)
    held = torch.iinfo(torch.int16)
    lowest, highest = (end.unsqueeze(-1) for end in ends)
    least = torch.where(levels == lowest, held.min, middle - half)
    most = torch.where(levels == highest, held.max, middle + half)
    return (dense * one).round().clamp(least, most).to(torch.int16)


class MergedLinear(LearnedLinear):
    """A layer over the quantized sum of a frozen weight and a low-rank update."""

    def __init__(self, layer: StudentLayer, options: Options, generator: torch.Generator):
        super().__init__(layer)
        held = layer.packed
        assert isinstance(held, IntWeight | Sparse24IntWeight)
        packed = held.to_int()
        self._kind, self._bits, self._symmetric = type(held), packed.bits, packed.symmetric
        self._ratio = options.alpha / options.rank
        self._one = 2 ** (14 - packed.bits)  # 16 bits then reach twice as far as the grid, to either side
        self._slope = 1 / math.sqrt(packed.group_size * (2 ** (packed.bits - packed.symmetric) - 1))
        self.scale: Tensor
        self.zero_point: Tensor
        self.base: Tensor
        self.keep: Tensor | None
        middle = torch.full_like(packed.scale, 2 ** (packed.bits - 1))
        zero_point = middle if packed.zero_point is None else packed.zero_point
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero_point", zero_point.float())
        self.register_buffer("base", self._start(layer.dense(), packed, options))
        self.register_buffer("keep", layer.kept)
        device = packed.scale.device
        a = torch.empty(options.rank, packed.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(packed.out_features, options.rank, device=device))
        self.step = nn.Parameter(torch.zeros_like(packed.scale, dtype=torch.float32))

    def _start(self, dense: Tensor, packed: IntWeight, options: Options) -> Tensor:
        """W [out, groups, group_size] in steps, int16."""
        steps = dense.to(packed.scale.device).unflatten(1, (-1, packed.group_size)) / packed.scale.float().unsqueeze(-1)
        if options.start == "dense":
            ends = torch.iinfo(torch.int16)
            return (steps * self._one).round().clamp(ends.min, ends.max).to(torch.int16)
        levels = packed.codes().float().unflatten(1, (-1, packed.group_size)) - self.zero_point.unsqueeze(-1)
        return in_cells(steps, levels, self._ends(), options.margin, self._one)

    def _ends(self) -> tuple[Tensor, Tensor]:
        return -self.zero_point, 2**self._bits - 1 - self.zero_point

    def learning(self) -> dict[str, nn.Parameter]:
        """The update's factors, and how far step sizes have moved as a share of where they began."""
        return {"a": self.a, "b": self.b, "step": self.step}

    def weight_of(self, *learning: Tensor) -> Tensor:
        """The quantized weight [out, in] float32."""
        a, b, step = learning
        scale = self._scale(step)
        weight = (self._levels(a, b, scale) * scale.unsqueeze(-1)).flatten(1)
        return weight if self.keep is None else weight * self.keep

    def _scale(self, step: Tensor) -> Tensor:
        """The step sizes [out, groups] float32, as they are stored."""
        start = self.scale.float()
        return stored_scale(start + start * step, self.scale.dtype, self._slope)

    def _levels(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Codes less zero points, [out, groups, group_size] float32."""
        frozen = self.base * (self.scale.float() / self._one).unsqueeze(-1)
        merged = torch.addmm(frozen.flatten(1), self._ratio * b, a)
        return nearest_levels(merged.view_as(frozen), scale, *self._ends())

    def recovered(self) -> Recovered:
        """The packed weight, in the layout it came in."""
        scale = self._scale(self.step)
        levels = self._levels(self.a, self.b, scale)
        if self.keep is not None:
            levels = levels * self.keep.view_as(levels)
        codes = (levels + self.zero_point.unsqueeze(-1)).flatten(1)
        grid = Grid(scale, self.zero_point, self._bits)
        packed = IntWeight.from_codes(codes, grid, levels.shape[2], self._symmetric, self.scale.dtype)
        if self._kind is Sparse24IntWeight and self.keep is not None:
            return Recovered(Sparse24IntWeight.from_int(packed, self.keep))
        return Recovered(packed)
