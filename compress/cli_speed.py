"""Those of `compress bench` that time checkpoints and kernels."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli_serve import Checkpoint, Prompts
from compress.errors import InputError, RunError
from compress.flags import Device, Json
from compress.report import Report, show


def speed(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints that plain transformers loads.")],
    baseline: Annotated[str, typer.Option(help="What they are compared with, such as the dense model.")],
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens after it, greedy, with a cache.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; the median counts.")] = 5,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time checkpoints as plain transformers runs them, in turns with the model they were made of, batch 1.

    [bold]Example[/bold]

      compress bench speed small smaller --baseline gemma-3-270m
    """
    from compress.bench.speed import bench_speed
    from compress.eval.speed import SpeedProtocol

    show(bench_speed(checkpoints, baseline, SpeedProtocol(seqlen, new_tokens, repeats), device), as_json)


def decode(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints or models; the first is the baseline.")],
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=4, help="Tokens after it, greedy, with a cache.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of each; the fastest counts.")] = 5,
    prompts: Annotated[
        str, typer.Option(help="What is kept for prompts: dense, decode or packed, as in `serve`.")
    ] = "dense",
    llama_bench: Annotated[
        Path | None, typer.Option("--llama-bench", help="llama.cpp's llama-bench, to time --gguf beside.")
    ] = None,
    gguf: Annotated[list[Path] | None, typer.Option(help="GGUF file for llama-bench; may be repeated.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time checkpoints as `compress serve` runs them, token by token in turns with the first, batch 1.

    [bold]Example[/bold]

      compress bench decode gemma-3-270m small-8 small-4

      compress bench decode gemma-3-270m small-4 --llama-bench build/bin/llama-bench
        --gguf gemma-3-270m-q4_0.gguf
    """
    from compress.bench.decode import DecodeRequest, bench_decode
    from compress.commands import find_model, pick_device
    from compress.eval.speed import SpeedProtocol
    from compress.progress import Reporter

    folders = {name: find_model(name, None, Reporter()) for name in checkpoints}
    protocol = SpeedProtocol(seqlen, new_tokens, repeats)
    request = DecodeRequest(folders, protocol, prompts, llama_bench, tuple(gguf or ()))
    show(bench_decode(request, pick_device(device)), as_json)


def runtimes(
    checkpoint: Checkpoint,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="RUNTIME,...",
            help="Which, beside ours: llama.cpp, onnx, onnx-lossy, openvino, openvino-f32, executorch.",
            show_default="all",
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens after it, greedy.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of each.")] = 2,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the exports; they are used again.", show_default="CHECKPOINT-runtimes"),
    ] = None,
    envs: Annotated[
        Path | None,
        typer.Option(help="Folder of the runtimes' environments, about 0.2 GB each.", show_default="OUT/envs"),
    ] = None,
    llama_bench: Annotated[
        Path | None,
        typer.Option("--llama-bench", help="llama.cpp's llama-bench.", show_default="on PATH, or built from source"),
    ] = None,
    prompts: Prompts = "decode",
    as_json: Json = False,
) -> None:
    """Export a checkpoint to other runtimes, and time each on the CPU in turns with ours, batch 1: one table.

    Each runtime has an environment of its own, on top of this one and with
    exact pins, and a process of its own. A runtime that cannot be had or does
    not take the checkpoint is a row that says why.

    [bold]Example[/bold]

      compress bench runtimes small --runtime llama.cpp,onnx
    """
    from compress.bench.runtimes.driver import RuntimesRequest, bench_runtimes
    from compress.eval.speed import SpeedProtocol

    names = tuple(name.strip() for name in runtime.split(",")) if runtime else ()
    protocol = SpeedProtocol(prompt_tokens, new_tokens, repeats)
    place = out or (whole := checkpoint.resolve()).with_name(f"{whole.name}-runtimes")
    request = RuntimesRequest(checkpoint, place, names, protocol, threads, envs, llama_bench, prompts)
    finish(bench_runtimes(request), as_json)


def kernels(
    shape: Annotated[str, typer.Option(help="Outputs x inputs of the layer.")] = "4096x4096",
    tokens: Annotated[str, typer.Option(help="Tokens of one product, with commas between.")] = "1,16,256",
    group_size: Annotated[int, typer.Option(min=1, help="Weights that share a scale.")] = 128,
    only: Annotated[list[str] | None, typer.Option(help="An implementation; may be repeated. Without: all.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check, then time every kernel that can serve a layer here, beside the dense product: on a GPU or a CPU.

    [bold]Example[/bold]

      compress bench kernels --device cuda --shape 4096x11008 --tokens 1,8,16,32,256
    """
    from compress.bench.kernels import KernelBench, bench_kernels
    from compress.commands import pick_device

    try:
        rows, columns = map(int, shape.split("x"))
        counts = tuple(int(count) for count in tokens.split(","))
    except ValueError as error:
        raise InputError(f"--shape {shape} --tokens {tokens}: write them as 4096x11008 and 1,16,256") from error
    asked = KernelBench((rows, columns), counts, group_size=group_size, only=tuple(only or ()))
    show(bench_kernels(asked, pick_device(device)), as_json)


def finish(report: Report, as_json: bool) -> None:
    """Print a report of runs; the exit code says whether one failed."""
    show(report, as_json)
    if any("failed" in row for row in report.data["runs"]):
        raise typer.Exit(RunError.exit_code)
