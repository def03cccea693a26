"""Which implementation multiplies by which layer, and why: `inspect --kernels`, and what serving prints at the start."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint.dense_view import PackedFiles
from compress.checkpoint.formats import open_weights
from compress.checkpoint.native import NativeFiles
from compress.errors import InputError
from compress.kernels.dispatch import Choice, Preferences, choose
from compress.kernels.implementation import Case
from compress.kernels.weights import PackedWeight
from compress.report import Report, table


def kernel_report(folder: Path, prompts: str, device: str) -> Report:
    """Every packed layer of a checkpoint, who would multiply by it on `device`, and why. Nothing is measured for it.

    Layers that read one input are served as one, from as many tokens as the largest of them.

    Raises InputError if nothing in the checkpoint is packed.
    """
    files = open_weights(folder)
    if not isinstance(files, PackedFiles):
        raise InputError(f"{folder} holds no packed layers: any model of its kind is multiplied densely")
    preferences = replace(Preferences.from_environment(prompts), measuring=False)
    lines = []
    for param, layers in files.packed.items():
        weight = files.unpacked(layers[0])
        if len(layers) > 1 or not isinstance(weight, PackedWeight):
            reason = "experts' slices are decoded" if len(layers) > 1 else "its groups are in no order"
            lines.append({"layer": param, "kernel": "dense", "why": reason})
            continue
        looked_up = isinstance(files, NativeFiles) and files.layers[layers[0]].embedding
        case = Case(weight, torch.device(device), files.dtype, files.input_quantizer(param))
        choice = choose(case, replace(preferences, prompts="packed") if looked_up else preferences)
        lines.append({"layer": layers[0], "kernel": choice.names, "why": choice.why})
    rows = [list(line.values()) for line in lines]
    return Report({"path": str(folder), "kernels": lines}, [table("", ["layer", "kernel", "why"], rows)])


def kernel_lines(choices: Mapping[str, Choice]) -> list[str]:
    """For people: "126 layers: cpu-int4; dense from 16 tokens", a line a kind."""
    return [f"{n} layers: {names}" for names, n in _counted(choice.names for choice in choices.values())]


def _counted(names: Iterable[str]) -> list[tuple[str, int]]:
    return Counter(names).most_common()


def kernel_counts(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """How many layers each choice serves."""
    return dict(_counted(choice.names for choice in choices.values()))
