"""The readers of what users download, each with its seeds and what damages them.

compress is imported where it is used, so that naming the targets is quick and atheris can watch the imports.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from contract import outcome
from damage import damage_file, damage_folder
from draws import Draws

DENSE = ("dense", "sharded")
FORMATS = {
    "native": ("native", None),
    "gptq": ("gptq", None),
    "compressed-tensors": ("compressed-tensors", None),
    "peft": ("gptq", "peft"),
    "own": ("native", "own"),
}
RECIPE = """
model = "llama-7b"
pruner = "wanda"
quantizer = "gptq"
recover = ["low-rank"]
[calib]
source = "builtin"
nsamples = 4
[target]
sparsity = 0.5
wbits = 4
group_size = 64
[options.gptq]
damping = 0.05
"""
BASELINE = {
    "version": 1,
    "asked": {"texts": [{"text": "builtin"}]},
    "confidence": 0.99,
    "tolerance": {"perplexity": 0.02},
    "figures": {
        "perplexity builtin": {"kind": "perplexity", "values": [20.0, 20.1]},
        "task": {"kind": "task", "values": [0.5], "se": 0.01, "each": [0.0, 1.0]},
    },
}


@dataclass(frozen=True)
class Target:
    """A reader: `make` writes the seed called so in a folder, `read` is what a command does with the damaged copy."""

    make: Callable[[Path, str], object]
    seeds: tuple[str, ...]
    read: Callable[[Path], object]
    only: tuple[str, ...] = ()  # the files that are damaged; none: any


# ---- seeds ----


def _make_model(folder: Path, seed: str) -> None:
    from checkpoints import save_packed, save_small

    if seed in FORMATS:
        save_packed(folder, *FORMATS[seed])
        return
    save_small(folder)
    if seed == "sharded":
        from transformers import AutoModelForCausalLM

        lm = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        lm.save_pretrained(folder, max_shard_size=20_000)


def _make_gguf(folder: Path, architecture: str) -> None:
    from gguf_files import F16, Q8, write_gguf

    small = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1}
    write_gguf(folder / "tiny.gguf", architecture, kinds=(Q8, F16), **small)


def _make_recipe(folder: Path, _: str) -> None:
    (folder / "recipe.toml").write_text(RECIPE)


def _make_baseline(folder: Path, _: str) -> None:
    (folder / "baseline.json").write_text(json.dumps(BASELINE))


def _make_run(folder: Path, _: str) -> None:
    """A run that has finished a block."""
    import torch
    from checkpoints import packed_layer

    from compress.checkpoint.native import Contents, encode
    from compress.recipe import read_recipe
    from compress.run_dir import Finished, RunDir

    run = RunDir(folder / "run", read_recipe(None, {"model": "m", "target": {"wbits": 4}}), {"model": {"a": "1"}})
    layer = packed_layer("model.layers.0.mlp.up_proj", "native", "own")
    run.save("0000", *encode(Contents([layer], {"bias": torch.zeros(4)}, {"x": torch.ones(4, 8) > 0})), {"bits": 4.0})
    run.once("tokens", lambda: {"tokens": torch.zeros(2, 8)})
    Finished(run.path).update({"seconds": 1.0})
    run.journal.write(event="layer", layer="a", step="prune")
    run.close()


def _make_finished(folder: Path, _: str) -> None:
    """A run from end to end, as its folder is handed on."""
    from checkpoints import save_small
    from tiny import tiny_text

    from compress.pipeline import compress
    from compress.progress import Reporter
    from compress.recipe import read_recipe

    small, text = save_small(folder.parent / "small"), folder.parent / "text.txt"
    text.write_text(tiny_text())
    values = {"model": str(small), "calib": {"source": str(text), "nsamples": 2, "seqlen": 32}, "quantizer": "rtn"}
    recipe = read_recipe(None, values | {"target": {"wbits": 4, "group_size": 32}})
    compress(recipe, small, folder, Reporter(quiet=True))


def _make_text(folder: Path, name: str) -> None:
    from tiny import tiny_text

    rows = [{"text": tiny_text(20, seed=i)} for i in range(5)]
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))


# ---- readers ----


def _read_weights(folder: Path) -> None:
    from compress.checkpoint.formats import open_weights

    files = open_weights(folder)
    for name in files.names():
        files.read(name)
        files.input_quantizer(name)
    files.nbytes()


def _read_model(folder: Path) -> None:
    import torch

    from compress.pipeline import open_model
    from compress.sources import resolve_model

    resolve_model(str(folder))
    model = open_model(folder)
    hidden = model.embed(torch.tensor(model.tokenizer("w3 w4 w5")["input_ids"][:8]))
    for block in model.blocks():
        hidden = block(hidden)
    model.logits(hidden)


def _read_to_serve(folder: Path) -> None:
    from compress.calib.skeleton import load_tokenizer
    from compress.generate import GenerateOptions, generate
    from compress.hf import load_model

    tokenizer, model = load_tokenizer(folder), load_model(folder)
    generate(model, tokenizer, "w3 w4 w5", GenerateOptions(2))


def _read_tokenizer(folder: Path) -> None:
    from compress.calib.skeleton import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer("w3 w4 w5")["input_ids"])


def _read_gguf(folder: Path) -> None:
    import torch

    from compress.gguf_file import read_gguf

    for tensor in read_gguf(folder / "tiny.gguf").tensors:
        tensor.dequantized()
        tensor.rounded(torch.bfloat16)


def _import_gguf(folder: Path) -> None:
    from compress.gguf_import import import_gguf

    import_gguf(folder / "tiny.gguf", folder / "cache")


def _read_recipe(folder: Path) -> None:
    from compress.recipe import read_recipe
    from compress.steps import find_steps

    recipe = read_recipe(folder / "recipe.toml", {})
    find_steps(recipe)
    recipe.toml()


def _read_baseline(folder: Path) -> None:
    from compress.gate import Figure, hold, read_baseline
    from compress.gate_measure import read_asked

    baseline = read_baseline(folder / "baseline.json")
    read_asked(baseline.asked, folder / "baseline.json")
    measured = {name: Figure(kept.kind, kept.values[0], kept.se, kept.each) for name, kept in baseline.figures.items()}
    hold(baseline, measured)


def _read_run(folder: Path) -> None:
    import torch

    from compress.checkpoint.native import decode
    from compress.recipe import read_recipe
    from compress.run_dir import Finished, RunDir

    run = RunDir(folder / "run", read_recipe(folder / "run" / "recipe.toml", {}), {"model": {"a": "1"}})
    try:
        for mark in sorted(run.blocks.glob("*.json")):
            if run.has(mark.stem):
                decode(*run.restore(mark.stem), "the block")
        run.once("tokens", lambda: {"tokens": torch.zeros(2, 8)})
        run.journal.read()
        Finished(run.path).read()
    finally:
        run.close()


def _inspect(folder: Path) -> None:
    from compress.inspection import inspect

    inspect(folder)


def _report(folder: Path) -> None:
    from compress.html_report.page import html_report

    html_report(folder, folder / "page.html", None)


def _read_texts(folder: Path) -> None:
    from compress.calib.texts import read_text

    for file in folder.iterdir():
        list(read_text(str(file)))


TARGETS = {
    "weights": Target(_make_model, (*DENSE, *FORMATS), _read_weights),
    "model": Target(_make_model, (*DENSE, *FORMATS), _read_model),
    "config": Target(_make_model, ("dense", "native", "gptq"), _read_model, ("config.json",)),
    "serve": Target(_make_model, (*DENSE, *FORMATS), _read_to_serve),
    "tokenizer": Target(_make_model, ("dense",), _read_tokenizer, ("tokenizer.json", "tokenizer_config.json")),
    "gguf-header": Target(_make_gguf, ("llama",), _read_gguf),
    "gguf-import": Target(_make_gguf, ("llama", "gemma3"), _import_gguf),
    "recipe": Target(_make_recipe, ("recipe",), _read_recipe),
    "baseline": Target(_make_baseline, ("baseline",), _read_baseline),
    "run": Target(_make_run, ("run",), _read_run),
    "inspect": Target(_make_finished, ("finished",), _inspect),
    "report": Target(_make_finished, ("finished",), _report),
    "text": Target(_make_text, ("text.jsonl", "text.parquet"), _read_texts),
}


@dataclass(frozen=True)
class Bench:
    """A place to work in: seeds that are made once, and copies that are damaged."""

    root: Path

    @property
    def outside(self) -> Path:
        """A folder that no input may lead to."""
        return self.root / "outside"

    def seed(self, name: str, which: str) -> Path:
        """A whole input of a target."""
        folder = self.root / "seeds" / TARGETS[name].make.__name__ / which
        if not self.outside.is_dir():
            from checkpoints import save_small

            save_small(self.outside)
        if not folder.is_dir():
            folder.mkdir(parents=True)
            TARGETS[name].make(folder, which)
        return folder

    def attempt(self, name: str, data: bytes) -> str:
        """Damage a copy of a seed of the target `name` as `data` decides, and read it: what `contract.outcome` says."""
        target, draws = TARGETS[name], Draws(data)
        seed = self.seed(name, draws.pick(target.seeds))
        folder = self.root / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(seed, folder)
        if target.only:
            for _ in range(1 + draws.below(2)):
                damage_file(folder / draws.pick(target.only), draws)
        else:
            damage_folder(folder, draws, self.outside)
        return outcome(partial(target.read, folder), folder, self.outside)

    def whole(self, name: str) -> dict[str, str]:
        """What becomes of each seed of a target without damage."""
        found = {}
        for which in TARGETS[name].seeds:
            folder = self.root / "input"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.seed(name, which), folder)
            found[which] = outcome(partial(TARGETS[name].read, folder), folder, self.outside)
        return found
