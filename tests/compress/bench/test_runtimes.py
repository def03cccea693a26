import importlib
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from byte_fallback import save_tiny
from tiny import tiny_text

from compress import cli
from compress.bench.llama import LlamaBench, undisturbed
from compress.bench.peers.environments import environ_of, python_of
from compress.bench.peers.rows import Peer
from compress.bench.runtimes import driver, llama_cpp
from compress.bench.runtimes.driver import SCRIPTS, RuntimesRequest, bench_runtimes
from compress.bench.runtimes.exports import exported, weight_bytes
from compress.bench.runtimes.llama_cpp import LlamaTurns, find_llama_bench
from compress.bench.runtimes.rows import OURS, RUNTIMES, Runtime, chosen_runtimes
from compress.bench.runtimes.worker import Worker
from compress.errors import InputError, RunError
from compress.eval.speed import SpeedProtocol
from compress.export.command import export
from compress.export.reference import reference_logits, reference_model
from compress.export.source import Source
from compress.hf import load_model
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.sources import resolve_model

QUIET = Reporter(quiet=True)
PROTOCOL = SpeedProtocol(12, 4, 2)
STAND_IN = """
import time
from turns import WholeTexts, serve

class Cached:
    cached = True

    def begin(self):
        print("a library talks")

    def prompt(self, ids):
        time.sleep(0.02)

    def token(self):
        pass

def load(request):
    if request["setting"].get("fails"):
        raise ValueError("no room\\nfor it")
    if request["setting"].get("dies"):
        import os
        os.abort()
    return Cached() if request["setting"].get("cached") else WholeTexts(lambda ids: len(ids))

serve(load, ("pytest",))
"""  # no imports that take long
EXPORTER = """#!/bin/sh
echo "$@" >> {calls}
for last; do out=$previous; previous=$last; case "$before" in -o) file=$last ;; esac; before=$last; done
if [ -e {refuse} ]; then echo "some progress" >&2; echo "error: no such type" >&2; exit 2; fi
mkdir -p "$(dirname "$file")"; printf 12345 > "$file"
echo "{{\\"files\\": {{\\"$file\\": 5}}}}"
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A checkpoint of 4 bits in groups of 32."""
    folder = tmp_path_factory.mktemp("runtimes")
    model = save_tiny(folder / "dense", "llama", prepend=True, dtype=torch.bfloat16)
    (folder / "text.txt").write_text(tiny_text(400))
    flags = {
        "model": str(model),
        "quantizer": "rtn",
        "target": {"wbits": 4, "group_size": 32},
        "calib": {"source": str(folder / "text.txt"), "nsamples": 2, "seqlen": 16},
    }
    compress(read_recipe(None, flags), resolve_model(str(model)), folder / "packed", QUIET)
    return folder / "packed"


@pytest.fixture
def stand_in(tmp_path):
    """A worker on a script that takes no time to start, by its setting."""
    script = tmp_path / "time_stand_in.py"
    script.write_text(STAND_IN)
    started = []

    def start(**setting):
        request = {"file": "", "prompt": [1, 2, 3], "new_tokens": 4, "threads": 1, "setting": setting}
        (tmp_path / "request.json").write_text(json.dumps(request))
        command = [sys.executable, str(script), str(tmp_path / "request.json")]
        worker = Worker("stand-in", command, environ_of(Peer("stand-in", ""), SCRIPTS), tmp_path / "log")
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.close()


@pytest.fixture
def exporter(tmp_path):
    """An interpreter that knows one command, `compress export`; what it was given is in `calls`."""
    python = tmp_path / "python"
    python.write_text(EXPORTER.format(calls=tmp_path / "calls", refuse=tmp_path / "refuse"))
    python.chmod(0o755)
    return python


def test_ours_is_measured_and_what_cannot_be_had_says_why(packed, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    request = RuntimesRequest(packed, tmp_path / "out", ("onnx",), PROTOCOL, 1, tmp_path / "file")
    report = bench_runtimes(request)
    ours, onnx = report.data["runs"]
    assert ours["decode_speedup"] == 1 and ours["cached"] and ours["prefill_tokens_per_second"] > 0
    assert ours["bytes"] == (packed / "model.safetensors").stat().st_size
    weights = {id(p): p.numel() for p in load_model(packed.parent / "dense").parameters()}
    assert report.data["dense_bytes"] == 2 * sum(weights.values())
    assert ours["ratio"] == ours["bytes"] / report.data["dense_bytes"]
    assert onnx == {"runtime": "onnx", "failed": onnx["failed"]} and "environment of runtime-onnx" in onnx["failed"]
    assert json.loads((tmp_path / "out" / "runtimes.json").read_text()) == report.data
    assert [len(column._cells) for column in report.tables[0].columns] == [2] * 7


def test_a_row_that_fails_at_a_turn_is_closed_and_the_others_go_on(packed, tmp_path, monkeypatch):
    counts = Counter()

    class Turns:
        def __init__(self, name):
            self.name, self.about = name, {"cached": True, "versions": {}}
            self.seconds = (0.5, 1.0 if name == OURS else 0.25)

        def turn(self):
            counts[self.name] += 1
            if (self.name, counts[self.name]) == ("onnx", 2):
                raise RunError("it died")

        def close(self):
            counts[f"{self.name} closed"] += 1

    def started(bench, runtime):
        bench.runs[runtime.name] = {"runtime": runtime.name, "bytes": 10, "note": ""}
        return Turns(runtime.name)

    monkeypatch.setattr(driver._Bench, "_started", started)
    request = RuntimesRequest(packed, tmp_path / "out", ("onnx", "openvino"), SpeedProtocol(12, 4, 3))
    _, onnx, openvino = bench_runtimes(request).data["runs"]
    assert onnx["failed"] == "it died" and openvino["decode_tokens_per_second"] == 4
    assert openvino["prefill_tokens_per_second"] == 24 and openvino["decode_speedup"] == 4
    assert counts == {OURS: 3, "onnx": 2, "openvino": 3, **{f"{n} closed": 1 for n in (OURS, "onnx", "openvino")}}


def test_without_ours_there_is_nothing_to_compare_with(packed, tmp_path):
    with pytest.raises(RunError, match="cannot be served"):
        bench_runtimes(RuntimesRequest(packed, tmp_path, (), PROTOCOL, prompts="nothing"))
    with pytest.raises(InputError, match="lower --prompt-tokens"):
        bench_runtimes(RuntimesRequest(packed, tmp_path, (), SpeedProtocol(10_000, 4, 1)))


def test_names():
    assert [runtime.name for runtime in chosen_runtimes(["onnx"])] == [OURS, "onnx"]
    assert chosen_runtimes([]) == list(RUNTIMES)
    with pytest.raises(InputError, match='"tflite"'):
        chosen_runtimes(["tflite"])
    for runtime in RUNTIMES:
        assert not runtime.peer.script or (SCRIPTS / runtime.peer.script).is_file()
        assert all("==" in requirement for requirement in runtime.peer.requirements)


def test_the_command_says_which_there_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["compress", "bench", "runtimes", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    help_ = " ".join(capsys.readouterr().out.split())
    assert ", ".join(runtime.name for runtime in RUNTIMES if runtime.name != OURS) in help_


def test_turns_of_a_process(stand_in):
    worker = stand_in(cached=True)
    assert worker.about["cached"] and worker.about["versions"] == {"pytest": pytest.__version__}
    worker.turn()
    worker.turn()
    prefill, decode = worker.seconds
    assert prefill >= 0.02 > decode  # what the library prints is no answer


def test_why_a_process_cannot_go_on(stand_in, tmp_path):
    with pytest.raises(RunError, match=r"^ValueError: no room$"):
        stand_in(fails=True)
    assert "Traceback" in (tmp_path / "log").read_text()
    with pytest.raises(RunError, match="stand-in ended with exit code -6"):
        stand_in(dies=True)


def test_without_a_cache_each_token_takes_the_text_again(stand_in, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    turns = importlib.import_module("turns")
    lengths = []
    session = turns.WholeTexts(lambda ids: lengths.append(len(ids)) or 7)
    for _ in range(2):
        assert len(turns.turn(session, [1, 2, 3], 9)["decode"]) == turns.UNCACHED
    assert lengths == [3, 4, 5] * 2
    assert not stand_in().about["cached"]


def test_ours_says_what_transformers_would(packed, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    session = importlib.import_module("time_compress").Ours(
        {"file": str(packed), "threads": torch.get_num_threads(), "setting": {"prompts": "decode"}}
    )
    prompt = [1, 30, 12, 70, 5]
    expected = load_model(packed).generate(torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for _ in range(2):
        session.begin()
        said = [session.prompt(prompt), *(session.token() for _ in range(5))]
        assert said == expected[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "library"), [(n, n.partition("-")[0]) for n in ("onnx", "openvino-f32", "executorch")]
)
def test_a_runtime_says_what_torch_would(packed, tmp_path, monkeypatch, name, library):
    """Where it is installed: the script runs the model, text and tokens that it is said to."""
    runtime = next(runtime for runtime in RUNTIMES if runtime.name == name)
    pytest.importorskip({"onnx": "onnxruntime_genai"}.get(library, library), reason=f"{library} is not installed")
    (file,) = export(packed, library, tmp_path / runtime.file).data["files"]
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module(Path(runtime.peer.script).stem)
    prompt = [5, 9, 17, 33]  # rounding 8-bit inputs swaps no two tokens after it
    request = {"file": file, "prompt": prompt, "new_tokens": 6, "threads": 1, "setting": runtime.setting}
    session = (script.load if hasattr(script, "load") else script.Genai)(request)
    model, expected = reference_model(Source(packed)), list(prompt)
    for _ in range(6):
        expected.append(int(reference_logits(model, torch.tensor([expected]))[0, -1].argmax()))
    for _ in range(2):
        session.begin()
        assert [session.prompt(prompt), *(session.token() for _ in range(5))] == expected[len(prompt) :]


def test_an_export_is_made_once_for_a_checkpoint(packed, exporter, tmp_path):
    checkpoint = shutil.copytree(packed, tmp_path / "checkpoint")
    runtime = Runtime("any", Peer("any", ""), "gguf", "model.gguf", lossy=True)
    files = exported(runtime, checkpoint, exporter, tmp_path / "out", QUIET)
    assert files == [tmp_path / "out" / "gguf-lossy" / "model.gguf"] and weight_bytes(files) == 5
    assert exported(runtime, checkpoint, exporter, tmp_path / "out", QUIET) == files
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call == f"-m compress export {checkpoint} --to gguf -o {files[0]} --json --lossy"
    os.utime(checkpoint / "model.safetensors", (1, 1))
    exported(runtime, checkpoint, exporter, tmp_path / "out", QUIET)
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_a_refused_export_says_so_once_for_all_that_share_it(packed, exporter, tmp_path, monkeypatch):
    (tmp_path / "refuse").touch()
    monkeypatch.setattr(driver, "python_of", lambda *_: exporter)
    bench = driver._Bench(RuntimesRequest(packed, tmp_path / "out"), [1, 2])
    for runtime in RUNTIMES[-3:-1]:
        with pytest.raises(InputError, match=r"^no such type$"):
            bench._started(runtime)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    with pytest.raises(InputError, match='there is no export to "tflite"'):
        exported(Runtime("any", Peer("any", ""), "tflite"), packed, Path(sys.executable), tmp_path, QUIET)


def test_bytes_are_those_of_the_model(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run").mkdir()
    for name in ("model.onnx", "model.onnx.data", "adapter/a.safetensors", "tokenizer.json", "run/t.safetensors"):
        (tmp_path / name).write_bytes(bytes(10))
    assert weight_bytes([tmp_path]) == 30
    assert weight_bytes([tmp_path / "model.onnx", tmp_path]) == 40


@pytest.mark.slow
def test_an_environment_on_top_of_this_one(tmp_path):
    """pip takes what is here for installed, so nothing is fetched."""
    peer = Peer("on-top", "", ("safetensors", "typer"), on_top=True)
    python = python_of(peer, tmp_path, QUIET)
    assert python == tmp_path / "on-top" / "bin" / "python"
    found = json.loads((tmp_path / "on-top" / "installed.json").read_text())
    assert any(package.startswith("torch==") for package in found["packages"])
    assert not list((tmp_path / "on-top").glob("lib/python*/site-packages/typer"))
    (tmp_path / "on-top" / "touched").touch()
    assert python_of(peer, tmp_path, QUIET) == python and (tmp_path / "on-top" / "touched").exists()


CMAKE = """#!/bin/sh
echo "$@" >> {calls}
if [ "$1" = --build ]; then mkdir -p "$2/bin"; echo built > "$2/bin/llama-bench"; fi
"""


def test_llama_bench_is_named_found_or_built(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    home = tmp_path / "home"
    with pytest.raises(InputError, match="none is no file: name a built one with --llama-bench"):
        find_llama_bench(tmp_path / "none", home, 1, QUIET)
    with pytest.raises(RunError, match="not built without cmake"):
        find_llama_bench(None, home, 1, QUIET)
    (home / "bin").mkdir(parents=True)
    (home / "lib" / "python3.11" / "site-packages" / llama_cpp.SOURCE).mkdir(parents=True)
    (tmp_path / "path").mkdir()
    cmake = tmp_path / "path" / "cmake"
    cmake.write_text("#!/bin/sh\nexit 1\n")
    cmake.chmod(0o755)
    with pytest.raises(RunError, match="its source does not build"):
        find_llama_bench(None, home, 1, QUIET)
    cmake.write_text(CMAKE.format(calls=tmp_path / "calls").replace("mkdir", "/bin/mkdir"))
    for _ in range(2):
        assert find_llama_bench(None, home, 3, QUIET).read_text() == "built\n"
    configured, built = (tmp_path / "calls").read_text().splitlines()
    assert llama_cpp.SOURCE in configured and built.endswith("--target llama-bench --parallel 3")
    shutil.copy(cmake, tmp_path / "path" / "llama-bench")
    assert find_llama_bench(None, home, 3, QUIET) == tmp_path / "path" / "llama-bench"
    assert find_llama_bench(cmake, home, 3, QUIET) == cmake


def test_what_counts_of_turns():
    assert undisturbed([3, 1, 2], [5, 1, 4, 2]) == (1, 1.5)
    assert undisturbed([2], [4, 9, 5]) == (2, 4.5)


def test_llama_cpp_takes_turns(tmp_path):
    program = tmp_path / "llama-bench"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *"-n 0"*) s=600 ;; *"-n 5 -d 12"*) s=20 ;; esac\n'
        'echo "[{\\"avg_ts\\": $s, \\"model_size\\": 77, \\"build_commit\\": \\"abc\\", \\"model_type\\": \\"q\\"}]"\n'
    )
    program.chmod(0o755)
    turns = LlamaTurns(LlamaBench(program, tmp_path / "any.gguf", 1, 5), 12)
    turns.turn()
    assert turns.seconds == (pytest.approx(12 / 600), pytest.approx(1 / 20))
    assert turns.about == {"cached": True, "versions": {"llama.cpp": "abc"}}
