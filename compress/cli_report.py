"""The command that makes a page of what was done: `compress report`."""

from pathlib import Path
from typing import Annotated

import typer

from compress.flags import Device, Json
from compress.report import show


def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="The --out of a run or of a sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page.", show_default="report.html in there")
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="Let the dense and the compressed model write, and show both.")
    ] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What samples begin with, instead of ours; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample, at most.")] = 48,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write a page about a run or a sweep: one HTML file that needs no network and no script.

    What was asked and what came out, errors, bits and zeros by layer, where time
    and memory went, training curves, samples, and the recipe that repeats it; of
    a sweep its table and perplexity against size.

    [bold]Examples[/bold]

      compress report small -o report.html

      compress report small --prompt "The capital of France is"

      compress report sweep
    """
    from compress.html_report.page import html_report
    from compress.html_report.samples import PROMPTS, SampleRequest

    asked = SampleRequest(tuple(prompt or PROMPTS), max_new_tokens, device) if samples or prompt else None
    show(html_report(path, out, asked), as_json)
