"""What counts as worse, and how it is said."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import InputError
from compress.gate import Figure, hold, read_baseline, record
from compress.gate_output import Gated, append_markdown, text_tables, write_junit


def verdict(recorded, now, **figure):
    """What a figure comes to against those of recorded runs."""
    kind = figure.pop("kind", "perplexity")
    runs = [{"x": Figure(kind, value, **figure)} for value in recorded]
    return hold(record({}, runs), {"x": Figure(kind, now, **figure)})[0]


@pytest.mark.parametrize(
    ("kind", "recorded", "now", "says"),
    [
        ("perplexity", 20.0, 20.3, "same"),
        ("perplexity", 20.0, 20.5, "worse"),
        ("perplexity", 20.0, 19.5, "better"),
        ("kl", 0.2, 0.22, "worse"),
        ("top1", 0.80, 0.78, "worse"),
        ("top1", 0.80, 0.82, "better"),
        ("size", 1000.0, 1020.0, "worse"),
        ("size", 1000.0, 1005.0, "same"),
        ("speed", 1.5, 1.2, "same"),
        ("speed", 1.5, 1.0, "worse"),
    ],
)
def test_a_single_run_leaves_the_tolerance_of_its_kind(kind, recorded, now, says):
    assert verdict([recorded], now, kind=kind).says == says


@given(st.lists(st.floats(10, 30), min_size=2, max_size=6), st.floats(5, 40))
def test_the_direction_decides_between_worse_and_better(values, now):
    found = verdict(values, now)
    mean = sum(values) / len(values)
    assert found.change == pytest.approx(now - mean)
    assert found.says == ("same" if abs(found.change) <= found.band else "worse" if now > mean else "better")
    assert found.band >= 0.02 * mean * 0.999


@pytest.mark.parametrize("k", [2, 3, 5])
def test_one_run_in_a_hundred_of_the_same_quality_is_called_worse(k):
    generator = torch.Generator().manual_seed(k)
    draws = 20 + torch.randn(4000, k + 1, dtype=torch.float64, generator=generator) * 5  # far beyond the tolerance
    worse = sum(verdict(row[:k].tolist(), row[k].item()).says == "worse" for row in draws) / 4000
    assert 0.004 < worse < 0.02


def test_a_tolerance_of_the_file_is_what_counts():
    baseline = record({}, [{"x": Figure("perplexity", 20.0)}])
    loose = baseline.model_copy(update={"tolerance": {"perplexity": 0.1}})
    assert hold(loose, {"x": Figure("perplexity", 21.0)})[0].says == "same"
    assert hold(baseline, {"x": Figure("perplexity", 21.0)})[0].says == "worse"


def test_tasks_are_compared_document_by_document():
    recorded = [1.0] * 60 + [0.0] * 40
    now = [1.0] * 52 + [0.0] * 48  # eight documents lost, none won: far beyond the error of their difference
    runs = [{"x": Figure("task", 0.60, 0.049, recorded)}]
    paired = hold(record({}, runs), {"x": Figure("task", 0.52, 0.05, now)})[0]
    assert paired.says == "worse" and paired.band == pytest.approx(2.326 * (0.08 * 0.92 / 99) ** 0.5, rel=1e-3)
    alone = hold(record({}, [{"x": Figure("task", 0.60, 0.049)}]), {"x": Figure("task", 0.52, 0.05)})[0]
    assert alone.says == "same" and alone.band == pytest.approx(2.326 * 0.07, rel=1e-2)
    assert verdict([0.6], 0.6, kind="task", each=recorded).says == "same"


def test_a_task_whose_metric_is_better_low_gets_worse_upwards():
    assert verdict([10.0], 20.0, kind="task", se=1.0, lower=True).says == "worse"
    assert verdict([10.0], 5.0, kind="task", se=0.5, lower=True).says == "better"


def test_a_baseline_is_read_as_it_was_written(tmp_path):
    runs = [{"a": Figure("task", v, 0.1, [v, 1.0, v]), "b": Figure("size", 9.0)} for v in (0.0, 1.0)]
    baseline = record({"texts": []}, runs)
    file = tmp_path / "b.json"
    file.write_text(baseline.model_dump_json(exclude_defaults=True))
    assert read_baseline(file) == baseline
    assert baseline.figures["a"].each == [0.5, 1.0, 0.5] and baseline.figures["a"].values == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "there is no baseline .*--record"),
        ("{", "is no baseline"),
        ('{"asked": {}, "figures": {"x": {"kind": "taste", "values": [1]}}}', "figures.x.kind"),
        ('{"asked": {}, "figures": {"x": {"kind": "size", "values": []}}}', "figures.x.values"),
        ('{"asked": {}, "figures": {}, "version": 2}', "version"),
        ('{"asked": {}, "figures": {"x": {"kind": "size", "values": [NaN]}}}', "figures.x.values"),
        ('{"asked": {}, "figures": {"x": {"kind": "size", "values": [1e999]}}}', "figures.x.values"),
        ('{"asked": {}, "figures": {"x": {"kind": "size", "values": [1e300, 1]}}}', "figures.x.values"),
        ('{"asked": {}, "figures": {}, "tolerance": {"size": NaN}}', "tolerance.size"),
        ('{"asked": ' * 50_000, "is no baseline"),
    ],
)
def test_a_file_that_is_no_baseline_is_one_line(tmp_path, text, line):
    file = tmp_path / "b.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=line):
        read_baseline(file)


def test_a_figure_that_was_not_measured_is_named():
    with pytest.raises(InputError, match=r"perplexity, a.* was not measured now"):
        hold(record({}, [{"perplexity, a": Figure("perplexity", 2.0)}]), {})


@pytest.fixture
def gates():
    baseline = record({}, [{"perplexity, a|b": Figure("perplexity", 20.0), "size": Figure("size", 2048.0)}])
    figures = {"perplexity, a|b": Figure("perplexity", 30.0), "size": Figure("size", 2048.0)}
    return [
        Gated("bad", "bad.json", hold(baseline, figures), 1.5),
        Gated("good", "good.json", hold(baseline, {**figures, "perplexity, a|b": Figure("perplexity", 20.0)}), 2.0),
    ]


def test_junit_has_a_case_for_each_figure_and_a_failure_for_what_is_worse(gates, tmp_path):
    write_junit(tmp_path / "j.xml", gates)
    suites = ET.parse(tmp_path / "j.xml").getroot().findall("testsuite")
    assert [(s.get("name"), s.get("tests"), s.get("failures")) for s in suites] == [
        ("bad", "2", "1"),
        ("good", "2", "0"),
    ]
    failed = [case for case in suites[0] if case.find("failure") is not None]
    assert [case.get("name") for case in failed] == ["perplexity, a|b"]
    assert "now 30.00, recorded 20.00, change +10.00, allowed 0.40" in failed[0].find("failure").text


def test_markdown_is_added_to_what_is_there(gates, tmp_path):
    file = tmp_path / "summary.md"
    file.write_text("before\n")
    append_markdown(file, gates)
    lines = file.read_text().splitlines()
    assert lines[0] == "before" and lines[1] == "### ❌ bad: worse in perplexity, a\\|b"
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1  # a bar in a name makes no column
    assert sum("**worse**" in line for line in rows) == 1


def test_a_gate_holds_if_nothing_is_worse(gates):
    assert [gate.held for gate in gates] == [False, True]
    assert json.dumps([gate.data() for gate in gates]) and len(text_tables(gates)) == 4
