"""`compress bench decode`: how fast checkpoints run on our own layers, as ratios to the first."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from compress.bench.llama import NEW_TOKENS, LlamaBench
from compress.errors import InputError
from compress.eval.speed import SpeedProtocol
from compress.hf import compressed_layers, load_model
from compress.kernel_report import kernel_counts
from compress.progress import Reporter
from compress.report import Report, size, table


class _Timed:
    """One model, its cache, and the seconds of each of its turns."""

    def __init__(self, folder: Path, prompts: str, device: str):
        self.model: Any = load_model(folder, prompts, device)
        self.kernels = kernel_counts({name: layer.choice for name, layer in compressed_layers(self.model).items()})
        self.nbytes = sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers()])
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.cache: Any = None
        self.token: Tensor

    def prompt(self, length: int) -> None:
        """Take a new prompt of random tokens; all models of one vocabulary get the same."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.model.config.get_text_config().vocab_size, (1, length), generator=generator)
        self.prefill.append(self._forward(ids.to(self.model.device), None))

    def tokens(self, count: int) -> None:
        """A turn of so many tokens more. The first finds the processor's cache as another model left it, and does not count."""
        seconds = [self._forward(self.token, self.cache) for _ in range(count)]
        self.decode.append(median(seconds[1:]))

    def _forward(self, ids: Tensor, cache: Any) -> float:
        started = time.perf_counter()
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # argmax of bfloat16 takes five times as long, a tenth of a token of a small model
        self.token, self.cache = out.logits[:, -1:].max(-1).indices, out.past_key_values
        self.token.tolist()  # waits for the device
        return time.perf_counter() - started

    def turn(self, seqlen: int) -> None:
        """A prompt that counts."""
        self.prompt(seqlen)


@dataclass(frozen=True)
class DecodeRequest:
    """What is timed: checkpoints on our layers, the first being what others are compared with; and GGUF files beside."""

    checkpoints: dict[str, Path]  # by the name that the table gives them
    protocol: SpeedProtocol
    prompts: str = "decode"  # as in `compress serve`
    llama_bench: Path | None = None
    ggufs: tuple[Path, ...] = ()


@torch.no_grad()
def bench_decode(request: DecodeRequest, device: str) -> Report:
    """Time prompts in turns, then tokens in turns of some in a row, so that what disturbs one model disturbs all.

    Of prompts the fastest counts. Of rounds in which each model has a turn, the quieter half counts (by the time all took
    together), and of those the median. llama-bench has its turns, as long, among them. Raises InputError for what does
    not load.
    """
    protocol, reporter = request.protocol, Reporter()
    others = _llama(request)
    models = []
    with reporter.stage("loading", len(request.checkpoints)) as stage:
        for folder in request.checkpoints.values():
            models.append(_Timed(folder, request.prompts, device))
            stage.step()
    everyone: list[_Timed | LlamaBench] = [*models, *others]
    rounds = max(1, protocol.new_tokens // NEW_TOKENS)
    with reporter.stage("prompt and tokens", protocol.repeats + 1 + rounds) as stage:
        for timed in models:
            timed.prompt(protocol.seqlen)  # does not count
        stage.step()
        for _ in range(protocol.repeats):
            for each in everyone:
                each.turn(protocol.seqlen)
            stage.step()
        for _ in range(rounds):
            for timed in models:
                timed.tokens(NEW_TOKENS)
            for other in others:
                other.turn(protocol.seqlen)
            stage.step()
    names = [*request.checkpoints] + [str(other.gguf) for other in others]
    found = _figures(names, models, others, protocol)
    rows = [
        [
            name,
            f"{each['prefill_tokens_per_second']:.0f}",
            f"{each['prefill_speedup']:.2f}",
            f"{each['decode_tokens_per_second']:.1f}",
            f"{each['decode_speedup']:.2f}",
            size(each["bytes"]),
        ]
        for name, each in found.items()
    ]
    columns = ["checkpoint", "prompt, tokens/s", "x first", "then, tokens/s", "x first", "in memory"]
    closing = f"x first: times as fast as {names[0]}; quieter half of {rounds} turns of {NEW_TOKENS} tokens"
    data = {"protocol": asdict(protocol), "prompts": request.prompts, "speed": found}
    return Report(data, [table("", columns, rows), closing])


def _llama(request: DecodeRequest) -> list[LlamaBench]:
    """Raises InputError unless the program and its files are there."""
    if (request.llama_bench is None) != (not request.ggufs):
        raise InputError("--llama-bench PROGRAM and --gguf FILE go together: name both")
    for path in request.ggufs:
        if not path.is_file():
            raise InputError(f"{path} is no file: make it with llama.cpp's llama-quantize")
    program = request.llama_bench
    return [] if program is None else [LlamaBench(program, path, torch.get_num_threads()) for path in request.ggufs]


def _figures(
    names: list[str], models: list[_Timed], others: list[LlamaBench], protocol: SpeedProtocol
) -> dict[str, dict[str, Any]]:
    rounds = [sum(times) for times in zip(*(timed.decode for timed in models), strict=True)]
    quiet = sorted(range(len(rounds)), key=rounds.__getitem__)[: max(1, len(rounds) // 2)]
    seconds = [(min(timed.prefill[1:]), median(timed.decode[i] for i in quiet)) for timed in models]
    seconds += [other.seconds for other in others]
    everyone: list[_Timed | LlamaBench] = [*models, *others]
    return {
        name: {
            "prefill_tokens_per_second": protocol.seqlen / prefill,
            "prefill_speedup": seconds[0][0] / prefill,
            "decode_tokens_per_second": 1 / decode,
            "decode_speedup": seconds[0][1] / decode,
            "bytes": timed.nbytes,
            "kernels": timed.kernels,
        }
        for name, timed, (prefill, decode) in zip(names, everyone, seconds, strict=True)
    }
