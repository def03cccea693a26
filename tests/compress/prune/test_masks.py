import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.prune.masks import keep_largest
from compress.task import LayerPlan


def by_sorting(score, count):
    """Which of a list of scores stay when `count` go, the plain way."""
    gone = sorted(range(len(score)), key=lambda i: (score[i], i))[:count]
    return [i not in gone for i in range(len(score))]


@st.composite
def scores(draw, rows=st.integers(1, 6), columns=st.integers(1, 24)):
    """Scores with many ties, now and then all equal."""
    levels, seed = draw(st.integers(1, 5)), draw(st.integers(0, 99))
    shape = draw(rows), draw(columns)
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(scores(), st.floats(0, 0.99))
def test_each_row_loses_its_share_the_earlier_of_equals_first(score, sparsity):
    keep = keep_largest(score, LayerPlan(sparsity=sparsity))
    assert keep.tolist() == [by_sorting(row, int(score.shape[1] * sparsity)) for row in score.tolist()]


@given(scores(), st.floats(0, 0.99))
def test_the_layer_loses_its_share_the_earlier_of_equals_first(score, sparsity):
    keep = keep_largest(score, LayerPlan(sparsity=sparsity, compare="layer"))
    assert keep.flatten().tolist() == by_sorting(score.flatten().tolist(), int(score.numel() * sparsity))


@given(st.integers(2, 16), st.data())
def test_every_group_keeps_n_of_m_the_earlier_of_equals_first(m, data):
    n = data.draw(st.integers(1, m - 1))
    score = data.draw(scores(columns=st.integers(1, 5).map(lambda groups: groups * m)))
    keep = keep_largest(score, LayerPlan(sparsity=1 - n / m, pattern=(n, m)))
    groups = score.unflatten(1, (-1, m)).flatten(0, 1).tolist()
    assert keep.unflatten(1, (-1, m)).flatten(0, 1).tolist() == [by_sorting(group, m - n) for group in groups]


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0, 0.99), st.data())
def test_blocks_go_whole_those_with_the_smallest_sum_of_squares(rows, columns, sparsity, data):
    times = st.integers(1, 4)
    score = data.draw(scores(times.map(lambda n: n * rows), times.map(lambda n: n * columns)))
    keep = keep_largest(score, LayerPlan(sparsity=sparsity, block=(rows, columns)))
    blocks = [part for strip in score.split(rows) for part in strip.split(columns, 1)]
    stay = [part for strip in keep.split(rows) for part in strip.split(columns, 1)]
    assert [part.all().item() for part in stay] == [part.any().item() for part in stay]
    energy = [part.square().sum().item() for part in blocks]
    assert [part.all().item() for part in stay] == by_sorting(energy, int(len(blocks) * sparsity))


def test_rows_are_the_comparison_group_unless_the_layer_is():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert keep_largest(score, LayerPlan(sparsity=0.5)).tolist() == [[False, False, True, True]] * 2
    assert keep_largest(score, LayerPlan(sparsity=0.5, compare="layer")).tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize(
    "plan", [LayerPlan(0.5), LayerPlan(0.5, compare="layer"), LayerPlan(0.5, (2, 4)), LayerPlan(0.5, block=(2, 4))]
)
def test_the_score_is_left_as_it_was(plan):
    score = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    before = score.clone()
    keep_largest(score, plan)
    assert torch.equal(score, before)
