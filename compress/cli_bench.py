"""The commands that measure: `compress sweep` and `compress bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli_serve import load
from compress.cli_speed import decode, finish, kernels, runtimes, speed
from compress.flags import Device, Json, ModelName, given
from compress.report import show

bench = typer.Typer(
    no_args_is_help=True, help="Measure quality, gradients and speed: what every claim of ours comes from."
)
for _timing in (speed, decode, runtimes, kernels):
    bench.command()(_timing)
bench.command("serve")(load)

RunsFolder = Annotated[Path, typer.Option("--out", help="Folder for the runs; finished ones are not repeated.")]
EvalText = Annotated[
    str, typer.Option("--ppl", help="Text to measure perplexity on: wikitext2, ptb, builtin, or a file.")
]
Windows = Annotated[int, typer.Option("--max-windows", min=1, help="Windows of the text.")]


def sweep(
    model: ModelName,
    method: Annotated[
        list[str], typer.Option(metavar="SETTING", help="A setting; may be repeated, or several with commas between.")
    ],
    ppl: EvalText,
    out: RunsFolder,
    sparsity: Annotated[
        list[str] | None, typer.Option(help="Share of weights to remove; repeated, or with commas between.")
    ] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="n:m with n kept of every m; likewise.")] = None,
    wbits: Annotated[list[str] | None, typer.Option(help="Bits a weight, for quantizers; likewise.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="What checkpoints may take, such as 3bits; columns of their own.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe that all runs start from.")] = None,
    calib: Annotated[str | None, typer.Option(help="Calibration text.", show_default="c4")] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="128")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a sequence and a window.", show_default="2048")] = None,
    max_windows: Windows = 32,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time each checkpoint beside the dense model as well.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Keep checkpoints and gradients; without it they go once measured, the figures stay."
        ),
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run every setting at every sparsity, pattern and width, and measure each.

    Ends in a table, OUT/sweep.csv, OUT/sweep.json and a plot. A SETTING is
    PRUNER, PRUNER+REFINE or QUANTIZER, or one of the first two +QUANTIZER; then
    @ALLOCATE; then :KEY=VALUE,... where KEY is METHOD.OPTION as in `run --set`,
    or a key of recipes, such as target.sparsity if no --sparsity is given. Runs
    share calibration tokens and gradients of the dense model.

    The same command again goes on where it was stopped; more settings or
    targets add to what is there. A run that fails is in the table as failed,
    with its line below; the others go on, and the exit code is 3.

    [bold]Examples[/bold]

      compress sweep llama-7b --method magnitude,wanda,sparsegpt --pattern 2:4
        --sparsity 0.5,0.6 --calib valid.txt --ppl test.txt --out sweep

      compress sweep llama-7b --method wanda+dsnot@owl --sparsity 0.7
        --method sparsegpt:sequential=true,calib.nsamples=64 --ppl c4 --out owl

      compress sweep llama-7b --method rtn,gptq --wbits 4,3 --ppl c4 --out bits

      compress sweep llama-7b --method atp:train=domain.txt --sparsity 0.3
        --ppl c4 --out smaller
    """
    from compress.sweep import Request
    from compress.sweep import sweep as measure

    base = given({"calib": {"source": calib, "nsamples": nsamples, "seqlen": seqlen}})
    request = Request(
        model,
        method,
        sparsity or [],
        pattern or [],
        wbits or [],
        base,
        recipe,
        ppl,
        max_windows,
        out,
        keep,
        speed,
        tuple(budget or ()),
    )
    finish(measure(request, device), as_json)


@bench.command()
def quality(
    model: ModelName,
    ppl: EvalText,
    out: RunsFolder,
    calib: Annotated[str, typer.Option(help="Calibration text.")] = "c4",
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    seqlen: Annotated[int, typer.Option(help="Tokens a sequence and a window.")] = 512,
    max_windows: Windows = 32,
    only: Annotated[
        list[str] | None, typer.Option(help="Names of the settings to run; may be repeated.", show_default="all")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compress a model in every standard way, measure each against the dense model, and print one table.

    [bold]Example[/bold]

      compress bench quality gemma-3-270m --calib valid.txt --ppl test.txt --out bench
    """
    from compress.bench.quality import bench_quality

    finish(bench_quality(model, out, (calib, nsamples, seqlen), (ppl, max_windows), only or [], device), as_json)


@bench.command()
def peers(
    model: ModelName,
    ppl: EvalText,
    out: RunsFolder,
    calib: Annotated[str, typer.Option(help="Calibration text.")] = "c4",
    nsamples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 32,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens a sequence and a window.")] = 512,
    max_windows: Windows = 32,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Peers and columns, readers, vllm; may be repeated.", show_default="all but vllm"),
    ] = None,
    envs: Annotated[
        Path | None, typer.Option(help="Folder of the peers' environments, about 1.5 GB each.", show_default="OUT/envs")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure once more what was measured before.")] = False,
    as_json: Json = False,
) -> None:
    """Measure other libraries beside ours, on the same model, calibration windows and text: one table.

    Each gets a virtual environment of its own, with exact pins, and a process
    of its own for each row. The same command again measures only what is
    missing; a library that fails is in the table with its line below.
    Checkpoints of ours are read by the others as well, and theirs by us.

    [bold]Example[/bold]

      compress bench peers gemma-3-270m --calib valid.txt --ppl test.txt --out peers
        --only compress --only llm-compressor --only "W4 g128"
    """
    from compress.bench.peers.driver import PeersRequest, bench_peers

    request = PeersRequest(model, (calib, nsamples, seqlen), (ppl, max_windows), out, envs, only or [], again)
    finish(bench_peers(request), as_json)


@bench.command()
def gradients(
    model: ModelName,
    calib: Annotated[str, typer.Option(help="Calibration text.")] = "c4",
    nsamples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 8,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 512,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time the gradients taken a block at a time, and their memory, beside those of the whole model in memory.

    [bold]Example[/bold]

      compress bench gradients gemma-3-270m --calib valid.txt --nsamples 8 --seqlen 512
    """
    from compress.bench.gradients import bench_gradients
    from compress.commands import find_model, pick_device
    from compress.progress import Reporter

    folder = find_model(model, None, Reporter())
    show(bench_gradients(folder, (calib, nsamples, seqlen), pick_device(device)), as_json)


@bench.command()
def recovery(
    model: ModelName,
    train: Annotated[str, typer.Option(metavar="TEXT", help="What is learned from.")] = "c4",
    method: Annotated[
        str, typer.Option(metavar="METHOD,...", help="Methods of recovery that train.")
    ] = "lrec,qlora,l4q,grid",
    wbits: Annotated[int, typer.Option(help="Bits a weight of the packed model.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each; the first is not timed.")] = 3,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences in memory at once.")] = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time methods of recovery that train, and their memory, beside full fine-tuning of the dense model.

    [bold]Example[/bold]

      compress bench recovery gemma-3-270m --train valid.txt --steps 3
    """
    from compress.bench.recovery import RecoveryBench, bench_recovery
    from compress.commands import find_model, pick_device
    from compress.progress import Reporter

    methods = tuple(name.strip() for name in method.split(","))
    asked = RecoveryBench(train, methods, wbits, group_size, steps, seqlen, batch_size, micro_batch_size)
    show(bench_recovery(find_model(model, None, Reporter()), asked, pick_device(device)), as_json)


@bench.command()
def ranks(
    model: ModelName,
    counts: Annotated[
        list[int] | None,
        typer.Option(
            "--ranks", min=1, help="How many; may be repeated. The first is compared with.", show_default="1, 2"
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe.", show_default="4 bits by GPTQ")] = None,
    calib: Annotated[str | None, typer.Option(help="Calibration text.", show_default="c4")] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="128")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a sequence.", show_default="2048")] = None,
    as_json: Json = False,
) -> None:
    """Share one run among several processes of one thread each, and compare seconds and checkpoints.

    [bold]Example[/bold]

      compress bench ranks gemma-3-270m --ranks 1 --ranks 4
        --calib valid.txt --nsamples 32 --seqlen 512
    """
    from compress.bench.ranks import bench_ranks
    from compress.recipe import read_recipe

    flags: dict[str, Any] = {"model": model, "calib": {"source": calib, "nsamples": nsamples, "seqlen": seqlen}}
    if recipe is None:
        flags["target"] = {"wbits": 4}
    show(bench_ranks(read_recipe(recipe, given(flags)), counts or [1, 2]), as_json)


@bench.command("make-model")
def make_model(
    shape: Annotated[
        str, typer.Argument(help="llama-7b, llama-13b, tinyllama-1.1b, olmoe-1b-7b, or a config.json of transformers.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the model.")],
    layers: Annotated[
        int | None, typer.Option(min=1, help="Transformer blocks.", show_default="as many as the shape has")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a model of a true shape with random weights, to measure memory and time with where the real one is not.

    [bold]Example[/bold]

      compress bench make-model llama-7b random-7b

      compress run random-7b --sparsity 0.5 --wbits 4 --calib builtin --dry-run
    """
    from compress.bench.make_model import bench_make_model

    show(bench_make_model(shape, out, layers, seed), as_json)
