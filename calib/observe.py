"""Watch the inputs of the linear layers of one block while calibration sequences run through it."""

from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.calib.layers import PRODUCTS, Layer
from compress.calib.model import Block
from compress.calib.stats import LayerStats

PANEL = 512  # rows of xᵀx computed at a time
SAMPLE_TOKENS = 512  # inputs kept of all calibration tokens, to measure output errors with


def shared_inputs(block: Block, hidden: Tensor) -> dict[str, str]:
    """Which layers read the same tensor: layer name -> the first layer that reads it, in the order of their calls.

    Found by tensor identity in one forward pass of `hidden` [1, tokens, hidden_size]. Experts stand for themselves,
    whether or not this sequence reaches them; a module the forward never calls is missing.
    """
    readers: list[tuple[Tensor, str]] = []  # holding the tensors keeps their identity from being reused
    owner: dict[str, str] = {}

    def see(layer: Layer, x: Tensor) -> None:
        if layer.index is None and layer.name not in owner:
            first = next((name for seen, name in readers if seen is x), layer.name)
            if first == layer.name:
                readers.append((x, layer.name))
            owner[layer.name] = first

    with _Watch(block.layers, see):
        block(hidden)
    return owner | {layer.name: layer.name for layer in block.layers if layer.index is not None}


def stages(block: Block, shared: dict[str, str]) -> list[list[Layer]]:
    """The block's layers in the order data reaches them: q k v | o | gate up | down; all experts' slices together."""
    by_input: dict[str, list[Layer]] = {name: [] for name in dict.fromkeys(shared.values())}
    for layer in block.layers:
        if layer.name in shared:
            key = shared[layer.name] if layer.index is None else f"{layer.param}.0"
            by_input[key].append(layer)
    return [layers for layers in by_input.values() if layers]


def observe(
    block: Block, layers: Iterable[Layer], hidden: Iterable[Tensor], needs: frozenset[str], shared: dict[str, str]
) -> dict[str, LayerStats]:
    """Statistics of each layer's input over all sequences; layers that read the same tensor get the same object.

    `hidden`: sequences [1, tokens, hidden_size] that enter the block, walked once. `needs` names fields of LayerStats
    (`x_sum`, `x_sq`, `hessian`). Products are made in float32 for each sequence and summed in float64, so the sums do not
    depend on how sequences are dealt out.
    """
    layers = [layer for layer in layers if layer.index is not None or shared[layer.name] == layer.name]
    sequences = hidden if isinstance(hidden, Sized) else list(hidden)
    take = -(-SAMPLE_TOKENS // len(sequences))
    sums = {layer.name: _Sums(needs, take) for layer in layers}
    with _Watch(layers, lambda layer, x: sums[layer.name].add(x)):
        for sequence in sequences:
            block(sequence)
    seen = {layer.name: sums.pop(layer.name).finish(layer) for layer in layers}
    return seen | {name: seen[first] for name, first in shared.items() if first in seen}


class _Sums:
    """Running sums over sequences of one input."""

    def __init__(self, needs: frozenset[str], take: int):
        self.needs, self.take = needs, take
        self.n_tokens = 0
        self.x_sum: Tensor | None = None
        self.x_sq: Tensor | None = None
        self.hessian: Tensor | None = None
        self.sample: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        if not len(x):
            return
        self.n_tokens += len(x)
        self.sample.append(x[:: max(1, len(x) // self.take)][: self.take].clone())
        if "x_sum" in self.needs:
            total = x.sum(0)
            self.x_sum = total.double() if self.x_sum is None else self.x_sum.add_(total)
        if "x_sq" in self.needs:
            square = x.square().sum(0)
            self.x_sq = square.double() if self.x_sq is None else self.x_sq.add_(square)
        if "hessian" in self.needs:
            if self.hessian is None:
                self.hessian = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
            for start in range(0, x.shape[1], PANEL):  # xᵀx is symmetric: panels up to the diagonal are enough
                stop = min(start + PANEL, x.shape[1])
                self.hessian[start:stop, :stop] += x[:, start:stop].T @ x[:, :stop]

    def finish(self, layer: Layer) -> LayerStats:
        if not self.n_tokens:
            noise = torch.eye(layer.shape[1], device=layer.stored.device)
            return LayerStats(
                n_tokens=0,
                x_sum=torch.zeros_like(noise[0]) if "x_sum" in self.needs else None,
                x_sq=noise.diagonal().clone() if "x_sq" in self.needs else None,
                hessian=noise if "hessian" in self.needs else None,
            )
        return LayerStats(
            n_tokens=self.n_tokens,
            x_sum=None if self.x_sum is None else self.x_sum.float(),
            x_sq=None if self.x_sq is None else self.x_sq.float(),
            hessian=None if self.hessian is None else _mirrored(self.hessian),
            sample=torch.cat(self.sample),
        )


def _mirrored(lower: Tensor) -> Tensor:
    """A symmetric float32 matrix from its lower panels in float64, which it uses up."""
    whole = lower.tril_().float()
    return whole.add_(whole.tril(-1).T)


class _Watch(TorchFunctionMode):
    """Calls `see(layer, input)` for each use of the layers: modules by a hook, experts' slices by their matrix product."""

    def __init__(self, layers: Iterable[Layer], see: Callable[[Layer, Tensor], None]):
        super().__init__()
        self.modules = [layer for layer in layers if layer.index is None]
        self.slices = {layer.stored.data_ptr(): layer for layer in layers if layer.index is not None}
        self.see = see

    def __enter__(self) -> "_Watch":
        self.hooks = [
            layer.owner.register_forward_pre_hook(lambda _, args, layer=layer: self.see(layer, args[0]))
            for layer in self.modules
        ]
        return super().__enter__() if self.slices else self

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.slices:
            super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            layer = self.slices.get(args[1].data_ptr())
            if layer is not None:
                self.see(layer, args[0])
        return func(*args, **(kwargs or {}))
