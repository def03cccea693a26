"""Gradients of the loss with respect to every layer weight, one block in memory at a time.

The blocks run forward once, and what enters each of them is kept in a file; then they run again from the last to the
first, each with autograd's recording on (Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174).
The loss is next-token cross-entropy. With g_j the gradient of sequence j's mean loss over its T_j targets,

    grad_sq  = mean over j of T_j g_j²
    grad_abs = mean over j of √T_j |g_j|

Means over j do not depend on nsamples. Nor do they depend on seqlen where tokens' gradients are independent: g_j is a
mean of T_j of them, and its square falls as 1/T_j.
"""

import math
import os
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.calib.hidden import reserve
from compress.calib.layers import PRODUCTS, Layer
from compress.calib.model import Model
from compress.calib.ranks import ALONE, Ranks
from compress.errors import RunError

FIELDS = frozenset({"grad_sq", "grad_abs"})
LOGITS_AT_ONCE = 2**24  # numbers; they are held in three copies
WEIGHTS_AT_ONCE = 2**20  # weights whose gradients are taken to float32 at a time
PEAK_EXPONENT = -4  # largest gradient of a sequence's hidden states, as a power of two: far from float16's both ends

LayerGradients = dict[str, dict[str, Tensor]]  # layer name -> field -> [out, in] float32
Record = tuple[Tensor, ...]


@dataclass(frozen=True)
class Span:
    """The blocks of one pass."""

    blocks: range
    stored: Container[int] = ()  # those whose gradients an earlier pass kept


class GradientPass:
    """One pass over the model from the first block of `span` to the head and back; blocks of `span` get weight gradients.

    `tokens`: [nsamples, seqlen] int64. `fields`: which of FIELDS. `folder` holds the hidden gradient that enters the
    next block, so that another pass with the same arguments goes on after a kill; it holds the blocks' inputs too, in a
    file without a name that goes with the process.

    With other `ranks`, `tokens` are this one's share of the sequences, `folder` is its own, and so are the layers whose
    gradients it is left with.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        fields: frozenset[str],
        span: Span,
        folder: Path,
        ranks: Ranks = ALONE,
    ):
        self.model, self.tokens, self.fields, self.span, self.folder = model, tokens, fields, span.blocks, folder
        self.ranks, self.nsamples = ranks, sum(ranks.gather(len(tokens)))
        folder.mkdir(parents=True, exist_ok=True)
        reached = sorted(int(file.stem) for file in folder.glob("*.gradient"))
        whole = (b for b in reached if all(i in span.stored for i in range(b, self.span.stop)))
        own_next = next(whole, model.n_blocks)  # its input's gradient is known: from the head, or from before a kill
        self._next = max(ranks.gather(own_next))
        self._known = all(ranks.gather((folder / self._name(self._next)).exists()))

    @property
    def steps(self) -> int:
        """How many times `run` calls `on_step`."""
        forward = self._next - self.span.start - (1 if self._known else 0)
        return forward + self._next - self.span.start

    def run(
        self,
        hidden: Iterable[Tensor],
        keep: Callable[[int, LayerGradients], None],
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Hand `keep` the gradients of the blocks of `span`, from the last that is not stored to the first.

        `hidden`: what enters block `span.start` of each sequence, [1, seqlen, hidden_size], walked once. When `keep`
        returns the gradients must be on disk. `on_step` is called after each block, forward and backward.
        Raises RunError if there is no room for the blocks' inputs or a gradient is not finite.
        """
        inputs = self._forward(hidden, on_step)
        try:
            for index in range(self._next - 1, self.span.start - 1, -1):
                self._backward(index, inputs, keep)
                on_step()
        finally:
            inputs.close()
        clean(self.folder)

    @staticmethod
    def _name(index: int) -> str:
        """The file that holds the gradient of what enters a block (of what leaves the last, for n_blocks)."""
        return f"{index:04d}.gradient"

    def _forward(self, hidden: Iterable[Tensor], on_step: Callable[[], None]) -> "Records":
        """What enters each block that the way back meets; ends with the gradient of the head unless it is known."""
        first, n = self.span.start, len(self.tokens)
        inputs: Records | None = None
        for j, each in enumerate(hidden):
            if inputs is None:
                inputs = Records(self.folder / "inputs", (each,), n * (self._next - first), keep=False)
            inputs[j] = (each,)
        assert inputs is not None  # there is at least one sequence
        last = self._next - 1
        for index in range(first, last if self._known else last + 1):
            with self.model.loaded(index) as block:
                if index < last:
                    for j in range(n):
                        inputs[(index - first + 1) * n + j] = (block(inputs[(index - first) * n + j][0]),)
                else:
                    self._from_head(block(inputs[(index - first) * n + j][0]) for j in range(n))
            on_step()
        return inputs

    def _from_head(self, outputs: Iterable[Tensor]) -> None:
        """Keep the loss's gradient with respect to what leaves the last block."""
        kept: Records | None = None
        for j, hidden in enumerate(outputs):
            record = _normalized(head_gradient(self.model, hidden, self.tokens[j]), 0)
            kept = kept or Records(self.folder / self._name(self.model.n_blocks), record, len(self.tokens))
            kept[j] = record
        assert kept is not None
        kept.finish()

    def _backward(self, index: int, inputs: "Records", keep: Callable[[int, LayerGradients], None]) -> None:
        """All sequences back through one block: into its weights' sums, and on to what entered it."""
        n = len(self.tokens)
        like = (inputs[0][0], torch.zeros(1, dtype=torch.int64))
        after = Records(self.folder / self._name(index + 1), like, n, fresh=False)
        before = Records(self.folder / self._name(index), like, n)
        with self.model.loaded(index) as block:
            sums = _Sums(block.layers if index in self.span else [], self.fields, self.ranks)
            for j, turn in self.ranks.turns(self.nsamples):
                if j is not None:
                    hidden = inputs[(index - self.span.start) * n + j][0].requires_grad_()
                    gradient, exponent = after[j]
                    sums.scale = 2.0 ** exponent.item() / math.sqrt(self.tokens.shape[1] - 1)
                    with sums, torch.enable_grad():
                        block.forward(hidden).backward(gradient)
                    assert hidden.grad is not None
                    before[j] = _normalized(hidden.grad, int(exponent.item()))
                sums.deliver([rank for rank, _ in turn])
            sums.release()
        before.finish()
        after.close()
        if index in self.span:
            keep(index, sums.finish(self.nsamples))
        after.file.unlink()


def clean(folder: Path) -> None:
    """Remove what a pass keeps in its folder for one that goes on after a kill."""
    for file in [*folder.glob("*.gradient"), *folder.glob("*.partial")]:
        file.unlink()


def head_gradient(model: Model, hidden: Tensor, window: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy in nats of window[1:] [seqlen] with respect to what leaves the last block.

    `hidden` and the result: [1, seqlen, hidden_size] in the model's dtype. A few positions' logits exist at a time.
    """
    positions = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    gradient = torch.zeros_like(hidden)  # the last position predicts nothing
    targets = window.to(hidden.device)[1:].unsqueeze(1)
    for start in range(0, len(targets), positions):
        stop = min(start + positions, len(targets))
        part = hidden[0, start:stop].unsqueeze(0).requires_grad_()
        with torch.enable_grad():
            logits = model.head(part)
        error = torch.softmax(logits.detach(), -1, dtype=torch.float32)
        error[0].scatter_add_(1, targets[start:stop], error.new_full((stop - start, 1), -1.0))
        gradient[:, start:stop] = torch.autograd.grad(logits, part, error.to(logits.dtype))[0]
    return gradient


def _normalized(gradient: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """gradient · 2^exponent again, with the power of two chosen to suit float16: other types do not notice."""
    peak = max(-gradient.min().item(), gradient.max().item())
    if not math.isfinite(peak):
        dtype = str(gradient.dtype).removeprefix("torch.")
        raise RunError(f"a gradient is NaN or infinite: the weights are damaged, or too large for {dtype} (--dtype)")
    shift = math.frexp(peak)[1] - PEAK_EXPONENT if peak else 0
    return gradient.float().mul_(2.0**-shift).to(gradient.dtype), torch.tensor([exponent + shift])


class _Sums(TorchFunctionMode):
    """Sums over sequences of one block's weight gradients. Each is used up as soon as autograd has it.

    As a context it lets autograd see the layers: modules by their parameter, an expert's slice of a 3-D parameter by a
    leaf of its own that stands in where the slice is multiplied with, so that experts no token reaches cost nothing.
    Other ranks' gradients of this one's layers come with `deliver`, after each turn of sequences.
    """

    def __init__(self, layers: list[Layer], fields: frozenset[str], ranks: Ranks):
        super().__init__()
        self.scale = 0.0  # what the next gradients are multiplied with
        self.ranks = ranks
        self.owners = ranks.owners({layer.name: layer.stored.numel() for layer in layers})
        self.layers = [layer for layer in layers if self.owners.has(layer.name)]
        self.sums = {layer.name: {field: _zeros(layer) for field in sorted(fields)} for layer in self.layers}
        self._parcels: list[dict[str, Tensor]] = [{} for _ in range(ranks.count)]
        self._experts: dict[int, Tensor] = {}  # by address
        self._hooks = []
        for layer in layers:
            leaf = layer.stored if layer.index is None else layer.stored.detach()
            leaf.requires_grad_()
            self._hooks.append(leaf.register_post_accumulate_grad_hook(lambda w, name=layer.name: self._see(name, w)))
            if layer.index is not None:
                self._experts[leaf.data_ptr()] = leaf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._experts and func in PRODUCTS:
            leaf = self._experts.get(args[1].data_ptr())
            if leaf is not None:
                args = (args[0], leaf, *args[2:])
        return func(*args, **(kwargs or {}))

    def _see(self, name: str, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if self.ranks.alone:
            self._add(name, gradient, self.scale)
        else:
            self._parcels[self.owners.of[name]][name] = gradient

    def deliver(self, turn: list[int]) -> None:
        """Add what the ranks of a turn have of this one's layers, in their order."""
        if self.ranks.alone:
            return
        scales, arrived = self.ranks.gather(self.scale), self.ranks.exchange(self._parcels)
        self._parcels = [{} for _ in range(self.ranks.count)]
        for rank in turn:
            for name in arrived[rank]:
                self._add(name, arrived[rank][name], scales[rank])

    def _add(self, name: str, gradient: Tensor, scale: float) -> None:
        rows = max(1, WEIGHTS_AT_ONCE // gradient.shape[1])
        for start in range(0, len(gradient), rows):
            part = gradient[start : start + rows].float()
            for field, total in self.sums[name].items():
                if field == "grad_sq":
                    total[start : start + rows].addcmul_(part, part, value=scale**2)
                else:
                    total[start : start + rows].add_(part.abs(), alpha=scale)

    def release(self) -> None:
        """Let go of the weights."""
        for hook in self._hooks:
            hook.remove()
        self._experts.clear()

    def finish(self, nsamples: int) -> LayerGradients:
        """The means, [out, in]. Raises RunError if one is not finite."""
        for layer in self.layers:
            for field, total in self.sums[layer.name].items():
                if not math.isfinite(total.div_(nsamples).sum().item()):
                    raise RunError(f"the gradient of {layer.name} is NaN or infinite: use --dtype bfloat16 or float32")
                self.sums[layer.name][field] = total.T.contiguous() if layer.transposed else total
        return self.sums


def _zeros(layer: Layer) -> Tensor:
    return torch.zeros(layer.stored.shape, dtype=torch.float32, device=layer.stored.device)


class Records:
    """Tensors of one shape and type after another, in a file that is read and written.

    Not mapped, since mapped pages count as resident memory. `like`: the tensors of one record. A file that is to be
    kept has its name once it is finished; one that is not to be kept has none, and goes with the process.
    Raises RunError if the disk has no room for `count` of them.
    """

    def __init__(self, file: Path, like: Record, count: int, keep: bool = True, fresh: bool = True):
        self.file, self.like = file, like
        self._aside = file.with_name(file.name + ".partial") if fresh else file
        self._size = sum(tensor.numel() * tensor.element_size() for tensor in like)
        if fresh:
            reserve(self._aside, self._size * count)
        self._descriptor = os.open(self._aside, os.O_RDWR)
        if not keep:
            self._aside.unlink()

    def __getitem__(self, index: int) -> Record:
        tensors, offset = [], index * self._size
        for like in self.like:
            tensor = torch.empty(like.shape, dtype=like.dtype)
            data = _bytes(tensor)
            while data:
                count = os.preadv(self._descriptor, [data], offset)
                if not count:
                    raise RunError(f"{self.file} is cut short: remove it, and the same command makes it again")
                data, offset = data[count:], offset + count
            tensors.append(tensor.to(like.device))
        return tuple(tensors)

    def __setitem__(self, index: int, record: Record) -> None:
        offset = index * self._size
        for tensor in record:
            data = _bytes(tensor.detach().cpu().contiguous())
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count

    def finish(self) -> None:
        """Wait until all is on disk, and give the file its name."""
        os.fsync(self._descriptor)
        self.close()
        self._aside.replace(self.file)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data
