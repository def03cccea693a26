"""Codebook weights times inputs on processors, without decoding the weight."""

import torch
from torch import Tensor

from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.implementation import Case, Implementation, needs_cpu

MOST_CODE_BITS = 12  # a table of 2**bits products for each few inputs


class Lookup(Implementation):
    """Products of the inputs with every vector of the codebooks, then sums of those that the codes name.

    As AQLM's kernel for processors does it (Egiazarian et al., arXiv:2401.06118, section 4.4). Codes are kept as int32,
    4 bytes for each vector, since `embedding_bag` takes nothing smaller.
    """

    NAME = "cpu-lookup"
    ABOUT = "sums products looked up by code: few tokens"
    BEATEN_FROM = 4

    codes: Tensor
    codebooks: Tensor
    scale: Tensor

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Codebooks of up to 4096 vectors, on a CPU."""
        if reason := needs_cpu(case):
            return reason
        if not isinstance(case.weight, CodebookWeight):
            return "it sums vectors of codebooks"
        bits = case.weight.code_bits
        return None if bits <= MOST_CODE_BITS else f"it takes codes of up to {MOST_CODE_BITS} bits, not {bits}"

    def __init__(self, case: Case):
        super().__init__()
        weight = case.weight
        if not isinstance(weight, CodebookWeight):
            raise TypeError(type(weight).__name__)
        codes = weight.codes().int()  # [out, groups, codebooks]
        tables = torch.arange(codes[0].numel(), dtype=torch.int32).view(codes.shape[1:])
        self.keep("codes", (codes + tables * weight.codebooks.shape[1]).flatten(1))
        self.keep("codebooks", weight.codebooks.float().permute(2, 0, 1).flatten(1).contiguous())  # [vector, all codes]
        self.keep("scale", weight.scale.float())

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        vectors = x.float().unflatten(1, (-1, len(self.codebooks)))  # [tokens, groups, vector]
        products = (vectors @ self.codebooks).flatten(1).T.contiguous()  # [groups * codebooks * codes, tokens]
        sums = torch.nn.functional.embedding_bag(self.codes, products, mode="sum")
        return (sums * self.scale).T.to(x.dtype)
