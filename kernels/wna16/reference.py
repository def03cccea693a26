"""What a product with integer weights has to compute, in plain torch.

With weights s_g (c - z_g) in groups g of inputs,

    y = sum_g s_g (sum_k x_k (c_k - z_g)) + (x Aᵀ) Bᵀ + bias:

c - z is a whole number that half precision holds exactly, so a kernel that scales sums of float32 rounds less than one
that rounds decoded weights.
"""

from torch import Tensor

from compress.kernels.gemm.launch import Epilogue
from compress.kernels.weights import IntWeight


def matmul(x: Tensor, weight: IntWeight, epilogue: Epilogue = Epilogue()) -> Tensor:
    """Outputs float64 [..., out] of x [..., in], any float dtype."""
    groups = (-1, weight.group_size)
    zero_point = 2 ** (weight.bits - 1) if weight.zero_point is None else weight.zero_point.double().unsqueeze(-1)
    centred = weight.codes().double().unflatten(1, groups) - zero_point  # [out, groups, group_size]
    sums = (x.double().unflatten(-1, groups).unsqueeze(-2) @ centred.permute(1, 2, 0)).squeeze(-2)  # [..., groups, out]
    y = (sums * weight.scale.double().T).sum(-2)
    if epilogue.a is not None and epilogue.b is not None:
        y += x.double() @ epilogue.a.double().T @ epilogue.b.double().T
    return y if epilogue.bias is None else y + epilogue.bias.double()
