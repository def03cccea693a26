"""Parts of ATP (arXiv:2412.14426): what makes the decision, what it is judged by, and what clears up after it."""

import math

import torch
from torch import Tensor, nn

WIDTH = 64  # of the generator
BUDGET = 5.0  # weight of the budget in the generator's loss
LASSO = 50000.0


class Generator(nn.Module):
    """Logits of all structures from fixed orthogonal inputs, one a block, that a transformer lets see each other."""

    places: Tensor

    def __init__(self, n_blocks: int, sizes: dict[str, int], seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("places", nn.init.orthogonal_(torch.empty(n_blocks, WIDTH)))
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(WIDTH)
            self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size, bias=False) for name, size in sizes.items()})

    def forward(self) -> dict[str, Tensor]:
        """[blocks, size] by structure."""
        seen = self.norm(self.encoder(self.places.unsqueeze(0)).squeeze(0))
        return {name: head(seen) for name, head in self.heads.items()}


def gumbel_difference(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The difference of two standard Gumbel variables: the logistic distribution, with mean 0."""
    uniform = torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return uniform.log() - (-uniform).log1p()


def thresholds(logits: Tensor, width: int) -> Tensor:
    """[blocks, 1]: half way between each block's `width` largest logits and the others; where all stay, below them."""
    ordered = logits.detach().sort(1, descending=True).values
    if width == logits.shape[1]:
        return ordered[:, -1:].clamp(max=1.0) - 1.0
    return (ordered[:, width - 1 : width] + ordered[:, width : width + 1]) / 2


def largest(logits: Tensor, width: int) -> Tensor:
    """Bool [blocks, size]: the `width` largest of each block."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(width, dim=1).indices, True)


def mean_count(logits: Tensor, temperature: float) -> Tensor:
    """How many logits [blocks, size] are above zero in the mean of all blocks.

    The straight-through estimator: the gradient is that of the sum of sigmoid(logits / temperature).
    """
    soft, hard = torch.sigmoid(logits / temperature), (logits > 0).to(logits.dtype)
    return (soft + (hard - soft).detach()).sum() / len(logits)


def budget_loss(kept: Tensor, wanted: float) -> Tensor:
    """5 log(max(p, p*) / min(p, p*)) of the kept and the wanted share of weights."""
    return BUDGET * (kept.log() - math.log(wanted)).abs()


def lasso_strength(progress: float) -> float:
    """50000 (e^t - 1) / (e - 1), with t in [0, 1]."""
    return LASSO * (math.exp(progress) - 1) / (math.e - 1)


def shrink(groups: list[Tensor], keep: Tensor, threshold: float) -> float:
    """The proximal step of a group lasso, in place: each group's norm falls by `threshold`, to zero at most.

    A group is the same row [i] of all tensors, [size, ...] each; rows where `keep` [size] is True are left as they are.
    Returns the largest norm left.
    """
    norms = torch.stack([group.flatten(1).square().sum(1) for group in groups]).sum(0).sqrt()
    factor = ((norms - threshold) / norms.clamp(min=1e-30)).clamp(min=0.0).masked_fill(keep, 1.0)
    for group in groups:
        group.mul_(factor.view(-1, *[1] * (group.dim() - 1)))
    return (norms * factor).masked_fill(keep, 0.0).max().item()
