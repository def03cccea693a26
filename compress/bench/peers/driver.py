"""`compress bench peers`: every library in every column it can do, on the same model, windows and evaluation."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.bench.peers.bench import PeersBench
from compress.bench.peers.environments import python_of
from compress.bench.peers.readers import Form, chosen_forms, read_forms, readers_table
from compress.bench.peers.rows import DENSE, OURS, PEERS, Row, chosen_rows
from compress.calib.texts import check_source
from compress.commands import find_model
from compress.errors import CompressError, RunError
from compress.files import sha256, write_json
from compress.progress import Reporter
from compress.report import Report, number, size, table
from compress.run_dir import held, read_json

COSTS = ("seconds", "peak_rss_bytes", "weight_bytes")
WEIGHT_FILES = ("*.safetensors", "*.pt", "*.bin")


@dataclass(frozen=True)
class PeersRequest:
    """What a bench is asked to do, as its flags have it."""

    model: str
    calib: tuple[str, int, int]  # source, nsamples, seqlen
    text: tuple[str, int]  # source, windows
    out: Path
    environments: Path | None  # where they are, or are made; None: in `out`
    only: list[str]  # peers and columns; empty: all
    again: bool  # measure what was measured before once more


def bench_peers(request: PeersRequest) -> Report:
    """`measure_rows` of the peers and columns that the request names. Raises InputError for one that there is not."""
    return measure_rows(request, chosen_rows(request.only), chosen_forms(request.only))


def measure_rows(request: PeersRequest, rows: list[Row], forms: Sequence[Form] = ()) -> Report:
    """Measure the rows and read the forms; what an earlier sitting did is not done again, be it a failure.

    Returns {"model", "calib", "text", "runs", "beside", "readers"}, which OUT/peers.json has as well. A run has column,
    peer, method, perplexity, ratio (to the model's own in that environment), tokens (scored), seconds (of the whole
    process that quantizes), working_seconds (without its imports), peak_rss_bytes (of that process), weight_bytes (of
    the checkpoint), sparsity and two_of_four (share of groups of four inputs with two zeros or more), threads, versions;
    or its line in `failed`. beside: by column, ours and the best of the others. readers: as `read_forms` has them.
    Raises InputError, before anything runs, for a request that cannot be met, and RunError if `out` is in use.
    """
    check_source(request.calib[0])
    check_source(request.text[0], "evaluation")
    with held(request.out):
        bench = _prepared(request)
        runs = list(_measured(bench, rows, request.again))
        readers = read_forms(bench, forms, request.again)
    dense = {run["peer"]: run["perplexity"] for run in runs if run["column"] == DENSE and "failed" not in run}
    for run in runs:
        if "perplexity" in run and run["peer"] in dense:
            run["ratio"] = run["perplexity"] / dense[run["peer"]]
    data = {"model": request.model, **{key: bench.shared[key] for key in ("calib", "text")}, "runs": runs}
    data |= {"beside": _beside(runs), "readers": readers}
    write_json(request.out / "peers.json", data)
    failed = [f"{run['title']} failed: {run['failed']}" for run in runs if "failed" in run]
    return Report(data, [_table(runs), *failed, "", *_beside_table(data["beside"]), *readers_table(readers)])


def _prepared(request: PeersRequest) -> PeersBench:
    """The request with its model found, and its windows written where every script reads them."""
    reporter, out = Reporter(), request.out.absolute()
    folder = find_model(request.model, None, reporter).absolute()  # scripts run in folders of their own
    source, nsamples, seqlen = request.calib
    shared = {
        "model": str(folder),
        "windows": str(out / "windows.safetensors"),
        "calib": {"source": _absolute(source), "nsamples": nsamples, "seqlen": seqlen},
        "text": {"source": _absolute(request.text[0]), "windows": request.text[1]},
    }
    bench = PeersBench(out, (request.environments or out / "envs").absolute(), reporter, shared, {})
    asked = {"calib": shared["calib"], "text": shared["text"], "config": sha256(folder / "config.json")}
    mark = out / "windows.json"
    if not mark.exists() or read_json(mark) != asked:
        bench.ask(Row("windows", PEERS[0], "", {}), "windows")
        write_json(mark, asked)
    return replace(bench, asked={"model": str(folder), "windows": sha256(out / "windows.safetensors")})


def _absolute(source: str) -> str:
    """A text's file from anywhere, or its name."""
    return str(Path(source).absolute()) if Path(source).is_file() else source


def _measured(bench: PeersBench, rows: list[Row], again: bool) -> Iterator[dict[str, Any]]:
    """Each row's figures, measured now or before. Environments come first; a peer without one is not kept as measured."""
    missing = _missing_environments(bench, rows)
    for index, row in enumerate(rows, 1):
        names = {"column": row.column, "peer": row.peer.name, "method": row.method, "title": row.title}
        if row.peer.name in missing:
            yield names | {"failed": missing[row.peer.name]}
            continue
        file = bench.out / "rows" / row.folder / "row.json"
        asked = {**bench.asked, "setting": row.setting, "requirements": list(row.peer.requirements)}
        kept = read_json(file) if file.exists() and not again else {}
        if kept.get("asked") != asked:
            bench.reporter.say(f"row {index} of {len(rows)}: {row.title}")
            kept = {"asked": asked, "found": _figures(bench, row)}
            write_json(file, kept)
        yield names | kept["found"]


def _missing_environments(bench: PeersBench, rows: list[Row]) -> dict[str, str]:
    """Why a peer has none, by name; the others' are there afterwards."""
    missing = {}
    for name, peer in {row.peer.name: row.peer for row in rows}.items():
        try:
            python_of(peer, bench.environments, bench.reporter)
        except RunError as error:
            bench.reporter.say(str(error))
            missing[name] = str(error)
    return missing


def _figures(bench: PeersBench, row: Row) -> dict[str, Any]:
    """One row's figures, or {"failed": why there are none}."""
    checkpoint = bench.out / "rows" / row.folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    figures: dict[str, Any] = {}
    try:
        if row.setting:
            if row.peer.compiles:
                _warm_up(bench, row)
            made = bench.ask(row, "quantize")
            figures = {
                "seconds": made["usage"].seconds,
                "working_seconds": made["working_seconds"],
                "peak_rss_bytes": made["usage"].peak_rss_bytes,
                "weight_bytes": sum(f.stat().st_size for kind in WEIGHT_FILES for f in checkpoint.glob(kind)),
            }
        found = bench.ask(row, "measure")
        del found["usage"], found["working_seconds"]
        return figures | found
    except CompressError as error:
        bench.reporter.say(f"failed: {error}")
        return {"failed": str(error)}
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)  # a third of a gigabyte a row


def _warm_up(bench: PeersBench, row: Row) -> None:
    """Let a library compile, once for an environment, what it compiles when it first quantizes."""
    mark = bench.environments / row.peer.name / "compiled"
    if not mark.exists():
        bench.reporter.say(f"{row.peer.name} compiles its extensions: a row that does not count")
        bench.ask(row, "quantize")
        shutil.rmtree(bench.out / "rows" / row.folder / "checkpoint")
        mark.touch()


def _beside(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By column, what ours and the best other library reach, and ours divided by that."""
    beside = []
    for column in dict.fromkeys(run["column"] for run in runs if run["column"] != DENSE):
        done = [run for run in runs if run["column"] == column and "failed" not in run]
        ours, others = ([run for run in done if (run["peer"] == OURS) == own] for own in (True, False))
        if ours and others:
            own, best = (min(group, key=lambda run: run["perplexity"]) for group in (ours, others))
            ratios = {key: own[key] / best[key] for key in ("perplexity", *COSTS)}
            beside.append({"column": column, "ours": own["perplexity"], "best": best["perplexity"],
                           "by": f"{best['peer']} {best['method']}", "ratios": ratios})  # fmt: skip
    return beside


def _table(runs: list[dict[str, Any]]) -> Any:
    columns = ["column", "by", "perplexity", "x dense", "seconds", "working", "peak memory", "weights", "zeros", "2:4"]
    rows = []
    for run in runs:
        if "failed" in run:
            rows.append([run["column"], _name(run), "failed", *[""] * 7])
            continue
        timed = "seconds" in run
        rows.append(
            [
                run["column"],
                _name(run),
                number(run["perplexity"]),
                number(run["ratio"]) if "ratio" in run else "",
                f"{run['seconds']:.0f}" if timed else "",
                f"{run['working_seconds']:.0f}" if timed else "",
                size(run["peak_rss_bytes"]) if timed else "",
                size(run["weight_bytes"]) if timed else "",
                *(f"{100 * run[key]:.1f} %" if key in run else "" for key in ("sparsity", "two_of_four")),
            ]
        )
    return table("", columns, rows)


def _name(run: dict[str, Any]) -> str:
    return f"{run['peer']} {run['method']}".strip()


def _beside_table(beside: list[dict[str, Any]]) -> list[Any]:
    """Nothing if there is nothing to compare."""
    columns = ["column", "ours", "best of the others", "by", "ours / best", "seconds", "memory", "weights"]
    rows = [
        [
            each["column"],
            number(each["ours"]),
            number(each["best"]),
            each["by"],
            *(f"{each['ratios'][key]:.3f}" for key in ("perplexity", *COSTS)),
        ]
        for each in beside
    ]
    return [table("ours beside the best of the others, and ours divided by it", columns, rows), ""] if rows else []
