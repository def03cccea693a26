"""What a product with a 2:4 weight has to compute, in plain torch: only the kept weights are multiplied."""

import torch
from torch import Tensor

from compress.kernels.gemm.launch import Epilogue
from compress.kernels.packing import unpack
from compress.kernels.sparse24_weight import KEPT, OF, PLACE_BITS, Sparse24IntWeight


def matmul(x: Tensor, weight: Sparse24IntWeight, epilogue: Epilogue = Epilogue()) -> Tensor:
    """Outputs float64 [..., out] of x [..., in]: y_n = sum over kept j of s (c_j - z) x[4 (j // 2) + place_j]."""
    n_kept = weight.in_features // OF * KEPT
    four = torch.arange(n_kept, device=x.device) // KEPT * OF
    inputs = four + unpack(weight.places, PLACE_BITS, n_kept)  # [out, in / 2]
    group = inputs // weight.group_size
    middle = torch.full_like(weight.scale, 2 ** (weight.bits - 1))
    zero_point = (middle if weight.zero_point is None else weight.zero_point).double().gather(1, group)
    values = (unpack(weight.packed, weight.bits, n_kept) - zero_point) * weight.scale.double().gather(1, group)
    y = torch.stack([x.double()[..., at] @ row for at, row in zip(inputs, values, strict=True)], -1)
    if epilogue.a is not None and epilogue.b is not None:
        y += x.double() @ epilogue.a.double().T @ epilogue.b.double().T
    return y if epilogue.bias is None else y + epilogue.bias.double()
