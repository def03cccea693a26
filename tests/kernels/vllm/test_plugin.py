"""What needs vLLM itself; `compress bench peers --only vllm` has it read checkpoints."""

import pickle
import tomllib
from pathlib import Path

import pytest
import torch
from packed_weights import int_weight
from torch import nn

from compress.checkpoint.manifest import entry_of
from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError

SOURCE = Path(__file__).resolve().parents[3] / "kernels" / "vllm"


def test_the_entry_point_is_there():
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["compress"].partition(":")
    assert f"def {function}(" in (SOURCE / module / "__init__.py").read_text()


@pytest.fixture(scope="module")
def config_class():
    pytest.importorskip("vllm", reason="vLLM has an environment of its own")
    from compress_vllm.config import CompressConfig

    return CompressConfig


def line(name, **more):
    return entry_of(StoredLayer(name, f"{name}.weight", None, False, int_weight((8, 64), 4, 32, True), **more))


def test_a_config_travels_between_processes(config_class):
    config = config_class.from_config({"quant_method": "compress", "version": 2, "layers": {}})
    config.layers, config.folder = {"a": line("a")}, "folder"
    assert config.adapter.of("a", (8, 64)) is None
    again = pickle.loads(pickle.dumps(config))
    assert again.layers == config.layers and again.folder == "folder"


def test_what_is_not_served_is_refused(config_class):
    entry = {"in_features": 64, "bits": 4, "group_size": 32, "param": "experts", "index": 0}
    with pytest.raises(InputError, match="expert's slice"):
        config_class.from_config({"quant_method": "compress", "version": 2, "layers": {"experts.0": entry}})


def test_layers_that_are_not_packed_are_left_alone(config_class):
    config = config_class({"a": line("a")})
    assert config.get_quant_method(nn.Identity(), "a") is None
    assert torch.bfloat16 in config.get_supported_act_dtypes()
