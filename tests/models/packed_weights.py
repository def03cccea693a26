"""Packed weights of random codes, tiny, one function a layout."""

import torch

from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.packing import pack
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight


def int_weight(shape, bits, group_size, symmetric=True, dtype=torch.float16, seed=0) -> IntWeight:
    random = torch.Generator().manual_seed(seed)
    groups = (shape[0], shape[1] // group_size)
    codes = torch.randint(0, 2**bits, shape, generator=random)
    scale = (torch.rand(groups, generator=random) * 0.1 + 0.01).to(dtype)
    zero_point = torch.randint(0, 2**bits, groups, generator=random).to(torch.uint8)
    return IntWeight(pack(codes, bits), scale, None if symmetric else zero_point, bits, group_size, shape[1])


def sparse_weight(shape, bits, group_size, symmetric=True, dtype=torch.float16, seed=0) -> Sparse24IntWeight:
    dense = int_weight(shape, bits, group_size, symmetric, dtype, seed)
    random = torch.Generator().manual_seed(seed)
    keep = (torch.rand(shape[0], shape[1] // 4, 4, generator=random).argsort(-1) < 2).flatten(1)
    codes = dense.codes()
    zeros = torch.full_like(codes, 2 ** (bits - 1))
    if dense.zero_point is not None:
        zeros = dense.zero_point.repeat_interleave(group_size, dim=1)
    packed = pack(torch.where(keep, codes, zeros), bits)
    pruned = IntWeight(packed, dense.scale, dense.zero_point, bits, group_size, shape[1])
    return Sparse24IntWeight.from_int(pruned, keep)


def codebook_weight(shape, n_codebooks=2, code_bits=8, vector_size=8, dtype=torch.float16, seed=0) -> CodebookWeight:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**code_bits, (shape[0], shape[1] // vector_size, n_codebooks), generator=random)
    codebooks = torch.randn(n_codebooks, 2**code_bits, vector_size, generator=random).to(dtype)
    scale = (torch.rand(shape[0], 1, generator=random) * 0.1 + 0.01).to(dtype)
    return CodebookWeight.from_codes(codes, codebooks, scale)
