"""What ranks tell one another about a block: vectors of inputs that somebody else has summed, layers that somebody else
has solved, and codes, while it is trained.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from compress.calib.layers import Layer
from compress.calib.ranks import Ranks
from compress.calib.stats import LayerStats
from compress.checkpoint.native import Contents, decode, encode
from compress.kernels.linear import PackedLinear
from compress.work import Finished

VECTORS = ("x_sum", "x_sq", "x_min", "x_max", "sample")  # what is small of an input's statistics


def share_vectors(ranks: Ranks, stats: dict[str, LayerStats], shared: dict[str, str]) -> dict[str, LayerStats]:
    """The statistics that each rank has, for all of them; a rank has matrices of its own inputs alone.

    `stats`: this rank's, by layer; `shared`: layer -> the first layer with the same input.
    """
    if ranks.alone:
        return stats
    own = {name: seen for name, seen in stats.items() if shared.get(name) == name}
    tensors = {
        f"{name} {vector}": tensor
        for name, seen in own.items()
        for vector in VECTORS
        if (tensor := getattr(seen, vector)) is not None
    }
    counts = ranks.gather({name: seen.n_tokens for name, seen in own.items()})
    first: dict[str, LayerStats] = {}
    for rank, (theirs, n_tokens) in enumerate(zip(ranks.share_out(tensors), counts, strict=True)):
        for name, n in n_tokens.items() if rank != ranks.number else ():
            vectors: dict[str, Any] = {vector: theirs.get(f"{name} {vector}") for vector in VECTORS}
            first[name] = LayerStats(n, **vectors)
    return stats | {name: first[owner] for name, owner in shared.items() if owner in first}


def share_finished(ranks: Ranks, layers: Iterable[Layer], finished: Sequence[Finished]) -> list[Finished]:
    """The layers that all ranks have finished, in the order of `layers`, each of them installed.

    `layers`: those that somebody has solved; `finished`: this rank's.
    """
    if ranks.alone:
        return list(finished)
    by_name = {layer.name: layer for layer in layers}
    own = {done.layer.name: done for done in finished}
    tensors, manifest = _encoded(finished)
    shown = ranks.share_out(tensors)
    said = ranks.gather([manifest, {name: [each.bits, each.error, each.journal] for name, each in own.items()}])
    everyones = dict(own)
    for rank, (theirs, (described, facts)) in enumerate(zip(shown, said, strict=True)):
        if rank == ranks.number:
            continue
        contents = decode(theirs, described, where=f"what rank {rank} sent")
        stored = {layer.name: layer for layer in contents.layers}
        for name, (bits, error, journal) in facts.items():
            layer, keep, packed = by_name[name], contents.masks.get(name), stored.get(name)
            layer.install(contents.dense[name] if packed is None else packed.dequantize())
            if packed is None:
                everyones[name] = Finished(layer, None, keep, bits, error, journal=journal)
            else:
                layer.quantize_inputs(packed.inputs)
                about = (packed.inputs, packed.correction, journal)
                everyones[name] = Finished(layer, packed.packed, keep, bits, error, *about)
    return [everyones[name] for name in by_name]


def _encoded(finished: Sequence[Finished]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of this rank's layers, and what they are."""
    stored = [done.stored for done in finished if done.stored is not None]
    dense = {done.layer.name: done.layer.weight for done in finished if done.packed is None}
    return encode(Contents(stored, dense, {done.layer.name: done.keep for done in finished if done.keep is not None}))


def share_codes(block: nn.Module, ranks: Ranks) -> None:
    """Leave each rank its share of the packed weights in a block that is trained.

    They do not learn, so nothing is summed on the way. What learns is small, and every rank has all of it.
    """
    if not ranks.alone:
        packed = [module for module in block.modules() if isinstance(module, PackedLinear)]
        ranks.deal_out(block, [code for module in packed for code in module.as_parameters()])
