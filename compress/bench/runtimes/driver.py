"""`compress bench runtimes`: export a checkpoint to every runtime, and time them all in turns with ours."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.bench.llama import LlamaBench
from compress.bench.peers.environments import environ_of, python_of
from compress.bench.runtimes.exports import exported, weight_bytes
from compress.bench.runtimes.llama_cpp import LlamaTurns, find_llama_bench
from compress.bench.runtimes.rows import LLAMA_CPP, OURS, Runtime, chosen_runtimes
from compress.bench.runtimes.worker import Timed, Worker
from compress.errors import CompressError, InputError
from compress.eval.speed import SpeedProtocol
from compress.files import write_json
from compress.pipeline import open_model
from compress.progress import Reporter
from compress.report import Report, table
from compress.run_dir import held
from compress.sizes import n_parameters

SCRIPTS = Path(__file__).parent / "scripts"
DENSE_BYTES = 2  # of a weight in bfloat16
MIB = 2**20


@dataclass(frozen=True)
class RuntimesRequest:
    """What a bench is asked to do, as its flags have it."""

    checkpoint: Path
    out: Path  # of exports and figures
    runtimes: tuple[str, ...] = ()  # none: all
    protocol: SpeedProtocol = field(default_factory=SpeedProtocol)
    threads: int = 2
    environments: Path | None = None  # where they are, or are made; None: in `out`
    llama_bench: Path | None = None
    prompts: str = "decode"  # of ours, as in `compress serve`


def bench_runtimes(request: RuntimesRequest) -> Report:
    """Time prompts and tokens in each runtime, each in a process of its own, in turns.

    Returns {"checkpoint", "dense_bytes", "protocol", "threads", "runs"}, which OUT/runtimes.json has as well. A run has
    runtime, bytes, ratio (to the model's weights in bfloat16), prefill_tokens_per_second, decode_tokens_per_second,
    decode_speedup (beside ours), cached (whether past tokens' keys and values are kept), versions and note; or its line
    in `failed`. Raises InputError for a request that cannot be met, and what ours fails with.
    """
    runtimes = chosen_runtimes(list(request.runtimes))
    model = open_model(request.checkpoint)
    dense, config = n_parameters(model) * DENSE_BYTES, model.lm.config.get_text_config()
    del model
    prompt = _prompt(request, config.vocab_size, getattr(config, "max_position_embeddings", None))
    with held(request.out):
        bench = _Bench(request, prompt)
        runs = bench.measured(runtimes)
    ours = runs[0]
    for run in (run for run in runs if "failed" not in run):
        run["ratio"] = run["bytes"] / dense
        run["decode_speedup"] = run["decode_tokens_per_second"] / ours["decode_tokens_per_second"]
    data = {
        "checkpoint": str(request.checkpoint),
        "dense_bytes": dense,
        "protocol": asdict(request.protocol),
        "threads": request.threads,
        "runs": runs,
    }
    write_json(request.out / "runtimes.json", data)
    return Report(data, [_table(runs), _closing(request)])


def _prompt(request: RuntimesRequest, vocab_size: int, longest: int | None) -> list[int]:
    """Random tokens, the same for everyone. Raises InputError if the model takes no text as long."""
    asked = request.protocol.seqlen + request.protocol.new_tokens
    if longest is not None and asked > longest:
        raise InputError(f"this model takes {longest} tokens, not {asked}: lower --prompt-tokens or --new-tokens")
    return random.Random(0).choices(range(vocab_size), k=request.protocol.seqlen)


class _Bench:
    """A bench under way."""

    def __init__(self, request: RuntimesRequest, prompt: list[int]):
        self.request, self.prompt, self.reporter = request, prompt, Reporter()
        self.out = request.out.absolute()
        self.environments = (request.environments or request.out / "envs").absolute()
        self.runs: dict[str, dict[str, Any]] = {}
        self.timed: dict[str, Timed] = {}
        self._exports: dict[str, list[Path] | CompressError] = {}  # by what they are called

    def measured(self, runtimes: list[Runtime]) -> list[dict[str, Any]]:
        """Each runtime's figures, or why there are none."""
        with ExitStack() as stack:
            for runtime in runtimes:
                with self._noting(runtime.name):
                    self.timed[runtime.name] = timed = self._started(runtime)
                    stack.callback(timed.close)
            repeats = self.request.protocol.repeats
            with self.reporter.stage("turns", repeats) as stage:
                for _ in range(repeats):
                    for name, timed in list(self.timed.items()):
                        with self._noting(name):
                            timed.turn()
                    stage.step()
        for name, timed in self.timed.items():
            prefill, decode = timed.seconds
            self.runs[name] |= timed.about
            self.runs[name]["prefill_tokens_per_second"] = self.request.protocol.seqlen / prefill
            self.runs[name]["decode_tokens_per_second"] = 1 / decode
        return [self.runs[runtime.name] for runtime in runtimes]

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """What fails is its row, and the others go on; without ours there is nothing to compare with."""
        try:
            yield
        except CompressError as error:
            if name == OURS:
                raise
            self.reporter.say(f"{name} failed: {error}")
            self.timed.pop(name, None)
            self.runs[name] = {"runtime": name, "failed": str(error)}

    def _started(self, runtime: Runtime) -> Timed:
        """A runtime with its model loaded."""
        python = python_of(runtime.peer, self.environments, self.reporter)
        files = self._exported(runtime, python)
        self.runs[runtime.name] = {"runtime": runtime.name, "bytes": weight_bytes(files), "note": runtime.note}
        if runtime.name == LLAMA_CPP:
            return self._llama(runtime, files)
        return self._worker(runtime, python, files[0])

    def _exported(self, runtime: Runtime, python: Path) -> list[Path]:
        """What the runtime reads; runtimes that share an export share its failure."""
        if runtime.exported not in self._exports:
            try:
                found = exported(runtime, self.request.checkpoint.absolute(), python, self.out, self.reporter)
            except CompressError as error:
                self._exports[runtime.exported] = error
                raise
            self._exports[runtime.exported] = found
        made = self._exports[runtime.exported]
        if isinstance(made, CompressError):
            raise made
        return made

    def _llama(self, runtime: Runtime, files: list[Path]) -> LlamaTurns:
        home, protocol, threads = self.environments / runtime.peer.name, self.request.protocol, self.request.threads
        program = find_llama_bench(self.request.llama_bench, home, threads, self.reporter)
        if len(files) > 1:
            self.runs[runtime.name]["note"] += "; llama-bench leaves the corrections out"
        return LlamaTurns(LlamaBench(program, files[0], threads, protocol.new_tokens), protocol.seqlen)

    def _worker(self, runtime: Runtime, python: Path, file: Path) -> Worker:
        where = self.out / "rows" / runtime.name
        where.mkdir(parents=True, exist_ok=True)
        setting = {"prompts": self.request.prompts} if runtime.name == OURS else runtime.setting
        asked = {"new_tokens": self.request.protocol.new_tokens, "threads": self.request.threads}
        write_json(where / "request.json", {"file": str(file), "prompt": self.prompt, "setting": setting, **asked})
        command = [str(python), str(SCRIPTS / runtime.peer.script), str(where / "request.json")]
        environ = environ_of(runtime.peer, SCRIPTS) | {"OMP_NUM_THREADS": str(self.request.threads)}
        return Worker(runtime.name, command, environ, where / "log")


def _table(runs: list[dict[str, Any]]) -> Any:
    columns = ["runtime", "file, MiB", "x bf16", "prompt, tokens/s", "then, tokens/s", "x ours", "note"]
    rows = []
    for run in runs:
        if "failed" in run:
            rows.append([run["runtime"], *[""] * 5, run["failed"]])
            continue
        cache = [] if run["cached"] else ["no cache: each token takes the whole text again"]
        rows.append(
            [
                run["runtime"],
                f"{run['bytes'] / MIB:.1f}",
                f"{run['ratio']:.2f}",
                f"{run['prefill_tokens_per_second']:.0f}",
                f"{run['decode_tokens_per_second']:.1f}",
                f"{run['decode_speedup']:.2f}",
                "; ".join([*cache, *filter(None, [run["note"]])]),
            ]
        )
    return table("", columns, rows)


def _closing(request: RuntimesRequest) -> str:
    protocol = request.protocol
    return (
        f"{protocol.repeats} turns of {protocol.seqlen} tokens and {protocol.new_tokens} after them, {request.threads} "
        "threads; the fastest prompt, the median of tokens in the faster half of turns; x bf16: beside 2 bytes a weight"
    )
