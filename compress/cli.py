"""The command line: reads flags, calls the rest, prints. Results go to stdout, progress and errors to stderr."""

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import __version__
from compress.__main__ import INTERRUPTED
from compress.cli_bench import bench, sweep
from compress.cli_eval import evaluate, gate
from compress.cli_export import export
from compress.cli_report import report
from compress.cli_serve import Prompts, generate, serve
from compress.errors import failure
from compress.flags import Device, Json, given
from compress.report import show

USAGE_ERROR: Any = typer.BadParameter.__base__  # typer brings a click of its own

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

app.add_typer(bench, name="bench")
app.command()(sweep)
app.command("eval")(evaluate)
app.command()(gate)
app.command()(generate)
app.command()(serve)
app.command()(report)
app.command()(export)

RUN_EXAMPLES = """
Prune, quantize and save a causal language model, one transformer block in memory at a time.

[bold]Examples[/bold]

  compress run gemma-3-270m --sparsity 0.5 --wbits 4 --calib builtin --out small

  compress run llama-7b --pattern 2:4 --pruner sparsegpt --out llama-24

  compress run gemma-3-270m --budget 150MiB --head-bits 4 --calib my-text.txt

  compress run ./my-model --wbits 3 --quantizer gptq --calib my-text.jsonl --set gptq.damping=0.05

The same command again goes on where it was stopped. Nothing finished is lost.
"""


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compress causal language models: prune, quantize, measure, and write checkpoints that others load."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(help=RUN_EXAMPLES)
def run(
    model: Annotated[str | None, typer.Argument(help="An alias, a hub id, a folder, or a .gguf file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint and its run.", show_default="MODEL-compressed")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe; flags override it.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of the blocks' weights to remove, 0 to 1.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured, n:m with n kept of every m (2:4, 4:8), or blocks (16x16).")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Unstructured scores compete within a row or the layer.", show_default="row")
    ] = None,
    pruner: Annotated[str | None, typer.Option(help="A method of `compress methods`.", show_default="alps")] = None,
    refine: Annotated[str | None, typer.Option(help="What improves the pruner's mask, such as dsnot.")] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD,...", help="What wins back the loss, in order: methods of `compress methods`, such as lrec."
        ),
    ] = None,
    recover_for: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="What each of them that trains may take: 15min, 90s or 200000tokens.",
            show_default="15min",
        ),
    ] = None,
    adapter_bits: Annotated[
        int | None, typer.Option(help="Bits of each number of an adapter: 1, 2, 4, 8 or 16.", show_default="16")
    ] = None,
    scatter: Annotated[
        bool | None,
        typer.Option("--scatter", help="Adapters of lora or qlora learn on the compressed model, for the dense one."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What methods that train learn from.", show_default="for --recover that of --calib"
        ),
    ] = None,
    wbits: Annotated[int | None, typer.Option(help="Bits a weight: 2, 3, 4, 5, 6 or 8.")] = None,
    abits: Annotated[
        int | None,
        typer.Option(help="Bits of what enters quantized layers: 4, 6 or 8.", show_default="16: as it comes"),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help="What makes codes of it.", show_default="smoothquant"),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; -1: one an output channel.",
            show_default="128; -1 where --abits goes with 6 or 8 bits",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Zero in the middle of the codes, or stored zero points.",
            show_default="symmetric; asymmetric at 2 and 3 bits",
        ),
    ] = None,
    quantizer: Annotated[str | None, typer.Option(help="A method of `compress methods`.", show_default="gptq")] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="Bits of embeddings and head: 4, 8 or 16.", show_default="16")
    ] = None,
    allocate: Annotated[
        str | None, typer.Option(help="How sparsity and bits are spread over layers.", show_default="uniform")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What the checkpoint may take: 0.25x of the dense one's bytes, 150MiB, or 3.2bits a weight of the "
            "blocks' layers. Bits, groups and sparsity of each layer are chosen to lose least."
        ),
    ] = None,
    drift: Annotated[
        float | None,
        typer.Option(help="Share of the drift of earlier layers that each makes up for, 0 to 1.", show_default="0.25"),
    ] = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--parallel",
            help="Within a block, calibrate each layer on already compressed ones.",
            show_default="parallel",
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="c4, wikitext2, ptb, pileval, ultrachat, builtin, self, or a .txt, .jsonl or .parquet file.",
            show_default="c4",
        ),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="128")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a sequence.", show_default="2048")] = None,
    seed: Annotated[int | None, typer.Option(help="Which sequences are taken.", show_default="0")] = None,
    refresh_gradients: Annotated[
        int | None, typer.Option(help="Blocks after which gradients are taken anew.", show_default="0: never")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="auto, compressed-tensors, gptq or native.", show_default="auto")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.", show_default="auto")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="METHOD.KEY=VALUE", help="An option of a method.")
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option("--eval", metavar="TEXT", help="Then measure perplexity, dense and compressed, on this text."),
    ] = None,
    eval_windows: Annotated[int, typer.Option(min=1, help="Windows of --eval.")] = 32,
    tracker: Annotated[
        str | None, typer.Option(help="Who gets the figures of trainings: tensorboard (in OUT/run/tracker), wandb, ...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, size, memory and time, and do nothing.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of this machine that share the work; for several machines see RANKS.md."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    from compress.calib.ranks import joined
    from compress.commands import pick_device, run_command
    from compress.launch import launch, launched
    from compress.recipe import read_recipe
    from compress.settings import method_options

    flags = {
        "model": model, "pruner": pruner, "refine": refine, "train": train, "quantizer": quantizer, "drift": drift, "sequential": sequential, "format": format,
        "dtype": dtype, "revision": revision, "activations": activations,
        "recover": recover, "recover_for": recover_for, "adapter_bits": adapter_bits, "scatter": scatter,
        "target": {"sparsity": sparsity, "pattern": pattern, "compare": compare, "wbits": wbits, "abits": abits, "group_size": group_size,
                   "symmetric": symmetric, "head_bits": head_bits, "allocate": allocate, "budget": budget},
        "calib": {"source": calib, "nsamples": nsamples, "seqlen": seqlen, "seed": seed,
                  "refresh_gradients": refresh_gradients},
        "options": method_options(settings or []),
    }  # fmt: skip
    if ranks is not None and not launched():
        raise typer.Exit(launch(ranks, sys.argv[1:]))
    with joined(pick_device(device)) as joint:
        read = read_recipe(recipe, given(flags))
        target = out or _beside(read.model)
        result = run_command(read, target, (evaluate, eval_windows), dry_run, joint, tracker)
    if result is not None:
        show(result, as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run that is under way.")],
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Instead, who multiplies by each layer when it is served, and why.")
    ] = False,
    prompts: Prompts = "decode",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show what a checkpoint or a run holds: every layer, its bits, its zeros, its error, and where the time went."""
    from compress.commands import inspect_command, pick_device
    from compress.kernel_report import kernel_report

    show(kernel_report(path, prompts, pick_device(device)) if kernels else inspect_command(path), as_json)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods, what each is and what can be set."""
    from compress.commands import methods_command

    show(methods_command(), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say whether this machine is ready: versions, memory, disk, GPU, hub, demo model."""
    from compress.commands import doctor_command

    show(doctor_command(), as_json)


def _beside(model: str) -> Path:
    """Where the checkpoint goes without --out: MODEL-compressed in the current folder."""
    name = Path(model).name
    if name in ("", ".."):  # "." has no name of its own
        name = Path(model).resolve().name
    return Path(f"{name.removesuffix('.gguf')}-compressed")


def main() -> None:
    """Run the command line; every foreseen failure ends in one line and its exit code. Raises KeyboardInterrupt."""
    debug = "--debug" in sys.argv
    try:
        status = app(args=[a for a in sys.argv[1:] if a != "--debug"], prog_name="compress", standalone_mode=False)
        code, line = (status if isinstance(status, int) else 0), ""
    except typer.Abort:
        code, line = INTERRUPTED, ""
    except USAGE_ERROR as error:
        code, line = 2, error.format_message()
    except Exception as error:
        if "KeyboardInterrupt" in str(error):  # compiled libraries, such as pydantic's, put it into words
            raise KeyboardInterrupt from error
        if debug:
            traceback.print_exc()
        code, line = failure(error, "--debug shows where")
    if code == INTERRUPTED:  # which typer makes of KeyboardInterrupt
        raise KeyboardInterrupt
    if line:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
