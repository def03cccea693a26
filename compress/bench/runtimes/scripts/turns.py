"""What every runtime's script has in common: the request it reads, and turns that are timed the same way.

A script is run as `python SCRIPT REQUEST`, and REQUEST is a JSON file: file (the model as the runtime reads it), prompt
(token ids), new_tokens, threads and setting. It answers on stdout in lines of JSON: {"cached", "versions"} when the model
is loaded, then for every line of stdin a turn, {"prefill": seconds, "decode": [seconds of a token]}. Where something
fails the line is {"failed": why}, the traceback goes to stderr, and the exit code is 1.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TextIO

UNCACHED = 2  # tokens of a turn where each takes as long as a prompt


class Session(Protocol):
    """A loaded model."""

    cached: bool  # keys and values of past tokens are kept

    def begin(self) -> None:
        """Forget the text. It is not timed."""

    def prompt(self, ids: Sequence[int]) -> int:
        """Take a text; the most likely token after it."""

    def token(self) -> int:
        """Take the token given last; the most likely one after it."""


class WholeTexts:
    """A model without a cache: each token takes the whole text again."""

    cached = False

    def __init__(self, next_token: Callable[[list[int]], int]):
        """`next_token`: the most likely one after a text."""
        self._next_token = next_token
        self._ids: list[int] = []

    def begin(self) -> None:
        """Forget the text."""
        self._ids = []

    def prompt(self, ids: Sequence[int]) -> int:
        """Take a text; the most likely token after it."""
        self._ids = list(ids)
        return self.token()

    def token(self) -> int:
        """Take the text so far; the most likely token after it."""
        self._ids.append(self._next_token(self._ids))
        return self._ids[-1]


def serve(load: Callable[[dict[str, Any]], Session], packages: Sequence[str]) -> None:
    """Answer until stdin ends. `packages`: those whose versions say what was measured."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        session = load(request)
        _say(answers, {"cached": session.cached, "versions": {package: version(package) for package in packages}})
        for _ in sys.stdin:
            _say(answers, turn(session, request["prompt"], request["new_tokens"]))
    except Exception as error:
        traceback.print_exc()  # before the answer, after which the process may be ended
        first = (str(error).strip() or "no message").splitlines()[0][:300]
        _say(answers, {"failed": f"{type(error).__name__}: {first}"})
        sys.exit(1)


def turn(session: Session, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """Seconds of a prompt and of each of the tokens after it, of which there are fewer without a cache."""
    session.begin()
    prefill = _seconds(lambda: session.prompt(prompt))
    count = new_tokens if session.cached else min(new_tokens, UNCACHED)
    return {"prefill": prefill, "decode": [_seconds(session.token) for _ in range(count)]}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _say(answers: TextIO, line: dict[str, Any]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()
