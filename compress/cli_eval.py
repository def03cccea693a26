"""The commands that judge a checkpoint: `compress eval` and `compress gate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.errors import InputError
from compress.flags import Device, Json
from compress.report import show

if TYPE_CHECKING:
    from compress.evaluate import TextRequest
    from compress.tasks import TaskRequest

WORSE = 1  # the exit code of a gate that does not hold

ModelNames = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...", help="Aliases (llama-7b), hub ids, folders, or .gguf files; the others beside the first."
    ),
]
Texts = Annotated[list[str] | None, typer.Option("--ppl", help="wikitext2, ptb, builtin, or a text file; repeatable.")]
Protocols = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME,...",
        help="compress, wanda (gptq), strided, llama.cpp or lm-eval; repeatable.",
        show_default="compress",
    ),
]
Seqlen = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens a window, and most of a task's prompt.", show_default="2048; strided 1024, llama.cpp 512"
    ),
]
Stride = Annotated[int | None, typer.Option(min=1, help="Of strided: tokens between windows.", show_default="half one")]
MaxWindows = Annotated[
    int | None, typer.Option(min=1, help="Only the first windows of each text; documents for lm-eval.")
]
Against = Annotated[
    str | None, typer.Option(metavar="DENSE", help="Measure divergence from this model as well: KL, same top token.")
]
Tasks = Annotated[list[str] | None, typer.Option(metavar="TASK,...", help="Tasks of lm-eval; repeatable.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")]
IncludePath = Annotated[Path | None, typer.Option(metavar="DIR", help="More tasks, as YAML files.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at once in tasks.")]


def evaluate(
    checkpoints: ModelNames,
    ppl: Texts = None,
    protocol: Protocols = None,
    seqlen: Seqlen = None,
    stride: Stride = None,
    max_windows: MaxWindows = None,
    against: Against = None,
    tasks: Tasks = None,
    limit: Limit = None,
    include_path: IncludePath = None,
    tasks_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write lm-eval's results, in its own JSON.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what --json prints, as far as it has come.")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure checkpoints: perplexity by the protocol of your choice, divergence from the dense model, tasks.

    Several make one table, a column each, with what changes from the first.

    Without --ppl and --tasks: perplexity on wikitext2. By our own protocol the text is tokenized whole without special
    tokens and cut into windows of SEQLEN - 1; BOS is put before each, and every token is scored. Models whose tokenizer
    has no BOS get windows of SEQLEN and their first token is not scored. The others count as the tools they are named
    after; EVALUATION.md says how.

    [bold]Examples[/bold]

      compress eval small --ppl my-text.txt --seqlen 512 --max-windows 32

      compress eval small --ppl wiki.test.raw.txt --protocol wanda,llama.cpp --against llama-7b

      compress eval small --tasks piqa,arc_easy --limit 100

      compress eval llama-7b small smaller --protocol wanda,llama.cpp --ppl wiki.test.raw.txt --tasks piqa
    """
    from compress.evaluation import Evaluation, evaluation_report

    request = task_request(tasks, limit, include_path, (batch_size, seqlen))
    texts = ppl or ([] if request else ["wikitext2"])
    if (against or protocol) and not texts:
        raise InputError("--against and --protocol are about a text: give --ppl")
    if tasks_out and not request:
        raise InputError("--tasks-out is where results of tasks go: give --tasks")
    if tasks_out and len(checkpoints) > 1:
        raise InputError("--tasks-out holds lm-eval's results of one checkpoint: give one, or --save")
    sizes = (seqlen, stride, max_windows)
    asked = Evaluation(text_requests(texts, protocol, sizes), against, request, tasks_out, save)
    show(evaluation_report(checkpoints, asked, device), as_json)


def gate(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="CKPT|RECIPE...", help="Checkpoints, or recipes (.toml) to be run and judged."),
    ],
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recorded figures.", show_default="RECIPE's name with .json")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add the tables to this file, such as $GITHUB_STEP_SUMMARY.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the verdicts as JUnit's XML.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the baseline; the options below say of what.")
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Of --record: runs with other calibration samples, whose spread makes the bands.")
    ] = 1,
    ppl: Texts = None,
    protocol: Protocols = None,
    seqlen: Seqlen = None,
    stride: Stride = None,
    max_windows: MaxWindows = None,
    against: Against = None,
    tasks: Tasks = None,
    limit: Limit = None,
    include_path: IncludePath = None,
    batch_size: BatchSize = 8,
    speed: Annotated[bool, typer.Option("--speed", help="Decode speed as a ratio to --against.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Hold checkpoints, or what recipes make, against recorded figures; exit code 1 says that one is worse.

    A baseline says what is measured and what came out. A figure is worse where it is off by more than its tolerance and
    more than chance: the spread of --seeds runs, and for tasks the error of the difference on the same documents. Size
    is always a figure. Exit codes: 0 all hold, 1 worse, 2 bad input, 3 cannot go on. EVALUATION.md has CI jobs.

    [bold]Examples[/bold]

      compress gate small --baseline small.json --record --seeds 3 --ppl valid.txt --against llama-7b

      compress gate small --baseline small.json --markdown "$GITHUB_STEP_SUMMARY" --junit gate.xml

      compress gate gates/*.toml
    """
    from compress.gate_measure import Asked
    from compress.gating import find_targets, record_baselines
    from compress.gating import gate as hold

    found = find_targets(targets, baseline)
    request = task_request(tasks, limit, include_path, (batch_size, seqlen))
    texts = text_requests(ppl or [], protocol, (seqlen, stride, max_windows))
    if record:
        if markdown or junit:
            raise InputError("--markdown and --junit show verdicts, and --record gives none: leave them out")
        show(
            record_baselines(found, Asked(texts=texts, against=against, tasks=request, speed=speed), seeds, device),
            as_json,
        )
        return
    if any((texts, request, against, speed, seeds > 1, protocol, seqlen, stride, max_windows)):
        raise InputError("what is measured stands in the baseline: give --ppl, --tasks and the like with --record")
    report = hold(found, (markdown, junit), device)
    show(report, as_json)
    if not report.data["held"]:
        raise typer.Exit(WORSE)


def text_requests(
    texts: list[str], protocols: list[str] | None, sizes: tuple[int | None, int | None, int | None]
) -> list["TextRequest"]:
    """Every text by every protocol; `sizes`: seqlen, stride, most windows."""
    from compress.evaluate import TextRequest

    names = split(protocols) or ["compress"]
    return [TextRequest(text, name, *sizes) for text in texts for name in names]


def task_request(
    tasks: list[str] | None, limit: int | None, include_path: Path | None, sizes: tuple[int, int | None]
) -> "TaskRequest | None":
    """What lm-eval is asked for, or None for nothing; `sizes`: prompts at once, tokens of each at most."""
    from compress.tasks import TaskRequest

    names = tuple(split(tasks))
    if not names and (limit or include_path):
        raise InputError("--limit and --include-path are about tasks: give --tasks")
    return TaskRequest(names, limit, include_path, sizes[0], sizes[1] or 2048) if names else None


def split(values: list[str] | None) -> list[str]:
    """An option that may be repeated and hold several with commas between, each once."""
    return list(dict.fromkeys(piece.strip() for value in values or () for piece in value.split(",") if piece.strip()))
