"""Random packed weights of each layout, for tests of what multiplies by them."""

import torch

from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.packing import pack
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight


def int_weight(out_features, in_features, bits, group_size, symmetric=True):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (out_features, in_features), generator=generator)
    groups = (out_features, in_features // group_size)
    scale = (torch.rand(groups, generator=generator) * 0.02 + 1e-3).to(torch.bfloat16)
    zero_point = None if symmetric else torch.randint(2**bits, groups, generator=generator).to(torch.uint8)
    return IntWeight(pack(codes, bits), scale, zero_point, bits, group_size, in_features)


def sparse24_weight(out_features, in_features, bits, group_size, symmetric=True):
    weight = int_weight(out_features, in_features, bits, group_size, symmetric)
    keep = torch.rand(out_features, in_features // 4, 4, generator=torch.Generator().manual_seed(1))
    keep = (keep.argsort(-1).argsort(-1) < 2).flatten(1)
    zero = weight.zero_point if weight.zero_point is not None else torch.full_like(weight.scale, 2 ** (bits - 1))
    codes = torch.where(keep, weight.codes(), zero.to(torch.uint8).repeat_interleave(group_size, 1))
    dense = IntWeight(pack(codes, bits), weight.scale, weight.zero_point, bits, group_size, in_features)
    return Sparse24IntWeight.from_int(dense, keep)


def codebook_weight(out_features, in_features, n_codebooks=2, code_bits=8, vector_size=8):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**code_bits, (out_features, in_features // vector_size, n_codebooks), generator=generator)
    books = torch.randn(n_codebooks, 2**code_bits, vector_size, generator=generator).bfloat16()
    scale = torch.rand(out_features, 1, generator=generator).bfloat16()
    return CodebookWeight.from_codes(codes, books, scale)
