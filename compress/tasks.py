"""Tasks of lm-eval on a checkpoint of any format that is read here: `compress eval --tasks`, and the gate's.

The model goes through our loader and multiplies by packed weights as it does when it is served (hf.py), with a decoded
copy of each layer kept, since every prompt is long.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from compress.calib.model_files import first_line
from compress.calib.skeleton import load_tokenizer
from compress.errors import CompressError, InputError
from compress.hf import load_model
from compress.progress import Reporter


@dataclass(frozen=True)
class TaskRequest:
    """What lm-eval is asked for."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # where a baseline's file has it
    names: tuple[str, ...]  # of tasks, groups and tags; * and ? as in file names
    limit: int | None = None  # the first documents of each
    include_path: Path | None = None  # a folder of YAML files with more tasks
    batch_size: int = 8
    max_length: int = 2048  # tokens of a window; lm-eval would take the model's, tens of thousands for some


@dataclass(frozen=True)
class TaskResults:
    """`figures`: {task: {"documents", "metrics": {name: {"value", "se", "higher_is_better", "each"}}}}.

    `each`: a number for each document in turn, whose mean is the value; None for metrics that are no means. `raw`: what
    lm-eval gives, as its own results files have it.
    """

    figures: dict[str, dict[str, Any]]
    raw: dict[str, Any]


def check_tasks(request: TaskRequest) -> Any:
    """lm-eval's manager that knows these tasks. Raises InputError where lm-eval or a task is missing. Reads no data."""
    if find_spec("lm_eval") is None:
        raise InputError('--tasks takes lm-eval: pip install "compress-llm[eval]"')
    from compress.harness import find_tasks

    if request.include_path is not None and not request.include_path.is_dir():
        raise InputError(f"--include-path {request.include_path} is no folder: give one that holds tasks' YAML files")
    manager, unknown = find_tasks(list(request.names), request.include_path)
    if unknown:
        raise InputError(f"lm-eval knows no task {unknown[0]}: `lm_eval ls tasks` lists them; --include-path adds some")
    return manager


def run_tasks(folder: Path, request: TaskRequest, device: str, reporter: Reporter) -> TaskResults:
    """Measure the checkpoint in `folder` on tasks.

    Raises InputError for tasks that are not known or whose data is out of reach.
    """
    manager, names = check_tasks(request), list(request.names)
    from compress.harness import harness_results

    reporter.say(f"tasks of lm-eval: {', '.join(names)}")
    model, tokenizer = load_model(folder, "dense", device), load_tokenizer(folder)
    sizes = {"limit": request.limit, "batch_size": request.batch_size, "max_length": request.max_length}
    try:
        raw = harness_results(model, tokenizer, manager, {"tasks": names, **sizes})
    except (CompressError, MemoryError):
        raise
    except Exception as error:  # tasks' hooks, datasets and the hub each raise their own
        raise InputError(
            f"lm-eval cannot run {', '.join(names)} ({type(error).__name__}: {first_line(error)}): check the tasks' files "
            "and data"
        ) from error
    samples = raw.pop("samples", {})
    figures = {task: _figures(raw, task, samples.get(task, [])) for task in raw["results"]}
    return TaskResults({task: found for task, found in figures.items() if found["metrics"]}, raw)


def _figures(raw: dict[str, Any], task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One task's line of lm-eval's results; its keys are METRIC,FILTER and METRIC_stderr,FILTER."""
    found = raw["results"][task]
    better = raw.get("higher_is_better", {}).get(task, {})
    metrics = {}
    for key, value in found.items():
        name, comma, which = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        se = found.get(f"{name}_stderr,{which}")
        mine = [sample for sample in samples if sample.get("filter", which) == which]
        metrics[name if which == "none" else f"{name}, {which}"] = {
            "value": float(value),
            "se": float(se) if isinstance(se, int | float) and math.isfinite(se) else None,
            "higher_is_better": bool(better.get(name, True)),
            "each": _each(mine, name, value),
        }
    return {"documents": raw.get("n-samples", {}).get(task, {}).get("effective", len(samples)), "metrics": metrics}


def _each(samples: list[dict[str, Any]], name: str, value: float) -> list[float] | None:
    """A metric of each document, if the metric is their mean."""
    each = [sample.get(name) for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))]
    numbers = [float(one) for one in each if isinstance(one, int | float)]
    if not numbers or len(numbers) < len(each) or not math.isclose(sum(numbers) / len(numbers), value, abs_tol=1e-9):
        return None
    return numbers
