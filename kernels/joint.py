"""Layers that read one input, multiplied as one: q, k and v, say, or gate and up."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from compress.kernels.dispatch import Choice
from compress.kernels.inference import CompressedLinear, LayerParts
from compress.kernels.weights import stacked_rows


def joinable(parts: LayerParts, choice: Choice | None = None) -> Hashable | None:
    """What layers of one input must agree in to become one: layout, inputs, and who serves them, if that is chosen.

    None: it stays alone.
    """
    weight, inputs = parts.weight, parts.inputs
    if weight.WHOLE or parts.correction is not None:
        return None
    dtypes = tuple(tensor.dtype for tensor in weight.tensors().values())
    shift = None if inputs is None or inputs.shift is None else tuple(inputs.shift.tolist())
    layout = type(weight), dtypes, tuple(weight.description().items())
    return layout, inputs and (inputs.bits, inputs.static, shift), choice and (choice.few, choice.many)


def joined(parts: Sequence[LayerParts]) -> LayerParts:
    """Layers that agree in `joinable`, with their outputs side by side; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    biases = [torch.zeros(each.weight.shape[0]) if each.bias is None else each.bias for each in parts]
    bias = None if all(each.bias is None for each in parts) else torch.cat([each.float() for each in biases])
    return LayerParts(stacked_rows([each.weight for each in parts]), bias, inputs=parts[0].inputs)


class JointLinear:
    """One layer in the place of several. The first of them that is called multiplies for all.

    It is no module: those take long to set what is held from one call to the next.
    """

    def __init__(self, layer: CompressedLinear, sizes: Sequence[int]):
        """`sizes`: how many outputs each of them has, in the order in which the model calls them."""
        self.layer, self.sizes = layer, list(sizes)
        self._made: tuple[Tensor, int, Sequence[Tensor]] | None = None  # of an input, as it was at that time

    def outputs(self, x: Tensor, index: int) -> Tensor:
        """Those of one of them, [..., sizes[index]], for an input [..., in] that all of them are called with."""
        version = 0 if x.is_inference() else x._version
        made = self._made
        if made is None or made[0] is not x or made[1] != version:
            made = self._made = (x, version, self.layer(x).split_with_sizes(self.sizes, -1))
        if index == len(self.sizes) - 1:
            self._made = None
        return made[2][index].contiguous()


class JointPart(nn.Module):
    """One of the layers that a `JointLinear` stands for."""

    def __init__(self, joint: JointLinear, index: int):
        super().__init__()
        self.joint, self.index = joint, index
        self.layer = joint.layer  # a module of this one's: it goes where the model goes
        self.in_features, self.out_features = joint.layer.in_features, joint.sizes[index]
        self.weight = joint.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`."""
        return self.joint.outputs(x, self.index)
