import json
import os

import pytest
import torch

from compress.errors import InputError, RunError
from compress.recipe import Recipe
from compress.run_dir import Finished, Journal, RunDir, Shared

RECIPE = Recipe(model="m", target={"sparsity": 0.5})
TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}


@pytest.fixture
def run(tmp_path):
    opened = RunDir(tmp_path / "run", RECIPE, {"model": {"files": 1}})
    yield opened
    opened.close()


def test_a_block_comes_back_as_it_was(run):
    run.save("0003", TENSORS, {"version": 1}, {"weights": 7})
    assert run.has("0003") and not run.has("0004")
    tensors, manifest = run.restore("0003")
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert manifest == {"version": 1} and run.figures("0003") == {"weights": 7}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "mark", "figures"])
def test_a_damaged_block_counts_as_missing(run, damage):
    run.save("0000", TENSORS, {}, {})
    file = run.blocks / "0000.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-3])
    elif damage == "remove":
        file.unlink()
    elif damage == "mark":
        (run.blocks / "0000.json").write_text("{")
    else:
        mark = json.loads((run.blocks / "0000.json").read_text())
        (run.blocks / "0000.json").write_text(json.dumps({"sha256": mark["sha256"]}))
    assert not run.has("0000")
    if damage not in ("mark", "figures"):
        assert run.journal.read()[-1]["event"] == "damaged"
    run.save("0000", TENSORS, {}, {})
    assert run.has("0000")


def test_a_kill_between_data_and_mark_leaves_the_block_undone(run):
    run.save("0000", TENSORS, {}, {})
    (run.blocks / "0000.json").unlink()
    assert not run.has("0000")


def test_a_second_process_is_turned_away(run):
    with pytest.raises(RunError, match="in use by another process"):
        RunDir(run.path, RECIPE, {"model": {"files": 1}})


def test_another_recipe_is_refused_naming_the_keys(run):
    run.close()
    other = Recipe(model="m", target={"sparsity": 0.6}, calib={"seed": 1})
    with pytest.raises(InputError, match=r"another calib\.seed, target\.sparsity"):
        RunDir(run.path, other, {"model": {"files": 1}})
    RunDir(run.path, RECIPE, {"model": {"files": 1}}).close()  # the refusal let go of the lock


def test_other_weights_under_the_same_name_are_refused(run):
    run.close()
    with pytest.raises(InputError, match="other weights"):
        RunDir(run.path, RECIPE, {"model": {"files": 2}})


def test_once_makes_once(run):
    made = []
    for _ in range(2):
        tokens = run.once("tokens", lambda: made.append(1) or {"tokens": torch.arange(3)})["tokens"]
    assert made == [1] and tokens.tolist() == [0, 1, 2]


def test_runs_that_calibrate_alike_share_tokens_and_nothing_else(tmp_path):
    def opened(name, model=1, **changes):
        return RunDir(
            tmp_path / name, Recipe(**RECIPE.model_dump() | changes), {"model": model}, Shared(tmp_path / "shared")
        )

    def folders(*arguments, **changes):
        run = opened(*arguments, **changes)
        run.close()
        assert run.folder_of("measured") == run.path
        assert run.folder_of("tokens") == run.folder_of("gradients") != run.path
        return run.folder_of("tokens")

    first = folders("a")
    assert folders("b", pruner="wanda", target={"sparsity": 0.7}) == first
    assert folders("c", calib={"refresh_gradients": 2}) == first
    others = [
        folders("d", calib={"seed": 1}),
        folders("e", dtype="float32"),
        folders("f", model=2),
        folders("g", target={"sparsity": 0.5, "head_bits": 8}),
    ]
    assert len({first, *others}) == 5
    held = opened("a")
    with pytest.raises(RunError, match="in use by another process"):
        opened("b", pruner="wanda", target={"sparsity": 0.7})
    held.close()
    assert held.once("tokens", lambda: {"tokens": torch.arange(3)})["tokens"].tolist() == [0, 1, 2]
    assert (first / "tokens.safetensors").is_file()


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    file = tmp_path / "log.jsonl"
    Journal(file).write(event="a")
    with file.open("a") as log:
        log.write('{"event": "b", "sec')
    journal = Journal(file)
    journal.write(event="c")
    assert [line["event"] for line in journal.read()] == ["a", "c"]
    assert [line["event"] for line in journal.this_sitting()] == ["c"]
    assert json.loads(file.read_text().splitlines()[0])["time"] > 0


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_files_of_a_run_are_one_line_with_the_mend(run, content):
    run.close()
    for name in ("result.json", "run.json", "tokens.safetensors"):
        (run.path / name).write_text(content)
    with pytest.raises(RunError, match=r"result\.json is damaged .*: remove it"):
        Finished(run.path).read()
    with pytest.raises(RunError, match=r"tokens\.safetensors is damaged .*: remove it"):
        run.once("tokens", dict)
    with pytest.raises(RunError, match=r"run\.json is damaged .*: remove it"):
        RunDir(run.path, RECIPE, {"model": {"files": 1}})
    (run.path / "recipe.toml").write_text("model = 5")
    with pytest.raises(InputError, match=r"recipe\.toml is damaged .*: remove .* to start over"):
        RunDir(run.path, RECIPE, {"model": {"files": 1}})


def test_blocks_are_never_taken_for_those_of_a_recipe_that_is_gone(run):
    run.save("0000", TENSORS, {}, {})
    run.close()
    (run.path / "recipe.toml").unlink()
    with pytest.raises(InputError, match=r"blocks of a run whose recipe\.toml is gone"):
        RunDir(run.path, RECIPE, {"model": {"files": 1}})


@pytest.mark.parametrize("manifest", [None, "{", "[" * 50_000])
def test_a_block_whose_manifest_is_none_is_one_line(run, manifest):
    """Its checksum holds: it was written so."""
    from compress.files import sha256, write_json, write_tensors

    data, mark = run._block("0000")
    write_tensors(data, TENSORS, None if manifest is None else {"manifest": manifest})
    write_json(mark, {"sha256": sha256(data), "figures": {}})
    assert run.has("0000")
    with pytest.raises(RunError, match=r"0000\.safetensors is damaged .*: remove it"):
        run.restore("0000")


def test_a_run_follows_no_link_and_waits_for_no_pipe(run, tmp_path):
    run.close()
    os.mkfifo(run.path / "tokens.safetensors")
    with pytest.raises(RunError, match=r"tokens\.safetensors is no ordinary file"):
        RunDir(run.path, RECIPE, {"model": {"files": 1}})
    (run.path / "tokens.safetensors").unlink()
    (run.path / "blocks" / "0000.json").symlink_to(tmp_path.parent)
    with pytest.raises(RunError, match=r"0000\.json is a link out of its folder"):
        RunDir(run.path, RECIPE, {"model": {"files": 1}})


@pytest.mark.parametrize(
    "line",
    [
        {"event": "layer"},
        {"event": "layer", "layer": 5},
        {"event": "saturation", "share": 0.5},
        {"event": "block", "block": "0", "seconds": {}},
        {"event": "block", "block": 0, "seconds": {"load": None}},
        {"event": "a", "notes": "abc"},
        {"event": "a", "time": "now"},
        {"event": "a", "time": 1e300},
        {"event": 5},
        {},
    ],
)
def test_a_line_that_is_none_of_ours_is_left_out(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    assert [each["event"] for each in Journal(tmp_path / "log.jsonl").read()] == ["damaged"]


def test_a_damaged_line_of_the_journal_does_not_cost_the_rest(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"event": "a"}\n\xff{{\n[]\n{"event": "b"}\n')
    assert [line["event"] for line in Journal(file).read()] == ["a", "damaged", "damaged", "b"]
