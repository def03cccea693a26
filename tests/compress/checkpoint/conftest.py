import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.stored import StoredLayer
from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.packing import pack
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight


def _weight(shape=(32, 64), group_size=32, bits=4, symmetric=True, dtype=torch.float16, seed=0):
    """Random codes, scales and zero points: every value a checkpoint can hold, not only those a fit would give."""
    random = torch.Generator().manual_seed(seed)
    groups = (shape[0], shape[1] // group_size)
    codes = torch.randint(0, 2**bits, shape, generator=random)
    scale = (torch.rand(groups, generator=random) * 0.1 + 2**-14).to(dtype)
    zero_point = torch.randint(0, 2**bits, groups, generator=random).to(torch.uint8)
    return IntWeight(pack(codes, bits), scale, None if symmetric else zero_point, bits, group_size, shape[1])


def _layer(name="model.layers.0.mlp.up_proj", **facts):
    place = {key: facts.pop(key) for key in ("param", "index", "transposed", "embedding") if key in facts}
    place = {"param": f"{name}.weight", "index": None, "transposed": False} | place
    return StoredLayer(name, **place, packed=_weight(**facts))


def _other(name, layout, seed=0):
    """A layer of 32 x 64 in a layout that holds more than integers."""
    random = torch.Generator().manual_seed(seed)
    if layout == "codebook":
        codes = torch.randint(0, 64, (32, 8, 2), generator=random)
        codebooks = torch.randn(2, 64, 8, generator=random).half()
        packed = CodebookWeight.from_codes(codes, codebooks, torch.rand(32, 1, generator=random).half())
    else:
        dense = _weight(seed=seed)
        keep = torch.rand(32, 16, 4, generator=random).argsort(-1).flatten(1) < 2
        codes = torch.where(keep, dense.codes(), 8)  # 8 is zero
        packed = Sparse24IntWeight.from_int(replace(dense, packed=pack(codes, 4)), keep)
    return StoredLayer(name, f"{name}.weight", None, False, packed)


def _checkpoint(folder, tensors, settings, **config):
    """A folder that looks like a checkpoint; `settings` becomes its quantization_config unless None."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {"dtype": "float16"} | config | ({"quantization_config": settings} if settings is not None else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def make_weight():
    return _weight


@pytest.fixture(scope="session")
def make_layer():
    return _layer


@pytest.fixture(scope="session")
def make_other():
    return _other


@pytest.fixture(scope="session")
def make_checkpoint():
    return _checkpoint
