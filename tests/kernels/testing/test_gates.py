import json
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

from packed_weights import sparse_weight

from compress.errors import InputError
from compress.kernels.gemm.configs import KernelConfig
from compress.kernels.gemm.launch import Launch
from compress.kernels.sparse24.layout import SlicedSparse24Weight
from compress.kernels.testing import __main__ as command
from compress.kernels.testing import gates
from compress.kernels.testing.configs import Subject
from compress.kernels.testing.gates import Row, ratchet, table


def row(**figures):
    return Row("k", "sm_80", **figures)


@pytest.mark.parametrize(("now", "fails"), [(100, False), (103, False), (104, True), (50, False)])
def test_the_ratchet_lets_nothing_get_worse_by_more_than_three_percent(now, fails):
    found = row(registers=now)
    ratchet([found], {"k sm_80": {"registers": 100}})
    assert bool(found.failed) == fails


def test_the_ratchet_starts_at_zero_spills():
    found = row(spills=1)
    ratchet([found], {"k sm_80": {"spills": 0}})
    assert found.failed == ["ratchet: spills 0 -> 1"]


def test_what_is_new_passes():
    found = row(registers=100)
    ratchet([found], {})
    assert found.failed == []


def test_a_waived_gate_is_shown_and_does_not_fail():
    config = KernelConfig("k", None, {}, {}, 4, 3, 0)
    subject = Subject(config, 4, lambda: None, waived={"issue": "why"})
    found = row()
    gates._judge(found, subject, {"issue": False, "spills": False, "loads": True})
    assert (found.failed, found.waived) == (["spills"], ["issue"])
    last = list(table([found]))[-1]
    assert "FAIL spills" in last
    assert "waived: issue" in last


def test_a_gate_can_be_waived_on_one_architecture():
    subject = Subject(KernelConfig("k", None, {}, {}, 4, 3, 0), 4, lambda: None, waived={"spills sm_80": "why"})
    here, elsewhere = row(), Row("k", "sm_90")
    for found in (here, elsewhere):
        gates._judge(found, subject, {"spills": False})
    assert (here.failed, here.waived) == ([], ["spills sm_80"])
    assert (elsewhere.failed, elsewhere.waived) == (["spills"], [])


def test_the_budget_of_instructions():
    assert gates._within(0.5, row(per_weight=1.0, budget=2.0))
    assert not gates._within(0.5, row(per_weight=1.1, budget=2.0))
    assert gates.GPUS[80].budget(4) == pytest.approx(gates.OUTRUN[100] * gates.GPUS[100].budget(4), rel=0.02)


def test_kernels_are_checked_where_they_run():
    subjects = {subject.config.name: subject for subject in command.known_subjects()}
    for name, on_amd in (("w4a16 g128 fp16 16x128", True), ("fragments w4a16 g128 fp16 m8", False)):
        assert gates.concerned(subjects[name], 80)
        assert gates.concerned(subjects[name], "gfx942") == on_amd
    assert not gates.concerned(subjects["2:4 w4 g128 bf16 32x64"], "gfx942")  # they get tiles of 16 tokens


SPARSE = [SlicedSparse24Weight.from_sparse(sparse_weight((8, 128), bits, 128)) for bits in (2, 4, 8)]


@pytest.mark.parametrize(
    "module", ["wna16.triton", "w8a8.triton", "sparse24.triton", "codebook.triton", "fragments.gluon"]
)
def test_all_tiles_that_are_launched_are_compiled(module):
    family = import_module(f"compress.kernels.{module}")
    weights = SPARSE if module == "sparse24.triton" else [None]  # the others' tiles are those of any weight
    compiled = {
        Launch(config.constexprs["BLOCK_M"], config.constexprs["BLOCK_N"], config.num_warps, config.num_stages)
        for config in family.CONFIGS
    }
    assert {tile for weight in weights for tile in family.tiles(weight)} <= compiled


def test_every_row_of_a_table_has_its_width():
    lines = list(table([row(registers=7, per_weight=1.234, budget=2.0), Row("another kernel", "gfx942")]))
    assert len({len(line) for line in lines}) == 1
    assert "1.23" in lines[2]
    assert "| 62 " in lines[2]


def test_metrics_are_kept_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "METRICS", tmp_path / "metrics.json")
    subject = Subject(KernelConfig("k", None, {}, {}, 4, 3, 0), 4, lambda: None)
    monkeypatch.setattr(command, "known_subjects", lambda: (subject,))
    old = {"k sm_90": {"registers": 7}, "gone sm_80": {"registers": 9}}
    command.METRICS.write_text(json.dumps({"triton": command._triton(), "figures": old}))
    results = iter([row(registers=100), row(registers=100), row(registers=120)])
    monkeypatch.setattr(command, "_rows", lambda options: [next(results)])
    build = ["--build", str(tmp_path)]
    assert command.main([*build, "--update"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["figures"] == {
        "k sm_80": {"registers": 100},
        "k sm_90": {"registers": 7},
    }
    assert command.main([*build, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["registers"] == 100
    assert command.main(build) == 1
    assert "ratchet: registers 100 -> 120" in capsys.readouterr().out


def test_metrics_of_another_triton_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "METRICS", tmp_path / "metrics.json")
    monkeypatch.setattr(command, "_rows", lambda options: [row(registers=1)])
    (tmp_path / "metrics.json").write_text('{"triton": "0.1", "figures": {}}')
    assert command.main(["--build", str(tmp_path)]) == 2


def test_a_kernel_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "known_subjects", lambda: ())
    options = command._options(["nothing", "--build", str(tmp_path)])
    with pytest.raises(InputError, match="no kernel is called nothing"):
        command._rows(options)


def test_kept_metrics_are_of_kernels_that_exist():
    if not command.METRICS.exists():
        pytest.skip("no metrics are kept")
    names = {subject.config.name for subject in command.known_subjects()}
    kept = json.loads(Path(command.METRICS).read_text())["figures"]
    assert {key.rpartition(" ")[0] for key in kept} <= names
