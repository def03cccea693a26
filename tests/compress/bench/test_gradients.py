import pytest
from tiny import save_tiny

from compress.bench.gradients import bench_gradients


def test_both_ways_are_measured_and_agree(tmp_path, text_file):
    """Experts and attention, each way in a process of its own."""
    data = bench_gradients(save_tiny(tmp_path, "mixtral"), (str(text_file), 2, 32), "cpu").data
    for way in ("streamed", "in_memory", "ratio"):
        assert data[way].keys() == {"seconds", "peak_rss_bytes"}
        assert all(value > 0 for value in data[way].values())
    assert data["ratio"]["seconds"] == pytest.approx(data["streamed"]["seconds"] / data["in_memory"]["seconds"])
    assert len(data["difference"]) == 3 * (4 + 2 * 4)
    assert max(data["difference"].values()) < 5e-6
