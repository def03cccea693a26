"""lm-eval around a model that our loader loaded. Imported only where lm-eval is there (extra `eval`)."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

BOOTSTRAPS = 1000  # none at all would leave out the analytic errors as well


class Harness(HFLM):
    """A loaded model as lm-eval asks it, with one BOS before a document instead of two.

    lm-eval puts its prefix before the first window of a document and lets the tokenizer put its own, so that the second
    one is scored. Rolling windows come one at a time: logits of several over a long vocabulary take gigabytes.
    """

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's whole document, in nats."""
        with self._changed(add_bos_token=False, batch_size_per_gpu=1):
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    @contextmanager
    def _changed(self, **attributes: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in attributes}
        try:
            for name, value in attributes.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


def find_tasks(names: list[str], include_path: Path | None) -> tuple[TaskManager, list[str]]:
    """The manager that knows all of these tasks, groups and tags, and those that none knows.

    The 15,000 of lm-eval itself are only indexed, in seconds, where the ones in `include_path` do not do.
    """
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and len(manager.match_tasks(names)) < len(names):
        manager = TaskManager(include_path=include_path)
    return manager, [name for name in names if not manager.match_tasks([name])]


def harness_results(model: Any, tokenizer: Any, manager: TaskManager, settings: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval gives, its samples included, as JSON has it.

    `settings`: "tasks", "limit", "batch_size" and "max_length", the tokens a window has at most.
    """
    lm = Harness(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=settings["batch_size"],
        max_length=settings["max_length"],
        device=str(model.device),
    )
    with redirect_stdout(sys.stderr):  # it prints there which errors it bootstraps; --json promises one object
        found = simple_evaluate(
            model=lm,
            tasks=settings["tasks"],
            limit=settings["limit"],
            task_manager=manager,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
    results: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return results
