import json
from itertools import chain

import pytest
from tiny import save_tiny

from compress import cli
from compress.bench import decode
from compress.bench.decode import DecodeRequest, bench_decode
from compress.errors import InputError
from compress.eval.speed import SpeedProtocol


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    return {"one": save_tiny(folder / "one"), "two": save_tiny(folder / "two", num_hidden_layers=1)}


def test_every_checkpoint_beside_the_first(folders):
    report = bench_decode(DecodeRequest(folders, SpeedProtocol(16, 6, 1)), "cpu")
    first, second = report.data["speed"].values()
    assert first["prefill_speedup"] == first["decode_speedup"] == 1
    assert second["bytes"] < first["bytes"] and first["kernels"] == {}
    assert second["decode_speedup"] == pytest.approx(
        second["decode_tokens_per_second"] / first["decode_tokens_per_second"]
    )


def test_the_quieter_half_counts(folders, monkeypatch):
    clock = {"now": 0.0}
    turns = [[90, *[seconds] * 15] for seconds in (2, 1, 2, 1, 50, 9, 50, 9)]  # a round is two; first tokens are cold
    seconds = chain([1] * 4, *turns)  # two prompts each, two quiet rounds, two others

    def tick():
        clock["turn"] = not clock.get("turn", False)
        if not clock["turn"]:
            clock["now"] += next(seconds)
        return clock["now"]

    monkeypatch.setattr(decode.time, "perf_counter", tick)
    speed = bench_decode(DecodeRequest(folders, SpeedProtocol(16, 64, 1)), "cpu").data["speed"]
    assert [each["decode_tokens_per_second"] for each in speed.values()] == [0.5, 1.0]
    assert [each["decode_speedup"] for each in speed.values()] == [1, 2]


def test_the_command(folders, capsys, monkeypatch):
    arguments = ["bench", "decode", *map(str, folders.values()), "--seqlen", "8", "--new-tokens", "4", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["compress", *arguments, "--json"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0 and len(json.loads(capsys.readouterr().out)["speed"]) == 2


LLAMA_BENCH = """#!/bin/sh
case "$*" in *"-n 0"*) speed=1600 ;; *"-n 16 -d 16"*) speed=200 ;; esac
echo "[{\\"avg_ts\\": $speed, \\"model_size\\": 77, \\"build_commit\\": \\"abc\\", \\"model_type\\": \\"tiny Q4_0\\"}]"
"""


def test_llama_cpp_beside(folders, tmp_path):
    program, gguf = tmp_path / "llama-bench", tmp_path / "model.gguf"
    program.write_text(LLAMA_BENCH)
    program.chmod(0o755)
    gguf.touch()
    request = DecodeRequest({"one": folders["one"]}, SpeedProtocol(16, 4, 2), "decode", program, (gguf,))
    ours, theirs = bench_decode(request, "cpu").data["speed"].values()
    assert theirs["prefill_tokens_per_second"] == pytest.approx(1600) and theirs["bytes"] == 77
    assert theirs["decode_tokens_per_second"] == pytest.approx(200)
    assert theirs["decode_speedup"] == pytest.approx(200 / ours["decode_tokens_per_second"])


def test_llama_cpp_needs_both(folders, tmp_path):
    with pytest.raises(InputError, match="go together"):
        bench_decode(DecodeRequest(folders, SpeedProtocol(16, 4, 1), "decode", tmp_path / "llama-bench"), "cpu")
    with pytest.raises(InputError, match="is no file"):
        bench_decode(DecodeRequest(folders, SpeedProtocol(), "decode", tmp_path, (tmp_path / "none.gguf",)), "cpu")
