"""`compress eval`: what was measured, as tables."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.commands import find_model, pick_device
from compress.evaluate import TextRequest, measure_texts
from compress.files import write_json
from compress.pipeline import open_model
from compress.progress import Reporter
from compress.report import Report, duration, table
from compress.tasks import TaskRequest, require_tasks, run_tasks


@dataclass(frozen=True)
class Evaluation:
    """What is asked about a checkpoint."""

    texts: list[TextRequest]
    against: str | None = None  # the dense model, as a user calls it
    tasks: TaskRequest | None = None
    tasks_out: Path | None = None  # lm-eval's own JSON


def evaluation_report(name: str, asked: Evaluation, device: str) -> Report:
    """Measure a checkpoint (an alias, a hub id, a folder) as asked.

    Returns {"checkpoint", "perplexity": {text: value, of the first protocol}, "measured": rows (measure_texts), "tokens",
    "seconds"} and with tasks "tasks" (tasks.py). Raises InputError before any work for what is not there.
    """
    started, reporter, device = time.monotonic(), Reporter(), pick_device(device)
    for request in asked.texts:
        request.check()
    if asked.tasks is not None:
        require_tasks()
    folder = find_model(name, None, reporter)
    dense = None if asked.against is None else find_model(asked.against, None, reporter)
    data: dict[str, Any] = {"checkpoint": str(folder), "perplexity": {}}
    tables: list[Any] = []
    if asked.texts:
        other = None if dense is None else open_model(dense, device=device)
        rows = measure_texts(open_model(folder, device=device), asked.texts, reporter, other)
        for row in rows:
            data["perplexity"].setdefault(row["text"], row["perplexity"])
        data |= {"measured": rows, "tokens": sum(row["tokens"] for row in rows)}
        tables.append(_texts_table(rows))
    if asked.tasks is not None:
        results = run_tasks(folder, asked.tasks, device, reporter)
        data["tasks"] = results.figures
        tables += [""] * bool(tables) + [_tasks_table(results.figures)]
        if asked.tasks_out is not None:
            write_json(asked.tasks_out, results.raw)
            tables.append(f"lm-eval's results in {asked.tasks_out}")
    data["seconds"] = round(time.monotonic() - started, 2)
    closing = f"{data['tokens']} tokens in " if asked.texts else "in "
    return Report(data, [*tables, f"\n{closing}{duration(data['seconds'])}"])


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


def with_error(value: float, se: float | None, digits: int) -> str:
    """A value with its standard error, if it has one."""
    return f"{value:.{digits}f}" + ("" if se is None else f" ± {se:.{digits}f}")


def percent(share: float, se: float | None) -> str:
    """The same for a share of 1."""
    return with_error(100 * share, None if se is None else 100 * se, 2) + " %"
