"""`python -m compress.kernels.testing`: check kernels for architectures that are not there, and print a table."""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from compress.errors import InputError
from compress.kernels.testing.aot import BUILD, build_folder
from compress.kernels.testing.configs import CORE
from compress.kernels.testing.gates import (
    AMD,
    EMULATED,
    NVIDIA,
    Row,
    Work,
    check_one,
    concerned,
    known_subjects,
    ratchet,
    table,
)
from compress.kernels.testing.page import page

METRICS = Path(__file__).with_name("metrics.json")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if all gates pass, 1 if one does not, 2 if they cannot be run."""
    options = _options(arguments)
    if options.page is not None:
        options.page.write_text(
            page(options.page.read_text(encoding="utf-8"), json.loads(METRICS.read_text())), "utf-8"
        )
        return 0
    try:
        with build_folder(options.build):
            rows = _rows(options)
    except InputError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    version, kept = _kept()
    if options.update:
        _keep(rows, kept if version == _triton() else {})
    elif version == _triton():
        ratchet(rows, kept)
    else:
        print(f"metrics.json is of Triton {version}, this is {_triton()}: --update", file=sys.stderr)  # noqa: T201
        return 2
    for line in (json.dumps(asdict(row)) for row in rows) if options.json else table(rows):
        print(line)  # noqa: T201
    return int(any(row.failed for row in rows))


def _keep(rows: list[Row], kept: dict[str, dict[str, Any]]) -> None:
    """Write metrics.json, with what was not checked this time as it was."""
    subjects = {subject.config.name: subject for subject in known_subjects()}
    figures = {key: value for key, value in kept.items() if key.rpartition(" ")[0] in subjects}
    for row in rows:
        figures[row.key] = row.kept()
    names = list(subjects)
    used: dict[str, dict[str, str]] = {}
    for key, value in figures.items():
        name, _, _ = key.rpartition(" ")
        for gate in value.get("waived", ()):
            used.setdefault(name, {})[gate] = subjects[name].waived[gate]
    ordered = sorted(figures, key=lambda key: (names.index(key.rpartition(" ")[0]), key))
    metrics = {"triton": _triton(), "waivers": used, "figures": {key: figures[key] for key in ordered}}
    METRICS.write_text(json.dumps(metrics, indent=1) + "\n")


def _kept() -> tuple[str, dict[str, dict[str, Any]]]:
    """The version of Triton that the kept figures are of, and they; none yet: this one."""
    if not METRICS.exists():
        return _triton(), {}
    kept = json.loads(METRICS.read_text())
    return kept["triton"], kept["figures"]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kernel-gates", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="only kernels whose name contains one of these")
    parser.add_argument("--arch", nargs="*", help="for these, such as 100 gfx942, instead of 80 and 90")
    parser.add_argument("--all", action="store_true", help="for all architectures")
    parser.add_argument("--core", action="store_true", help="only one kernel of each kind")
    parser.add_argument("--static", action="store_true", help="compile and read the code, run nothing")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, one a line")
    parser.add_argument("--update", action="store_true", help="keep these figures in metrics.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--page", type=Path, help="write the tables of KERNELS.md from metrics.json, and do no more")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of compiled kernels")
    return parser.parse_args(arguments)


def _rows(options: argparse.Namespace) -> list[Row]:
    archs: list[int | str] = [*NVIDIA, *AMD] if options.all else list(EMULATED)
    if options.arch:
        archs = [int(each) if each.isdigit() else each for each in options.arch]
    parts = options.kernels or [""]
    named = {
        number: subject
        for number, subject in enumerate(known_subjects())
        if any(part in subject.config.name for part in parts) and (not options.core or subject.config.name in CORE)
    }
    if not named:
        raise InputError(f"no kernel is called {' or '.join(options.kernels)}")
    pairs = [(number, arch) for number, subject in named.items() for arch in archs if concerned(subject, arch)]
    work: list[Work] = [(*pair, options.build, not options.static) for pair in pairs]
    if options.jobs == 1:
        return [check_one(each) for each in work]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(check_one, work))


def _triton() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
