"""What can be taken out of a transformer so that an ordinary, smaller one is left: feed-forward channels and heads.

A structure is a slice of the outputs of some linear layers (its writers) and of the inputs of one (its reader). Without
it nothing else changes, so a model whose reader sees zeros in its place computes what the smaller model computes. Each
block chooses which of its structures go, but all blocks keep equally many: a configuration of transformers has one
`intermediate_size` and one `num_attention_heads`. For the same reason nothing finer than a head is taken out: it has
one `head_dim`, for queries, keys and values of all blocks alike, and pairs of rotary dimensions of some blocks only
would need a rotary table for each.

Heads go by whole groups of queries that share a key and a value, or by single queries where all share one. How many may
stay is what the configuration class accepts: Llama's and Gemma's want a divisor of `hidden_size`.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from compress.calib.model import Model
from compress.calib.skeleton import skeleton
from compress.errors import InputError

CHANNELS, HEADS = "channels", "heads"
FEED_FORWARD = (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("c_fc", "c_proj"), ("fc1", "fc2"))
ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "dense"))

Masks = dict[str, Tensor]  # by structure: [blocks, size]; bool, or float to scale by


@dataclass(frozen=True)
class Port:
    """A linear layer's outputs or inputs, cut into structures."""

    layer: str  # within its block: "mlp.gate_proj"
    span: int  # neighbouring features that belong to one structure
    masked: bool = True  # whether a mask has to be put here while a model is trained; see `masked`


@dataclass(frozen=True)
class Structure:
    """One kind of structure. Every block has `size` of them."""

    name: str
    size: int
    writers: tuple[Port, ...]
    reader: Port
    widths: tuple[int, ...]  # how many a block may keep, ascending; the last is `size`
    weights: int  # of one of them, in all layers it runs through


@dataclass(frozen=True)
class Structures:
    """All that can be taken out of a model, and what it would be without."""

    kinds: tuple[Structure, ...]
    n_blocks: int
    n_weights: int  # of all linear layers in the blocks: what `sparsity` is a share of
    config: dict[str, int]  # the sizes as they are

    def sparsity(self, widths: dict[str, int]) -> float:
        """Share of the blocks' weights that is gone when blocks keep `widths`."""
        gone = sum((kind.size - widths[kind.name]) * kind.weights for kind in self.kinds)
        return self.n_blocks * gone / self.n_weights

    def nearest(self, sparsity: float, heads: float) -> dict[str, int]:
        """The widths nearest to a sparsity, of those with as nearly `heads` heads as that allows."""
        return min(
            self._filled(sparsity), key=lambda each: (self._miss(each, sparsity), abs(each.get(HEADS, 0) - heads))
        )

    def choices(self, sparsity: float) -> list[dict[str, int]]:
        """All widths that come to a sparsity, within half a step in channels: one for each number of heads.

        Raises InputError if there are none.
        """
        filled = self._filled(sparsity)
        if found := [each for each in filled if self._miss(each, sparsity) == 0]:
            return found
        nearest = min((self.sparsity(each) for each in filled), key=lambda share: abs(share - sparsity))
        names = " and ".join(kind.name for kind in self.kinds)
        raise InputError(
            f"no numbers of {names} come to a sparsity of {sparsity:g} in this model, only to {nearest:.3f}"
        )

    def _filled(self, sparsity: float) -> list[dict[str, int]]:
        """For each number of heads, the channels that come nearest to a sparsity."""
        widths = {kind.name: kind.widths for kind in self.kinds}
        heads = [{HEADS: width} for width in widths[HEADS]] if HEADS in widths else [{}]
        options = ([{**each, CHANNELS: width} for width in widths[CHANNELS]] for each in heads)
        return [min(each, key=lambda option: abs(self.sparsity(option) - sparsity)) for each in options]

    def _miss(self, widths: dict[str, int], sparsity: float) -> float:
        """How far widths are from a sparsity, beyond half a step in channels."""
        channels = next(kind for kind in self.kinds if kind.name == CHANNELS)
        step = max((b - a for a, b in pairwise(channels.widths)), default=0)
        half = self.n_blocks * step * channels.weights / self.n_weights / 2 + 1e-9
        return max(0.0, abs(self.sparsity(widths) - sparsity) - half)

    def sizes(self, widths: dict[str, int]) -> dict[str, int]:
        """What config.json has to say of a model whose blocks keep `widths`; every size is given, none left to derive."""
        sizes = dict(self.config)
        for kind in self.kinds:
            for key in _CONFIG_KEYS[kind.name]:
                sizes[key] = self.config[key] * widths[kind.name] // kind.size
        if self.config["num_key_value_heads"] == 1:
            sizes["num_key_value_heads"] = 1
        return sizes

    def removed(self, name: str, tensor: Tensor, keep: dict[str, Tensor]) -> Tensor:
        """What is left of a block's parameter, `name` within its block, when only `keep` (bool [size] each) stays."""
        layer, _, attribute = name.rpartition(".")
        rows, columns = self.stays(layer, keep)
        if rows is not None:
            tensor = tensor[rows]
        return tensor if columns is None or attribute != "weight" else tensor[:, columns]

    def stays(self, layer: str, keep: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Which outputs and which inputs of a block's layer stay, bool [out] and [in]; None: all."""
        rows = columns = None
        for kind in self.kinds:
            for port in kind.writers:
                if port.layer == layer:
                    rows = keep[kind.name].repeat_interleave(port.span)
            if kind.reader.layer == layer:
                columns = keep[kind.name].repeat_interleave(kind.reader.span)
        return rows, columns


_CONFIG_KEYS = {CHANNELS: ("intermediate_size",), HEADS: ("num_attention_heads", "num_key_value_heads")}


def find_structures(model: Model, heads: bool, multiple_of: int, group_size: int = 1) -> Structures:
    """What can be taken out of a model. Channels that stay are a multiple of `multiple_of`.

    `group_size`: how many inputs of a layer will share a scale once it is quantized; widths that it does not divide are
    left out. Raises InputError for an architecture whose blocks are not built as expected, or cannot be smaller.
    """
    config = model.config.get_text_config()
    kinds = [_channels(model, multiple_of, group_size)]
    if heads:
        kinds.append(_heads(model, group_size))
    if kinds[0].size != getattr(config, "intermediate_size", None):
        raise InputError(f"{config.model_type}: its blocks' feed-forwards are not of one size: use another pruner")
    n_weights = sum(o * i for index in range(model.n_blocks) for o, i in (x.shape for x in model.layers_of(index)))
    found = Structures(tuple(kinds), model.n_blocks, n_weights, _sizes(config))
    _require_buildable(model, found)
    return found


def _sizes(config: Any) -> dict[str, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {key: getattr(config, key) for keys in _CONFIG_KEYS.values() for key in keys if hasattr(config, key)}
    return {"num_key_value_heads": config.num_attention_heads} | sizes | {"head_dim": head_dim}


def with_sizes(config: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The content of a config.json, with other sizes; those of the language model where it describes more than one."""
    config = copy.deepcopy(config)
    (config["text_config"] if "text_config" in config else config).update(sizes)
    return config


def _layers(model: Model, patterns: tuple[tuple[str, ...], ...], what: str) -> dict[str, tuple[str, nn.Linear]]:
    """The linear layers of the first pattern that every block has: by their last name, their path and themselves."""
    for pattern in patterns:
        found = []
        for block in model.modules:
            linears = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
            named = {n.rpartition(".")[2]: (n, m) for n, m in linears}
            if len(named) == len(linears) and all(name in named for name in pattern):
                found.append({name: named[name] for name in pattern})
        shapes = {tuple((path, m.weight.shape) for path, m in layers.values()) for layers in found}
        if len(found) == model.n_blocks and len(shapes) == 1:
            return found[0]
    kind = model.config.model_type
    raise InputError(f"{kind}: its blocks hold no {what} that structures can be taken out of: use another pruner")


def _channels(model: Model, multiple_of: int, group_size: int) -> Structure:
    layers = _layers(model, FEED_FORWARD, "feed-forward of plain linear layers")
    *writers, (reader, down) = layers.values()
    size = down.in_features
    weights = sum(layer.in_features for _, layer in writers) + down.out_features
    widths = [width for width in range(multiple_of, size, multiple_of) if _divides(width, group_size)]
    ports = tuple(Port(path, 1) for path, _ in writers)
    return Structure(CHANNELS, size, ports, Port(reader, 1), (*widths, size), weights)


def _heads(model: Model, group_size: int) -> Structure:
    q, k, v, o = _layers(model, ATTENTION, "attention of plain linear layers").values()
    sizes = _sizes(model.config.get_text_config())
    n_heads, n_groups, head_dim = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]
    if q[1].out_features != n_heads * head_dim or k[1].out_features != n_groups * head_dim:
        raise InputError(f"{model.config.model_type}: its attention is not heads of one size: --set atp.heads=false")
    keys: tuple[Port, ...] = ()
    if n_groups == 1:
        size, span = n_heads, head_dim
    else:  # queries without their key and value, or the other way round, would need another grouping in each block
        size, span = n_groups, n_heads // n_groups * head_dim
        keys = (Port(k[0], head_dim, masked=False), Port(v[0], head_dim))
    weights = span * (q[1].in_features + o[1].out_features)
    weights += head_dim * (k[1].in_features + v[1].in_features) if keys else 0
    widths = [w for w in range(1, size) if _divides(w * span, group_size) and _accepts(model, sizes, w, size)]
    writers = (Port(q[0], span, masked=False), *keys)
    return Structure(HEADS, size, writers, Port(o[0], span), (*widths, size), weights)


def _divides(features: int, group_size: int) -> bool:
    return features < group_size or features % group_size == 0


def _accepts(model: Model, sizes: dict[str, int], width: int, size: int) -> bool:
    """Whether the configuration class takes `width` of `size` heads or groups."""
    n_groups = sizes["num_key_value_heads"]
    fewer = {**sizes, "num_attention_heads": sizes["num_attention_heads"] * width // size}
    fewer["num_key_value_heads"] = 1 if n_groups == 1 else width
    try:
        type(model.config).from_dict(with_sizes(model.config.to_dict(), fewer))
    except Exception:  # each class checks its own values and raises its own errors
        return False
    return True


def _require_buildable(model: Model, structures: Structures) -> None:
    """Build the smallest model, without weights, and compare every shape with what would be left."""
    smallest = {kind.name: kind.widths[0] for kind in structures.kinds}
    keep = {kind.name: torch.arange(kind.size) < smallest[kind.name] for kind in structures.kinds}
    sizes = with_sizes(model.config.to_dict(), structures.sizes(smallest))
    state, config = model.lm.state_dict(), type(model.config).from_dict(sizes)
    built = skeleton(config, model.dtype, len(state))
    for name, tensor in built.state_dict().items():
        left = state[name].to("meta")
        if name.startswith(model.path + "."):
            left = structures.removed(name.removeprefix(model.path + ".").partition(".")[2], left, keep)
        if tensor.shape != left.shape:
            raise InputError(
                f"{model.config.model_type}: {name} would be {list(left.shape)}, and transformers builds "
                f"{list(tensor.shape)}: this architecture cannot be made smaller so (--set atp.heads=false)"
            )


@contextmanager
def masked(blocks: nn.ModuleList, structures: Structures, masks: Masks, frozen_only: bool = False) -> Iterator[None]:
    """While open, blocks compute as if every structure were multiplied by its mask, [blocks, size].

    The mask is put where structures are read. `frozen_only`: LoRA layers (PEFT's) take it in their frozen branch alone,
    y = W (m x) + B A x, and writers mask what their frozen branch gives, y = m (W x) + B A x, so that the trained branch
    of a masked structure still learns. Queries and keys are left alone: a head with queries of zero still attends, evenly.
    """
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            for kind in structures.kinds:
                mask = masks[kind.name][index]
                reader: Any = block.get_submodule(kind.reader.layer)
                features = mask.repeat_interleave(kind.reader.span)
                if not frozen_only:
                    stack.callback(reader.register_forward_pre_hook(_input_mask(features)).remove)
                    continue
                stack.callback(reader.base_layer.register_forward_pre_hook(_input_mask(features)).remove)
                for port in kind.writers:
                    if port.masked:
                        writer: Any = block.get_submodule(port.layer)
                        hook = _output_mask(mask.repeat_interleave(port.span))
                        stack.callback(writer.base_layer.register_forward_hook(hook).remove)
        yield


def _input_mask(features: Tensor) -> Any:
    return lambda module, args: (args[0] * features.to(args[0].dtype), *args[1:])


def _output_mask(features: Tensor) -> Any:
    return lambda module, args, output: output * features.to(output.dtype)
