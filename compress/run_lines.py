"""What a run's JSON files hold that is read again: lines of its journal, its figures, what it ran on.

A run's folder may come from somebody else, or be damaged.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import RunError
from compress.recipe import validation_line

YEAR_9999 = 253402300799  # seconds


class _Said(BaseModel):
    """Whatever more is said is left as it is."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Line(_Said):
    """Any line: what happened, and what went otherwise than asked."""

    event: str
    time: float = Field(0.0, ge=0, le=YEAR_9999)  # since the epoch
    layer: str = Field("", max_length=300)
    file: str = ""
    note: str = ""
    notes: list[str] = []


class _Timed(_Line):
    seconds: float


class _OfLayer(_Line):
    layer: str = Field(max_length=300)


class _Layer(_OfLayer, _Timed):
    step: str
    method: str
    error: float
    error_on: str
    bits: float
    density: float


class _Input(_OfLayer):
    abits: int
    codes: str


class _Saturation(_OfLayer):
    share: float


class _Block(_Line):
    block: int
    seconds: dict[str, float]


class _Expected(_Line):
    seconds: dict[str, float]


class _Train(_Timed):
    method: str
    step: int
    loss: float
    held_out: float = 0.0


class _Recovered(_Line):
    method: str


class _Loss(_Timed):
    predicted_loss: float
    measured_loss: float


LINES: dict[str, Any] = {  # models; mypy finds no common type of these classes
    "layer": _Layer,
    "input": _Input,
    "saturation": _Saturation,
    "block": _Block,
    "expected": _Expected,
    "train": _Train,
    "recovered": _Recovered,
    "loss": _Loss,
} | dict.fromkeys(("opened", "measured", "gradients", "teacher", "checkpoint"), _Timed)


def check_line(values: Any) -> None:
    """Raise ValueError unless `values` are a line as `Journal.write` makes them."""
    event = values.get("event") if isinstance(values, dict) else None
    LINES.get(str(event), _Line).model_validate(values)


class _Recovery(_Said):
    method: str
    peak_rss_bytes: int | None = None


class _Asked(_Said):
    text: str
    seqlen: int
    max_windows: int


class _Eval(_Said):
    asked: _Asked
    dense: float = Field(gt=0)
    compressed: float


class _Result(_Said):
    """result.json, as a page shows it."""

    format: str
    dense_bytes: int = Field(gt=0)
    compressed_bytes: int
    parameters: int = Field(gt=0)
    bits_per_weight: float
    layer_bits_per_weight: float
    sparsity: float
    seconds: float
    peak_rss_bytes: int | None
    recovery: list[_Recovery] = []
    eval: _Eval | None = None


class _About(_Said):
    """run.json, as a page shows it."""

    versions: dict[str, str]
    threads: int


def check_result(values: dict[str, Any], file: Path) -> None:
    """Raise RunError unless `values`, read from `file`, are a finished run's figures."""
    _check(_Result, values, file)


def check_about(values: dict[str, Any], file: Path) -> None:
    """Raise RunError unless `values`, read from `file`, say what a run ran on."""
    _check(_About, values, file)


def _check(kind: type[_Said], values: dict[str, Any], file: Path) -> None:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        raise RunError(
            f"{file} is damaged ({validation_line(error)}): remove it and run the same command again"
        ) from error
