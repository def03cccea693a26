"""`compress bench recovery`: seconds a step and peak memory of training packed models, beside full fine-tuning.

Each training is measured in a process of its own, on the same windows of text, with as many tokens a step. Full
fine-tuning is what one would write with transformers: the dense model in memory, its own loss, plain AdamW on all its
parameters, with and without gradient checkpointing. All weights that are not packed are bfloat16. Ours is the training
of a run, with what it holds beside (the best state, the teacher's head and states), on weights rounded to nearest, which
takes no calibration; making them is not counted.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.calib.data import training_windows
from compress.calib.ranks import Ranks
from compress.calib.skeleton import quiet
from compress.clock import Measured, alone, forget_peak, peak_rss_bytes
from compress.errors import InputError
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.recover.variants import AdapterOptions
from compress.recovery import TrainOptions
from compress.report import Report, duration, size, table
from compress.run_dir import Journal
from compress.steps import find_options, whole_model
from compress.training import require_peft

FULL = {"full fine-tuning": False, "the same, checkpointed": True}  # whether blocks are computed again in backward
DTYPE = "bfloat16"


@dataclass(frozen=True)
class RecoveryBench:
    """What is measured, and on what."""

    train: str
    methods: tuple[str, ...] = ("lrec", "qlora", "l4q", "grid")
    wbits: int = 4
    group_size: int = 128
    steps: int = 3
    seqlen: int = 512
    batch_size: int = 4
    micro_batch_size: int = 1

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.seqlen

    def options(self, method: str) -> dict[str, int]:
        """Of a method, as far as all of them have the same. Raises InputError for one that does not train."""
        sizes = {"seqlen": self.seqlen, "batch_size": self.batch_size, "micro_batch_size": self.micro_batch_size}
        if not whole_model("recover", method):
            raise InputError(f"{method} does not train: leave it out")
        if isinstance(find_options("recover", method, sizes), AdapterOptions):
            require_peft()
        return sizes


def bench_recovery(model_folder: Path, asked: RecoveryBench, device: str) -> Report:
    """Measure each method, then full fine-tuning of the dense model in `model_folder`.

    Raises InputError for methods that do not train, a text that is too short, and without peft where it is needed.
    """
    if asked.steps < 2:
        raise InputError(
            f"{asked.steps} step is not enough, as the first is slower than others: give --steps 2 or more"
        )
    ways = {method: partial(_recovered, method) for method in asked.methods if asked.options(method)}
    ways |= {name: partial(_fine_tuned, checkpointed) for name, checkpointed in FULL.items()}
    reporter, found = Reporter(), dict[str, Measured]()
    for name, way in ways.items():
        reporter.say(f"measuring {name}, {asked.steps} steps of {asked.tokens} tokens")
        found[name] = alone(way, model_folder, asked, device)
    least = {key: min(found[name][key] for name in FULL) for key in next(iter(found.values()))}
    rows = [
        [
            name,
            duration(each["seconds"]),
            f"{each['seconds'] / least['seconds']:.2f}",
            size(each["peak_rss_bytes"]),
            f"{each['peak_rss_bytes'] / least['peak_rss_bytes']:.2f}",
        ]
        for name, each in found.items()
    ]
    head = ["", "seconds a step", "ratio", "peak memory", "ratio"]
    closing = f"{asked.tokens} tokens a step, {asked.micro_batch_size} x {asked.seqlen} at once; ratios to the better full fine-tuning"
    data = {"asked": vars(asked), "dtype": DTYPE, "measured": found, "full": list(FULL)}
    return Report(data, [table("", head, rows), closing])


def _recovered(method: str, folder: Path, asked: RecoveryBench, device: str) -> Measured:
    """Of the steps of one method, in a run that is gone afterwards."""
    flags = {
        "model": str(folder),
        "dtype": DTYPE,
        "train": asked.train,
        "target": {"wbits": asked.wbits, "group_size": asked.group_size},
        "quantizer": "rtn",
        "recover": [method],
        "recover_for": f"{asked.steps * asked.tokens}tokens",
        "options": {method: asked.options(method)},
        "format": "native",
    }
    with tempfile.TemporaryDirectory() as out:
        (figures,) = compress(read_recipe(None, flags), folder, Path(out), Reporter(quiet=True), Ranks(device=device))[
            "recovery"
        ]
        lines = Journal(Path(out) / "run" / "log.jsonl").read()
    rates = [line["tokens_per_second"] for line in lines if line["event"] == "train"]
    return {
        "seconds": asked.tokens / statistics.median(rates[1:]),
        "peak_rss_bytes": figures["peak_rss_bytes"] or peak_rss_bytes(),
    }


def _fine_tuned(checkpointed: bool, folder: Path, asked: RecoveryBench, device: str) -> Measured:
    """Of as many steps on the dense model."""
    with quiet():
        lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(device).train()
    n_windows = asked.steps * asked.batch_size
    windows = training_windows(asked.train, AutoTokenizer.from_pretrained(folder), n_windows, asked.seqlen, 0)
    if len(windows) < n_windows:
        raise InputError(f"{asked.train} gives {len(windows)} windows of {asked.seqlen}, and {n_windows} are needed")
    if checkpointed:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(lm.parameters(), TrainOptions().lr)
    forget_peak()
    seconds = []
    for batch in windows.to(device).split(asked.batch_size):
        started = time.monotonic()
        for part in batch.split(asked.micro_batch_size):
            loss = lm(part, labels=part, use_cache=False).loss * (len(part) / len(batch))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        seconds.append(time.monotonic() - started)
    return {"seconds": statistics.median(seconds[1:]), "peak_rss_bytes": peak_rss_bytes()}
