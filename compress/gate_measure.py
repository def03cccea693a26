"""What a gate measures of a checkpoint."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.bench.decode import DecodeRequest, bench_decode
from compress.checkpoint.formats import open_weights
from compress.commands import find_model
from compress.errors import InputError
from compress.eval.speed import SpeedProtocol
from compress.evaluate import TextRequest, measure_texts
from compress.gate import Figure
from compress.pipeline import open_model
from compress.progress import Reporter
from compress.recipe import validation_line
from compress.tasks import TaskRequest, check_tasks, run_tasks

SPEED = SpeedProtocol(seqlen=128, new_tokens=32, repeats=1)


class Asked(BaseModel):
    """Everything that decides what a gate's figures are; a baseline keeps it, so that later gates measure the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    texts: list[TextRequest] = []
    against: str | None = None  # the dense model, for divergence and speed
    tasks: TaskRequest | None = None
    speed: bool = False

    def check(self) -> None:
        """Raise InputError for what is not there, before any work."""
        for request in self.texts:
            request.check()
        if self.tasks is not None:
            check_tasks(self.tasks)
        if self.speed and self.against is None:
            raise InputError("--speed is a ratio to the dense model: give it with --against")


def read_asked(values: dict[str, Any], file: Path) -> Asked:
    """What a baseline says is measured. Raises InputError if it cannot be read."""
    try:
        return Asked.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{file}, asked: {validation_line(error)}") from error


def measure_figures(folder: Path, asked: Asked, device: str, reporter: Reporter) -> dict[str, Figure]:
    """The figures of a checkpoint by name: perplexity, kl and top1 of each text, tasks, size and speed."""
    dense = None if asked.against is None else find_model(asked.against, None, reporter)
    figures = {"size": Figure("size", float(open_weights(folder).nbytes()))}
    if asked.texts:
        other = None if dense is None else open_model(dense, device=device)
        for row in measure_texts(open_model(folder, device=device), asked.texts, reporter, other):
            figures |= _of_text(row)
    if asked.tasks is not None:
        figures |= _of_tasks(folder, asked.tasks, device, reporter)
    if asked.speed and dense is not None:
        found = bench_decode(DecodeRequest({"dense": dense, "checkpoint": folder}, SPEED), device).data["speed"]
        figures["decode speed, x dense"] = Figure("speed", found["checkpoint"]["decode_speedup"])
    return figures


def _of_text(row: dict[str, Any]) -> dict[str, Figure]:
    """Lm-eval's protocol counts by words, since tokens are no measure across tokenizers."""
    where = f"{row['text']}, {row['protocol']}"
    found = {f"perplexity, {where}": Figure("perplexity", row.get("word_perplexity", row["perplexity"]))}
    if "kl" in row:
        found |= {f"{kind}, {where}": Figure(kind, row[kind]) for kind in ("kl", "top1")}
    return found


def _of_tasks(folder: Path, request: TaskRequest, device: str, reporter: Reporter) -> dict[str, Figure]:
    return {
        f"{task}, {metric}": Figure("task", one["value"], one["se"], one["each"], not one["higher_is_better"])
        for task, found in run_tasks(folder, request, device, reporter).figures.items()
        for metric, one in found["metrics"].items()
    }


def described(asked: Asked) -> dict[str, Any]:
    """What is asked, as a baseline's file has it; what is left to a protocol is left out."""
    values: dict[str, Any] = asked.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    return values
