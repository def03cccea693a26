"""`compress export`: a checkpoint for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli_serve import Checkpoint
from compress.flags import Json
from compress.report import show


def export(
    checkpoint: Checkpoint,
    to: Annotated[str, typer.Option(help="gguf, onnx, openvino or executorch.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .gguf or .pte file; a folder for the others.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read it back with the runtime, and print the largest differences.")
    ] = False,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Write what the runtime cannot hold exactly as near as it can.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for another runtime, its packed weights equal bit for bit.

    What the runtime cannot hold exactly is refused, with the nearest that it can, unless --lossy.

    [bold]Examples[/bold]

      compress export small --to gguf -o small.gguf --verify

      compress export small --to onnx -o small-onnx
    """
    from compress.export.command import export as run

    show(run(checkpoint, to, out, verify, lossy), as_json)
