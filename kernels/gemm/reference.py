"""What any kernel over a packed weight is held to: the product in float64, and what its dtype gives in plain torch."""

import torch
from torch import Tensor

from compress.kernels.gemm.launch import Epilogue
from compress.kernels.weights import PackedWeight


def linear64(x: Tensor, weight: PackedWeight, epilogue: Epilogue = Epilogue()) -> Tensor:
    """float64 [..., out] of x [..., in]: no rounding but that of float64."""
    dense = weight.dequantize().double()
    if epilogue.a is not None and epilogue.b is not None:
        dense += epilogue.b.double() @ epilogue.a.double()
    y = x.double() @ dense.T
    return y if epilogue.bias is None else y + epilogue.bias.double()


def linear_rounded(x: Tensor, weight: PackedWeight, epilogue: Epilogue = Epilogue()) -> Tensor:
    """[..., out] in the dtype of `x`: decode the weight to it, then torch's own products, each summed in float32."""
    y = x.float() @ weight.dequantize().to(x.dtype).float().T
    if epilogue.a is not None and epilogue.b is not None:
        y += (x.float() @ epilogue.a.float().T).to(x.dtype).float() @ epilogue.b.float().T
    return (y if epilogue.bias is None else y + epilogue.bias.float()).to(x.dtype)


def excess_error(y: Tensor, rounded: Tensor, exact: Tensor) -> float:
    """||y - exact|| / ||rounded - exact||: at most 1.25 for a kernel that keeps to its dtype (0 / 0 is 0)."""
    found, allowed = (torch.linalg.vector_norm(t.double() - exact.double()).item() for t in (y, rounded))
    return 0.0 if found == 0 else found / allowed if allowed else float("inf")
