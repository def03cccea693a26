"""What a person sees while a run goes on: a bar on a terminal, a line a block elsewhere. Always on stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter:
    """Reports stages of known length. `quiet` says nothing at all. `tracker`: who gets the figures of trainings as well."""

    def __init__(self, quiet: bool = False, tracker: str | None = None):
        self.tracker = tracker
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live = self.console.is_terminal and not quiet

    def say(self, line: str) -> None:
        """One line for the reader."""
        self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator["Stage"]:
        """A stage of `total` steps."""
        if self._live:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as bar:
                yield Stage(self, title, total, bar, bar.add_task(title, total=total, note=""))
        else:
            yield Stage(self, title, total)


class Stage:
    """Counts the steps of one stage."""

    def __init__(
        self, reporter: Reporter, title: str, total: int, bar: Progress | None = None, task: TaskID | None = None
    ):
        self.reporter, self.title, self.total, self.bar, self.task = reporter, title, total, bar, task
        self.done, self.skipped, self.started = 0, 0, time.monotonic()
        self.said = self.started

    def skip(self, steps: int) -> None:
        """Some steps were done in an earlier sitting."""
        self.done += steps
        self.skipped += steps

    def step(self, note: str = "") -> None:
        """One step is done. Without a terminal, a line is printed every two seconds at most."""
        self.done += 1
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self.said < 2 and not (self.done == self.total and self.said > self.started):
            return
        self.said = now
        rate = (now - self.started) / (self.done - self.skipped)
        left = f"{rate * (self.total - self.done):.0f} s left"
        self.reporter.say(f"{self.title} {self.done}/{self.total}  {rate:.2f} s each, {left}  {note}".rstrip())
