"""Flags that several commands take."""

from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
ModelName = Annotated[str, typer.Argument(help="An alias (llama-7b), a hub id, a folder, or a .gguf file.")]


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Nested flags without those the user left out."""
    nested = {key: given(value) if isinstance(value, dict) else value for key, value in flags.items()}
    return {key: value for key, value in nested.items() if value is not None and value != {}}
