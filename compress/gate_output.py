"""Verdicts of gates as a table, as Markdown for the summary of a CI job, and as JUnit's XML."""

import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.files import disk_errors, replace_file
from compress.gate import Verdict
from compress.report import number, size, table

COLUMNS = ["figure", "now", "recorded", "change", "allowed", "verdict"]


@dataclass(frozen=True)
class Gated:
    """One target and its verdicts."""

    target: str
    baseline: str
    verdicts: list[Verdict]
    seconds: float

    @property
    def held(self) -> bool:
        """Whether nothing is worse."""
        return all(verdict.says != "worse" for verdict in self.verdicts)

    def data(self) -> dict[str, Any]:
        """The same as JSON has it."""
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        return {"target": self.target, "baseline": self.baseline, "held": self.held, "verdicts": verdicts}

    @property
    def line(self) -> str:
        """The verdict in one line."""
        worse = [verdict.name for verdict in self.verdicts if verdict.says == "worse"]
        return f"{self.target}: worse in {'; '.join(worse)}" if worse else f"{self.target}: holds"


def text_tables(gates: list[Gated]) -> list[Any]:
    """A table for each target and its line below."""
    return [part for gate in gates for part in (table("", COLUMNS, _cells(gate)), f"{gate.line}\n")]


def append_markdown(file: Path, gates: list[Gated]) -> None:
    """Add the tables to the end of a file, which CI jobs share ($GITHUB_STEP_SUMMARY)."""
    lines: list[str] = []
    for gate in gates:
        lines += [f"### {'✅' if gate.held else '❌'} {_escaped(gate.line)}", ""]
        lines += [_row(COLUMNS), "| --- |" + " ---: |" * 4 + " --- |"]
        lines += [_row([*row[:-1], f"**{row[-1]}**" if row[-1] == "worse" else row[-1]]) for row in _cells(gate)]
        lines.append("")
    with disk_errors(file), file.open("a", encoding="utf-8") as opened:
        opened.write("\n".join(lines) + "\n")


def write_junit(file: Path, gates: list[Gated]) -> None:
    """A test suite for each target, a test case for each figure, as CI servers read them."""
    root = ET.Element("testsuites", name="compress gate")
    for gate in gates:
        failed = [verdict for verdict in gate.verdicts if verdict.says == "worse"]
        about = {"name": gate.target, "tests": str(len(gate.verdicts)), "failures": str(len(failed)), "errors": "0"}
        suite = ET.SubElement(root, "testsuite", about | {"time": f"{gate.seconds:.3f}"})
        for verdict, cells in zip(gate.verdicts, _cells(gate), strict=True):
            case = ET.SubElement(suite, "testcase", classname=gate.target, name=verdict.name)
            said = ", ".join(f"{column} {cell}" for column, cell in zip(COLUMNS[1:-1], cells[1:-1], strict=True))
            if verdict.says == "worse":
                ET.SubElement(case, "failure", message=f"{verdict.name} is worse", type="worse").text = said
            else:
                ET.SubElement(case, "system-out").text = said
    ET.indent(root)
    replace_file(file, lambda aside: ET.ElementTree(root).write(aside, encoding="utf-8", xml_declaration=True))


def _cells(gate: Gated) -> list[list[str]]:
    return [
        [
            verdict.name,
            _shown(verdict.kind, verdict.value),
            _shown(verdict.kind, verdict.recorded),
            ("+" if verdict.value > verdict.recorded else "") + _shown(verdict.kind, verdict.value - verdict.recorded),
            _shown(verdict.kind, verdict.band),
            verdict.says,
        ]
        for verdict in gate.verdicts
    ]


def _shown(kind: str, value: float) -> str:
    """A figure for people, with as many digits as its kind takes."""
    if kind == "size":
        return size(value)
    return number(value) if kind in ("perplexity", "speed") else f"{value:.4f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
