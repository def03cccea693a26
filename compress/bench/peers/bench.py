"""A bench of peers under way: its model and windows, and the scripts it asks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.bench.peers.environments import ask, python_of
from compress.bench.peers.rows import Row
from compress.progress import Reporter


@dataclass(frozen=True)
class PeersBench:
    """A request with its model and windows found."""

    out: Path
    environments: Path
    reporter: Reporter
    shared: dict[str, Any]  # of every script's request: model, windows, calib, text
    asked: dict[str, Any]  # what figures depend on beside the row: the model, the content of the windows

    def ask(self, row: Row, action: str, **more: Any) -> dict[str, Any]:
        """The answer of the row's script."""
        python = python_of(row.peer, self.environments, self.reporter)
        where = self.out / "rows" / row.folder
        request = {**self.shared, "setting": row.setting, "checkpoint": str(where / "checkpoint"), **more}
        return ask(row.peer, python, action, request, where)
