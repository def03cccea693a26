"""Grid: learn scales and codebooks of packed weights from text, their codes as they are.

The P step of PV-Tuning alone (Malinovskii et al., arXiv:2405.14852, section 3); SketchTune (Zhang et al., arXiv:2410.06364)
trains a table of values for each row in the same way. Nothing is added to the model, its size stays, and a pruned weight
stays zero since its code decodes to zero at any scale. Zero points stay too.

What learns is how far each value has moved, as a share of where it began (of a codebook: of the root mean square of its
values). Adam moves every parameter by about the learning rate a step, so one rate fits scales of all sizes, which differ a
hundredfold between layers. The moves are float32, and the forward sees what would be stored, so that nothing is lost at the end.

Needs packed weights. Costs a step of training with every weight decoded three times. Beside the packed model it holds a
float32 value, its gradient and Adam's two moments for each scale: 1 bit a weight in groups of 128.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import InputError
from compress.recover.learned import LayersLearner, LearnedLinear, stored_scale, straight_through
from compress.recovery import Learner, ParameterGroup, Recovered, Student, StudentLayer, TrainOptions

NEEDS: frozenset[str] = frozenset()
PACKED_ONLY = True  # there is nothing to do where no layer is quantized


class Options(TrainOptions):
    """How it trains."""

    lr: float = Field(3e-3, gt=0, description="highest learning rate: how far a value moves a step, as a share of it")


def recover_model(student: Student, options: Options) -> Learner:
    """Put layers whose scales and codebooks learn in place of all that are packed. Raises InputError if none is."""
    packed = [layer for layer in student.layers.values() if layer.quantized]
    if not packed:
        raise InputError("grid has no packed layer to learn the scales of: quantize with --wbits, or use lora")
    layers = {layer.name: GridLinear(layer) for layer in packed}
    for layer in packed:
        layer.put(layers[layer.name])
    moves = [move for layer in layers.values() for move in layer.learning().values()]
    return LayersLearner(layers, [ParameterGroup(moves)])


class GridLinear(LearnedLinear):
    """A layer over a packed weight of any layout: its floating-point tensors learn, its integers stay."""

    def __init__(self, layer: StudentLayer):
        super().__init__(layer)
        packed = layer.packed
        assert packed is not None
        self._kind, self._description = type(packed), packed.description()
        self._correction = layer.correction
        self._names = []
        self.moves = nn.ParameterDict()
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
            self._names.append(name)
            if tensor.is_floating_point():
                self.moves[name] = nn.Parameter(torch.zeros_like(tensor, dtype=torch.float32))

    def learning(self) -> dict[str, nn.Parameter]:
        """How far each floating-point tensor has moved."""
        return dict(self.moves.items())

    def weight_of(self, *learning: Tensor) -> Tensor:
        """The weight [out, in] float32 for such moves."""
        named = {name: getattr(self, name) for name in self._names}
        moved = {name: self._moved(name, move) for name, move in zip(self.moves, learning, strict=True)}
        weight = self._kind.from_tensors(named | moved, self._description).dequantize()
        return weight if self._correction is None else weight + self._correction.delta()

    def recovered(self) -> Recovered:
        """The packed weight with what it has learned, and the correction it had."""
        named = {name: getattr(self, name) for name in self._names}
        moved = {name: self._moved(name, move).to(named[name].dtype) for name, move in self.moves.items()}
        return Recovered(self._kind.from_tensors(named | moved, self._description), correction=self._correction)

    def _moved(self, name: str, move: Tensor) -> Tensor:
        """A tensor after its move: float32, and what its dtype holds."""
        start: Tensor = getattr(self, name)
        values = start.float()
        if name == "scale":
            return stored_scale(values + values * move, start.dtype)
        size = values.square().mean(dim=tuple(range(1, values.dim())), keepdim=True).sqrt()
        moved = values + size * move
        return straight_through(moved.detach().to(start.dtype).float(), moved)
