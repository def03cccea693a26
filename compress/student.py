"""The compressed model in memory, for methods that train it: packed layers stay packed, blocks are recomputed in backward."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.calib.layers import Layer
from compress.calib.model import Block, Model
from compress.calib.ranks import ALONE, Ranks
from compress.checkpoint.native import Contents
from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError
from compress.kernels.correction import Correction, correction_from
from compress.kernels.inputs import InputQuantizer
from compress.kernels.linear import PackedLinear
from compress.kernels.weights import PackedWeight
from compress.recovery import Recovered, Student, StudentLayer
from compress.run_dir import Journal
from compress.sharing import share_codes


class _StraightThrough(torch.autograd.Function):
    """The values of an input's codes, with the gradient of the input itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: InputQuantizer) -> Tensor:
        return quantizer.fake(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@contextmanager
def student_of(model: Model, blocks: Iterable[Contents], journal: Journal, ranks: Ranks = ALONE) -> Iterator[Student]:
    """The model with its finished `blocks`, all in memory while the context lasts; afterwards no block is.

    Each linear layer may have another put in its place, and keeps its codes of inputs, whose gradient is passed on as it
    is. Layers that are no `nn.Linear` (experts' slices, transformers' Conv1D) are what they decode to and learn
    nothing, with a line in the journal. Only what enters each block is kept for backward. Nothing is random: the model
    is in its evaluation mode. A float16 model is in float32 meanwhile, since float16 has no room for gradients; packed
    weights stay as they are. Each of `ranks` keeps a share of those.
    """
    half = list[Tensor]()
    blank = [copy.deepcopy(module) for module in model.modules]  # without weights
    dense, layers = _DenseWeights(model), dict[str, StudentLayer]()
    try:
        for index, contents in enumerate(blocks):
            block = model.load_block(index)
            dense.moved |= {index} & _restore(block, contents)
            packed = {layer.name: layer for layer in contents.layers}
            for layer in block.layers:
                if layer.index is None and isinstance(layer.owner, nn.Linear):
                    made = _linear(model, layer, packed.get(layer.name), contents.masks.get(layer.name))
                    layers[layer.name] = replace(made, dense=dense.reader(index, layer.name))
                else:
                    _freeze(layer, packed.get(layer.name))
                    note = "recovery leaves it: it is no nn.Linear"
                    journal.write(event="note", layer=layer.name, note=note)
            _recompute(block.module)
            share_codes(block.module, ranks)
        if model.dtype == torch.float16:
            half = _widened(model.lm)
            journal.write(
                event="note",
                layer="every layer",
                note="recovery trains in float32: gradients are too small for float16",
            )
        yield Student(model.lm, layers)
    finally:
        for tensor in half:
            tensor.data = tensor.data.half()
        dense.close()
        for index, module in enumerate(blank):
            model.modules[index] = module


def with_results(contents: Contents, results: dict[str, Recovered], dtype: torch.dtype, adapter_bits: int) -> Contents:
    """A block's contents with what became of its layers. What was pruned of a weight that is not packed stays zero."""
    layers, dense = [], dict(contents.dense)
    for layer in contents.layers:
        result = results.get(layer.name)
        if result is not None:
            added = None if result.correction is None else _off(result.correction.rounded(dtype, adapter_bits))
            packed = layer.packed if result.packed is None else moved(result.packed, "cpu")
            layer = replace(layer, packed=packed, correction=added)
        layers.append(layer)
    for name, result in results.items():
        if result.weight is not None and (param := f"{name}.weight") in dense:
            weight, keep = result.weight.cpu(), contents.masks.get(name)
            dense[param] = (weight if keep is None else weight.masked_fill(~keep, 0.0)).to(dtype)
    return Contents(layers, dense, contents.masks)


def moved(packed: PackedWeight, device: str) -> PackedWeight:
    """A packed weight on another device."""
    tensors = {name: tensor.to(device) for name, tensor in packed.tensors().items()}
    return packed.from_tensors(tensors, packed.description())


def _off(correction: Correction) -> Correction:
    parts = {name: tensor.detach().cpu() for name, tensor in correction.tensors().items()}
    return correction_from(parts, correction.shape, correction.rank, correction.bits, correction.single)


def _restore(block: Block, contents: Contents) -> set[int]:
    """Give a block what its contents hold outside of packed layers. Returns its number if other things than layers differ."""
    state, weights = block.state(), {layer.param for layer in block.layers}
    same = True
    for name, tensor in contents.dense.items():
        same = same and (name in weights or torch.equal(state[name], tensor.to(state[name].device)))
        state[name].copy_(tensor)
    return set() if same else {block.index}


def _linear(model: Model, layer: Layer, stored: StoredLayer | None, keep: Tensor | None) -> StudentLayer:
    """A linear layer as a student has it, put where it belongs; what reads its dense weight is still to come."""
    layer.quantize_inputs(None)
    place = _Place(model.lm, layer.name, None if stored is None else stored.inputs)
    module: Any = layer.owner
    correction = None
    dtype = torch.float32 if model.dtype == torch.float16 else model.dtype
    if stored is not None:
        bias, correction = None if layer.bias is None else layer.bias.data, stored.correction
        module = PackedLinear(moved(stored.packed, model.device), bias, dtype)
        module.correction = correction
    place.put(module)
    mask = None if keep is None else keep.to(model.device)
    return StudentLayer(layer.name, module, mask, correction, dtype, layer.weight.float, place.put)


def _freeze(layer: Layer, stored: StoredLayer | None) -> None:
    """Let a layer that cannot learn be what it decodes to."""
    layer.quantize_inputs(None)
    if stored is not None:
        layer.install(stored.dequantize())
        if stored.inputs is not None:
            layer.owner.register_forward_pre_hook(_rounding(stored.inputs))


def _widened(lm: nn.Module) -> list[Tensor]:
    """Make all of a model float32 that is float16, but for what packed weights are made of. Returns what was."""
    found: dict[int, Tensor] = {}
    for module in lm.modules():
        tensors = (
            [module.bias]
            if isinstance(module, PackedLinear)
            else [*module._parameters.values(), *module._buffers.values()]
        )
        found |= {id(tensor): tensor for tensor in tensors if tensor is not None and tensor.dtype == torch.float16}
    for tensor in found.values():
        tensor.data = tensor.data.float()
    return list(found.values())


class _Place:
    """Where a layer stands, and what enters it."""

    def __init__(self, lm: nn.Module, name: str, quantizer: InputQuantizer | None):
        parent, _, self.attribute = name.rpartition(".")
        self.parent, self.quantizer = lm.get_submodule(parent), quantizer
        self.hook: Any = None

    def put(self, module: nn.Module) -> None:
        """Let a module stand there; what enters it is rounded as before, and no longer what enters the one before it."""
        if self.hook is not None:
            self.hook.remove()
        if self.quantizer is not None:
            self.hook = module.register_forward_pre_hook(_rounding(self.quantizer))
        setattr(self.parent, self.attribute, module)


def _rounding(quantizer: InputQuantizer) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (_StraightThrough.apply(args[0], quantizer), *args[1:])


def _recompute(module: nn.Module) -> None:
    """Let a block keep only what enters it, and run once more in backward (arXiv:1604.06174)."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


class _DenseWeights:
    """Weights as they were before compression, read from the model's files a block at a time."""

    def __init__(self, model: Model):
        self.model, self.moved = model, set[int]()
        self._second: Model | None = None  # of its own, since the first has other modules in place of its layers
        self._loaded: tuple[int, dict[str, Tensor]] = (-1, {})

    def reader(self, index: int, name: str) -> Callable[[], Tensor]:
        """What reads the weight of a layer of block `index`, float32 [out, in].

        It raises InputError where scales of inputs were folded in the block: the layer's inputs are in other units now.
        """
        return lambda: self._read(index, name)

    def _read(self, index: int, name: str) -> Tensor:
        if index in self.moved:
            raise InputError(
                f"what enters the layers beside {name} was scaled, so that its dense weight does not fit: "
                "use --activations per-token, or a method of recovery that does not read it"
            )
        if self._loaded[0] != index:
            first = self.model
            self._second = self._second or Model(first.folder, first.files, first.dtype, first.device)
            with self._second.loaded(index) as block:
                self._loaded = index, {layer.name: layer.weight.data for layer in block.layers}
        return self._loaded[1][name].float()

    def close(self) -> None:
        """Let go of what was read; it can be read again."""
        self._second, self._loaded = None, (-1, {})
