"""`compress eval`: what was measured of one checkpoint, or of several beside the first, as tables."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.formats import open_weights
from compress.commands import find_model, pick_device
from compress.comparison import compare, comparison_table
from compress.errors import InputError
from compress.evaluate import TextRequest, measure_texts
from compress.files import write_json
from compress.pipeline import open_model
from compress.progress import Reporter
from compress.report import Report, duration, percent, table, with_error
from compress.tasks import TaskRequest, check_tasks, run_tasks


@dataclass(frozen=True)
class Evaluation:
    """What is asked about each checkpoint."""

    texts: list[TextRequest]
    against: str | None = None  # the dense model, as a user calls it
    tasks: TaskRequest | None = None
    tasks_out: Path | None = None  # lm-eval's own JSON, of a single checkpoint
    save: Path | None = None  # what is measured, as far as it has come

    def check(self) -> None:
        """Raise InputError for what is not there, before any work."""
        for request in self.texts:
            request.check()
        if self.tasks is not None:
            check_tasks(self.tasks)
        for file in (self.save, self.tasks_out):
            if file is not None and not file.parent.is_dir():
                raise InputError(
                    f"there is no folder {file.parent} to write {file.name} in: make it, or choose another"
                )


def evaluation_report(names: list[str], asked: Evaluation, device: str) -> Report:
    """Measure checkpoints (aliases, hub ids, folders) as asked, one after the other.

    Returns of a single one {"checkpoint", "bytes", "perplexity": {text: value, of the first protocol}, "measured": rows
    (measure_texts), "tokens", "seconds"} and with tasks "tasks" (tasks.py); of several {"checkpoints": {name: the same},
    "compared": rows (comparison.py)}. Raises InputError before any work for what is not there.
    """
    reporter, device = Reporter(), pick_device(device)
    asked.check()
    folders = {name: find_model(name, None, reporter) for name in names}
    dense = None if asked.against is None else find_model(asked.against, None, reporter)
    measured: dict[str, dict[str, Any]] = {}
    for title, folder in zip(_titles(list(folders)), folders.values(), strict=True):
        if len(folders) > 1:
            reporter.say(f"measuring {title}")
        measured[title] = _measure(folder, dense, asked, (device, reporter))
        if asked.save is not None:
            write_json(asked.save, _data(measured, len(folders)))
    data = _data(measured, len(folders))
    return Report(data, _several(data) if len(folders) > 1 else _single(data, asked))


def _titles(names: list[str]) -> list[str]:
    """The last parts of names and paths, where these tell them apart."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else names


def _measure(folder: Path, dense: Path | None, asked: Evaluation, means: tuple[str, Reporter]) -> dict[str, Any]:
    """All that is asked about one checkpoint; `means`: the device, and who is told."""
    started, (device, reporter) = time.monotonic(), means
    data: dict[str, Any] = {"checkpoint": str(folder), "bytes": open_weights(folder).nbytes(), "perplexity": {}}
    if asked.texts:
        other = None if dense is None else open_model(dense, device=device)
        rows = measure_texts(open_model(folder, device=device), asked.texts, reporter, other)
        for row in rows:
            data["perplexity"].setdefault(row["text"], row["perplexity"])
        data |= {"measured": rows, "tokens": sum(row["tokens"] for row in rows)}
    if asked.tasks is not None:
        results = run_tasks(folder, asked.tasks, device, reporter)
        data["tasks"] = results.figures
        if asked.tasks_out is not None:
            write_json(asked.tasks_out, results.raw)
    return data | {"seconds": round(time.monotonic() - started, 2)}


def _data(measured: dict[str, dict[str, Any]], asked: int) -> dict[str, Any]:
    """What is said of those of the `asked` checkpoints that are measured."""
    every = list(measured.values())
    return every[0] if asked == 1 else {"checkpoints": dict(measured), "compared": compare(every)}


def _several(data: dict[str, Any]) -> list[Any]:
    first, *_ = names = list(data["checkpoints"])
    legend = f"± is the standard error; in brackets what changes from {first}, with the error of pairs"
    seconds = sum(one["seconds"] for one in data["checkpoints"].values())
    return [comparison_table(names, data["compared"]), f"\n{legend}", f"in {duration(seconds)}"]


def _single(data: dict[str, Any], asked: Evaluation) -> list[Any]:
    tables: list[Any] = []
    if asked.texts:
        tables.append(_texts_table(data["measured"]))
    if asked.tasks is not None:
        tables += [""] * bool(tables) + [_tasks_table(data["tasks"])]
    if asked.tasks_out is not None:
        tables.append(f"lm-eval's results in {asked.tasks_out}")
    closing = f"{data['tokens']} tokens in " if asked.texts else "in "
    return [*tables, f"\n{closing}{duration(data['seconds'])}"]


def _texts_table(rows: list[dict[str, Any]]) -> Any:
    """A line a text and protocol; columns that no line fills are left out."""
    columns = {
        "text": lambda row: row["text"],
        "protocol": lambda row: row["protocol"],
        "perplexity": lambda row: with_error(row["perplexity"], row["perplexity_se"], 3),
        "dense": lambda row: f"{row['dense_perplexity']:.3f}" if "dense_perplexity" in row else "",
        "KL, nats": lambda row: with_error(row["kl"], row["kl_se"], 4) if "kl" in row else "",
        "same top token": lambda row: percent(row["top1"], row["top1_se"]) if "top1" in row else "",
        "a word": lambda row: f"{row['word_perplexity']:.3f}" if "word_perplexity" in row else "",
        "a byte": lambda row: f"{row['byte_perplexity']:.4f}" if "byte_perplexity" in row else "",
        "tokens": lambda row: str(row["tokens"]),
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    kept = {name: column for name, column in cells.items() if any(column)}
    return table("", list(kept), [list(row) for row in zip(*kept.values(), strict=True)])


def _tasks_table(figures: dict[str, dict[str, Any]]) -> Any:
    """A line a task and metric."""
    rows = [
        [task, metric, with_error(each["value"], each["se"], 4), str(found["documents"])]
        for task, found in figures.items()
        for metric, each in found["metrics"].items()
    ]
    return table("", ["task", "metric", "value", "documents"], rows)
