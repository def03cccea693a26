"""What the lines of a journal hold that are read again. A run's folder may come from somebody else, or be damaged."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Line(BaseModel):
    """Any line: what happened, and what went otherwise than asked."""

    model_config = ConfigDict(extra="allow", strict=True)

    event: str
    time: float = 0.0  # seconds since the epoch
    layer: str = ""
    file: str = ""
    note: str = ""
    notes: list[str] = []


class _Timed(_Line):
    seconds: float


class _Layer(_Timed):
    step: str
    method: str
    error: float
    error_on: str
    bits: float
    density: float


class _Input(_Line):
    abits: int
    codes: str


class _Saturation(_Line):
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


LINES: dict[str, type[_Line]] = {
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
