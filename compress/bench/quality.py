"""`compress bench quality`: the standard settings on one model, beside the dense model. README's table is its output."""

from pathlib import Path
from typing import Any

from compress.commands import find_model, pick_device
from compress.errors import InputError
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.report import Report, number, size, table
from compress.runs import Bench, Protocol, Run, run_all

HALF, TWO_OF_FOUR = {"sparsity": 0.5}, {"pattern": "2:4"}
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude 50%": {"pruner": "magnitude", "target": HALF},
    "wanda 50%": {"pruner": "wanda", "target": HALF},
    "sparsegpt 50%": {"pruner": "sparsegpt", "target": HALF},
    "wanda 2:4": {"pruner": "wanda", "target": TWO_OF_FOUR},
    "sparsegpt 2:4": {"pruner": "sparsegpt", "target": TWO_OF_FOUR},
    "alps 50%": {"pruner": "alps", "target": HALF},
    "alps 2:4": {"pruner": "alps", "target": TWO_OF_FOUR},
    "rtn W4": {"quantizer": "rtn", "target": {"wbits": 4, "symmetric": True}},
    "gptq W4": {"quantizer": "gptq", "target": {"wbits": 4, "symmetric": True}},
    "rtn W3": {"quantizer": "rtn", "target": {"wbits": 3, "symmetric": True}},
    "gptq W3": {"quantizer": "gptq", "target": {"wbits": 3, "symmetric": True}},
    "rtn W2": {"quantizer": "rtn", "target": {"wbits": 2, "symmetric": True}},
    "gptq W2": {"quantizer": "gptq", "target": {"wbits": 2, "symmetric": True}},
    "gptq W4 asymmetric": {"quantizer": "gptq", "target": {"wbits": 4, "symmetric": False}},
    "gptq W3 asymmetric": {"quantizer": "gptq", "target": {"wbits": 3, "symmetric": False}},
    "gptq W2 asymmetric": {"quantizer": "gptq", "target": {"wbits": 2, "symmetric": False}},
    "alps 50% + gptq W4": {"target": {**HALF, "wbits": 4}},
    "alps 2:4 + gptq W4": {"target": {**TWO_OF_FOUR, "wbits": 4}},
    "alps 50% + gptq W4 + head 8": {"target": {**HALF, "wbits": 4, "head_bits": 8}},
}


def bench_quality(
    model: str, out: Path, calib: tuple[str, int, int], text: tuple[str, int], only: list[str], device: str
) -> Report:
    """Run the settings and measure them. `calib`: (source, nsamples, seqlen); `text`: (source, windows)."""
    if unknown := [name for name in only if name not in SETTINGS]:
        raise InputError(f"there is no setting {unknown[0]!r}: choose among {', '.join(SETTINGS)}")
    reporter, device = Reporter(), pick_device(device)
    base = {"model": model, "calib": {"source": calib[0], "nsamples": calib[1], "seqlen": calib[2]}}
    runs = []
    for name in only or SETTINGS:
        recipe = read_recipe(None, base | SETTINGS[name])
        folder = out / name.replace(" ", "_").replace("%", "").replace(":", "of")
        runs.append(Run(name, "", recipe, folder))
    protocol = Protocol(text[0], text[1], calib[2])
    bench = Bench(find_model(model, None, reporter), out, protocol, reporter, device)
    dense, *rows = run_all(bench, runs)
    data = {"model": model, "protocol": protocol.described(), "dense": dense, "runs": rows}
    lines = [f"{row['setting']} failed: {row['failed']}" for row in rows if "failed" in row]
    return Report(data, [_table(dense["perplexity"], [row for row in rows if "failed" not in row]), *lines])


def _table(dense: float, rows: list[dict[str, Any]]) -> Any:
    columns = ["setting", "perplexity", "x dense", "bits (layers)", "sparsity", "size", "seconds"]
    body = [["dense", f"{dense:.2f}", "1.00", "16.00", "0 %", size(rows[0]["dense_bytes"]), ""]] if rows else []
    for row in rows:
        body.append(
            [
                row["setting"],
                number(row["perplexity"]),
                number(row["ratio"]),
                f"{row['layer_bits_per_weight']:.2f}",
                f"{100 * row['layer_sparsity']:.0f} %",
                size(row["compressed_bytes"]),
                f"{row['seconds']:.0f}",
            ]
        )
    return table("", columns, body)
