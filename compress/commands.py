"""What each command does, between its flags and its printing."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from compress.calib.ranks import ALONE, Ranks
from compress.calib.texts import check_source
from compress.checkpoint.save import write_card
from compress.doctor import doctor
from compress.errors import InputError
from compress.estimate import estimate
from compress.evaluate import evaluate
from compress.inspection import inspect, loss_line, notes
from compress.pipeline import compress, open_model
from compress.progress import Reporter, Stage
from compress.recipe import Recipe
from compress.report import Report, size, table
from compress.run_dir import Finished, Journal
from compress.settings import typed
from compress.sources import resolve_model
from compress.steps import STAGES, methods, whole_model
from compress.tracker import check_tracker
from compress.whole_model import estimate_whole_model, prunes_whole_model


def pick_device(name: str) -> str:
    """`auto` resolved. Raises InputError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # "meta" can make it, but has no value
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {name!r} here: use --device cpu") from error
    return name


def find_model(name: str, revision: str | None, reporter: Reporter) -> Path:
    """The model's folder; what it takes to get there is reported."""
    with contextlib.ExitStack() as stack:
        stages: list[Stage] = []

        def report(done: int, total: int) -> None:
            if not stages:
                stages.append(stack.enter_context(reporter.stage("reading the GGUF file, tensor", total)))
            while stages[0].done < done:
                stages[0].step()

        return resolve_model(name, revision=revision, progress=report)


def run_command(
    recipe: Recipe,
    out: Path,
    evaluation: tuple[str | None, int],
    dry_run: bool,
    ranks: Ranks = ALONE,
    tracker: str | None = None,
) -> Report | None:
    """`compress run`: compress, then measure dense and compressed if asked. None: another rank has the report.

    `evaluation`: a text, None: none, and how many windows of it; `tracker`: of trainings, as accelerate names it.
    """
    (text, windows), reporter = evaluation, Reporter(quiet=not ranks.first, tracker=tracker)
    if tracker is not None:
        if not any(whole_model(stage, name) for stage, name in recipe.steps):
            raise InputError(f"tracker {tracker} has nothing to do: no method of this recipe trains the model")
        check_tracker(tracker)
    with ranks.first_goes_first():
        folder = find_model(recipe.model, recipe.revision, reporter)
    check_out(out, folder)
    if text is not None:
        check_source(text, "evaluation")  # not after hours of work
    if dry_run and ranks.first:
        if prunes_whole_model(recipe):
            return estimate_whole_model(recipe, open_model(folder, recipe.dtype, ranks.device))
        return estimate(recipe, folder, out, ranks.device, reporter)
    result = None if dry_run else compress(recipe, folder, out, reporter, ranks)
    if result is None or not ranks.first:
        return None
    if text is not None:
        result = _with_perplexity(result, folder, out, (text, recipe.calib.seqlen, windows), reporter, ranks.device)
    said = notes(Journal(out / "run" / "log.jsonl").read())
    closing = f"\nCheckpoint in {out}. Look into it with: compress inspect {out}"
    losses = [loss_line(result)] if "measured_loss" in result else []
    return Report(result, [_run_table(result), *losses, *said, closing])


def check_out(out: Path, folder: Path) -> None:
    """Raise InputError for an --out that cannot be a folder, or is one whose model would be overwritten."""
    if out.resolve() == folder.resolve():
        raise InputError(f"--out {out} is the model itself: choose another folder")
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        raise InputError(f"--out {out} cannot be made, since {there} is no folder: choose another")
    ours = (out / "recipe.toml").exists() or (out / "run").exists()
    if not ours and any([*out.glob("config.json"), *out.glob("*.safetensors")]):
        raise InputError(f"--out {out} holds a model that compress did not write: choose another folder")


def _with_perplexity(
    result: dict[str, Any], folder: Path, out: Path, protocol: tuple[str, int, int], reporter: Reporter, device: str
) -> dict[str, Any]:
    """The figures of a run with the perplexity before and after; measured once for each protocol."""
    text, seqlen, windows = protocol
    asked = {"text": text, "seqlen": seqlen, "max_windows": windows}
    if result.get("eval", {}).get("asked") != asked:
        measured = {"asked": asked}
        for name, checkpoint in (("dense", folder), ("compressed", out)):
            reporter.say(f"measuring the {name} model")
            values = evaluate(checkpoint, [text], seqlen, windows, reporter, device)["perplexity"]
            measured[name] = next(iter(values.values()))
        result = {**result, "eval": measured}
        write_card(out, result)
        Finished(out / "run").update(result)  # last: what is here is not measured and told again
    return result


def _run_table(result: dict[str, Any]) -> Any:
    dense_bits = result["dense_bytes"] * 8 / result["parameters"]
    sparsity = "weights taken out of the blocks" if "widths" in result else "sparsity of those layers"
    rows = [
        ["size of the weights", size(result["dense_bytes"]), size(result["compressed_bytes"])],
        ["bits a weight, whole model", f"{dense_bits:.2f}", f"{result['bits_per_weight']:.2f}"],
        ["bits a weight, compressed layers", f"{dense_bits:.2f}", f"{result['layer_bits_per_weight']:.2f}"],
        [sparsity, "0 %", f"{100 * result['sparsity']:.1f} %"],
    ]
    if "eval" in result:
        measured = result["eval"]
        name = f"perplexity, {Path(measured['asked']['text']).name}"
        rows.insert(0, [name, f"{measured['dense']:.2f}", f"{measured['compressed']:.2f}"])
    if "adapter_for_dense_bytes" in result:
        rows.append(["adapter for the dense model", "", size(result["adapter_for_dense_bytes"])])
    rows.append(["seconds", "", f"{result['seconds']:.0f}"])
    rows.append(["peak memory", "", size(result["peak_rss_bytes"])])
    return table("", ["", "dense", "compressed"], rows)


def inspect_command(path: Path) -> Report:
    """`compress inspect`."""
    return inspect(path)


def doctor_command() -> Report:
    """`compress doctor`."""
    return doctor()


def methods_command() -> Report:
    """`compress methods`."""
    data: list[dict[str, Any]] = []
    tables: list[Any] = []
    for stage in STAGES:
        rows = []
        for name, module in methods(stage).items():
            options = {
                key: {"default": field.default, "about": field.description}
                for key, field in module.Options.model_fields.items()
            }
            about = (module.__doc__ or "").strip().splitlines()[0]
            data.append(
                {"stage": stage, "name": name, "about": about, "needs": sorted(module.NEEDS), "options": options}
            )
            rows.append(
                [name, about.partition(": ")[2], ", ".join(f"{k}={typed(o['default'])}" for k, o in options.items())]
            )
        tables.append(table(stage, ["method", "what it is", "options"], rows))
        tables.append("")
    return Report(data, tables)
