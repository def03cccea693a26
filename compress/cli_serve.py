"""The commands that run a checkpoint: `compress generate` and `compress serve`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.errors import InputError, RunError
from compress.flags import Device, Json
from compress.report import Report, show

Prompts = Annotated[
    str,
    typer.Option(
        help="What is kept for prompts: dense, a decoded copy of each layer (fastest, most memory); decode, its codes; "
        "packed, nothing more.",
    ),
]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of a checkpoint in any format that is read, or of a model.")]


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="What the text begins with, or a message with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens after the prompt, at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the tokens drawn at other temperatures.")] = 0,
    prompts: Prompts = "decode",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Print what a checkpoint says after a prompt, as it comes, then how fast it was and which kernels ran.

    [bold]Example[/bold]

      compress generate small "The capital of France is" --max-new-tokens 32
    """
    from compress.calib.skeleton import load_tokenizer
    from compress.commands import pick_device
    from compress.generate import GenerateOptions
    from compress.generate import generate as run
    from compress.hf import compressed_layers, load_model
    from compress.kernel_report import kernel_counts, kernel_lines

    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, prompts, pick_device(device))
    choices = {name: layer.choice for name, layer in compressed_layers(model).items()}

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    options = GenerateOptions(max_new_tokens, temperature, seed, chat)
    done = run(model, tokenizer, prompt, options, (lambda _: None) if as_json else say)
    data = {"text": done.text, **done.figures, "kernels": kernel_counts(choices)}
    rates = ", ".join(f"{key.removesuffix('_tokens_per_second')} {value:.1f} tokens/s" for key, value in done.figures.items()
                      if key.endswith("per_second"))  # fmt: skip
    if as_json:
        show(Report(data, []), True)
    else:
        print(f"\n{done.new_tokens} tokens; {rates}", *kernel_lines(choices), sep="\n", file=sys.stderr)


def serve(
    checkpoint: Checkpoint,
    engine: Annotated[str, typer.Option(help="transformers, vllm (a folder) or llama.cpp (a GGUF file).")] = (
        "transformers"
    ),
    engine_binary: Annotated[
        str | None,
        typer.Option(help="The program of another engine.", show_default="vllm or llama-server, as on PATH"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the folder's name")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --api-key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="COMPRESS_API_KEY", help="What clients have to send.", show_default="none")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer.", show_default="the model's own")
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at once; more are refused.")] = 64,
    prompts: Prompts = "decode",
    device: Device = "auto",
) -> None:
    """Serve a checkpoint over HTTP as OpenAI's API has it: chat, completions, responses, models, health; streaming.

    [bold]Examples[/bold]

      compress serve small --port 8000

      curl localhost:8000/v1/completions -H 'Content-Type: application/json'
        -d '{"model": "small", "prompt": "The capital of France is"}'

      compress serve small --engine vllm --engine-binary vllm-env/bin/vllm

      compress serve small.gguf --engine llama.cpp
    """
    from compress.commands import pick_device
    from compress.engines import ENGINES, become, check_listening, check_serve_extra, command, needs_plugin

    if engine not in ENGINES:
        raise InputError(f'there is no engine "{engine}": choose {", ".join(ENGINES)}')
    check_listening(host, api_key)
    if engine != "transformers":
        if (prompts, device, max_requests) != ("decode", "auto", 64):
            raise InputError(f"--prompts, --device and --max-requests are not {engine}'s: leave them out")
        arguments = command(engine, checkpoint, host, port, max_model_len, name)
        become(arguments, api_key, engine_binary, plugin=engine == "vllm" and needs_plugin(checkpoint))
    check_serve_extra()
    from compress.calib.skeleton import load_tokenizer
    from compress.hf import load_model
    from compress.serve import ServeOptions
    from compress.serve import serve as run

    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, prompts, pick_device(device))
    called = name or checkpoint.resolve().name
    for line in _loaded(called, checkpoint, model):
        print(line, file=sys.stderr, flush=True)
    print(f"listening on http://{host}:{port}/v1", file=sys.stderr, flush=True)
    run(called, model, tokenizer, ServeOptions(host, port, api_key, max_model_len, max_requests))
    print("stopped", file=sys.stderr, flush=True)
    os._exit(0)  # an answer that nobody waits for may be under way in a thread, which Python's own end would break off


def load(
    checkpoint: Checkpoint,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once, each with one request after the other.")] = 50,
    seconds: Annotated[float, typer.Option(min=0, help="In which requests are begun.")] = 30.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, about.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 32,
    prompts: Prompts = "decode",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Serve a checkpoint on loopback, let clients ask at once, and print how long they waited.

    Beside it what the server held before and after: memory, files, sockets.
    The exit code is 3 if a request failed or the server did not end well.

    [bold]Example[/bold]

      compress bench serve small --clients 50 --seconds 60
    """
    from compress.bench.serve import Load, bench_serve
    from compress.engines import check_serve_extra

    check_serve_extra()
    report = bench_serve(checkpoint, Load(clients, seconds, prompt_tokens, new_tokens, prompts, device))
    show(report, as_json)
    if report.data["errors"] or report.data["end"]["exit_code"]:
        raise typer.Exit(RunError.exit_code)


def _loaded(name: str, checkpoint: Path, model: Any) -> list[str]:
    """What was loaded, for people."""
    from compress.hf import compressed_layers
    from compress.kernel_report import kernel_lines
    from compress.report import size

    choices = {name: layer.choice for name, layer in compressed_layers(model).items()}
    held = size(sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]))
    where = f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    return [f"{name}: {checkpoint}, {where}, {held} in memory", *kernel_lines(choices)]
