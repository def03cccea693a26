import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.prune.masks import keep_largest
from compress.task import LayerPlan


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 16), st.data())
def test_every_group_keeps_n_of_m_and_the_largest(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    score = torch.randint(0, 5, (rows, groups * m), generator=torch.Generator().manual_seed(n)).float()  # many ties
    keep = keep_largest(score, LayerPlan(sparsity=1 - n / m, pattern=(n, m))).unflatten(1, (-1, m))
    assert (keep.sum(-1) == n).all()
    grouped = score.unflatten(1, (-1, m))
    lowest_kept = grouped.masked_fill(~keep, float("inf")).amin(-1)
    highest_gone = grouped.masked_fill(keep, float("-inf")).amax(-1)
    assert (lowest_kept >= highest_gone).all()


def test_rows_are_the_comparison_group():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert keep_largest(score, LayerPlan(sparsity=0.5)).tolist() == [[False, False, True, True]] * 2


def test_of_equal_scores_the_earlier_column_goes():
    assert keep_largest(torch.ones(1, 4), LayerPlan(sparsity=0.5, pattern=(2, 4))).tolist() == [
        [False, False, True, True]
    ]
