"""Gradients of a run: taken before the blocks that need them, kept on disk, read back a layer at a time."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.calib.gradients import GradientPass, LayerGradients, Span, clean
from compress.calib.model import Model
from compress.calib.ranks import ALONE, Ranks
from compress.errors import RunError
from compress.files import disk_errors, write_tensors
from compress.progress import Reporter
from compress.run_dir import RunDir


@dataclass(frozen=True)
class Gradients:
    """What the gradients are of, and where they lie: gradients/<blocks>_<fields>/<block>.safetensors."""

    model: Model
    run: RunDir
    fields: frozenset[str]  # of LayerStats; empty: no step reads gradients
    every: int  # blocks after which they are taken anew, from what is compressed by then; 0: never
    ranks: Ranks = ALONE  # who each have a share of the sequences

    def span(self, block: int) -> range:
        """The blocks that get their gradients from the same pass as this one."""
        if not self.every:
            return range(self.model.n_blocks)
        start = block - block % self.every
        return range(start, min(start + self.every, self.model.n_blocks))

    def due(self, block: int) -> bool:
        """Whether a pass belongs before this block."""
        return bool(self.fields) and block < self.model.n_blocks and block == self.span(block).start

    def take(self, block: int, tokens: Tensor, hidden: Iterable[Tensor], reporter: Reporter) -> None:
        """The pass due before this block, from where a kill left it; what is on disk is not done again.

        `tokens`: [nsamples, seqlen], this rank's share of them; `hidden`: what enters the block, a
        [1, seqlen, hidden_size] a sequence.
        """
        span = self.span(block)
        folder = self.ranks.own_folder(self._folder(span))
        stored = set(self.ranks.agree(lambda: [index for index in span if self._file(index).exists()]))
        self._tell_earlier(self._folder(span).name, stored)
        if len(stored) == len(span):
            clean(folder)
            return
        with disk_errors(folder):
            one_pass = GradientPass(self.model, tokens, self.fields, Span(span, stored), folder, self.ranks)
            with reporter.stage("gradients", one_pass.steps) as stage:
                started = time.monotonic()

                def keep(index: int, gradients: LayerGradients) -> None:
                    nonlocal started
                    self._write(index, gradients, time.monotonic() - started)
                    started = time.monotonic()

                one_pass.run(hidden, keep, stage.step)

    def of(self, block: int, layer: str) -> dict[str, Any]:
        """A layer's gradient fields, [out, in] float32. Raises RunError if their file is damaged."""
        if not self.fields:
            return {}
        with self._opened(block) as file:
            return {field: file.get_tensor(f"{layer}.{field}") for field in self.fields}

    def _folder(self, span: range) -> Path:
        base = self.run.folder_of("gradients") if span.start == 0 else self.run.path  # later ones are this run's alone
        return base / "gradients" / "_".join([f"{span.start:04d}-{span.stop - 1:04d}", *sorted(self.fields)])

    def _file(self, block: int) -> Path:
        return self._folder(self.span(block)) / f"{block:04d}.safetensors"

    def _write(self, block: int, gradients: LayerGradients, seconds: float) -> None:
        own = {f"{layer}.{field}": each for layer, fields in gradients.items() for field, each in fields.items()}
        nothing: list[dict[str, Tensor]] = [{} for _ in range(self.ranks.count - 1)]
        everyones = self.ranks.exchange([own, *nothing])
        with self.ranks.first_goes_first():
            if self.ranks.first:
                tensors = {name: tensor for each in everyones for name, tensor in each.items()}
                write_tensors(self._file(block), tensors, {"seconds": repr(seconds)})
        name = self._folder(self.span(block)).name
        self.run.journal.write(event="gradients", gradients=name, blocks=[block], seconds=round(seconds, 3))

    def _tell_earlier(self, name: str, stored: set[int]) -> None:
        """Note in the journal what was spent, before this sitting, on blocks that are stored."""
        told = [line for line in self.run.journal.this_sitting() if line.get("gradients") == name]
        earlier = sorted(stored.difference(*(line["blocks"] for line in told)))
        seconds = 0.0
        for block in earlier:
            with self._opened(block) as file:
                seconds += float(file.metadata()["seconds"])
        if earlier:
            self.run.journal.write(event="replayed", gradients=name, blocks=earlier, seconds=round(seconds, 3))

    @contextlib.contextmanager
    def _opened(self, block: int) -> Iterator[Any]:
        path = self._file(block)
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} is damaged ({error}): remove it, and the same command makes it again") from error
