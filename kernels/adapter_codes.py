"""Small adapters: each number of a factor as a code of 1 to 8 bits, a value that the normal distribution is best rounded to.

Gao et al. (arXiv:2307.16867) code adapters so, with the medians of their cells; here levels are the means, which leave
the least squared error (Lloyd, 1982; Max, 1960), and each row has a mean and a deviation of its own, since the
components of a singular value decomposition are of unlike size.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.kernels.packing import pack, unpack, words_for

BITS = (1, 2, 4, 8)
ROUNDS = 500  # of Lloyd's iteration; files depend on it


@dataclass(frozen=True)
class NormalCodes:
    """A matrix whose row r is normal[r, 0] + normal[r, 1] * level of its codes."""

    packed: Tensor  # [rows, ceil(length * bits / 32)] int32, a bit stream along each row (kernels/packing.py)
    normal: Tensor  # [rows, 2] bfloat16, mean and standard deviation
    bits: int
    length: int

    @classmethod
    def of(cls, matrix: Tensor, bits: int) -> "NormalCodes":
        """The nearest levels of a matrix [rows, length] of floats; `bits`: one of BITS."""
        matrix = matrix.float()
        normal = torch.stack([matrix.mean(1), matrix.std(1, correction=0)], dim=1).bfloat16()
        return cls(pack(_codes(matrix, normal, bits), bits), normal, bits, matrix.shape[1])

    def decode(self) -> Tensor:
        """float32 [rows, length]."""
        mean, deviation = self.normal.float().unsqueeze(-1).unbind(1)
        levels = normal_levels(self.bits).to(self.packed.device)
        return levels[unpack(self.packed, self.bits, self.length).long()] * deviation + mean

    @staticmethod
    def expected(rows: int, length: int, bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of each of its tensors."""
        return {"packed": ((rows, words_for(length, bits)), torch.int32), "normal": ((rows, 2), torch.bfloat16)}


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """What a matrix [rows, length] decodes to once it is coded; float32. For training through it."""
    return NormalCodes.of(matrix.detach(), bits).decode()


@cache
def normal_levels(bits: int) -> Tensor:
    """The 2**bits values to which N(0, 1) is rounded with the least squared error, ascending; float32.

    Each is the mean of what is nearer to it than to the others: the fixed point of Lloyd's iteration.
    """
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    middles = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = normal.icdf(middles) * 3**0.5  # where many levels lie best (Panter and Dite, 1951)
    infinity = torch.full((1,), torch.inf, dtype=torch.float64)
    for _ in range(ROUNDS):
        edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density, share = normal.log_prob(edges).exp(), normal.cdf(edges)
        levels = (density[:-1] - density[1:]) / (share[1:] - share[:-1])
        levels = (levels - levels.flip(0)) / 2
    return levels.float()


def _codes(matrix: Tensor, normal: Tensor, bits: int) -> Tensor:
    levels = normal_levels(bits).to(matrix.device)
    mean, deviation = normal.float().unsqueeze(-1).unbind(1)
    units = (matrix - mean) / deviation.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.bucketize(units.contiguous(), (levels[1:] + levels[:-1]) / 2)
