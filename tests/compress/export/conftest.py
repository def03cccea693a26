import json
import shutil
from pathlib import Path

import pytest
import torch
from byte_fallback import save_tiny
from tiny import tiny_text

from compress.checkpoint.adapter import write_adapter
from compress.checkpoint.stored import StoredLayer
from compress.export.source import Source
from compress.kernels.correction import Correction
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.sources import resolve_model

TARGETS = {
    "W4": {"wbits": 4, "group_size": 32},
    "W4 asymmetric": {"wbits": 4, "group_size": 64, "symmetric": False},
    "W8": {"wbits": 8, "group_size": -1},
    "W3": {"wbits": 3, "group_size": 32},
    "W2": {"wbits": 2, "group_size": 32},
    "W4 2:4": {"wbits": 4, "group_size": 32, "pattern": "2:4"},
    "pruned": {"sparsity": 0.5},
    "W4 head 8": {"wbits": 4, "group_size": 32, "head_bits": 8},
    "W8 asymmetric": {"wbits": 8, "group_size": 32, "symmetric": False},
    "W4 g16": {"wbits": 4, "group_size": 16},
    "W8A8": {"wbits": 8, "abits": 8},
    "W4 gptq": {"wbits": 4, "group_size": 32},
}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """The checkpoint of a tiny model, made once: by the name of a target, and of an architecture."""
    made: dict[tuple[str, str], Path] = {}
    folder = tmp_path_factory.mktemp("export")

    def make(target: str, architecture: str = "llama") -> Path:
        key = (target, architecture)
        if key not in made:
            model = folder / architecture
            if not model.exists():
                changes = {"sliding_window": 16} if architecture.startswith("gemma") else {}
                save_tiny(model, architecture, prepend=architecture == "llama", dtype=torch.bfloat16, **changes)
            (folder / "text.txt").write_text(tiny_text(400))
            made[key] = _compress(model, folder / f"{architecture}-{len(made)}", target)
        return made[key]

    return make


def _compress(model: Path, out: Path, target: str) -> Path:
    asked = TARGETS[target]
    flags = {
        "model": str(model),
        "target": asked,
        "calib": {"source": str(out.parent / "text.txt"), "nsamples": 2, "seqlen": 16},
    }
    flags |= {"quantizer": "rtn"} if "wbits" in asked else {}
    flags |= {"pruner": "magnitude"} if asked.keys() & {"sparsity", "pattern"} else {}
    flags |= {"format": "gptq"} if "gptq" in target else {}
    compress(read_recipe(None, flags), resolve_model(str(model)), out, Reporter())
    return out


@pytest.fixture(scope="session")
def with_adapter(make_checkpoint, tmp_path_factory):
    """An asymmetric 4-bit checkpoint with corrections of two ranks beside it."""
    folder = tmp_path_factory.mktemp("adapter") / "checkpoint"
    shutil.copytree(make_checkpoint("W4 asymmetric"), folder)
    source, random = Source(folder), torch.Generator().manual_seed(0)
    layers = []
    for number, layer in enumerate(source.layers):
        (out, inputs), rank = layer.packed.shape, 4 if number % 3 else 2
        a, b = (torch.randn(shape, generator=random).bfloat16() / 8 for shape in ((rank, inputs), (out, rank)))
        weight = source.weight(layer.name)
        layers.append(StoredLayer(layer.name, layer.param, None, False, weight, correction=Correction(a, b)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | write_adapter(folder, layers)))
    return folder
