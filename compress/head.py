"""Embeddings and head: rounded to nearest before the blocks, so that these calibrate on what they will really see."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from compress.calib.model import Model
from compress.checkpoint.native import Contents, decode, encode
from compress.checkpoint.stored import StoredLayer, integers
from compress.errors import RunError
from compress.kernels.weights import Grid, IntWeight, PackedWeight
from compress.run_dir import RunDir

HEAD = "head"  # what the run folder calls embeddings and head
HEAD_ROWS = 16384  # embedding rows rounded at a time: all 262,144 of them in float32 would not be small


def compress_head(model: Model, head: list[StoredLayer], run: RunDir) -> None:
    """Round embeddings and head to nearest, so that the blocks calibrate on what they will really see."""
    if not head:
        return
    if not run.has(HEAD):
        layers = [_round_rows(model, layer) for layer in head]
        run.save(HEAD, *encode(Contents(layers)), {})
    for layer in decode(*run.restore(HEAD), where=HEAD).layers:
        parameter = model.lm.get_parameter(layer.param)
        for rows, part in _row_parts(layer.packed):
            parameter[rows].copy_(part.dequantize())


def _round_rows(model: Model, planned: StoredLayer) -> StoredLayer:
    """One embedding or head, [rows, hidden_size], rounded a few rows at a time."""
    wanted, parameter = integers(planned), model.lm.get_parameter(planned.param)
    parts = []
    for rows in torch.arange(len(parameter)).split(HEAD_ROWS):
        groups = parameter[rows[0] : rows[-1] + 1].float().unflatten(1, (-1, wanted.group_size))
        if not torch.isfinite(groups).all():
            raise RunError(f"{planned.name} holds NaN or infinity as it came: the model's files are damaged")
        grid = Grid.fit(groups, wanted.bits, True, model.dtype)
        codes = grid.encode_groups(groups).flatten(1)
        parts.append(IntWeight.from_codes(codes, grid, wanted.group_size, True, model.dtype))
    tensors = {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
    return replace(planned, packed=IntWeight.from_tensors(tensors, wanted.description()))


def _row_parts(weight: PackedWeight) -> Iterator[tuple[slice, PackedWeight]]:
    """A weight in pieces of a few rows."""
    for start in range(0, weight.shape[0], HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        yield rows, weight.rows(rows)
