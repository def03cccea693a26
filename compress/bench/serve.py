"""`compress bench serve`: many clients at once on a server of our own, how long they wait, and what it does to the server."""

import asyncio
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compress.calib.skeleton import load_tokenizer
from compress.errors import RunError
from compress.progress import Reporter, Stage
from compress.report import Report, size, table

PERCENTILES = (50, 90, 99)
STARTING = 600.0  # seconds that a server may take to load its model
ENDING = 60.0  # the same to finish what it began


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    clients: int = 50  # at once, each with one request after the other, streamed
    seconds: float = 30.0  # in which requests are begun
    prompt_tokens: int = 64  # about: text is made of random tokens
    new_tokens: int = 32  # at most
    prompts: str = "decode"  # as in `compress serve`
    device: str = "auto"


@dataclass
class Answers:
    """What clients saw, in seconds since they asked."""

    first: list[float] = field(default_factory=list)  # until the first token was there
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def bench_serve(checkpoint: Path, load: Load) -> Report:
    """Serve a checkpoint on loopback in a process of its own and let clients ask until the time is over.

    Each client asks once before, which does not count. Raises RunError if the server does not start, or does not end
    when it is told to (SIGTERM) within a minute.
    """
    reporter, prompts = Reporter(), _prompts(checkpoint, load)
    with _served(checkpoint, load) as (server, ask):
        asyncio.run(ask(prompts, Answers(), 0.0))
        before, answers, began = _held(server), Answers(), time.monotonic()
        with reporter.stage("second", round(load.seconds)) as stage:
            asyncio.run(ask(prompts, answers, load.seconds, stage))
        seconds, after = time.monotonic() - began, _held(server)
        told = time.monotonic()
        server.terminate()
        ended = {"exit_code": _end(server), "seconds": round(time.monotonic() - told, 3)}
    found = {
        "requests": len(answers.whole),
        "errors": dict(answers.errors),
        "tokens_per_second": answers.tokens / seconds,
        "first_token_seconds": _percentiles(answers.first),
        "answer_seconds": _percentiles(answers.whole),
        "before": before,
        "after": after,
        "end": ended,
    }
    return Report({"checkpoint": str(checkpoint), "load": asdict(load), **found}, _tables(load, found))


def _prompts(checkpoint: Path, load: Load) -> Iterator[str]:
    """Texts of about so many random tokens, always the same ones."""
    tokenizer, draw = load_tokenizer(checkpoint), random.Random(0)
    special = set(tokenizer.all_special_ids)
    words = [index for index in range(len(tokenizer)) if index not in special]
    while True:
        yield str(tokenizer.decode(draw.choices(words, k=load.prompt_tokens)))


@contextmanager
def _served(checkpoint: Path, load: Load) -> Iterator[tuple[psutil.Popen, Any]]:
    """A server while it is needed, and what lets clients ask it."""
    with socket.socket() as free, tempfile.TemporaryFile("w+") as said:
        free.bind(("127.0.0.1", 0))
        port, key = free.getsockname()[1], secrets.token_hex()
        free.close()
        flags = ["--port", str(port), "--name", "model", "--prompts", load.prompts, "--device", load.device]
        flags += ["--max-requests", str(2 * load.clients + 8)]
        command = [sys.executable, "-m", "compress", "serve", str(checkpoint), *flags]
        environment = {**os.environ, "COMPRESS_API_KEY": key, "PYTHONSAFEPATH": "1"}
        server = psutil.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            clients = _Clients(f"http://127.0.0.1:{port}", key, load)
            while not asyncio.run(clients.answered()):
                if server.poll() is not None or time.monotonic() - clients.made > STARTING:
                    said.seek(0)
                    raise RunError(f"the server did not start: {(said.read().strip().splitlines() or ['no word'])[-1]}")
                time.sleep(0.1)
            yield server, clients.ask
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()


class _Clients:
    """OpenAI's clients, each of them with connections of its own."""

    def __init__(self, url: str, key: str, load: Load):
        self.url, self.key, self.load, self.made = url, key, load, time.monotonic()

    def _client(self) -> Any:
        import openai

        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=STARTING)

    async def answered(self) -> bool:
        """Whether anybody is there."""
        import openai

        async with self._client() as client:
            try:
                await client.models.list()
            except openai.APIConnectionError:
                return False
        return True

    async def ask(self, prompts: Iterator[str], answers: Answers, seconds: float, stage: Stage | None = None) -> None:
        """All clients at once, until so many seconds are over; each asks once at least."""
        until = time.monotonic() + seconds
        telling = asyncio.create_task(_tell(stage)) if stage is not None else None
        await asyncio.gather(*(self._one(prompts, answers, until) for _ in range(self.load.clients)))
        if telling is not None:
            telling.cancel()

    async def _one(self, prompts: Iterator[str], answers: Answers, until: float) -> None:
        async with self._client() as client:
            while True:
                await self._request(client, next(prompts), answers)
                if time.monotonic() >= until:
                    return

    async def _request(self, client: Any, prompt: str, answers: Answers) -> None:
        import openai

        asked, first = time.monotonic(), None
        try:
            stream = await client.completions.create(
                model="model", prompt=prompt, max_tokens=self.load.new_tokens, stream=True, temperature=0
            )
            async for chunk in stream:
                first = first or time.monotonic() - asked
                if chunk.usage is not None:
                    answers.tokens += chunk.usage.completion_tokens
        except openai.OpenAIError as error:
            answers.errors[f"{type(error).__name__}: {error}"[:200]] += 1
            return
        answers.first.append(first or time.monotonic() - asked)
        answers.whole.append(time.monotonic() - asked)


async def _tell(stage: Stage) -> None:
    while stage.done < stage.total:
        await asyncio.sleep(1.0)
        stage.step()


def _held(server: psutil.Popen) -> dict[str, int]:
    """What the server holds once its clients have gone."""
    deadline = time.monotonic() + 10
    while server.net_connections() and any(each.status == "ESTABLISHED" for each in server.net_connections()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return {"rss_bytes": server.memory_info().rss, "handles": server.num_fds(), "threads": server.num_threads()}


def _end(server: psutil.Popen) -> int:
    try:
        return int(server.wait(ENDING))
    except psutil.TimeoutExpired as error:
        raise RunError(f"the server has not ended {ENDING:.0f} seconds after SIGTERM") from error


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{each}": round(float(np.percentile(seconds, each)), 4) for each in PERCENTILES} if seconds else {}


def _tables(load: Load, found: dict[str, Any]) -> list[Any]:
    waits = [
        [name, *(f"{found[key][f'p{each}']:.3f}" if found[key] else "" for each in PERCENTILES)]
        for name, key in (("first token", "first_token_seconds"), ("whole answer", "answer_seconds"))
    ]
    before, after = found["before"], found["after"]
    rows = [
        ["requests answered", str(found["requests"])],
        ["failed", "; ".join(f"{count} x {line}" for line, count in found["errors"].items()) or "none"],
        ["tokens a second, all clients", f"{found['tokens_per_second']:.1f}"],
        ["memory of the server", f"{size(before['rss_bytes'])} before, {size(after['rss_bytes'])} after"],
        ["files and sockets", f"{before['handles']} before, {after['handles']} after"],
        ["end", f"exit code {found['end']['exit_code']} after {found['end']['seconds']:.1f} s"],
    ]
    title = f"{load.clients} clients, seconds"
    return [table("", [title, *(f"p{each}" for each in PERCENTILES)], waits), table("", ["", ""], rows)]
