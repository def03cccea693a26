"""What a page says of one run, read from its folder: JSON-able, nothing measured anew."""

import re
import shlex
from pathlib import Path
from typing import Any

from compress.calib.model_files import check_folder
from compress.errors import InputError
from compress.inspection import notes, split
from compress.recipe import Recipe, read_recipe
from compress.run_dir import Finished, Journal, read_json
from compress.run_lines import check_about, check_result
from compress.task import LayerPlan

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # a component of a layer's name: its block, or its expert


def run_folder(path: Path) -> Path | None:
    """The folder with the journal: `path`, or `run` inside a checkpoint; None where there is neither."""
    return next((folder for folder in (path, path / "run") if (folder / "log.jsonl").is_file()), None)


def run_data(path: Path) -> dict[str, Any]:
    """Everything a page says of the run in `path`, a checkpoint's folder or the `run` inside of it.

    "result" is None while the run is under way; "blocks_done" says how far it is. Raises InputError if there is no run.
    """
    folder = run_folder(path)
    if folder is None:
        raise InputError(f"{path} holds no run (no run/log.jsonl): give the --out of `compress run`, or of a sweep")
    check_folder(folder)
    recipe, journal, finished = read_recipe(folder / "recipe.toml", {}), Journal(folder / "log.jsonl"), Finished(folder)
    lines, result = journal.read(), finished.read()
    if result is not None:
        check_result(result, finished.file)
    name = (folder.parent if folder.resolve().name == "run" else folder).resolve().name
    perplexity = found_perplexity(folder, result)
    about = read_json(folder / "run.json")
    check_about(about, folder / "run.json")
    return {
        "kind": "run",
        "name": name,
        "model": recipe.model,
        "summary": summary(recipe),
        "asked": asked(recipe),
        "result": result,
        "blocks_done": len({line["block"] for line in lines if line["event"] == "block"}),
        "time": lines[-1]["time"] if lines and "time" in lines[-1] else None,
        "perplexity": perplexity,
        "layers": layers(lines),
        "seconds": split(lines),
        "training": trainings(lines),
        "losses": {k: v for line in lines if line["event"] == "loss" for k, v in line.items() if k.endswith("_loss")},
        "notes": [note.removeprefix("note: ") for note in notes(lines)],
        "versions": about["versions"],
        "threads": about["threads"],
        "recipe": recipe.toml(),
        "command": command(name, perplexity),
    }


def layers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each layer in the order of the run: "layer", "block", "kind" (its name within a block), "steps".

    A step has "step", "method", "error" (of the output, as a share of its energy), "bits", "density", "seconds".
    """
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    keys = ("step", "method", "error", "bits", "density", "seconds")
    for line in lines:
        if line["event"] == "layer":
            step = {key: line[key] for key in keys}
            found.setdefault(line["layer"], {})[line["step"], line["method"]] = step
    return [place(name) | {"steps": list(steps.values())} for name, steps in found.items()]


def place(name: str) -> dict[str, Any]:
    """Where a layer stands: experts of a block are of one kind, and a layer outside the blocks has block None."""
    number = NUMBER.search(name)
    if number is None:
        return {"layer": name, "block": None, "kind": name}
    inside = NUMBER.sub("*", name[number.end() + 1 :])
    return {"layer": name, "block": int(number[0]), "kind": inside.removesuffix(".*")}


def trainings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each training in order: "method", "points" (a step's "loss" and perhaps "held_out"), and its closing figures.

    Steps that were done again after a kill count once.
    """
    found: list[dict[str, Any]] = []
    points: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["event"] == "train":
            if not found or found[-1]["method"] != line["method"] or "steps" in found[-1]:
                points = {}
                found.append({"method": line["method"], "points": points})
            points[line["step"]] = {key: line[key] for key in ("step", "loss", "held_out") if key in line}
        elif line["event"] == "recovered" and found and found[-1]["method"] == line["method"]:
            found[-1] |= {key: value for key, value in line.items() if key not in ("event", "time")}
    return [each | {"points": list(each["points"].values())} for each in found]


def found_perplexity(folder: Path, result: dict[str, Any] | None) -> dict[str, Any] | None:
    """{"text", "seqlen", "windows", "dense", "compressed"} as `--eval` or a sweep measured it, or None."""
    if result is not None and "eval" in result:
        measured, protocol = result["eval"], result["eval"]["asked"]
        facts = {"text": protocol["text"], "seqlen": protocol["seqlen"], "windows": protocol["max_windows"]}
        return facts | {kind: measured[kind] for kind in ("dense", "compressed")}
    own, dense = folder / "measurements.json", folder.parent.parent / "dense.json"
    if not (own.is_file() and dense.is_file()):
        return None
    by_protocol = [
        {tuple(each["asked"]["perplexity"].items()): each["found"] for each in read_json(file)["measurements"]
         if "perplexity" in each["asked"]}
        for file in (own, dense)
    ]  # fmt: skip
    for protocol, measured in by_protocol[0].items():
        if protocol in by_protocol[1]:
            values = {"dense": by_protocol[1][protocol]["perplexity"], "compressed": measured["perplexity"]}
            return dict(protocol) | values
    return None


def command(name: str, perplexity: dict[str, Any] | None) -> str:
    """The line that repeats a run from its recipe.toml."""
    words = ["compress", "run", "--recipe", "recipe.toml", "--out", name]
    if perplexity is not None:
        words += ["--eval", perplexity["text"], "--eval-windows", str(perplexity["windows"])]
    return shlex.join(words)


def summary(recipe: Recipe) -> str:
    """What was done, as a sentence: Pruned to 50 % by alps, quantized to 4 bits by gptq."""
    target, words = recipe.target, {"prune": "pruned", "quantize": "quantized"}
    if target.budget is None:
        plan = target.layer_plan()
        words = {"prune": f"pruned to {_share(plan)}", "quantize": f"quantized to {plan.wbits} bits"}
    parts = []
    for stage, method in recipe.steps:
        if stage in words:
            parts.append(f"{words[stage]} by {method}")
        elif stage == "refine":
            parts.append(f"its mask refined by {method}")
        elif stage == "activations":
            parts.insert(0, f"inputs in {target.abits} bits by {method}")
    if target.budget is not None:
        parts.append(f"within {target.budget}")
    if target.head_bits < 16:
        parts.append(f"embeddings and head in {target.head_bits} bits")
    if recipe.recover:
        parts.append(f"recovered by {listed(recipe.recover)}")
    line = ", ".join(parts)
    return line[:1].upper() + line[1:]


def listed(names: list[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _share(plan: LayerPlan) -> str:
    percent = f"{100 * plan.sparsity:g} %"
    return f"{percent} ({plan.pattern[0]}:{plan.pattern[1]})" if plan.pattern else percent


def asked(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe asks for, as pairs for a reader; what it leaves alone is left out."""
    target, calib = recipe.target, recipe.calib
    stages: dict[str, list[str]] = {}
    for stage, method in recipe.steps:
        stages.setdefault(stage, []).append(method)
    titles = {"activations": "inputs", "prune": "pruner", "refine": "mask refined by", "quantize": "quantizer"}
    pairs = [("model", recipe.model + (f" at {recipe.revision}" if recipe.revision else ""))]
    pairs += [(titles.get(stage, stage), ", ".join(names)) for stage, names in stages.items()]
    pairs += [("budget", target.budget)] if target.budget else []
    pairs += [("sparsity", _share(target.layer_plan()))] if target.density_gap else []
    pairs += [("blocks of", target.pattern)] if target.block else []
    if target.wbits < 16:
        group = "one scale an output" if target.group_size == -1 else f"groups of {target.group_size}"
        pairs.append(("weights", f"{target.wbits} bits, {group}"))
    pairs += [("inputs in", f"{target.abits} bits")] if target.abits < 16 else []
    pairs += [("embeddings and head", f"{target.head_bits} bits")] if target.head_bits < 16 else []
    pairs += [("allocation", target.allocate)] if target.allocate != "uniform" else []
    text = Path(calib.source).name
    pairs.append(("calibration", f"{calib.nsamples} × {calib.seqlen} tokens of {text}, seed {calib.seed}"))
    pairs += [("trained on", Path(recipe.train).name)] if recipe.train else []
    pairs += [("each training", recipe.recover_for)] if recipe.recover else []
    pairs.append(("drift made up for", f"{100 * recipe.drift_share:g} %"))
    options = [f"{name}.{key} = {value}" for name, own in recipe.options.items() for key, value in own.items()]
    return pairs + ([("options", ", ".join(options))] if options else [])
