"""What is added to a packed weight: its value, its size, and its way through a file."""

import pytest
import torch

from compress.kernels.adapter_codes import BITS
from compress.kernels.correction import CodedCorrection, Correction, correction_from, part_shapes, planned_correction

OUT, IN, RANK = 24, 32, 4


def random_correction(rank=RANK, single=5):
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, IN, generator=random), torch.randn(OUT, rank, generator=random)
    index = torch.randperm(OUT * IN, generator=random)[:single].sort().values.int()
    return Correction(a, b, *((index, torch.randn(single, generator=random)) if single else ()))


def back(correction):
    return correction_from(correction.tensors(), correction.shape, correction.rank, correction.bits, correction.single)


@pytest.mark.parametrize(("rank", "single"), [(4, 5), (4, 0), (0, 5)])
def test_delta_is_the_product_and_the_single_weights(rank, single):
    correction = random_correction(rank, single)
    wanted = correction.b @ correction.a
    for place in range(single):
        row, column = divmod(correction.index[place].item(), IN)
        wanted[row, column] += correction.value[place]
    torch.testing.assert_close(correction.delta(), wanted)
    assert correction.delta().dtype == torch.float32 and correction.shape == (OUT, IN)
    assert (correction.rank, correction.single, correction.bits) == (rank, single, 16)
    assert correction.nbytes == 4 * (rank * (OUT + IN) + 2 * single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_twice_is_rounding_once(dtype):
    correction = random_correction()
    for bits in (16, *BITS):
        once = correction.rounded(dtype, bits)
        twice = once.rounded(dtype, bits)
        assert once.bits == twice.bits == bits
        for name, tensor in once.tensors().items():
            assert torch.equal(twice.tensors()[name], tensor)
        assert once.value.dtype == dtype


def test_rounding_to_other_bits_codes_anew():
    once = random_correction().rounded(torch.bfloat16, 4)
    assert once.rounded(torch.bfloat16, 2).bits == 2 and once.rounded(torch.bfloat16).bits == 16
    torch.testing.assert_close(once.rounded(torch.float32).delta(), once.delta())


def test_fewer_bits_take_less_and_lose_more():
    correction = random_correction(single=0)
    sizes = [correction.rounded(torch.bfloat16, bits).nbytes for bits in (*BITS, 16)]
    errors = [(correction.rounded(torch.bfloat16, b).delta() - correction.delta()).norm().item() for b in (*BITS, 16)]
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert sizes[0] == RANK * (4 * (1 + 1) + 2 * 4)  # a word for each row of 32 and of 24; two numbers each


@pytest.mark.parametrize("bits", [16, *BITS])
@pytest.mark.parametrize(("rank", "single"), [(4, 5), (4, 0), (0, 5)])
def test_through_a_file_and_back(rank, single, bits):
    correction = random_correction(rank, single).rounded(torch.bfloat16, bits)
    assert isinstance(correction, CodedCorrection) == (bits < 16 and rank > 0)
    assert correction.tensors().keys() == part_shapes((OUT, IN), rank, correction.bits, single).keys()
    assert torch.equal(back(correction).delta(), correction.delta())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"a": torch.zeros(4, IN + 1)}, "a is torch.float32"),
        ({"b": torch.zeros(OUT, 4, dtype=torch.int32)}, "b is torch.int32"),
        ({"index": torch.tensor([0, 1, 2, 3, OUT * IN], dtype=torch.int32)}, "index does not name places"),
        ({"index": torch.tensor([0, 1, 1, 2, 3], dtype=torch.int32)}, "index does not name places"),
        ({"index": torch.tensor([-1, 1, 2, 3, 4], dtype=torch.int32)}, "index does not name places"),
        ({"value": torch.zeros(4)}, "value is torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        correction_from(random_correction().tensors() | changes, (OUT, IN), RANK, 16, 5)


def test_a_product_for_a_larger_weight_has_zeros_where_there_was_nothing():
    a, b = torch.randn(2, 3), torch.randn(4, 2)
    rows, columns = torch.tensor([1, 0, 1, 1, 1, 0]) > 0, torch.tensor([0, 1, 1, 0, 1]) > 0
    delta = Correction(a, b).scattered(rows, columns).delta()
    assert delta.shape == (6, 5) and not delta[~rows].any() and not delta[:, ~columns].any()
    torch.testing.assert_close(delta[rows][:, columns], b @ a)
    torch.testing.assert_close(Correction(a, b).scattered(None, None).delta(), b @ a)


@pytest.mark.parametrize("bits", [16, *BITS])
@pytest.mark.parametrize(("rank", "single"), [(3, 0), (3, 5), (0, 5)])
def test_a_planned_correction_is_as_large_as_one_that_was_made(bits, rank, single):
    index = torch.arange(single, dtype=torch.int32) if single else None
    made = Correction(torch.randn(rank, 40), torch.randn(24, rank), index, torch.ones(single) if single else None)
    made = made.rounded(torch.bfloat16, bits)
    planned = planned_correction((24, 40), rank, single, bits, torch.bfloat16)
    assert planned.nbytes == made.nbytes and planned.bits == made.bits and planned.shape == made.shape == (24, 40)
    assert {n: (t.shape, t.dtype) for n, t in planned.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in made.tensors().items()
    }
