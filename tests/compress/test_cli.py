"""The command line as users and scripts meet it: exit codes, one line, JSON on stdout."""

import json
import subprocess
import sys

import pytest
from tiny import save_tiny

from compress.cli import _beside, main
from compress.errors import failure
from compress.report import Report, show


def call(*arguments, cwd=None):
    command = [sys.executable, "-m", "compress", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_run_eval_inspect_in_json(llama_folder, text_file, tmp_path):
    flags = ["--sparsity", 0.5, "--wbits", 4, "--group-size", 32, "--calib", text_file, "--nsamples", 4, "--seqlen", 32]
    done = call(
        "run", llama_folder, *flags, "--out", tmp_path / "a", "--eval", text_file, "--eval-windows", 3, "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    wanted = "checkpoint dense_bytes compressed_bytes bits_per_weight sparsity seconds peak_rss_bytes".split()
    assert set(wanted) <= set(result)
    assert result["eval"]["dense"] > 0 and result["eval"]["compressed"] > 0

    done = call("eval", tmp_path / "a", "--ppl", text_file, "--seqlen", 32, "--max-windows", 3, "--json")
    measured = json.loads(done.stdout)
    assert measured["perplexity"] == {"words": pytest.approx(result["eval"]["compressed"])}
    assert measured["tokens"] == 3 * 31 and measured["seconds"] > 0

    seen = json.loads(call("inspect", tmp_path / "a", "--json").stdout)
    assert len(seen["layers"]) == 21 and seen["format"] == "compressed-tensors"
    assert {"observe", "forward", "save", "load"} <= set(seen["seconds"])
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"{result['eval']['compressed']:.3f}" in card and "50.0%" in card
    table = call("inspect", tmp_path / "a").stdout
    assert "model.layers.2.mlp.down_proj" in table and "where the time went" in table


def test_a_dry_run_shows_the_plan_and_leaves_nothing(llama_folder, text_file, tmp_path):
    flags = ["--pattern", "2:4", "--wbits", 3, "--group-size", 32, "--calib", text_file]
    done = call("run", llama_folder, *flags, "--out", tmp_path / "a", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["steps"] == ["alps", "gptq"] and plan["format"] == "compressed-tensors"
    assert not (tmp_path / "a").exists()
    flags += ["--nsamples", 4, "--seqlen", 32]
    real = json.loads(call("run", llama_folder, *flags, "--out", tmp_path / "a", "--json").stdout)
    assert plan["compressed_bytes"] == pytest.approx(real["compressed_bytes"], rel=0.1)  # headers are not counted
    assert "2:4" in call("run", llama_folder, *flags, "--out", tmp_path / "b", "--dry-run").stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "no-such-model", "--sparsity", "0.5"], "no-such-model"),
        (["run", "LLAMA", "--sparsity", "1.5"], "target.sparsity = 1.5: should be less than 1"),
        (["run", "LLAMA", "--sparsity", "half"], "valid number"),
        (["run", "LLAMA"], "nothing to do"),
        (["run"], "model is missing"),
        (["run", "LLAMA", "--sparsity", "0.5", "--calib", "no-such.txt"], "no-such.txt"),
        (["run", "LLAMA", "--wbits", "4", "--group-size", "48"], "groups of 48 do not divide"),
        (["run", "LLAMA", "--wbits", "4", "--set", "gptq"], "METHOD.KEY=VALUE"),
        (["run", "LLAMA", "--wbits", "4", "--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["run", "LLAMA", "--wbits", "4", "--device", "meta"], "there is no device 'meta'"),
        (["run", "LLAMA", "--wbits", "4", "--set", ".x=1"], "METHOD.KEY=VALUE"),
        (["run", "LLAMA", "--wbits", "4", "--eval-windows", "0"], "--eval-windows"),
        (["run", "--recipe", "no.toml"], "there is no recipe no.toml"),
        (["run", "--recipe", "."], "cannot read the recipe ."),
        (["eval", "LLAMA", "--max-windows", "0"], "--max-windows"),
        (["eval", "LLAMA", "--seqlen", "1"], "--seqlen"),
        (["eval", "LLAMA", "--ppl", "no-such.txt"], "no-such.txt"),
        (["inspect", "."], "neither a checkpoint"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(llama_folder, tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress", *[str(llama_folder) if a == "LLAMA" else a for a in arguments]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and line in last
    assert "Traceback" not in err


def test_nan_weights_stop_the_run_and_name_the_layer(tmp_path, text_file):
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    flags = ["--wbits", 4, "--group-size", 32, "--calib", text_file, "--nsamples", 2, "--seqlen", 32]
    done = call("run", folder, *flags, "--quantizer", "rtn", "--out", tmp_path / "a")
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].startswith("error: model.layers.1.mlp.up_proj holds NaN or infinity")


def test_help_has_examples_and_methods_are_listed():
    assert "compress run gemma-3-270m --sparsity 0.5" in call("run", "--help").stdout
    listed = json.loads(call("methods", "--json").stdout)
    assert {"wanda", "sparsegpt", "magnitude", "gptq", "rtn", "uniform"} <= {method["name"] for method in listed}
    assert "damping" in call("methods").stdout


def test_doctor_answers():
    found = json.loads(call("doctor", "--json").stdout)
    assert found["torch"] and "memory" in found


def test_a_name_in_brackets_is_printed_as_it_is(capsys):
    show(Report({}, ["Checkpoint in a[/b][bold]:smile:"]), as_json=False)
    assert capsys.readouterr().out == "Checkpoint in a[/b][bold]:smile:\n"


def test_the_checkpoint_of_the_current_folder_is_named_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(_beside(model)) for model in ("a/b", "x.gguf", ".", "./")] == [
        *("b-compressed", "x-compressed", f"{tmp_path.name}-compressed", f"{tmp_path.name}-compressed")
    ]


def test_what_the_system_refuses_is_no_bug_of_ours():
    line = "the system says permission denied: /x (--debug shows where)"
    assert failure(PermissionError(13, "Permission denied", "/x"), "--debug shows where") == (3, line)
