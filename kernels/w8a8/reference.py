"""What a kernel for quantized inputs has to compute, in plain torch: whole numbers inside, scales at the end.

With inputs q (int8), weights s_g (c - z_g) in groups g, and a scale t of each token (1 if static),

    y = t * sum_g s_g (sum_j q_j c_j - z_g sum_j q_j) + W shift + bias,

where both sums over the inputs of a group are of integers and stay within int32.
"""

import torch
from torch import Tensor

from compress.kernels.inputs import InputQuantizer
from compress.kernels.weights import IntWeight


def integer_linear(x: Tensor, inputs: InputQuantizer, weight: IntWeight, bias: Tensor | None = None) -> Tensor:
    """Outputs float64 [tokens, out] of inputs [tokens, in], by the integer path: int32 sums, then the scales."""
    codes = inputs.codes(x).to(torch.int32).unflatten(1, (-1, weight.group_size)).transpose(0, 1)  # [groups, tokens, n]
    weights = weight.codes().to(torch.int32).unflatten(1, (-1, weight.group_size)).permute(1, 2, 0)  # [groups, n, out]
    zero_point = (
        torch.full_like(weight.scale, 2 ** (weight.bits - 1)) if weight.zero_point is None else weight.zero_point
    )
    sums = codes.sum(-1, dtype=torch.int32).unsqueeze(-1)  # [groups, tokens, 1]
    products = codes @ weights - sums * zero_point.to(torch.int32).T.unsqueeze(1)  # [groups, tokens, out]
    outputs = (products.double() * weight.scale.double().T.unsqueeze(1)).sum(0)
    scale = inputs.token_scale(x)
    return _shifted(outputs if scale is None else outputs * scale.double(), inputs, weight, bias)


def fake_linear(x: Tensor, inputs: InputQuantizer, weight: IntWeight, bias: Tensor | None = None) -> Tensor:
    """The same from decoded inputs and decoded weights, in float64, where no product or sum of them is rounded."""
    codes, scale = inputs.codes(x).double(), inputs.token_scale(x)
    outputs = (codes if scale is None else codes * scale.double()) @ weight.dequantize().double().T
    return _shifted(outputs, inputs, weight, bias)


def _shifted(outputs: Tensor, inputs: InputQuantizer, weight: IntWeight, bias: Tensor | None) -> Tensor:
    """What does not depend on the input."""
    if inputs.shift is not None:
        outputs = outputs + weight.dequantize().double() @ inputs.shift.double()
    return outputs if bias is None else outputs + bias.double()
