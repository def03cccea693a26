"""Write a finished run as a checkpoint: weights first, then all that travels along; config.json makes it a checkpoint."""

import json
import shutil
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compress import __version__
from compress.calib.model import Model
from compress.calib.model_files import CODE, read_object
from compress.checkpoint.adapter import FOR_DENSE, KEY, peft_bytes, write_adapter
from compress.checkpoint.card import model_card
from compress.checkpoint.dense_view import quantization_settings, read_config
from compress.checkpoint.formats import DENSE, find_format, open_weights
from compress.checkpoint.native import Contents
from compress.checkpoint.stored import StoredLayer
from compress.checkpoint.writer import ShardWriter
from compress.errors import CompressError, RunError
from compress.files import replace_file, write_json, write_text
from compress.recipe import Recipe

ALONG = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")  # tokenizer, generation config, licences
NOT_ALONG = ("config.json", "quantize_config.json", "model.safetensors.index.json", "recipe.toml")


class Saver:
    """Takes what the run folder holds piece by piece, so that only one shard is in memory."""

    def __init__(self, out: Path, format_name: str, model: Model, recipe: Recipe):
        self.out, self.format_name, self.model, self.recipe = out, format_name, model, recipe
        self.format = None if format_name == DENSE else find_format(format_name)
        self.writer = ShardWriter(out)
        self.layers: list[StoredLayer] = []
        self.corrected: list[StoredLayer] = []  # layers without values, their corrections with them
        self.adapter: dict[str, str] = {}  # what config.json says of it

    def add(self, contents: Contents) -> None:
        """The tensors of one block, or of what lies outside the blocks."""
        dense = self.model.as_stored(contents.dense) if self.format is None else contents.dense
        for name, tensor in dense.items():
            self.writer.add(name, tensor)
        for packed in contents.layers:
            assert self.format is not None  # choose_format: dense is for runs without a packed layer
            layer = self.format.held(replace(packed, correction=None))
            for name, tensor in self.format.layer_tensors(layer, self.model.dtype).items():
                self.writer.add(name, tensor)
            sized = layer.packed.without_values(layer.packed.shape[0], layer.packed.description())
            layer = replace(layer, packed=sized)  # config.json needs the sizes, not the values
            self.layers.append(layer)
            if packed.correction is not None:
                self.corrected.append(replace(layer, correction=packed.correction.to(self.model.dtype)))

    def finish_weights(self) -> int:
        """Put the weight files and the adapter in place. Returns the bytes of both.

        The folder is no checkpoint yet: config.json is missing.
        """
        weights = self.writer.finish()
        self.adapter = write_adapter(self.out, self.corrected)
        return weights + sum((self.out / file).stat().st_size for file in self.adapter.values())

    def finish(self, result: dict[str, Any]) -> None:
        """Write everything else: tokenizer, recipe, config.json, and the model card."""
        config = self._config()
        copy_along(self.model.folder, self.out)
        write_text(self.out / "recipe.toml", self.recipe.toml())
        if self.format is not None:
            for name, content in self.format.side_files(config).items():
                write_json(self.out / name, content)
        write_json(self.out / "config.json", config)
        write_card(self.out, result)

    def _config(self) -> dict[str, Any]:
        config = plain_config(self.model)
        if self.format is not None:
            packed = {layer.name for layer in self.layers}
            ignore = [name for name in self.model.linear_names() if name not in packed]
            config["quantization_config"] = self.format.quantization_config(self.layers, ignore)
        return config | self.adapter


def plain_config(model: Model) -> dict[str, Any]:
    """A model's config.json as of one that is not quantized, in the dtype it has here. Raises RunError if it has gone."""
    file = model.folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {file} ({error}): restore or download it, and the same command goes on") from error
    for stale in ("quantization_config", KEY, "torch_dtype", CODE):
        config.pop(stale, None)
    return config | {"dtype": str(model.dtype).removeprefix("torch.")}


def files_along(folder: Path) -> list[Path]:
    """What of a model's folder goes into its checkpoint."""
    return [file for pattern in ALONG for file in folder.glob(pattern) if file.name not in NOT_ALONG]


def copy_along(folder: Path, out: Path) -> None:
    """Copy what goes into a checkpoint. Python of the folder's own stays behind, and so does what asks others to run it."""
    for file in files_along(folder):
        settings = read_object(file) if file.name.endswith("config.json") else {}
        if CODE in settings:
            write_json(out / file.name, {key: value for key, value in settings.items() if key != CODE})
        else:
            replace_file(out / file.name, partial(shutil.copyfile, file))


def lacking(out: Path, folder: Path, result: dict[str, Any]) -> str | None:
    """What a finished checkpoint of the model in `folder` has lost since it was written; None: it is whole."""
    for name in ("config.json", "recipe.toml", *(file.name for file in files_along(folder))):
        if not (out / name).is_file():
            return name
    try:
        files = {entry.file for entry in open_weights(out).entries.values()}
    except CompressError:
        return "a weight file"
    if sum(file.stat().st_size for file in files) != result.get("compressed_bytes"):
        return "a weight file"
    for_dense = result.get("adapter_for_dense_bytes", 0)
    return FOR_DENSE if for_dense and peft_bytes(out / FOR_DENSE) != for_dense else None


def write_card(out: Path, result: dict[str, Any]) -> None:
    """The checkpoint's README.md, with the figures known so far."""
    recipe, config = (out / "recipe.toml").read_text(encoding="utf-8"), read_config(out)
    facts = {
        "name": out.name,
        "base_model": tomllib.loads(recipe)["model"],
        "version": __version__,
        "recipe": recipe,
        "format": result["format"],
        "quantization_config": quantization_settings(config),
        "adapter": config.get(KEY),
        "bytes": {"dense": result["dense_bytes"], "compressed": result["compressed_bytes"]},
        "bits_per_weight": result["bits_per_weight"],
        "removed" if "widths" in result else "sparsity": result["sparsity"],
    }
    if "eval" in result:
        measured = result["eval"]
        text = f"{Path(measured['asked']['text']).name}, windows of {measured['asked']['seqlen']}"
        facts["perplexity"] = {text: {kind: measured[kind] for kind in ("dense", "compressed")}}
    write_text(out / "README.md", model_card(facts))
