"""What the dense and the compressed model say after the same prompts, the most likely token each time."""

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from compress.calib.skeleton import load_tokenizer
from compress.commands import find_model, pick_device
from compress.errors import InputError
from compress.generate import GenerateOptions, generate
from compress.hf import load_model
from compress.html_report.run_data import run_folder
from compress.progress import Reporter, Stage
from compress.recipe import read_recipe

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
)


@dataclass(frozen=True)
class SampleRequest:
    """What is to be said."""

    prompts: tuple[str, ...] = PROMPTS
    max_new_tokens: int = 48
    device: str = "auto"


def take_samples(path: Path, request: SampleRequest, reporter: Reporter) -> list[dict[str, Any]]:
    """{"prompt", "dense", "compressed", "same"} of each prompt; "same": characters that both begin with.

    One model at a time is in memory. `path`: as in `run_data`. Raises InputError where the checkpoint or the dense
    model is not to be had.
    """
    folder = run_folder(path)
    assert folder is not None  # its data was read
    checkpoint = folder.parent
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"samples take the checkpoint, and {checkpoint} holds none: finish the run, or leave them out")
    recipe = read_recipe(folder / "recipe.toml", {})
    dense = find_model(recipe.model, recipe.revision, reporter)
    with reporter.stage("writing samples,", 2 * len(request.prompts)) as stage:
        texts = [_say(each, request, stage) for each in (dense, checkpoint)]
    return [
        {"prompt": prompt, "dense": before, "compressed": after, "same": _same(before, after)}
        for prompt, before, after in zip(request.prompts, *texts, strict=True)
    ]


def _say(folder: Path, request: SampleRequest, stage: Stage) -> list[str]:
    """What a model says after each prompt."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, device=pick_device(request.device))
    options, texts = GenerateOptions(request.max_new_tokens), []
    for prompt in request.prompts:
        texts.append(generate(model, tokenizer, prompt, options).text)
        stage.step()
    return texts


def _same(left: str, right: str) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
