import torch

from compress.calib.hidden import HiddenStates


def test_states_beyond_the_limit_go_to_a_file_and_read_back_equal(tmp_path):
    first = torch.randn(1, 6, 4).bfloat16()
    small, large = HiddenStates(first, 3), HiddenStates(first, 3, tmp_path, limit=10)
    assert small.file is None
    assert large.file is not None and large.file.stat().st_size == 3 * 6 * 4 * 2
    for index in range(3):
        small[index] = large[index] = first * index
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))
    assert torch.equal(large[2], first * 2)
    large.close()
    assert not list(tmp_path.iterdir())
