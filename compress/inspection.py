"""`compress inspect`: what a checkpoint or a run holds."""

from pathlib import Path
from typing import Any

from compress.calib.model_files import check_folder
from compress.checkpoint.dense_view import quantization_settings, read_config
from compress.checkpoint.formats import open_weights
from compress.errors import InputError, printable
from compress.report import Report, duration, size, table
from compress.run_dir import Finished, Journal


def inspect(path: Path) -> Report:
    """Layers, errors and times of the checkpoint or run in `path`. Raises InputError if it is neither."""
    run = path if (path / "log.jsonl").is_file() else path / "run"
    whole = (path / "config.json").is_file()
    if not whole and not (run / "log.jsonl").is_file():
        raise InputError(f"{path} is neither a checkpoint (no config.json) nor a run (no run/log.jsonl)")
    data: dict[str, Any] = {"path": str(path)}
    tables: list[Any] = []
    if whole:
        data |= _checkpoint(path)
        tables.append(f"{path}: {data['format']}, {size(data['bytes'])} in {data['tensors']} tensors")
    if (run / "log.jsonl").is_file():
        check_folder(run)
        journal = Journal(run / "log.jsonl").read()
        data |= {"layers": _layers(journal), "seconds": split(journal), "expected_seconds": expected(journal)}
        data["result"] = Finished(run).read()
        data["notes"] = notes(journal)
        data["losses"] = {k: v for line in journal if line["event"] == "loss" for k, v in line.items() if "_loss" in k}
        tables += [_layer_table(data["layers"]), _time_table(data["seconds"], data["expected_seconds"])]
        if data["losses"]:
            tables.append(loss_line(data["losses"]))
        tables += data["notes"]
        if data["result"] is None:
            done = {line["block"] for line in journal if line["event"] == "block"}
            tables.append(f"not finished: {len(done)} blocks done; the same command goes on")
    return Report(data, tables)


def _checkpoint(path: Path) -> dict[str, Any]:
    settings = quantization_settings(read_config(path))
    files = open_weights(path)
    return {"format": settings.get("quant_method", "dense"), "bytes": files.nbytes(), "tensors": len(files.entries)}


def _layers(journal: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last word of the journal on each layer."""
    last = {line["layer"]: line for line in journal if line["event"] == "layer"}
    inputs = {line["layer"]: f"{line['abits']} bits, {line['codes']}" for line in journal if line["event"] == "input"}
    shares = {line["layer"]: line["share"] for line in journal if line["event"] == "saturation"}
    keys = ("layer", "method", "error", "error_on", "density", "bits")
    return [
        {key: line[key] for key in keys} | {"inputs": inputs.get(name), "saturated": shares.get(name)}
        for name, line in last.items()
    ]


def split(journal: list[dict[str, Any]]) -> dict[str, float]:
    """Where the seconds went, by stage and by method, summed over blocks."""
    seconds: dict[str, float] = {}
    for line in journal:
        if line["event"] == "block":
            for name, value in line["seconds"].items():
                seconds[name] = seconds.get(name, 0.0) + value
        elif line["event"] == "layer":
            name = f"  solve: {line['method']}"
            seconds[name] = seconds.get(name, 0.0) + line["seconds"]
        elif line["event"] in ("opened", "measured", "gradients", "teacher", "train", "checkpoint", "loss"):
            seconds[line["event"]] = seconds.get(line["event"], 0.0) + line["seconds"]
    return {name: round(value, 2) for name, value in seconds.items()}


def within(stage: str) -> bool:
    """Whether what `split` calls so is part of another stage's seconds."""
    return stage.startswith(" ")


def expected(journal: list[dict[str, Any]]) -> dict[str, float]:
    """What the run was expected to take, by stage, as it was written down when it began; nothing if it was not."""
    found: dict[str, float] = next((line["seconds"] for line in journal if line["event"] == "expected"), {})
    return found


def notes(journal: list[dict[str, Any]]) -> list[str]:
    """What went otherwise than asked, and for how many layers; each kind once."""
    layers: dict[str, list[str]] = {}
    for line in journal:
        for note in [*line.get("notes", ()), *([line["note"]] if "note" in line else [])]:
            layers.setdefault(note, []).append(line.get("layer") or line.get("file", ""))
    return [
        printable(f"note: {note} ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})")
        for note, names in layers.items()
    ]


def loss_line(figures: dict[str, Any]) -> str:
    """What a plan made of trials was said to lose, and what it lost."""
    return f"loss: predicted {figures['predicted_loss']:.4g}, measured {figures['measured_loss']:.4g}"


def _layer_table(layers: list[dict[str, Any]]) -> Any:
    rows = [
        [line["layer"], f"{line['bits']:.2f}", f"{100 * (1 - line['density']):.1f} %", f"{line['error']:.4f}"]
        for line in layers
    ]
    titles = ["layer", "bits", "sparsity", "output error"]
    if any(line["inputs"] for line in layers):
        titles += ["inputs", "saturated"]
        for row, line in zip(rows, layers, strict=True):
            saturated = "" if line["saturated"] is None else f"{line['saturated']:.2g}"
            row += [line["inputs"] or "", saturated]
    return table("", titles, rows)


def _time_table(seconds: dict[str, float], expected: dict[str, float]) -> Any:
    if not expected:
        return table("", ["where the time went", ""], [[name, duration(value)] for name, value in seconds.items()])
    whole = [sum(value for name, value in each.items() if not within(name)) for each in (seconds, expected)]
    rows = [
        [name, *("" if value is None else duration(value) for value in (seconds.get(name), expected.get(name)))]
        for name in dict.fromkeys([*seconds, *expected])
    ]
    return table("", ["where the time went", "", "expected"], [*rows, ["all of it", *map(duration, whole)]])
