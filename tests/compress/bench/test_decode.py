import json

import pytest
from tiny import save_tiny

from compress import cli
from compress.bench import decode
from compress.bench.decode import bench_decode
from compress.eval.speed import SpeedProtocol


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    return [save_tiny(folder / "one"), save_tiny(folder / "two", num_hidden_layers=1)]


def test_every_checkpoint_beside_the_first(folders):
    report = bench_decode(folders, SpeedProtocol(16, 6, 1), "decode", "cpu")
    first, second = report.data["speed"].values()
    assert first["prefill_speedup"] == first["decode_speedup"] == 1
    assert second["bytes"] < first["bytes"] and first["kernels"] == {}
    assert second["decode_speedup"] == pytest.approx(
        second["decode_tokens_per_second"] / first["decode_tokens_per_second"]
    )


def test_the_quieter_half_counts(folders, monkeypatch):
    clock = {"now": 0.0}
    seconds = iter([1, 1, 1, 1, *[2, 1] * 2, *[50, 9] * 2])  # two prompts each, two quiet rounds, two others

    def tick():
        clock["turn"] = not clock.get("turn", False)
        if not clock["turn"]:
            clock["now"] += next(seconds)
        return clock["now"]

    monkeypatch.setattr(decode.time, "perf_counter", tick)
    speed = bench_decode(folders, SpeedProtocol(16, 4, 1), "decode", "cpu").data["speed"]
    assert [each["decode_tokens_per_second"] for each in speed.values()] == [0.5, 1.0]
    assert [each["decode_speedup"] for each in speed.values()] == [1, 2]


def test_the_command(folders, capsys, monkeypatch):
    arguments = ["bench", "decode", *map(str, folders), "--seqlen", "8", "--new-tokens", "4", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["compress", *arguments, "--json"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0 and len(json.loads(capsys.readouterr().out)["speed"]) == 2
