import torch

from compress.kernels.codebook_weight import decode_vectors
from compress.quantize.vectors import beam_search, k_means, refined


def test_wider_beams_find_nearer_sums():
    generator = torch.Generator().manual_seed(0)
    targets, codebooks = torch.randn(200, 4, generator=generator), torch.randn(3, 8, 4, generator=generator)

    def distance(codes):
        found = sum(codebook[codes[:, m]] for m, codebook in enumerate(codebooks))
        return (targets - found).square().sum(1)

    every = torch.cartesian_prod(*[torch.arange(8)] * 3)
    best = torch.stack([distance(codes.expand(200, 3)) for codes in every]).amin(0)
    torch.testing.assert_close(distance(beam_search(targets, codebooks, 64)), best)  # 64 sums of two: all there are
    mean = [distance(beam_search(targets, codebooks, beam)).mean() for beam in (1, 2, 8, 64)]
    assert mean == sorted(mean, reverse=True)


def test_a_beam_of_one_is_a_greedy_search():
    generator = torch.Generator().manual_seed(0)
    left, codebooks = torch.randn(50, 4, generator=generator), torch.randn(3, 8, 4, generator=generator)
    codes = beam_search(left, codebooks, 1)
    for m, codebook in enumerate(codebooks):
        greedy = torch.cdist(left, codebook).argmin(1)
        assert torch.equal(codes[:, m], greedy)
        left = left - codebook[greedy]


def test_k_means_weighs_errors_by_dimension():
    """One cluster is the weighted mean; points of no weight are none of its business."""
    points, weights = (
        torch.tensor([[0.0, 0.0], [1.0, 3.0], [100.0, 5.0]]),
        torch.tensor([[1.0, 2.0], [3.0, 1.0], [0, 1.0]]),
    )
    centres = k_means(points, weights, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centres, torch.tensor([[0.75, 2.0]]))


def test_a_code_chosen_anew_is_never_a_worse_one():
    generator = torch.Generator().manual_seed(0)
    targets, codebooks = torch.randn(200, 4, generator=generator), torch.randn(3, 8, 4, generator=generator)
    codes = torch.randint(0, 8, (200, 3), generator=generator)
    before, after = (
        (decode_vectors(each.unsqueeze(1), codebooks) - targets).square().sum(1)
        for each in (codes, refined(targets, codes, codebooks))
    )
    assert (after <= before + 1e-5).all() and after.mean() < 0.5 * before.mean()
