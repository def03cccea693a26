"""`python -m compress.kernels.testing`: check every kernel for every architecture, and print a table."""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from compress.errors import InputError
from compress.kernels.testing.aot import BUILD, build_folder
from compress.kernels.testing.gates import AMD, NVIDIA, Row, Work, check_one, known_subjects, ratchet, table

METRICS = Path(__file__).with_name("metrics.json")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if all gates pass, 1 if one does not, 2 if they cannot be run."""
    options = _options(arguments)
    try:
        with build_folder(options.build):
            rows = _rows(options)
    except InputError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    version, kept = _kept()
    if options.update:
        names = {subject.config.name for subject in known_subjects()}
        valid = {key: value for key, value in kept.items() if version == _triton() and key.rpartition(" ")[0] in names}
        figures = valid | {row.key: row.figures() for row in rows}
        METRICS.write_text(json.dumps({"triton": _triton(), "figures": dict(sorted(figures.items()))}, indent=1) + "\n")
    elif version == _triton():
        ratchet(rows, kept)
    else:
        print(f"metrics.json is of Triton {version}, this is {_triton()}: --update", file=sys.stderr)  # noqa: T201
        return 2
    for line in (json.dumps(asdict(row)) for row in rows) if options.json else table(rows):
        print(line)  # noqa: T201
    return int(any(row.failed for row in rows))


def _kept() -> tuple[str, dict[str, dict[str, float]]]:
    """The version of Triton that the kept figures are of, and they; none yet: this one."""
    if not METRICS.exists():
        return _triton(), {}
    kept = json.loads(METRICS.read_text())
    return kept["triton"], kept["figures"]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kernel-gates", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="only kernels whose name contains one of these")
    parser.add_argument("--arch", nargs="*", help="only these, such as 80 gfx942")
    parser.add_argument("--static", action="store_true", help="compile and read the code, run nothing")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, one a line")
    parser.add_argument("--update", action="store_true", help="keep these figures in metrics.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of compiled kernels")
    return parser.parse_args(arguments)


def _rows(options: argparse.Namespace) -> list[Row]:
    archs: list[int | str] = [*NVIDIA, *AMD]
    if options.arch:
        archs = [int(each) if each.isdigit() else each for each in options.arch]
    parts = options.kernels or [""]
    named = [i for i, each in enumerate(known_subjects()) if any(part in each.config.name for part in parts)]
    if not named:
        raise InputError(f"no kernel is called {' or '.join(options.kernels)}")
    work: list[Work] = [(number, arch, options.build, not options.static) for number in named for arch in archs]
    if options.jobs == 1:
        return [check_one(each) for each in work]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(check_one, work))


def _triton() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
