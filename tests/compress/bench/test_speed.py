from compress.bench.speed import bench_speed
from compress.eval.speed import SpeedProtocol


def test_checkpoints_are_compared_with_the_baseline(llama_folder):
    report = bench_speed([str(llama_folder)], str(llama_folder), SpeedProtocol(8, 2, 1), "cpu")
    assert report.data["protocol"] == {"seqlen": 8, "new_tokens": 2, "repeats": 1}
    assert set(report.data["speed"]) == {str(llama_folder)}
    assert len(report.tables[0].rows) == 1
