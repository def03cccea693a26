"""`compress bench ranks`: one run shared by 1, 2, ... processes of this machine: seconds of each stage, and whether the files agree.

Every process has one thread, so that a rank is a core. Times are those of the first rank, with what it waits for others.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from compress.errors import InputError, RunError
from compress.files import sha256, write_text
from compress.recipe import Recipe
from compress.report import Report, duration, size, table
from compress.run_dir import Finished, Journal

WHOLE = "whole run"


def bench_ranks(recipe: Recipe, counts: list[int]) -> Report:
    """Run a recipe once with each number of ranks. Raises InputError for fewer than two numbers, RunError if a run fails."""
    if len(counts) < 2:
        raise InputError("give two numbers of ranks at least, such as --ranks 1,2")
    runs = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="compress-ranks-") as folder:
            runs.append(_measured(recipe, count, Path(folder)))
    first = runs[0]
    rows = []
    for stage in first["seconds"]:
        times = [run["seconds"][stage] for run in runs]
        ratios = [f"{times[0] / each:.2f}" if each else "" for each in times[1:]]
        rows.append([stage, *(duration(each) for each in times), *ratios])
    rows.append(["peak memory of a rank", *(size(run["peak_rss_bytes"]) for run in runs), *("" for _ in runs[1:])])
    names = [_ranks(count) for count in counts]
    columns = ["", *names, *(f"speed-up of {name}" for name in names[1:])]
    same = all(run["files"] == first["files"] for run in runs)
    closing = "the checkpoints are the same, byte for byte" if same else "the checkpoints DIFFER"
    return Report({"runs": runs, "same": same}, [table("", columns, rows), closing])


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _measured(recipe: Recipe, count: int, folder: Path) -> dict[str, Any]:
    """Figures of one run: ranks, seconds by stage, peak_rss_bytes of a rank, files with their checksums."""
    file, out = folder / "recipe.toml", folder / "out"
    write_text(file, recipe.toml())
    command = [sys.executable, "-P", "-m", "compress", "run", "--recipe", str(file), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--ranks", str(count), "--json"], env=environment, stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise RunError(f"the run with {_ranks(count)} failed: its error stands above")
    seconds = Counter[str]()
    for line in Journal(out / "run" / "log.jsonl").read():
        if line["event"] == "block":
            seconds.update(line["seconds"])
        elif line["event"] in ("gradients", "recovered", "checkpoint"):
            seconds[line["event"]] += line.get("seconds", line.get("training_seconds", 0.0))
    result = Finished(out / "run").read() or {}
    return {
        "ranks": count,
        "seconds": {name: round(value, 2) for name, value in seconds.items()} | {WHOLE: result["seconds"]},
        "peak_rss_bytes": result["peak_rss_bytes"],
        "files": {each.name: sha256(each) for each in sorted(out.glob("*.safetensors"))},
    }
