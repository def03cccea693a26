"""Vectors for many weights at a time: k-means, and the search for sums of codebook vectors.

Additive codebooks are searched as in AQLM (arXiv:2401.06118, section 3.2): a beam of sums, then each code in turn.
"""

import torch
from torch import Tensor

from compress.kernels.codebook_weight import decode_vectors

FEW_VECTORS = 2**14  # that the first steps of k-means see
FIRST_STEPS, LAST_STEPS = 8, 3
DRAWS = 32  # in which the centres that k-means starts from are chosen
AT_ONCE = 2**24  # distances in memory at a time


def k_means(points: Tensor, weights: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Centres [n_clusters, d] of `points` [n, d], where a point's squared error in dimension i counts `weights` [n, d].

    Starts from points far from each other. The first steps see the first `FEW_VECTORS` alone, so `points` come in random
    order. A cluster that loses all its points stays where it is.
    """
    centres = _far_apart(points[:FEW_VECTORS], weights[:FEW_VECTORS], n_clusters, generator)
    for size in [FEW_VECTORS] * FIRST_STEPS + [len(points)] * LAST_STEPS:
        some, weight = points[:size], weights[:size]
        nearest = nearest_weighted(some, weight, centres)
        total = torch.zeros_like(centres).index_add_(0, nearest, weight * some)
        mass = torch.zeros_like(centres).index_add_(0, nearest, weight)
        centres = torch.where(mass > 0, total / mass, centres)
    return centres


def _far_apart(points: Tensor, weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Points [n, d] drawn by their squared distance to those drawn before (k-means++, some at a time)."""
    centres = points[:1]
    distance = torch.full_like(points[:, 0], torch.inf)
    while len(centres) < n:
        added = centres[-max(n // DRAWS, 1) :]
        squares = (_scores(points, weights, added) + (weights * points.square()).sum(1, keepdim=True)).amin(1)
        distance = torch.minimum(distance, squares.clamp_(min=0))
        chance = distance.cpu() + torch.finfo(distance.dtype).tiny  # where every point is a centre already
        drawn = chance.multinomial(min(max(n // DRAWS, 1), n - len(centres)), replacement=True, generator=generator)
        centres = torch.cat([centres, points[drawn.to(points.device)]])
    return centres


def _scores(points: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Weighted squared distances [n, k] of points [n, d] to centres [k, d], less what they are for a centre at zero."""
    return torch.cat([weights, weights * points], dim=1) @ torch.cat([centres.square(), -2 * centres], dim=1).T


def nearest_weighted(points: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Which of the centres [k, d] has the least weighted squared distance to each point [n, d]: int64 [n]."""
    size = max(1, AT_ONCE // len(centres))
    parts = zip(points.split(size), weights.split(size), strict=True)
    return torch.cat([_scores(part, weight, centres).min(1).indices for part, weight in parts])


def beam_search(targets: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    """Codes int64 [n, n_codebooks] whose sums of vectors come near the targets [n, d], in squared distance.

    `codebooks`: [n_codebooks, k, d], taken in order; after each, the `beam_size` best sums so far go on. One is a greedy
    search.
    """
    parts = targets.split(max(1, AT_ONCE // (beam_size * codebooks.shape[1])))
    return torch.cat([_beam_search(part, codebooks, beam_size) for part in parts])


def _beam_search(targets: Tensor, codebooks: Tensor, beam_size: int) -> Tensor:
    n, k, d = len(targets), codebooks.shape[1], codebooks.shape[2]
    left = targets.unsqueeze(1)  # [n, beams, d], what each sum still lacks
    codes = torch.empty(n, 1, 0, dtype=torch.int64, device=targets.device)
    for m, codebook in enumerate(codebooks):
        beams = left.shape[1]
        score = torch.addmm(codebook.square().sum(1), left.reshape(-1, d), codebook.T, alpha=-2).view(n, beams, k)
        if beams > 1:
            score += left.square().sum(-1, keepdim=True)
        score = score.flatten(1)
        if m + 1 == len(codebooks) or beam_size == 1:
            best = score.min(1, keepdim=True).indices
        else:
            best = score.topk(min(beam_size, score.shape[1]), largest=False).indices
        parent, code = best // k, best % k
        left = left.gather(1, parent.unsqueeze(-1).expand(-1, -1, d)) - codebook[code]
        before = codes.gather(1, parent.unsqueeze(-1).expand(-1, -1, m))
        codes = torch.cat([before, code.unsqueeze(-1)], dim=-1)
    return codes[:, 0]


def refined(targets: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """Codes [n, n_codebooks] after each was chosen anew with the others as they are."""
    codes = codes.clone()
    left = targets - decode_vectors(codes.unsqueeze(1), codebooks)
    for m, codebook in enumerate(codebooks):
        alone = left + codebook[codes[:, m]]
        codes[:, m] = torch.addmm(codebook.square().sum(1), alone, codebook.T, alpha=-2).min(1).indices
        left = alone - codebook[codes[:, m]]
    return codes
