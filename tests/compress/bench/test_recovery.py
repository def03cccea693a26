import pytest
from tiny import save_tiny

from compress.bench.recovery import FULL, RecoveryBench, bench_recovery
from compress.errors import InputError


@pytest.mark.slow
def test_each_training_is_measured_beside_full_fine_tuning(tmp_path, text_file):
    asked = RecoveryBench(str(text_file), ("grid",), group_size=32, seqlen=24, batch_size=2)
    report = bench_recovery(save_tiny(tmp_path), asked, "cpu")
    measured = report.data["measured"]
    assert list(measured) == ["grid", *FULL]
    for each in measured.values():
        assert each.keys() == {"seconds", "peak_rss_bytes"} and all(value > 0 for value in each.values())
    assert report.data["asked"]["steps"] == 3


def test_what_cannot_be_measured_is_refused_before_anything_is_done(tmp_path, text_file):
    for asked, line in (
        (RecoveryBench(str(text_file), ("low-rank",)), "low-rank does not train"),
        (RecoveryBench(str(text_file), ("lrek",)), "did you mean lrec"),
        (RecoveryBench(str(text_file), steps=1), "give --steps 2"),
    ):
        with pytest.raises(InputError, match=line):
            bench_recovery(tmp_path, asked, "cpu")
