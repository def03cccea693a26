"""Figures of a training as it goes on, for the trackers that accelerate knows: tensorboard, wandb, mlflow and others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import InputError

Tell = Callable[[int, dict[str, Any]], None]  # the step just done, and its figures


def check_tracker(kind: str) -> None:
    """Raise InputError for a tracker that there is not, or that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if kind not in LOGGER_TYPE_TO_CLASS:
        raise InputError(f"there is no tracker {kind!r}; there are: {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}")
    if kind not in map(str, get_available_trackers()):
        package = '"compress-llm[train]"' if kind == "tensorboard" else kind
        raise InputError(f"tracker {kind} is not installed: pip install {package}")


@contextmanager
def tracked(tell: Tell, kind: str | None, folder: Path, name: str) -> Iterator[Tell]:
    """What tells `tell`, and the tracker `kind` as well if there is one.

    Numbers alone are tracked: loss, held_out, lr, gradient, tokens_per_second and what a method adds. `folder`: for
    trackers that write files; `name`: of the training there.
    """
    if kind is None:
        yield tell
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    made: Any = LOGGER_TYPE_TO_CLASS[kind]
    tracker = made(name, folder) if made.requires_logging_directory else made(name)
    tracker.start()

    def told(step: int, figures: dict[str, Any]) -> None:
        tell(step, figures)
        tracker.log({key: value for key, value in figures.items() if isinstance(value, int | float)}, step=step)

    try:
        yield told
    finally:
        tracker.finish()
