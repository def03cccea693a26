"""Watch the inputs of the linear layers of one block while calibration sequences run through it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.calib.hidden import HiddenStates
from compress.calib.layers import PRODUCTS, Layer
from compress.calib.model import Block
from compress.calib.stats import LayerStats

PANEL = 512  # rows of xᵀx computed at a time
TOKENS_AT_ONCE = 2048  # whose products are made together
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
    block: Block,
    layers: Iterable[Layer],
    hidden: Sequence[Tensor] | HiddenStates,
    needs: frozenset[str],
    shared: dict[str, str],
    dense: HiddenStates | None = None,
) -> dict[str, LayerStats]:
    """Statistics of each layer's input over all sequences; layers that read the same tensor get the same object.

    `hidden`: sequences [1, tokens, hidden_size] that enter the block. `needs` names fields of LayerStats
    (`x_sum`, `x_sq`, `x_min`, `x_max`, `hessian`). Products are made in float32 for a few whole sequences at a time and
    summed in float64, so the sums do not depend on how such bunches of sequences are dealt out.

    `dense`: what enters the block in the dense model; then statistics have `drift` and `drift_sum` as well, and `dense`
    is what leaves the block afterwards. The block must be as it came. Experts, which may get other tokens in the dense
    model, have none.
    """
    layers = [layer for layer in layers if layer.index is not None or shared[layer.name] == layer.name]
    take = -(-SAMPLE_TOKENS // len(hidden))
    sums = {layer.name: _Sums(needs, take) for layer in layers}
    before: dict[str, Tensor] = {}
    modules = [layer for layer in layers if layer.index is None]
    together = max(1, TOKENS_AT_ONCE // hidden[0].shape[1])
    calls: list[str] = []  # in the first sequence

    def see(layer: Layer, x: Tensor) -> None:
        sums[layer.name].add(x, before.pop(layer.name, None))
        if index == 0:
            calls.append(layer.name)
        elif layer.name == last:
            raise _SeenAll

    for index, sequence in enumerate(hidden):
        last = calls[-1] if calls and calls.count(calls[-1]) == 1 and len(modules) == len(layers) else None
        if dense is not None:
            with _Watch(modules, lambda layer, y: before.update({layer.name: y.clone()})):  # `dense` is overwritten
                dense[index] = block(dense[index])
        with contextlib.suppress(_SeenAll), _Watch(layers, see):
            block(sequence)
        if (index + 1) % together == 0 or index + 1 == len(hidden):
            for each in sums.values():
                each.multiply()
    seen = {layer.name: sums.pop(layer.name).finish(layer) for layer in layers}
    return seen | {name: seen[first] for name, first in shared.items() if first in seen}


@contextlib.contextmanager
def saturation(block: Block) -> Iterator[dict[str, list[int]]]:
    """Counts, while the context lasts: layer -> [inputs beyond the range of their static codes, inputs in all]."""
    layers = [layer for layer in block.layers if layer.inputs is not None and layer.inputs.static]
    counts = {layer.name: [0, 0] for layer in layers}

    def see(layer: Layer, x: Tensor) -> None:
        assert layer.inputs is not None
        counts[layer.name][0] += layer.inputs.saturated(x)
        counts[layer.name][1] += x.numel()

    with _Watch(layers, see):
        yield counts


class _Sums:
    """Running sums over sequences of one input."""

    def __init__(self, needs: frozenset[str], take: int):
        self.needs, self.take = needs, take
        self.n_tokens = 0
        self.x_sum: Tensor | None = None
        self.x_sq: Tensor | None = None
        self.x_min: Tensor | None = None
        self.x_max: Tensor | None = None
        self.hessian: Tensor | None = None
        self.drift: Tensor | None = None
        self.drift_sum: Tensor | None = None
        self.sample: list[Tensor] = []
        self.waiting: list[tuple[Tensor, Tensor | None]] = []  # inputs whose products are still to be made

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Take in one sequence's inputs, and what they are in the dense model."""
        x = x.detach().flatten(0, -2)
        if not len(x):
            return
        if "hessian" in self.needs:
            self.waiting.append((x, None if dense is None else dense.flatten(0, -2)))
        self.n_tokens += len(x)
        self.sample.append(x[:: max(1, len(x) // self.take)][: self.take].to(torch.float32, copy=True))
        if not self.needs - {"hessian"}:
            return
        x = x.float()
        if "x_sum" in self.needs:
            total = x.sum(0)
            self.x_sum = total.double() if self.x_sum is None else self.x_sum.add_(total)
        if "x_sq" in self.needs:
            square = x.square().sum(0)
            self.x_sq = square.double() if self.x_sq is None else self.x_sq.add_(square)
        if self.needs & {"x_min", "x_max"}:
            low, high = x.aminmax(dim=0)
            self.x_min = low if self.x_min is None else torch.minimum(self.x_min, low)
            self.x_max = high if self.x_max is None else torch.maximum(self.x_max, high)

    def multiply(self) -> None:
        """Make the products of the sequences taken in since the last time: sums in float64 cost more than short products."""
        if not self.waiting:
            return
        x = torch.cat([each for each, _ in self.waiting])
        dense = [each for _, each in self.waiting if each is not None]
        dtype, x = x.dtype, x.float()
        self.waiting = []
        if self.hessian is None:
            self.hessian = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        with products_of(dtype):
            for start in range(0, x.shape[1], PANEL):  # xᵀx is symmetric: panels up to the diagonal are enough
                stop = min(start + PANEL, x.shape[1])
                self.hessian[start:stop, :stop] += x[:, start:stop].T @ x[:, :stop]
            if dense:
                self._add_drift(torch.cat(dense).float(), x)

    def _add_drift(self, dense: Tensor, x: Tensor) -> None:
        """`drift` is the sum of y xᵀ until `finish` takes the Hessian off it: y is exact in the model's dtype, y - x not."""
        product, moved = dense.T @ x, (dense - x).sum(0)
        if self.drift is None or self.drift_sum is None:
            self.drift, self.drift_sum = product.double(), moved.double()
        else:
            self.drift.add_(product)
            self.drift_sum.add_(moved)

    def finish(self, layer: Layer) -> LayerStats:
        """What was seen of the layer's input. Uses the sums up."""
        if not self.n_tokens:
            noise = torch.eye(layer.shape[1], device=layer.stored.device)
            return LayerStats(
                n_tokens=0,
                x_sum=torch.zeros_like(noise[0]) if "x_sum" in self.needs else None,
                x_sq=noise.diagonal().clone() if "x_sq" in self.needs else None,
                x_min=-noise.diagonal() if "x_min" in self.needs else None,
                x_max=noise.diagonal().clone() if "x_max" in self.needs else None,
                hessian=noise if "hessian" in self.needs else None,
            )
        hessian = None if self.hessian is None else _mirrored(self.hessian)
        if self.drift is not None and hessian is not None:
            self.drift.sub_(hessian)
        return LayerStats(
            n_tokens=self.n_tokens,
            x_sum=None if self.x_sum is None else self.x_sum.float(),
            x_sq=None if self.x_sq is None else self.x_sq.float(),
            x_min=self.x_min,
            x_max=self.x_max,
            hessian=hessian,
            drift=None if self.drift is None else self.drift.float(),
            drift_sum=None if self.drift_sum is None else self.drift_sum.float(),
            sample=torch.cat(self.sample),
        )


@contextlib.contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """While open, float32 matrices that hold values of `dtype` are multiplied by the units for bfloat16 (CPU) or tf32.

    Where those hold the values, products are exact and summed in float32, as before, and several times as fast.
    """
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]  # made at run time
    before = cpu.fp32_precision, cuda.fp32_precision
    try:
        if dtype == torch.bfloat16:
            cpu.fp32_precision = "bf16"
        if dtype in (torch.bfloat16, torch.float16):
            cuda.fp32_precision = "tf32"
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


def _mirrored(lower: Tensor) -> Tensor:
    """A symmetric float32 matrix from its lower panels in float64, which it uses up."""
    whole = lower.tril_().float()
    return whole.add_(whole.tril(-1).T)


class _SeenAll(Exception):
    """Ends a block's forward once all that is watched was seen: what leaves the block is not asked for."""


class _Watch(TorchFunctionMode):
    """Calls `see(layer, input)` for each use of the layers: modules by a hook, experts' slices by their matrix product.

    It sees inputs as they come, before they are rounded.
    """

    def __init__(self, layers: Iterable[Layer], see: Callable[[Layer, Tensor], None]):
        super().__init__()
        self.modules = [layer for layer in layers if layer.index is None]
        self.slices = {layer.stored.data_ptr(): layer for layer in layers if layer.index is not None}
        self.see = see

    def __enter__(self) -> "_Watch":
        self.hooks = [
            layer.owner.register_forward_pre_hook(lambda _, args, layer=layer: self.see(layer, args[0]), prepend=True)
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
