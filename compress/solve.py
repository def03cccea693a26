"""Take the layers that read one input through every step, with a line in the journal for each."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from compress.activations import Prepared
from compress.calib.allocator import return_freed
from compress.calib.layers import Layer
from compress.calib.stats import LayerStats, make_up
from compress.checkpoint.formats import as_held
from compress.errors import RunError
from compress.steps import Step
from compress.task import LayerTask, split, stacked
from compress.work import Finished, Work, stored_layer

WEIGHTS_AT_ONCE = 2**22  # of layers that are solved together: more would leave the cache, and take memory


@dataclass(frozen=True)
class Reader:
    """A layer, and what is known of its input."""

    layer: Layer
    stats: LayerStats
    prepared: Prepared | None  # None: the input stays as it is
    gradients: Callable[[], dict[str, Any]] = dict  # those fields of LayerStats, read when their turn comes


@dataclass(frozen=True)
class _Begun:
    """A layer before its first step, without what is known of its drift: that has been made up for."""

    layer: Layer
    prepared: Prepared | None
    task: LayerTask


def compress_layers(work: Work, readers: Iterable[Reader]) -> list[Finished]:
    """Take layers that read one input through every step and install what comes out.

    Small ones together, large ones one after another: several states of a layer's float32 weight are in memory.
    """
    begun, finished = map(partial(_begin, work), readers), list[Finished]()
    while done := _compress(work, _some(begun)):
        finished += done
        return_freed()
    return finished


def _some(begun: Iterator[_Begun]) -> list[_Begun]:
    """The next of them, up to so many weights."""
    some: list[_Begun] = []
    while sum(each.task.weight.numel() for each in some) < WEIGHTS_AT_ONCE and (one := next(begun, None)) is not None:
        some.append(one)
    return some


def _compress(work: Work, begun: Sequence[_Begun]) -> list[Finished]:
    """Take layers through every step and install what comes out."""
    journals: list[list[dict[str, Any]]] = [[] for _ in begun]
    tasks = [each.task for each in begun]
    energies = [task.stats.output_energy(task.original) for task in tasks]
    errors = [0.0] * len(tasks)
    for step in work.of_layers:
        at = [index for index, task in enumerate(tasks) if step.applies(task.plan)]
        noted = [len(tasks[index].notes) for index in at]
        started = time.monotonic()
        done = run_step(step, [tasks[index] for index in at])
        seconds = time.monotonic() - started
        n_weights = sum(task.weight.numel() for task in done)
        for index, task, before in zip(at, done, noted, strict=True):
            tasks[index] = task
            errors[index] = _error(task, energies[index])
            if not torch.isfinite(task.weight).all():
                raise RunError(
                    f"{step.name} made NaN or infinity of {task.name}: use more calibration samples or damping"
                )
            journals[index].append({
                "event": "layer", "layer": task.name, "step": step.stage, "method": step.name,
                "seconds": round(seconds * task.weight.numel() / n_weights, 4), "error": errors[index],
                "error_on": task.stats.measured_on, "density": _density(task),
                "bits": _bits(work, task, begun[index].layer), "notes": task.notes[before:],
            })  # fmt: skip
    return [_install(work, *each) for each in zip(begun, tasks, errors, journals, strict=True)]


def run_step(step: Step, tasks: Sequence[LayerTask]) -> list[LayerTask]:
    """One step on layers that read one input. Rows that a step treats alone are solved together, a chunk at a time."""
    if not step.rows_alone:
        return [step.run(task) for task in tasks]
    done: list[LayerTask] = []
    for _, alike in groupby(tasks, key=lambda task: (task.plan, task.keep is None)):
        several = list(alike)
        if several[0].keep is None and several[0].plan.compares_rows:  # a mask is still to be chosen
            done += [step.run(task) for task in several]
            continue
        done += split((step.run(stacked(chunk)) for chunk in _chunks(several)), several)
    return done


def _chunks(tasks: Sequence[LayerTask]) -> Iterator[list[LayerTask]]:
    """Rows of the tasks, in order, in lists of at most `WEIGHTS_AT_ONCE` weights."""
    rows = max(1, WEIGHTS_AT_ONCE // tasks[0].weight.shape[1])
    chunk: list[LayerTask] = []
    room = rows
    for task in tasks:
        start, total = 0, len(task.weight)
        while start < total:
            stop = min(total, start + room)
            chunk.append(task.rows(slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield chunk
                chunk, room = [], rows
    if chunk:
        yield chunk


def _begin(work: Work, reader: Reader) -> _Begun:
    """The layer as it comes, checked."""
    layer, stats, prepared = reader.layer, reader.stats, reader.prepared
    weight = layer.weight.float().contiguous()
    if not torch.isfinite(weight).all():
        range_ = ", or its weights do not fit float16: use --dtype bfloat16" * (work.model.dtype == torch.float16)
        raise RunError(f"{layer.name} holds NaN or infinity as it came: the model's files are damaged{range_}")
    if not stats.finite:
        raise RunError(
            f"the inputs of {layer.name} hold NaN or infinity: weights before it are damaged, or too large for "
            f"{str(work.model.dtype).removeprefix('torch.')} (--dtype float32)"
        )
    plan = work.plans[layer.name].plan
    weight = weight if prepared is None else prepared.folded(weight)
    if plan.changes:  # a layer that nothing is asked of stays as it came, to the last bit
        weight = make_up(stats, weight, work.drift)
    stats = replace(stats, drift=None, drift_sum=None, **reader.gradients())
    task = LayerTask(layer.name, weight, weight, stats, plan, work.model.dtype, adapter_bits=work.adapter_bits)
    if work.needs and not stats.n_tokens:
        task = task.noted(
            "no calibration token reached this layer, so its inputs count as white noise: use more samples"
        )
    return _Begun(layer, prepared, task)


def _install(work: Work, begun: _Begun, task: LayerTask, error: float, journal: list[dict[str, Any]]) -> Finished:
    layer = begun.layer
    layer.install(task.weight)
    inputs = None if begun.prepared is None or task.packed is None else begun.prepared.quantizer
    layer.quantize_inputs(inputs)
    return Finished(layer, task.packed, task.keep, _bits(work, task, layer), error, inputs, task.correction, journal)


def _error(task: LayerTask, energy: float) -> float:
    return task.stats.output_energy(task.weight - task.original) / energy if energy else 0.0


def _density(task: LayerTask) -> float:
    return 1.0 if task.keep is None else task.keep.float().mean().item()


def _bits(work: Work, task: LayerTask, layer: Layer) -> float:
    """Bits a weight takes in the checkpoint, scales, zero points and its correction counted."""
    if task.packed is None:
        return layer.stored.element_size() * 8.0
    sized = task.packed.without_values(task.packed.shape[0], task.packed.description())
    packed = as_held(work.format_name, stored_layer(layer, sized)).packed.nbytes
    added = 0 if task.correction is None else task.correction.nbytes
    return (packed + added) * 8 / task.weight.numel()
