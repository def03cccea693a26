"""A gate: the figures of a checkpoint held against recorded ones, each within a band.

What may pass as the same is the largest of a tolerance and of what chance makes of it: the spread of runs with other
calibration samples, and for tasks the error of the difference over the same documents.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.calib.model_files import read_text
from compress.errors import InputError
from compress.recipe import validation_line

Measured = Annotated[float, Field(ge=-1e100, le=1e100)]  # whose square is a number, too
CONFIDENCE = 0.99  # a new run of the same quality is called worse once in a hundred figures


@dataclass(frozen=True)
class Kind:
    """Which way a kind of figure gets worse, and how far it may at least."""

    higher_is_better: bool
    tolerance: float
    relative: bool  # the tolerance is a share of the recorded value


KINDS = {
    "perplexity": Kind(False, 0.02, True),
    "kl": Kind(False, 0.05, True),
    "top1": Kind(True, 0.01, False),
    "task": Kind(True, 0.0, False),
    "size": Kind(False, 0.01, True),
    "speed": Kind(True, 0.25, True),
}


@dataclass(frozen=True)
class Figure:
    """One measured figure."""

    kind: str
    value: float
    se: float | None = None  # tasks: of the value, as lm-eval gives it
    each: list[float] | None = None  # tasks: of each document, if the value is their mean
    lower: bool = False  # tasks: a metric that is better when it is lower


class Recorded(BaseModel):
    """One figure of a baseline: its value in each run, and what `Figure` has beside it, documents as means over runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Literal["perplexity", "kl", "top1", "task", "size", "speed"]
    values: list[Measured] = Field(min_length=1)
    se: Measured | None = None
    each: list[Measured] | None = None
    lower: bool = False


class Baseline(BaseModel):
    """What a gate is held against, as its JSON file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    version: Literal[1] = 1
    asked: dict[str, Any]  # what is measured (gate_measure.py)
    confidence: float = Field(CONFIDENCE, gt=0.5, lt=1)
    tolerance: dict[Literal["perplexity", "kl", "top1", "task", "size", "speed"], float] = Field(default_factory=dict)
    figures: dict[str, Recorded]


@dataclass(frozen=True)
class Verdict:
    """How one figure came out. `change` is in the figure's own unit, positive where it is worse; `band` what it may be."""

    name: str
    kind: str
    value: float
    recorded: float
    change: float
    band: float
    says: str = field(init=False)  # same, better or worse

    def __post_init__(self) -> None:
        says = "worse" if self.change > self.band else "better" if -self.change > self.band else "same"
        object.__setattr__(self, "says", says)


def read_baseline(file: Path) -> Baseline:
    """A baseline from its file. Raises InputError if it is missing or not one."""
    try:
        return Baseline.model_validate_json(read_text(file))
    except FileNotFoundError as error:
        raise InputError(f"there is no baseline {file}: make one with --record") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read the baseline {file}: {reason}") from error
    except ValidationError as error:
        raise InputError(f"{file} is no baseline of a gate: {validation_line(error)}") from error


def record(asked: dict[str, Any], runs: list[dict[str, Figure]]) -> Baseline:
    """A baseline from the figures of one or more runs that differ in their calibration samples."""
    figures = {}
    for name, first in runs[0].items():
        same = [run[name] for run in runs]
        of_documents = [figure.each for figure in same if figure.each is not None]
        each = [sum(one) / len(one) for one in zip(*of_documents, strict=True)] if first.each is not None else None
        figures[name] = Recorded(
            kind=first.kind,
            values=[figure.value for figure in same],
            se=first.se,
            each=each,
            lower=first.lower,
        )
    return Baseline(asked=asked, figures=figures)


def hold(baseline: Baseline, figures: dict[str, Figure]) -> list[Verdict]:
    """A verdict on each figure of the baseline. Raises InputError for one that was not measured now."""
    if lost := baseline.figures.keys() - figures.keys():
        raise InputError(f"the baseline has {min(lost)}, which was not measured now: record it again")
    return [_verdict(baseline, name, recorded, figures[name]) for name, recorded in baseline.figures.items()]


def _verdict(baseline: Baseline, name: str, recorded: Recorded, figure: Figure) -> Verdict:
    mean = sum(recorded.values) / len(recorded.values)
    kind = KINDS[recorded.kind]
    worse = figure.value - mean if recorded.lower or not kind.higher_is_better else mean - figure.value
    tolerance = baseline.tolerance.get(recorded.kind, kind.tolerance) * (abs(mean) if kind.relative else 1.0)
    chance = math.hypot(_spread(recorded.values, baseline.confidence), _sampling(recorded, figure, baseline.confidence))
    return Verdict(name, recorded.kind, figure.value, mean, worse, max(tolerance, chance))


def _spread(values: list[float], confidence: float) -> float:
    """How far one more run lies above the mean of these at most, with `confidence`: a one-sided prediction interval.

    t s sqrt(1 + 1/k), Student's t with k - 1 degrees of freedom; 0 for a single run, which has no spread.
    """
    k = len(values)
    if k < 2:
        return 0.0
    from scipy.stats import t

    mean = sum(values) / k
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (k - 1))
    return float(t.ppf(confidence, k - 1)) * deviation * math.sqrt(1 + 1 / k)


def _sampling(recorded: Recorded, figure: Figure, confidence: float) -> float:
    """The same for the documents of a task: of the differences on the same ones, or of two means where they are unknown."""
    if recorded.kind != "task":
        return 0.0
    from scipy.stats import norm

    if figure.each and recorded.each and len(figure.each) == len(recorded.each) > 1:
        n = len(figure.each)
        differences = [a - b for a, b in zip(figure.each, recorded.each, strict=True)]
        mean = sum(differences) / n
        se = math.sqrt(sum((one - mean) ** 2 for one in differences) / (n - 1) / n)
    else:
        se = math.hypot(figure.se or 0.0, recorded.se or 0.0)
    return float(norm.ppf(confidence)) * se
