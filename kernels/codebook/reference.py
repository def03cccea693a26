"""What a product with codebook vectors has to compute, in plain torch: each input is met by a vector only once.

For a token with inputs x_g in groups g of d,

    y_r = scale_r * sum_g sum_m T[m, g, code[r, g, m]],    T[m, g, c] = codebooks[m, c] · x_g,

so that outputs look up products instead of decoding weights.
"""

import torch
from torch import Tensor

from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.gemm.launch import Epilogue


def matmul(x: Tensor, weight: CodebookWeight, epilogue: Epilogue = Epilogue()) -> Tensor:
    """Outputs float64 [..., out] of x [..., in]."""
    codes = weight.codes().long().permute(2, 1, 0)  # [n_codebooks, groups, out]
    groups = x.double().unflatten(-1, (-1, weight.vector_size))
    y = torch.zeros(*x.shape[:-1], len(weight.packed), dtype=torch.float64, device=x.device)
    for codebook, chosen in zip(weight.codebooks.double(), codes, strict=True):
        table = groups @ codebook.T  # [..., groups, vectors]
        y += table.gather(-1, chosen.expand(*table.shape[:-1], -1)).sum(-2)
    y *= weight.scale.double().flatten()
    if epilogue.a is not None and epilogue.b is not None:
        y += x.double() @ epilogue.a.double().T @ epilogue.b.double().T
    return y if epilogue.bias is None else y + epilogue.bias.double()
