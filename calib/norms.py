"""The norms whose output nothing but linear layers reads: what scales such an input can be folded in."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from compress.calib.layers import Layer
from compress.calib.model import Block

TOLERANCE = 1e-4  # relative, in float32, of what a norm is found to compute


class Norm:
    """A norm that computes (offset + weight) * normalized + bias, with the weight and the bias that it stores."""

    def __init__(self, module: nn.Module, offset: float):
        self.module, self.offset = module, offset

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias that a shift can go into."""
        return self._bias is not None

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @torch.no_grad()
    def divide(self, scale: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Make the norm emit (x - shift) / scale where it emitted x; `scale`, `shift`: float32 [features].

        Returns the scale and the shift that it has then: those for which its parameters are exact as they are stored,
        close to the ones asked for. A norm without a bias takes no shift. Where a gain is too small to be divided in
        its dtype it stays, and so does the scale 1.
        """
        stored: Any = self.module.weight
        gain = self.offset + stored.float()
        wanted = (gain / scale - self.offset).to(stored.dtype)
        lost = (self.offset + wanted.float() == 0) & (gain != 0)
        stored.copy_(torch.where(lost, stored, wanted))
        scale = torch.where(gain == 0, scale, gain / (self.offset + stored.float()))
        if self._bias is None:
            return scale, None
        before = self._bias.float().clone()  # what a cast to its own dtype would not do
        self._bias.copy_((before if shift is None else before - shift) / scale)
        return scale, None if shift is None else before - self._bias.float() * scale


def emitting_norms(block: Block, shared: dict[str, str], hidden: Tensor) -> dict[str, Norm]:
    """The norms that emit an input, by the name of the first layer that reads it, where only linear layers read it.

    Found in one forward pass of `hidden` [1, tokens, hidden_size]: the input is the very tensor that a norm returned, a
    norm that is called once, and no operation outside of the layers that share it (`shared`, of `shared_inputs`)
    reads it. What a norm computes is found by trying it.
    """
    watch = _Readers(block, shared)
    with watch:
        left = block(hidden)
    found = {}
    for name, module in watch.emitters.items():
        output = watch.inputs[name]
        if output is left or watch.calls[module] > 1 or any(output is each for each in watch.read_elsewhere):
            continue
        if (offset := _offset(module)) is not None:
            found[name] = Norm(module, offset)
    return found


def _offset(module: nn.Module) -> float | None:
    """What a norm adds to its weight before it multiplies, 0 or 1; None if it computes anything else."""
    probe: Any = copy.deepcopy(module).float()
    features = len(probe.weight)
    x = torch.randn(4, features, generator=torch.Generator().manual_seed(0)).to(probe.weight.device)
    bias = 0.0 if getattr(probe, "bias", None) is None else probe.bias

    def output(weight: Tensor | float) -> Tensor:
        with torch.no_grad():
            probe.weight.copy_(torch.as_tensor(weight, device=x.device).expand(features))
            return probe(x) - bias

    at_zero, at_one = output(0.0), output(1.0)
    normalized, weight = at_one - at_zero, torch.linspace(-1, 2, features, device=x.device)
    tried = output(weight)
    for offset in (0.0, 1.0):
        if torch.allclose(tried, (offset + weight) * normalized, rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None


class _Readers(TorchFunctionMode):
    """Sees which norm returned each input, and every operation on it outside of the layers that share it."""

    def __init__(self, block: Block, shared: dict[str, str]):
        super().__init__()
        self.block, self.shared = block, shared
        self.calls: dict[nn.Module, int] = {}  # of each norm
        self.outputs: list[tuple[Tensor, nn.Module]] = []  # holding the tensors keeps their identity from being reused
        self.inputs: dict[str, Tensor] = {}  # of the layers that others share an input with, and of single ones
        self.emitters: dict[str, nn.Module] = {}
        self.read_elsewhere: list[Tensor] = []
        self.inside: list[Tensor] = []  # the inputs of the layers that are running

    def __enter__(self) -> "_Readers":
        layers = [layer for layer in self.block.layers if layer.index is None and layer.name in self.shared]
        norms = [module for module in self.block.module.modules() if _is_norm(module)]
        self.hooks = [norm.register_forward_hook(self._returned) for norm in norms]
        for layer in layers:
            enter = layer.owner.register_forward_pre_hook(lambda _, args, layer=layer: self._enter(layer, args[0]))
            self.hooks += [enter, layer.owner.register_forward_hook(lambda *_: self._leave())]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def _returned(self, norm: nn.Module, args: Any, output: Any) -> None:
        self.calls[norm] = self.calls.get(norm, 0) + 1
        if isinstance(output, Tensor):
            self.outputs.append((output, norm))

    def _enter(self, layer: Layer, x: Tensor) -> None:
        self.inside.append(x)
        name = self.shared[layer.name]
        emitter = next((norm for output, norm in self.outputs if output is x), None)
        if name not in self.inputs:
            self.inputs[name] = x
            if emitter is not None and x.shape[-1] == len(emitter.weight):  # type: ignore[arg-type]
                self.emitters[name] = emitter

    def _leave(self) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(each, Tensor) for each in tree_leaves(result)):  # not a look at a shape or a dtype
            for each in tree_leaves((args, kwargs)):
                known = isinstance(each, Tensor) and any(each is output for output, _ in self.outputs)
                if known and not any(each is x for x in self.inside):
                    self.read_elsewhere.append(each)
        return result


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has one gain a feature and is called a norm; GroupNorm and the like take other inputs."""
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.dim() == 1
