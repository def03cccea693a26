"""`compress bench`: the standard settings on one model, each as a ratio to the dense model. README's table is its output."""

import json
from pathlib import Path
from typing import Any

from compress.commands import find_model, pick_device
from compress.errors import InputError
from compress.evaluate import evaluate
from compress.files import write_json
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.report import Report, size, table

HALF, TWO_OF_FOUR = {"sparsity": 0.5}, {"pattern": "2:4"}
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude 50%": {"pruner": "magnitude", "target": HALF},
    "wanda 50%": {"pruner": "wanda", "target": HALF},
    "sparsegpt 50%": {"pruner": "sparsegpt", "target": HALF},
    "wanda 2:4": {"pruner": "wanda", "target": TWO_OF_FOUR},
    "sparsegpt 2:4": {"pruner": "sparsegpt", "target": TWO_OF_FOUR},
    "rtn W4": {"quantizer": "rtn", "target": {"wbits": 4, "symmetric": True}},
    "gptq W4": {"quantizer": "gptq", "target": {"wbits": 4, "symmetric": True}},
    "rtn W3": {"quantizer": "rtn", "target": {"wbits": 3, "symmetric": True}},
    "gptq W3": {"quantizer": "gptq", "target": {"wbits": 3, "symmetric": True}},
    "rtn W2": {"quantizer": "rtn", "target": {"wbits": 2, "symmetric": True}},
    "gptq W2": {"quantizer": "gptq", "target": {"wbits": 2, "symmetric": True}},
    "gptq W4 asymmetric": {"quantizer": "gptq", "target": {"wbits": 4, "symmetric": False}},
    "gptq W3 asymmetric": {"quantizer": "gptq", "target": {"wbits": 3, "symmetric": False}},
    "gptq W2 asymmetric": {"quantizer": "gptq", "target": {"wbits": 2, "symmetric": False}},
    "sparsegpt 50% + gptq W4": {"target": {**HALF, "wbits": 4}},
    "sparsegpt 2:4 + gptq W4": {"target": {**TWO_OF_FOUR, "wbits": 4}},
    "sparsegpt 50% + gptq W4 + head 8": {"target": {**HALF, "wbits": 4, "head_bits": 8}},
}


def bench(
    model: str, out: Path, calib: tuple[str, int, int], text: tuple[str, int], only: list[str], device: str
) -> Report:
    """Run the settings and measure them. `calib`: (source, nsamples, seqlen); `text`: (source, windows)."""
    if unknown := [name for name in only if name not in SETTINGS]:
        raise InputError(f"there is no setting {unknown[0]!r}: choose among {', '.join(SETTINGS)}")
    reporter, device = Reporter(), pick_device(device)
    folder = find_model(model, None, reporter)
    protocol = {"text": text[0], "windows": text[1], "seqlen": calib[2]}
    dense = _measured(folder, out / "dense.json", protocol, reporter, device)
    rows: list[dict[str, Any]] = []
    for name in only or SETTINGS:
        reporter.say(f"-- {name}")
        base = {"model": model, "calib": {"source": calib[0], "nsamples": calib[1], "seqlen": calib[2]}}
        target = out / name.replace(" ", "_").replace("%", "").replace(":", "of")
        result = compress(read_recipe(None, base | SETTINGS[name]), folder, target, reporter, device)
        value = _measured(target, target / "run" / "perplexity.json", protocol, reporter, device)
        rows.append({"setting": name, "perplexity": value, "ratio": value / dense, **result})
    data = {"model": model, "protocol": protocol, "dense": dense, "settings": rows}
    return Report(data, [_table(dense, rows)])


def _measured(folder: Path, file: Path, protocol: dict[str, Any], reporter: Reporter, device: str) -> float:
    """Perplexity of a checkpoint, from `file` if it was measured before under the same protocol."""
    if file.exists() and (before := json.loads(file.read_text(encoding="utf-8")))["protocol"] == protocol:
        return before["perplexity"]
    measured = evaluate(folder, [protocol["text"]], protocol["seqlen"], protocol["windows"], reporter, device)
    value = next(iter(measured["perplexity"].values()))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"protocol": protocol, "perplexity": value})
    return value


def _table(dense: float, rows: list[dict[str, Any]]) -> Any:
    columns = ["setting", "perplexity", "x dense", "bits (layers)", "sparsity", "size", "seconds"]
    body = [["dense", f"{dense:.2f}", "1.00", "16.00", "0 %", size(rows[0]["dense_bytes"]), ""]] if rows else []
    for row in rows:
        body.append(
            [
                row["setting"],
                _number(row["perplexity"]),
                _number(row["ratio"]),
                f"{row['layer_bits_per_weight']:.2f}",
                f"{100 * row['sparsity']:.0f} %",
                size(row["compressed_bytes"]),
                f"{row['seconds']:.0f}",
            ]
        )
    return table("", columns, body)


def _number(value: float) -> str:
    """Two decimals, or the magnitude of what is beyond all use."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.0e}"
