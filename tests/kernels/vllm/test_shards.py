import os
import subprocess
import sys

import pytest
import torch
from packed_weights import codebook_weight, int_weight, sparse_weight

from compress.checkpoint.manifest import entry_of
from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError, RunError
from compress.kernels.correction import Correction
from compress.kernels.dispatch import Preferences
from compress.kernels.inputs import InputQuantizer
from compress_vllm.shards import ServedLinear, Shards, packed_table, shape_of, shard_names, together

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
REFERENCE = Preferences(forced="reference", measuring=False)
WEIGHTS = {
    "W4 symmetric": lambda rows, seed: int_weight((rows, 64), 4, 32, True, seed=seed),
    "W3 asymmetric": lambda rows, seed: int_weight((rows, 64), 3, 32, False, seed=seed),
    "W4 2:4": lambda rows, seed: sparse_weight((rows, 64), 4, 32, True, seed=seed),
    "codebook": lambda rows, seed: codebook_weight((rows, 64), 2, 5, 8, seed=seed),
}
SIZES = {"q": 32, "k": 16, "v": 16}


def stored_layer(name, weight, inputs=None):
    return StoredLayer(name, f"{name}.weight", None, False, weight, inputs=inputs)


def loaded(layers):
    """Shards that have been given all tensors of `layers`, by vLLM's names of them, in another order."""
    shards = Shards({each.name: entry_of(each) for each in layers.values()})
    for shard, layer in reversed(layers.items()):
        for part, tensor in layer.packed.tensors().items():
            shards.load(part, tensor, shard)
    return shards


def nothing(name, shape):
    return None


def served(stored):
    return ServedLinear(stored, torch.float32, torch.device("cpu"), REFERENCE)


def test_names_of_fused_layers():
    assert shard_names("model.layers.0.self_attn.qkv_proj", FUSED) == tuple(
        f"model.layers.0.self_attn.{each}_proj" for each in "qkv"
    )
    assert shard_names("gate_up_proj", FUSED) == ("gate_proj", "up_proj")
    assert shard_names("model.layers.0.mlp.down_proj", FUSED) == ("model.layers.0.mlp.down_proj",)
    assert shard_names("lm_head", {}) == ("lm_head",)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_shards_lie_side_by_side_whatever_the_order_they_come_in(kind):
    layers = {each: stored_layer(f"{each}_proj", WEIGHTS[kind](rows, ord(each))) for each, rows in SIZES.items()}
    stored = loaded(layers).stored(nothing)
    assert shape_of(stored) == (64, 64)
    assert len(together(stored)) == (3 if kind == "codebook" else 1)  # codebooks are a layer's own
    x = torch.randn(5, 64)
    whole = torch.cat([each.packed.dequantize() for each in layers.values()])
    torch.testing.assert_close(served(stored)(x), x @ whole.T)


def test_shards_that_differ_are_not_together():
    weights = [
        WEIGHTS["W4 symmetric"](16, 0),
        int_weight((16, 64), 4, 32, True, torch.bfloat16),
        int_weight((16, 64), 4, 64, True),
        WEIGHTS["W3 asymmetric"](16, 1),
    ]
    layers = {i: stored_layer(f"l{i}", weight) for i, weight in enumerate(weights)}
    stored = loaded(layers).stored(nothing)
    assert together(stored) is stored
    x = torch.randn(3, 64)
    torch.testing.assert_close(served(stored)(x), x @ torch.cat([w.dequantize() for w in weights]).T)


def test_one_shard_may_be_dense_and_one_corrected():
    random, dense = WEIGHTS["W4 symmetric"], torch.randn(16, 64)
    shards = Shards({"gate": entry_of(stored_layer("gate", random(16, 0))), "up": None})
    for part, tensor in random(16, 0).tensors().items():
        shards.load(part, tensor, 0)
    shards.load("weight", dense, 1)
    added = Correction(torch.randn(2, 64), torch.randn(16, 2))
    stored = shards.stored(lambda name, shape: {"gate": added}.get(name))
    x = torch.randn(3, 64)
    whole = torch.cat([random(16, 0).dequantize() + added.delta(), dense])
    torch.testing.assert_close(served(stored)(x), x @ whole.T, rtol=1e-4, atol=1e-4)


def test_one_layer_alone_keeps_all_it_has():
    quantizer = InputQuantizer(8, static=True, shift=torch.randn(64))
    layer = stored_layer("down", int_weight((16, 64), 8, 64, True), quantizer)
    shards = loaded({None: layer})
    shards.load("input_shift", quantizer.shift, None)
    added = Correction(torch.randn(2, 64), torch.randn(16, 2))
    x = torch.randn(3, 64) * 20
    whole = layer.packed.dequantize() + added.delta()
    found = served(shards.stored(lambda *_: added))(x)
    torch.testing.assert_close(found, quantizer.fake(x) @ whole.T, rtol=1e-4, atol=1e-3)


def test_inputs_are_rounded_as_in_the_checkpoint():
    quantizer = InputQuantizer(4)
    layers = {i: stored_layer(f"l{i}", int_weight((8, 64), 8, 64, True, seed=i), quantizer) for i in range(2)}
    stored = loaded(layers).stored(nothing)
    assert len(together(stored)) == 1
    x = torch.randn(3, 64)
    whole = torch.cat([each.packed.dequantize() for each in layers.values()])
    torch.testing.assert_close(served(stored)(x), quantizer.fake(x) @ whole.T, rtol=1e-4, atol=1e-4)
    mixed = {**layers, 2: stored_layer("l2", int_weight((8, 64), 8, 64, True), InputQuantizer(8))}
    assert len(together(loaded(mixed).stored(nothing))) == 3


def test_what_is_missing_or_does_not_fit_is_named():
    layer = stored_layer("model.o_proj", WEIGHTS["W4 2:4"](16, 0))
    shards = Shards({layer.name: entry_of(layer)})
    shards.load("packed", layer.packed.packed, None)
    with pytest.raises(RunError, match=r"lacks the tensor model\.o_proj\.(places|scale)"):
        shards.stored(nothing)
    whole = loaded({None: layer})
    whole.load("scale", layer.packed.scale[:, :1], None)
    with pytest.raises(RunError, match=r"model\.o_proj\.scale"):
        whole.stored(nothing)
    with pytest.raises(InputError, match="in other pieces"):
        loaded({0: layer, 1: stored_layer("other", layer.packed)}).load("packed", layer.packed.packed, None)


def test_parts_with_a_row_an_output_can_be_reordered():
    layers = {i: stored_layer(f"l{i}", WEIGHTS[kind](8, 0)) for i, kind in enumerate(WEIGHTS)}
    shards = loaded(layers)
    assert set(shards.parts) == {"packed", "scale", "zero_point", "places", "codebooks"}
    assert shards.of_rows == {"packed", "scale", "zero_point", "places"}


def test_an_embedding_is_one_packed_layer():
    table = stored_layer("embed", int_weight((20, 64), 8, 64, True))
    assert torch.equal(packed_table(loaded({None: table}).stored(nothing)).dequantize(), table.packed.dequantize())
    with pytest.raises(InputError, match="not looked up"):
        packed_table(loaded({None: table}).stored(lambda *_: Correction(torch.ones(1, 64), torch.ones(20, 1))))


def test_it_asks_for_little_of_this_package():
    """vLLM's environment has another transformers, and neither typer nor datasets are asked for."""
    refused = ("transformers", "accelerate", "datasets", "huggingface_hub", "typer", "scipy", "jinja2", "gguf")
    code = f"""if True:
        import sys
        sys.modules |= dict.fromkeys({refused!r})
        import compress_vllm.shards, compress.checkpoint.adapter, compress.kernels.gpu
    """
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
