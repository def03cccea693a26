"""`compress bench decode`: how fast checkpoints run on our own layers, as ratios to the first."""

import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

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

    def step(self) -> None:
        """One token more."""
        self.decode.append(self._forward(self.token, self.cache))

    def _forward(self, ids: Tensor, cache: Any) -> float:
        started = time.perf_counter()
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.token, self.cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        self.token.tolist()  # waits for the device
        return time.perf_counter() - started


@torch.no_grad()
def bench_decode(folders: list[Path], protocol: SpeedProtocol, prompts: str, device: str) -> Report:
    """Time prompts in turns, then tokens in turns, so that what disturbs one model disturbs all.

    Of prompts the fastest counts. Of rounds of one token each, the quieter half counts (by the time all models took
    together), and of those the median. `prompts` as in `compress serve`. Raises InputError for what does not load.
    """
    reporter = Reporter()
    models = []
    with reporter.stage("loading", len(folders)) as stage:
        for folder in folders:
            models.append(_Timed(folder, prompts, device))
            stage.step()
    with reporter.stage("prompt and tokens", protocol.repeats + 1 + protocol.new_tokens) as stage:
        for _ in range(protocol.repeats + 1):
            for timed in models:
                timed.prompt(protocol.seqlen)
            stage.step()
        for _ in range(protocol.new_tokens):
            for timed in models:
                timed.step()
            stage.step()
    found = _figures(folders, models, protocol)
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
    closing = f"x first: times as fast as {folders[0]}; quieter half of {protocol.new_tokens} rounds"
    data = {"protocol": asdict(protocol), "prompts": prompts, "speed": found}
    return Report(data, [table("", columns, rows), closing])


def _figures(folders: list[Path], models: list[_Timed], protocol: SpeedProtocol) -> dict[str, dict[str, Any]]:
    rounds = [sum(times) for times in zip(*(timed.decode for timed in models), strict=True)]
    quiet = sorted(range(len(rounds)), key=rounds.__getitem__)[: max(1, len(rounds) // 2)]
    decode = [median(timed.decode[i] for i in quiet) for timed in models]
    prefill = [min(timed.prefill[1:]) for timed in models]
    return {
        str(folder): {
            "prefill_tokens_per_second": protocol.seqlen / prefill[i],
            "prefill_speedup": prefill[0] / prefill[i],
            "decode_tokens_per_second": 1 / decode[i],
            "decode_speedup": decode[0] / decode[i],
            "bytes": timed.nbytes,
            "kernels": timed.kernels,
        }
        for i, (folder, timed) in enumerate(zip(folders, models, strict=True))
    }
