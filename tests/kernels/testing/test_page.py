"""KERNELS.md says what metrics.json has, and both are of the kernels that there are."""

import json
from pathlib import Path

from compress.kernels.testing.gates import AMD, NVIDIA
from compress.kernels.testing.page import ARCHITECTURES, BEGIN, END, page, tables

ROOT = Path(__file__).resolve().parents[3]
METRICS = json.loads((ROOT / "kernels/testing/metrics.json").read_text())
FIGURES = {
    "fragments w4a16 g128 fp16 m8 sm_80": {"registers": 89, "spills": 0, "per_weight": 2.4726, "bits": 4.125},
    "w4a16 g128 fp16 128x128 sm_80": {"registers": 255, "spills": 3, "shared": 2048, "bits": 4.125, "error": 0.7},
}


def test_the_page_is_up_to_date():
    text = (ROOT / "KERNELS.md").read_text()
    assert page(text, METRICS) == text, "run python -m compress.kernels.testing --page KERNELS.md"


def test_every_kernel_has_figures_on_every_architecture_it_runs_on():
    kernels = {key.rpartition(" ")[0] for key in METRICS["figures"]}
    for name in kernels:
        on = {arch for arch in ARCHITECTURES if f"{name} {arch}" in METRICS["figures"]}
        assert on in (set(ARCHITECTURES), set(ARCHITECTURES) - set(AMD)), name
    assert {f"sm_{arch}" for arch in NVIDIA} | set(AMD) == set(ARCHITECTURES)


def test_tables_are_grouped_by_what_kernels_are_for():
    lines = list(tables({"figures": FIGURES, "waivers": {"a": {"issue": "why"}, "b": {"issue": "why"}}}))
    heads = [line for line in lines if line.startswith("#")]
    assert "in fragments" in heads[0] and "More than 32" in heads[1]
    assert "| issue | a, b | why |" in lines
    fast = next(line for line in lines if "m8 " in line)
    assert "| 2.47 /  | 50 % |" in fast  # half of what an A100 issues meanwhile
    assert any("| 255, 3 spilt |" in line and "| 2 KiB |" in line for line in lines)


def test_what_is_written_by_hand_stays():
    written = page(f"before\n{BEGIN}\nold\n{END}\nafter\n", {"figures": FIGURES, "waivers": {}})
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
