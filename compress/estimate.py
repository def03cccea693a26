"""`compress run --dry-run`: the plan, and what it will cost, before anything is done."""

import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.costs import Costs
from compress.inspection import within
from compress.measure import measures
from compress.pipeline import open_model, rehearse_allocation
from compress.plan import PlannedLayer, packed_layers, plan_format, plan_layers
from compress.progress import Reporter
from compress.recipe import Recipe
from compress.report import Report, duration, size, table
from compress.sizes import checkpoint_bytes, dense_bytes, n_parameters
from compress.steps import find_steps
from compress.task import LayerPlan
from compress.whole_recovery import prepare_recovery, trained_methods, training_cost

BAR = 40  # characters that stand for all weights of a block
EIGHTHS = " ▏▎▍▌▋▊▉█"


def estimate(recipe: Recipe, folder: Path, out: Path, device: str, reporter: Reporter) -> Report:
    """What a run would do and need. Nothing is left behind, and one block at most is loaded at a time.

    A rule of allocation that measures the dense model does so, for the very plan the run will have.
    """
    steps = find_steps(recipe)
    prepare_recovery(recipe)
    model = open_model(folder, recipe.dtype, device)
    started, layers = time.monotonic(), plan_layers(model, recipe)
    layers, prediction = rehearse_allocation(model, recipe, layers, reporter)
    allocating = time.monotonic() - started
    format_name, reason = plan_format(model, recipe, layers)
    compressed = checkpoint_bytes(model, format_name, packed_layers(model, recipe, layers))
    costs = Costs(model, recipe, layers)
    seconds = costs.seconds()
    if measures(recipe):
        seconds["measured"] = allocating
    memory, disk = costs.peak_bytes(), 2 * compressed + costs.gradient_disk_bytes()
    trained, training = trained_methods(recipe), 0
    if trained:
        training, seconds["train"] = training_cost(recipe, model)
        memory = max(memory, costs.training_bytes(compressed))
        disk += len(trained) * compressed
    free = shutil.disk_usage(_existing(out)).free
    data: dict[str, Any] = {
        "steps": [*(step.name for step in steps), *trained],
        "training_tokens": training,
        "format": format_name,
        "dense_bytes": dense_bytes(model),
        "compressed_bytes": compressed,
        "bits_per_weight": compressed * 8 / n_parameters(model),
        "peak_rss_bytes": memory,
        "seconds": round(sum(value for name, value in seconds.items() if not within(name)), 1),
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
        "disk_bytes": disk,
        "free_disk_bytes": free,
        "layers": len(layers),
        "predicted_loss": None if prediction is None else prediction.loss,
        "plan": {layer.name: asdict(layer.plan) for layer in layers},
    }
    loss = [] if prediction is None else [["loss, predicted", f"{prediction.loss:.4g}"]]
    if trained:
        loss.append(["learns from, about", f"{training} tokens of {recipe.train or recipe.calib.source}"])
    rows = [
        ["steps", " then ".join(data["steps"]) or "head only"],
        ["format", f"{format_name} ({reason})"],
        ["size", f"{size(data['dense_bytes'])} to {size(compressed)}, {data['bits_per_weight']:.2f} bits a weight"],
        *loss,
        ["memory, about", size(memory)],
        ["time, about", duration(data["seconds"]) + " (measured speed of this machine, loading of data not counted)"],
        ["disk while it runs", f"{size(data['disk_bytes'])}; {size(free)} are free"],
    ]
    times = table("", ["where the time will go", ""], [[name, duration(value)] for name, value in seconds.items()])
    return Report(data, [_plan_table(layers), *_picture(layers), "", table("", ["", ""], rows), "", times])


def _plan_table(layers: list[PlannedLayer]) -> Any:
    """The layers of one kind as a row."""
    kinds: dict[tuple[str, ...], list[float]] = {}
    for layer in layers:
        plan = layer.plan
        group = "channel" if plan.group_size == -1 else str(plan.group_size)
        kind = "symmetric" if plan.symmetric else "asymmetric"
        bits = "16" if plan.wbits == 16 else f"{plan.wbits} {kind}, groups of {group}"
        bits += f", inputs {plan.abits}" if plan.abits < 16 and plan.wbits < 16 else ""
        name = re.sub(r"\.\d+$", "", _within_block(layer))  # an expert's number
        key = (name, f"{layer.shape[0]} x {layer.shape[1]}", _pattern(plan), bits)
        kinds.setdefault(key, []).append(plan.sparsity)
    rows = [
        [name, str(len(shares)), shape, f"{_range(shares)} {pattern}" if max(shares) else "dense", bits]
        for (name, shape, pattern, bits), shares in kinds.items()
    ]
    return table("plan", ["layer", "how many", "out x in", "pruning", "bits"], rows)


def _pattern(plan: LayerPlan) -> str:
    if plan.pattern is not None:
        return f"{plan.pattern[0]}:{plan.pattern[1]}"
    return "unstructured" if plan.block is None else f"in blocks of {plan.block[0]}x{plan.block[1]}"


def _within_block(layer: PlannedLayer) -> str:
    return layer.name.split(f".{layer.block}.", 1)[-1]


def _range(shares: list[float]) -> str:
    """Sparsities in per cent: 50 %, or 42 to 58 %."""
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _picture(layers: list[PlannedLayer]) -> list[Any]:
    """A bar a block, of the bits that its weights take or of the share that goes; nothing if all layers are alike."""
    if len({layer.plan for layer in layers}) == 1:
        return []
    bits = len({_label(layer.plan) for layer in layers}) > 1
    rows = []
    for block in dict.fromkeys(layer.block for layer in layers):
        inside = [layer for layer in layers if layer.block == block]
        weights = sum(layer.n_weights for layer in inside)
        modules: dict[str, list[LayerPlan]] = {}
        for layer in inside:
            modules.setdefault(_within_block(layer).partition(".")[0], []).append(layer.plan)
        told = (
            f"{name} {_labels(plans) if bits else _range([p.sparsity for p in plans])}"
            for name, plans in modules.items()
        )
        if bits:
            mean = sum(_bits(layer) * layer.n_weights for layer in inside) / weights
            figures = [bar(mean / 16), f"{mean:.2f}"]
        else:
            share = sum(layer.n_weights * layer.plan.sparsity for layer in inside) / weights
            figures = [bar(share), f"{100 * share:.1f} %"]
        uneven = len({layer.plan for layer in inside}) > 1
        rows.append([str(block), *figures, ", ".join(told) if uneven or bits else ""])
    return ["", table(f"{'bits a weight' if bits else 'sparsity'} of each block", ["block", "", "", ""], rows)]


def _label(plan: LayerPlan) -> str:
    """A plan as a budget's choices are written, without a sparsity that belongs to no pattern."""
    group = "" if plan.wbits == 16 else f"g{plan.group_size}"
    return f"{plan.wbits}{group}" + (f"+{plan.pattern[0]}:{plan.pattern[1]}" if plan.pattern else "")


def _labels(plans: list[LayerPlan]) -> str:
    return "/".join(dict.fromkeys(map(_label, plans)))


def _bits(layer: PlannedLayer) -> float:
    """Bits a weight of a layer takes, scales and zero points counted."""
    stored = layer.stored
    return 8.0 * layer.place.stored.element_size() if stored is None else stored.packed.nbytes * 8 / layer.n_weights


def bar(share: float) -> str:
    """A bar of BAR characters for 1, in steps of an eighth of one."""
    whole, eighths = divmod(round(share * BAR * 8), 8)
    return "█" * whole + EIGHTHS[eighths].strip()


def _existing(path: Path) -> Path:
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
