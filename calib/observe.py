"""Watch the inputs of the linear layers of one block while calibration sequences run through it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.calib.hidden import Sequences
from compress.calib.layers import PRODUCTS, Layer
from compress.calib.model import Block
from compress.calib.products import Products, dealt
from compress.calib.ranks import NOBODY_ELSE, Owners, Ranks
from compress.calib.stats import LayerStats

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
    sequences: Sequences,
    needs: frozenset[str],
    shared: dict[str, str],
    owners: Owners = NOBODY_ELSE,
) -> dict[str, LayerStats]:
    """Statistics of each layer's input over all sequences; layers that read the same tensor get the same object.

    `sequences`: what enters the block. `needs` names fields of LayerStats (`x_sum`, `x_sq`, `x_min`, `x_max`,
    `hessian`). Products are made in float32 for a few whole sequences at a time and summed in float64, so the sums do
    not depend on how such bunches of sequences are dealt out.

    With sequences in the dense model, statistics have `drift` and `drift_sum` as well, and those sequences are what
    leaves the block afterwards. The block must be as it came. Experts, which may get other tokens in the dense model,
    have none.

    `owners`: whose each distinct input is, by the first layer that reads it. Each rank sends its own sequences through
    the block, makes its share of the products, and is left with the statistics of its own inputs over all sequences.
    """
    layers = [layer for layer in layers if layer.index is not None or shared[layer.name] == layer.name]
    nsamples = sum(owners.ranks.gather(len(sequences.hidden)))
    summing = _Summing(layers, needs, -(-SAMPLE_TOKENS // nsamples), owners, drift=sequences.dense is not None)
    sums, together = summing.sums, max(1, TOKENS_AT_ONCE // sequences.hidden[0].shape[1])
    mail = _Mail(owners.ranks, summing.readers, sums)
    passing = _Passing(block, layers, sequences, mail.put)
    for place, turn in owners.ranks.turns(nsamples):
        if place is not None:
            passing.send(place)
        for index in mail.deliver(turn):
            if (index + 1) % together == 0 or index + 1 == nsamples:
                for each in sums.values():
                    each.multiply()
    summing.collect()
    seen = {layer.name: sums.pop(layer.name).finish(layer) for layer in layers if owners.has(layer.name)}
    return seen | {name: seen[first] for name, first in shared.items() if first in seen}


class _Passing:
    """Sequences on their way through a block whose layers are watched.

    `see(layer, input, input in the dense model)` is called for each use of a layer, in their order.
    """

    def __init__(
        self, block: Block, layers: list[Layer], sequences: Sequences, see: Callable[[str, Tensor, Tensor | None], None]
    ):
        self.block, self.layers, self.sequences, self.see = block, layers, sequences, see
        self.modules = [layer for layer in layers if layer.index is None]
        self.dense: dict[str, Tensor] = {}
        self.calls: list[str] = []  # in the first sequence

    def send(self, index: int) -> None:
        """Take a sequence as far as the last layer that is watched, and through the block in the dense model."""
        calls, dense = self.calls, self.sequences.dense
        last = calls[-1] if calls and calls.count(calls[-1]) == 1 and len(self.modules) == len(self.layers) else None

        def see(layer: Layer, x: Tensor) -> None:
            self.see(layer.name, x, self.dense.pop(layer.name, None))
            if index == 0:
                calls.append(layer.name)
            elif layer.name == last:
                raise _SeenAll

        if dense is not None:
            with _Watch(self.modules, lambda layer, y: self.dense.update({layer.name: y.clone()})):  # is overwritten
                dense[index] = self.block(dense[index])
        with contextlib.suppress(_SeenAll), _Watch(self.layers, see):
            self.block(self.sequences.hidden[index])


class _Summing:
    """Who sums what: an input's owner its vectors and its sample, all ranks a share of the panels of all products."""

    def __init__(self, layers: list[Layer], needs: frozenset[str], take: int, owners: Owners, drift: bool):
        self.owners, number, products = owners, owners.ranks.number, frozenset({"hessian"})
        widths = {layer.name: layer.shape[1] for layer in layers} if products <= needs else {}
        makers = dealt(widths, owners.ranks.count, drift)
        self.readers = {layer.name: {owners.of.get(layer.name, 0), *makers.get(layer.name, ())} for layer in layers}
        self.sums: dict[str, _Sums] = {}
        for name in (layer.name for layer in layers if number in self.readers[layer.name]):
            places = {place for place, rank in enumerate(makers.get(name, ())) if rank == number}
            self.sums[name] = _Sums(needs if owners.has(name) else products, take, places)

    def collect(self) -> None:
        """Give the owner of each input the panels that others have made."""
        parcels: list[dict[str, Tensor]] = [{} for _ in range(self.owners.ranks.count)]
        for name in [name for name in self.sums if not self.owners.has(name)]:
            made = self.sums.pop(name).products.made()
            parcels[self.owners.of[name]] |= {f"{name} {key}": panel for key, panel in made.items()}
        for theirs in self.owners.ranks.exchange(parcels):
            for key, panel in theirs.items():
                name, _, place = key.partition(" ")
                self.sums[name].products.receive({place: panel})


class _Mail:
    """Inputs on their way from the ranks that have seen them to those that sum them."""

    def __init__(self, ranks: Ranks, readers: dict[str, set[int]], sums: "dict[str, _Sums]"):
        self.ranks, self.readers, self.sums = ranks, readers, sums
        self._empty()

    def _empty(self) -> None:
        self.parcels: list[dict[str, Tensor]] = [{} for _ in range(self.ranks.count)]

    def put(self, name: str, x: Tensor, dense: Tensor | None) -> None:
        """One input, and what it is in the dense model; without other ranks it goes into its sums at once."""
        if self.ranks.alone:
            self.sums[name].add(x, dense)
            return
        for reader in self.readers[name]:
            parcel = self.parcels[reader]
            key = f"{len(parcel)} {name}"
            parcel[key] = x
            if dense is not None:
                parcel[f"dense {key}"] = dense

    def deliver(self, turn: list[tuple[int, int]]) -> Iterator[int]:
        """The sequences of a turn, each when what all ranks have seen of it is in the sums."""
        arrived = self.ranks.exchange(self.parcels)
        self._empty()
        for rank, index in turn:
            for key, x in arrived[rank].items():
                if not key.startswith("dense "):
                    self.sums[key.split(" ")[1]].add(x, arrived[rank].get(f"dense {key}"))
            yield index


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

    def __init__(self, needs: frozenset[str], take: int, places: set[int]):
        self.needs, self.take = needs, take
        self.n_tokens = 0
        self.x_sum: Tensor | None = None
        self.x_sq: Tensor | None = None
        self.x_min: Tensor | None = None
        self.x_max: Tensor | None = None
        self.products = Products(places)
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
        self.waiting = []
        self.products.add(x, torch.cat(dense) if dense else None)

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
        hessian, drift, drift_sum = self.products.finish()
        return LayerStats(
            n_tokens=self.n_tokens,
            x_sum=None if self.x_sum is None else self.x_sum.float(),
            x_sq=None if self.x_sq is None else self.x_sq.float(),
            x_min=self.x_min,
            x_max=self.x_max,
            hessian=hessian,
            drift=drift,
            drift_sum=drift_sum,
            sample=torch.cat(self.sample),
        )


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
