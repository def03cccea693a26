"""From the folder of a run or a sweep to one HTML file: no scripts, nothing fetched, fit for a phone and for paper."""

from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from compress import __version__
from compress.errors import InputError
from compress.files import write_text
from compress.html_report.run_data import run_data
from compress.html_report.samples import SampleRequest, take_samples
from compress.html_report.sweep_data import sweep_data
from compress.progress import Reporter
from compress.report import Report, duration, number, size

# What `inspect` calls where the seconds went, for a reader who does not know the loop.
STAGES = {
    "opened": "opening the model",
    "measured": "measuring the dense model",
    "gradients": "gradients",
    "embed": "embedding the text",
    "load": "reading weights",
    "observe": "inputs of each layer",
    "solve": "solving layers",
    "save": "writing blocks",
    "forward": "sending the text through blocks",
    "teacher": "what the dense model says",
    "train": "training",
    "loss": "measuring the loss",
    "checkpoint": "writing the checkpoint",
}
SOLVE = "  solve: "  # how parts of a stage begin there


def html_report(path: Path, out: Path | None, samples: SampleRequest | None) -> Report:
    """Write the page of the run or the sweep in `path` to `out`, by default report.html in there.

    `samples`: what dense and compressed model are to say, if anything. Returns the data of the page and "page", its
    file. Raises InputError for a folder that holds neither, or where matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise InputError('a report draws with matplotlib: pip install "compress-llm[plots]"')
    out = path / "report.html" if out is None else out
    if not out.absolute().parent.is_dir():
        raise InputError(f"-o {out}: there is no folder {out.parent}")
    reporter = Reporter()
    if (path / "sweep.json").is_file():
        if samples is not None:
            raise InputError(f"{path} is a sweep, and samples are of one checkpoint: report one of its runs")
        data, page = sweep_data(path), sweep_page
    else:
        data, page = run_data(path), run_page
        data["samples"] = [] if samples is None else take_samples(path, samples, reporter)
    reporter.say("drawing")
    write_text(out, page(data))
    return Report(data | {"page": str(out)}, [f"{out}: {size(out.stat().st_size)}. Open it in a browser."])


def run_page(data: dict[str, Any]) -> str:
    """The HTML of one run; `data`: of `run_data`, and "samples"."""
    from compress.html_report.figures import error_plot, spread_plot, training_plot

    trainings = [(_training_title(each), each) for each in data["training"]]
    return _render(
        "run.html",
        data,
        tiles=tiles(data),
        error=error_plot(data["layers"]),
        spread=spread_plot(data["layers"]),
        training=training_plot("training", trainings),
        times=times(data["seconds"], data["result"]),
        memory=memory(data),
        date=None if data["time"] is None else f"{datetime.fromtimestamp(data['time'], UTC):%-d %B %Y}",
        rows=layer_rows(data["layers"]),
    )


def sweep_page(data: dict[str, Any]) -> str:
    """The HTML of a sweep; `data`: of `sweep_data`."""
    from compress.html_report.figures import held_out_plot, size_plot, sweep_plot

    return _render(
        "sweep.html", data, size_plot=size_plot(data), sweep_plot=sweep_plot(data), training=held_out_plot(data["runs"])
    )


def _render(template: str, data: dict[str, Any], **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("compress.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "duration": duration, "number": number, "filename": lambda p: Path(p).name}
    return environment.get_template(template).render(data=data, version=__version__, **more)


def tiles(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that come first: "title", "value", "dense" (before), "share" of that for a bar, and a "note"."""
    result, perplexity = data["result"], data["perplexity"]
    if result is None:
        return []
    before = result["dense_bytes"] * 8 / result["parameters"]
    compressed = result["compressed_bytes"] / result["dense_bytes"]
    made = [_tile("size of the weights", size(result["compressed_bytes"]), size(result["dense_bytes"]), compressed,
                  f"{100 * compressed:.0f} % of dense")]  # fmt: skip
    if perplexity is not None:
        ratio = perplexity["compressed"] / perplexity["dense"]
        made.append(_tile("perplexity", number(perplexity["compressed"]), number(perplexity["dense"]), None,
                          f"× {ratio:.2f}"))  # fmt: skip
    bits = result["layer_bits_per_weight"]
    if bits < before:
        made.append(_tile("bits a weight, compressed layers", f"{bits:.2f}", f"{before:.2f}", bits / before,
                          f"whole model {result['bits_per_weight']:.2f}"))  # fmt: skip
    if result["sparsity"]:
        title = "weights taken out of the blocks" if "widths" in result else "weights that are zero"
        made.append(_tile(title, f"{100 * result['sparsity']:.1f} %", None, None, "of the blocks' layers"))
    return made


def _tile(title: str, value: str, dense: str | None, share: float | None, note: str) -> dict[str, Any]:
    return {"title": title, "value": value, "dense": dense, "share": share, "note": note}


def times(seconds: dict[str, float], result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Where the time went, as bars: "title", "value" in seconds, "share" of the longest, and whether it is a "part"."""
    whole = {name: value for name, value in seconds.items() if not name.startswith(SOLVE)}
    rows = []
    for name, value in sorted(whole.items(), key=lambda item: -item[1]):
        rows.append((STAGES.get(name, name), value, False))
        if name == "solve":
            rows += [(key.removeprefix(SOLVE), part, True) for key, part in seconds.items() if key.startswith(SOLVE)]
    if result is not None and (rest := result["seconds"] - sum(whole.values())) > 0.01 * result["seconds"]:
        rows.append(("everything else", rest, False))
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    return [
        {"title": title, "value": value, "share": value / longest, "part": part}
        for title, value, part in rows
        if value >= 0.05
    ]


def memory(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Memory at its peak, as bars: of the run and each training, beside the dense weights."""
    result = data["result"]
    if result is None or result["peak_rss_bytes"] is None:
        return []
    rows = [("the dense model's weights, for comparison", result["dense_bytes"], True)]
    rows += [
        (f"training by {each['method']}", each["peak_rss_bytes"], False)
        for each in result.get("recovery", [])
        if each["peak_rss_bytes"] is not None
    ]
    rows.append(("the run at its peak", result["peak_rss_bytes"], False))
    most = max(value for _, value, _ in rows)
    return [
        {"title": title, "value": value, "share": value / most, "part": part} for title, value, part in reversed(rows)
    ]


def layer_rows(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line of the table for each layer; experts of a block that are of one kind have one line, with their means."""
    groups: dict[tuple[Any, str], list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault((layer["block"], layer["kind"]), []).append(layer)
    rows = []
    for own in groups.values():
        last = [layer["steps"][-1] for layer in own]
        mean = {key: sum(step[key] for step in last) / len(last) for key in ("error", "bits", "density")}
        steps = ", ".join(step["method"] for step in own[0]["steps"])
        rows.append({"layer": own[0]["layer"], "more": len(own) - 1, "steps": steps, **mean})
    return rows


def _training_title(training: dict[str, Any]) -> str:
    if "loss_after" not in training:
        return training["method"]
    return f"{training['method']}: {training['loss_before']:.3f} to {training['loss_after']:.3f}"
