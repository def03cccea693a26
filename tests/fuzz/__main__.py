"""Damaged and hostile inputs for a bounded time: python tests/fuzz --seconds 60 [TARGET ...]

A process a target. Where atheris is installed, the lines of compress that an input reaches guide what is tried next;
without it inputs are random. Ends with a table of inputs and outcomes, and with exit code 1 if the contract was broken.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models")]

from targets import TARGETS, Bench  # noqa: E402

STALLED = 30  # times its time, and ten minutes, after which a target is stuck where Python cannot end it
LENGTH = 96  # bytes of an input, of which few are used up


def main() -> int:
    """Run targets one after another and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60, help="of computing for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--input", help="hexadecimal: read this input alone, of one target, and show its traceback")
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"no target {min(unknown)}: there are {', '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    if options.input is not None:
        return _replay(names[0], bytes.fromhex(options.input))
    if options.one is not None:
        _fuzz(names[0], options.seconds, options.seed, Path(options.one))
    totals = {name: _in_a_process(name, options.seconds, options.seed) for name in names}
    return _table(totals)


def _in_a_process(name: str, seconds: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="compress-fuzz-") as folder:
        said, output = Path(folder) / "totals.json", Path(folder) / "output"
        command = [sys.executable, str(HERE), name, "--seconds", str(seconds), "--seed", str(seed), "--one", str(said)]
        with output.open("wb") as out:
            child = subprocess.Popen(command, stdout=out, stderr=out, env=_environment(folder))
            try:
                status = child.wait(600 + STALLED * seconds)
            except subprocess.TimeoutExpired:
                child.kill()
                status = child.wait()
        found = json.loads(said.read_text()) if said.is_file() else {"inputs": 0, "outcomes": {}, "findings": {}}
        if status:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            current = said.with_suffix(".input")
            found["findings"][f"the process ended with {status}: {last}"] = (
                current.read_text() if current.is_file() else ""
            )
        return found


def _environment(folder: str) -> dict[str, str]:
    return os.environ | {"TMPDIR": folder, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_VERBOSITY": "critical"}


def _fuzz(name: str, seconds: float, seed: int, said: Path) -> None:
    """Try inputs until the time is over; never returns."""
    guided = find_spec("atheris") is not None
    if guided:
        import atheris
    bench = Bench(Path(tempfile.mkdtemp()))
    with atheris.instrument_imports(include=["compress"]) if guided else contextlib.nullcontext():
        bench.whole(name)
    outcomes: collections.Counter[str] = collections.Counter()
    findings: dict[str, str] = {}
    end = time.process_time() + seconds

    def attempt(data: bytes) -> None:
        said.with_suffix(".input").write_text(data.hex())
        try:
            outcomes[bench.attempt(name, data)] += 1
        except AssertionError as breach:
            outcomes["broken"] += 1
            findings.setdefault(str(breach), data.hex())
        over = time.process_time() > end
        if over or not outcomes.total() % 10:
            said.write_text(json.dumps({"inputs": outcomes.total(), "outcomes": outcomes, "findings": findings}))
        if over:
            os._exit(0)  # libFuzzer has no other end

    if guided:
        options = [f"-seed={seed + 1}", f"-max_len={LENGTH}", "-len_control=0", "-timeout=600", "-rss_limit_mb=0"]
        atheris.Setup(["fuzz", *options], attempt)
        atheris.Fuzz()
    draw = random.Random(seed)
    while True:
        attempt(draw.randbytes(LENGTH))


def _replay(name: str, data: bytes) -> int:
    with tempfile.TemporaryDirectory(prefix="compress-fuzz-") as folder:
        print(Bench(Path(folder)).attempt(name, data))
    return 0


def _table(totals: dict[str, dict[str, Any]]) -> int:
    """Print the totals. Returns the exit code."""
    keys = ("works", "InputError", "RunError", "broken")
    print(f"{'':14}{'inputs':>9}" + "".join(f"{key:>12}" for key in keys))
    for name, found in totals.items():
        outcomes = found["outcomes"]
        print(f"{name:14}{found['inputs']:>9}" + "".join(f"{outcomes.get(key, 0):>12}" for key in keys))
    broken = [(name, line, data) for name, found in totals.items() for line, data in found["findings"].items()]
    for name, line, data in broken:
        print(f"\n{name}: {line}\n  again: python tests/fuzz {name!r} --input {data}")
    print(
        f"\n{sum(found['inputs'] for found in totals.values())} inputs, {len(broken)} ways in which the contract is broken"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
