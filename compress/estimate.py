"""`compress run --dry-run`: the plan, and what it will cost, before anything is done."""

import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress.calib.gradients import FIELDS, LOGITS_AT_ONCE
from compress.calib.model import Model
from compress.calib.observe import shared_inputs, stages
from compress.distill import POSITIONS, WORDS
from compress.measure import measures
from compress.pipeline import open_model, rehearse_allocation
from compress.plan import PlannedLayer, packed_layers, plan_format, plan_layers
from compress.progress import Reporter
from compress.recipe import Recipe
from compress.report import Report, duration, size, table
from compress.sizes import checkpoint_bytes, dense_bytes, n_parameters
from compress.steps import Step, find_steps
from compress.task import LayerPlan
from compress.whole_recovery import prepare_recovery, trained_methods, trained_options, training_cost

TOKENIZER = 10  # resident bytes for each byte of tokenizer.json
IMPORTS = 450 * 2**20  # resident bytes of python, torch and transformers
SECONDS_PER_COLUMN = 60e-6  # of one column's turn in a solver, apart from its arithmetic
BYTES_PER_SECOND = 8e9  # of a rank-one update that runs through memory
BLOCK_SIZE = 128  # columns a solver updates together
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
    needs = frozenset[str]().union(*(step.needs for step in steps))
    solvers = sum("hessian" in step.needs for step in steps)
    seconds = _seconds(model, layers, recipe, needs, solvers)
    seconds["solve"] += _solver_flops(steps, layers) / _flops(torch.float32)
    if measures(recipe):
        seconds["allocate"] = allocating
    memory, disk = _memory(model, layers, recipe, needs), 2 * compressed
    trained, training = trained_methods(recipe), 0
    if trained:
        training, seconds["recover"] = training_cost(recipe, model)
        memory = max(memory, _training_memory(model, layers, recipe, compressed))
        disk += len(trained) * compressed
    if gradients := needs & FIELDS:
        disk += _gradient_bytes(model, layers, recipe, len(gradients))
    free = shutil.disk_usage(_existing(out)).free
    data: dict[str, Any] = {
        "steps": [*(step.name for step in steps), *trained],
        "training_tokens": training,
        "format": format_name,
        "dense_bytes": dense_bytes(model),
        "compressed_bytes": compressed,
        "bits_per_weight": compressed * 8 / n_parameters(model),
        "peak_rss_bytes": memory,
        "seconds": round(sum(seconds.values()), 1),
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
    return Report(data, [_plan_table(layers), *_picture(layers), "", table("", ["", ""], rows)])


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


def _solver_flops(steps: list[Step], layers: list[PlannedLayer]) -> float:
    """What steps say of their own cost, for the layers that they change."""
    return sum(step.flops(*layer.shape) for step in steps for layer in layers if step.applies(layer.plan))


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


def _itemsize(model: Model) -> int:
    return torch.empty(0, dtype=model.dtype).element_size()


def _existing(path: Path) -> Path:
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())


def _inputs(model: Model) -> tuple[list[int], int]:
    """in_features of each distinct input of the widest block, and how many stages it has."""
    tokens = torch.arange(8) % model.config.get_text_config().vocab_size
    hidden = model.embed(tokens)
    block = model.load_block(model.n_blocks - 1)
    shared = shared_inputs(block, hidden)
    widths = {layer.name: layer.shape[1] for layer in block.layers}
    return [widths[name] for name in dict.fromkeys(shared.values())], len(stages(block, shared))


def _seconds(
    model: Model, layers: list[PlannedLayer], recipe: Recipe, needs: frozenset[str], solvers: int
) -> dict[str, float]:
    """Estimated seconds by stage, from the machine's speed at matrix products of the model's dtype and of float32."""
    tokens = recipe.calib.nsamples * recipe.calib.seqlen
    fast, exact = _flops(model.dtype), _flops(torch.float32)
    weights = sum(layer.n_weights for layer in layers)
    seconds = {"load and save": 6 * weights * _itemsize(model) / 1e9, "observe": 0.0, "solve": 0.0, "forward": 0.0}
    if needs:
        inputs, n_stages = _inputs(model)
        forward = 2 * weights * tokens / (0.35 * fast)
        seconds["forward"] = forward
        seconds["observe"] = forward * (n_stages if recipe.sequential else 1)
        if needs & FIELDS:
            seconds["gradients"] = _gradient_seconds(model, recipe, 4 * forward, fast)
        if "hessian" in needs:
            gram = sum(2 * tokens * width**2 + 4 * recipe.calib.nsamples * width**2 for width in inputs)
            factor = sum(3 * width**3 for width in inputs) * solvers
            seconds["observe"] += model.n_blocks * gram / exact
            seconds["solve"] += model.n_blocks * factor / exact
    for layer in layers:
        out_features, in_features = layer.shape
        columns = in_features * (SECONDS_PER_COLUMN + BLOCK_SIZE * out_features * 4 / BYTES_PER_SECOND)
        trailing = out_features * in_features**2 / exact
        measuring = 4 * out_features * in_features**2 / exact if "hessian" in needs else 0.0
        seconds["solve"] += solvers * (columns + trailing + measuring) + 40e-9 * layer.n_weights
    return seconds


def _gradient_seconds(model: Model, recipe: Recipe, blocks: float, flops: float) -> float:
    """Of all passes, if the blocks take `blocks` in one; those taken anew go over the blocks that remain."""
    n, tokens = model.n_blocks, recipe.calib.nsamples * recipe.calib.seqlen
    starts = range(0, n, recipe.calib.refresh_gradients or n)
    head = 3 * 2 * model.lm.get_output_embeddings().weight.numel() * tokens / (0.35 * flops)
    return sum(blocks * (n - start) / n + head for start in starts)


def _gradient_bytes(model: Model, layers: list[PlannedLayer], recipe: Recipe, fields: int) -> int:
    """Disk for gradients: what enters every block and what comes back to two, and the gradients themselves."""
    states = recipe.calib.nsamples * recipe.calib.seqlen * model.config.get_text_config().hidden_size * _itemsize(model)
    return (model.n_blocks + 2) * states + 4 * fields * sum(layer.n_weights for layer in layers)


def _flops(dtype: torch.dtype) -> float:
    """Multiply-adds times two, a second, of a matrix product of this type here."""
    a = torch.ones(512, 2048, dtype=dtype)
    b = torch.ones(2048, 2048, dtype=dtype)
    a @ b
    started = time.monotonic()
    for _ in range(3):
        a @ b
    return 3 * 2 * 512 * 2048**2 / (time.monotonic() - started)


def _memory(model: Model, layers: list[PlannedLayer], recipe: Recipe, needs: frozenset[str]) -> int:
    """Estimated peak resident bytes: what stays, one block, its statistics, and the largest layer's solve."""
    width = _itemsize(model)
    outside = sum(p.numel() for n, p in model.lm.named_parameters() if not n.startswith(model.path + ".")) * width
    block = _largest(sum(x.n_weights for x in layers if x.block == i) for i in range(model.n_blocks))
    layer = _largest(x.n_weights for x in layers)
    hidden = recipe.calib.nsamples * recipe.calib.seqlen * model.config.get_text_config().hidden_size * width
    statistics = 0
    if "hessian" in needs:
        widths = _inputs(model)[0]
        statistics = sum(8 * w**2 for w in widths) + 12 * max(widths) ** 2
    vocabulary = model.folder / "tokenizer.json"
    tokenizer = TOKENIZER * vocabulary.stat().st_size if needs and vocabulary.exists() else 0
    fields = len(needs & FIELDS)
    taking_gradients = 4 * fields * block + 10 * LOGITS_AT_ONCE if fields else 0
    compressing = 4 * (6 + fields) * layer + (hidden if needs else 0) + statistics
    return int(IMPORTS + tokenizer + outside + 2 * width * block + max(compressing, taking_gradients))


def _training_memory(model: Model, layers: list[PlannedLayer], recipe: Recipe, compressed: int) -> int:
    """About what training holds beside what a method learns: the compressed model, a block's activations, logits."""
    width = _itemsize(model)
    longest = _largest(options.seqlen * options.micro_batch_size for _, options in trained_options(recipe))
    inside = sum(sum(layer.shape) for layer in layers) // model.n_blocks
    entering = model.n_blocks * model.config.get_text_config().hidden_size
    decoded = 8 * _largest(layer.n_weights for layer in layers)
    return int(IMPORTS + compressed + decoded + longest * width * (2 * inside + entering) + 24 * POSITIONS * WORDS)


def _largest(values: Iterable[int]) -> int:
    return max(values, default=0)
