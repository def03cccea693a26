import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import InputError
from compress.eval.windows import cut_windows, rolling_windows, second_halves, strided_windows

TOKENS = torch.arange(100)
lengths, seqlens = st.integers(2, 120), st.integers(2, 40)


def scored(windows) -> list[int]:
    """Which tokens are scored; each is checked to follow what its window reads before it."""
    for window in windows:
        read = window.inputs[window.first : window.first + len(window.targets)]
        assert torch.equal(window.targets, read + 1)
        assert window.first + len(window.targets) <= len(window.inputs)
    return [token for window in windows for token in window.targets.tolist()]


@given(lengths, seqlens)
def test_whole_windows_score_all_but_each_first_token(length, seqlen):
    if length < seqlen:
        with pytest.raises(InputError, match="less than one window"):
            cut_windows(torch.arange(length), seqlen)
        return
    windows = cut_windows(torch.arange(length), seqlen)
    assert scored(windows) == [t for t in range(length // seqlen * seqlen) if t % seqlen]


@given(lengths, seqlens, st.integers(1, 40))
def test_strided_windows_score_each_token_once_with_the_overlap_as_context(length, seqlen, stride):
    tokens = torch.arange(length)
    if stride > seqlen:
        with pytest.raises(InputError, match="leaves tokens out"):
            strided_windows(tokens, seqlen, stride)
        return
    windows = strided_windows(tokens, seqlen, stride)
    starts = set(range(0, length, stride)) if stride == seqlen else {0}
    assert scored(windows) == [t for t in range(length) if t not in starts]
    assert all(len(window.inputs) <= seqlen for window in windows)
    assert all(window.first >= seqlen - stride - 1 for window in windows[1:])


@given(lengths, seqlens)
def test_rolling_windows_score_every_token_once(length, seqlen):
    tokens = torch.arange(length)
    windows = list(rolling_windows(tokens, -1, seqlen))
    assert scored(windows) == list(range(length))
    assert all(len(window.inputs) == min(seqlen, length) for window in windows)
    assert windows[0].inputs[0] == -1


def test_llama_cpp_scores_255_of_512_and_puts_the_bos_over_a_token():
    windows = second_halves(torch.arange(1100), 512, bos=1)
    assert len(windows) == 2
    assert windows[1].inputs[0] == 1 and windows[1].inputs[1] == 513
    assert scored(windows) == [*range(257, 512), *range(769, 1024)]
    assert second_halves(torch.arange(512), 512, None)[0].inputs[0] == 0


@given(st.integers(1, 80), st.integers(1, 30))
def test_rolling_windows_are_lm_evals(length, seqlen):
    harness = pytest.importorskip("lm_eval.utils", reason="lm-eval is missing (extra `eval`)")
    tokens = list(range(length))
    theirs = [harness.make_disjoint_window(pair) for pair in harness.get_rolling_token_windows(tokens, -1, seqlen, 1)]
    ours = [
        ([*window.inputs[: window.first + 1].tolist()], window.targets.tolist())
        for window in rolling_windows(torch.tensor(tokens), -1, seqlen)
    ]
    assert ours == theirs
