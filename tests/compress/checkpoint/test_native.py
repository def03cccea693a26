import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.checkpoint.native import (
    Contents,
    NativeFiles,
    decode,
    encode,
    layer_tensors,
    quantization_config,
    refusal,
)
from compress.errors import InputError, RunError
from compress.kernels.inputs import InputQuantizer


@settings(max_examples=60)
@given(
    out=st.integers(1, 9),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 37),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
    place=st.fixed_dictionaries(
        {"index": st.none() | st.integers(0, 5), "transposed": st.booleans(), "embedding": st.booleans()}
    ),
)
def test_what_is_encoded_is_decoded(make_layer, out, groups, group_size, place, **facts):
    param = "a.weight" if place["index"] is None else "x"
    shape = (out, groups * group_size)
    layer = make_layer("a", shape=shape, group_size=group_size, param=param, **place, **facts)
    keep = layer.packed.codes() % 2 == 0
    dense = {"norm.weight": torch.arange(3.0)}
    tensors, manifest = encode(Contents([layer], dense, {"a": keep, "b": keep}))
    back = decode(tensors, json.loads(json.dumps(manifest)))
    (other,) = back.layers
    for name in ("name", "param", "index", "transposed", "embedding"):
        assert getattr(other, name) == getattr(layer, name)
    assert other.packed.description() == layer.packed.description()
    assert other.packed.tensors().keys() == layer.packed.tensors().keys()
    for part, tensor in layer.packed.tensors().items():
        assert torch.equal(other.packed.tensors()[part], tensor)
        assert other.packed.tensors()[part].dtype == tensor.dtype
    assert torch.equal(back.masks["a"], keep) and torch.equal(back.masks["b"], keep)
    assert list(back.dense) == ["norm.weight"] and torch.equal(back.dense["norm.weight"], dense["norm.weight"])


def test_the_tensors_and_the_manifest_are_those_documented(make_layer):
    layer = make_layer("m.up", bits=3, symmetric=False)
    plain = make_layer("m.down", shape=(8, 32), group_size=32)
    keep = torch.tensor([[True, False, False, False, False, False, False, False, True]])
    tensors, manifest = encode(Contents([layer, plain], {}, {"m.up": keep}))
    assert sorted(tensors) == [
        "m.down.packed", "m.down.scale", "m.up.keep", "m.up.packed", "m.up.scale", "m.up.zero_point",
    ]  # fmt: skip
    assert tensors["m.up.keep"].tolist() == [[1, 1]]
    assert manifest == {
        "version": 2,
        "layers": {
            "m.up": {"bits": 3, "group_size": 32, "in_features": 64, "symmetric": False},
            "m.down": {"bits": 4, "group_size": 32, "in_features": 32},
        },
        "masks": {"m.up": 9},
    }


def test_two_things_of_one_name_are_refused(make_layer):
    with pytest.raises(ValueError, match=r"two tensors are called a\.scale"):
        encode(Contents([make_layer("a")], {"a.scale": torch.ones(1)}))
    with pytest.raises(ValueError, match="two layers share a name"):
        encode(Contents([make_layer("a"), make_layer("a")]))


def test_a_newer_version_asks_for_an_update(make_layer):
    tensors, manifest = encode(Contents([make_layer("a")]))
    with pytest.raises(
        InputError, match="block 7 is in version 3 of the native layout, and this compress reads 2: update"
    ):
        decode(tensors, manifest | {"version": 3, "new": 1}, "block 7")


def _with(**changes):
    return lambda tensors, manifest: manifest["layers"]["a"].update(changes)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda tensors, manifest: manifest.pop("layers") and manifest.update(layers=[]), "manifest of b .*layers"),
        (_with(bits=9), r"damaged \(layers\.a\.int\.bits"),
        (_with(bits="4"), r"damaged \(layers\.a\.int\.bits"),
        (_with(group_size=0), r"damaged \(layers\.a\.int\.group_size"),
        (_with(colour="red"), r"damaged \(layers\.a\.int\.colour"),
        (
            _with(bits=8),
            r"a\.packed is torch.int32 \[32, 8\], which does not fit in_features 64, bits 8, group_size 32, symm",
        ),
        (_with(group_size=16), r"a\.scale is"),
        (_with(group_size=30), "group_size 30, "),  # two whole groups, as there are scales, and a rest
        (_with(in_features=96), r"a\.packed is"),
        (_with(layout="float"), r"damaged \(layers\.a: .*float"),
        (_with(layout="int-2:4"), r"b lacks the tensor a\.places"),
        (_with(layout="codebook"), r"damaged \(layers\.a\.codebook\.n_codebooks"),
        (_with(symmetric=False), r"b lacks the tensor a\.zero_point"),
        (lambda tensors, manifest: tensors.pop("a.packed"), r"b lacks the tensor a\.packed"),
        (
            lambda tensors, manifest: tensors.update({"a.scale": tensors["a.scale"].double()}),
            r"a\.scale is torch.float64",
        ),
        (lambda tensors, manifest: tensors.update({"a.scale": tensors["a.scale"][:3]}), r"a\.scale is"),
        (lambda tensors, manifest: manifest.update(masks={"a": 65}), "mask of a in b does not have rows of 65"),
        (lambda tensors, manifest: manifest.update(masks={"c": 64}), r"b lacks the tensor c\.keep"),
    ],
)
def test_damage_is_one_line_that_names_it(make_layer, damage, complaint):
    layer = make_layer("a")
    tensors, manifest = encode(Contents([layer], {}, {"a": layer.packed.codes() > 3}))
    manifest = json.loads(json.dumps(manifest))
    decode(tensors, manifest, "b")
    damage(tensors, manifest)
    with pytest.raises(RunError, match=complaint) as raised:
        decode(tensors, manifest, "b")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", ["int-2:4", "codebook"])
def test_other_layouts_are_encoded_decoded_and_read(tmp_path, make_other, make_checkpoint, layout):
    layer = make_other("h.0.q", layout)
    tensors, manifest = encode(Contents([layer]))
    assert manifest["version"] == 2 and manifest["layers"]["h.0.q"]["layout"] == layout
    (back,) = decode(tensors, json.loads(json.dumps(manifest))).layers
    assert type(back.packed) is type(layer.packed) and back.packed.description() == layer.packed.description()
    assert torch.equal(back.packed.dequantize(), layer.packed.dequantize())
    settings = quantization_config([layer])
    files = NativeFiles(make_checkpoint(tmp_path, layer_tensors(layer), settings, dtype="float32"))
    assert list(files.names()) == ["h.0.q.weight"]
    assert torch.equal(files.read("h.0.q.weight"), layer.packed.dequantize())


@pytest.mark.parametrize(
    ("layout", "damage", "complaint"),
    [
        ("int-2:4", {"in_features": 62}, r"damaged \(layers\.a\.int-2:4\.in_features"),
        ("int-2:4", {"bits": 8}, r"a\.packed is torch.int32 .* does not fit in_features 64, bits 8"),
        ("int-2:4", {"layout": "int"}, r"damaged \(layers\.a\.int\.layout"),
        ("codebook", {"code_bits": 17}, r"damaged \(layers\.a\.codebook\.code_bits"),
        ("codebook", {"code_bits": 5}, r"a\.codebooks is .* n_codebooks 2, code_bits 5, vector_size 8"),
        ("codebook", {"vector_size": 4}, r"a\.packed is"),
        ("codebook", {"vector_size": 7}, "vector_size 7"),
    ],
)
def test_damage_to_other_layouts_is_one_line_that_names_it(make_other, layout, damage, complaint):
    tensors, manifest = encode(Contents([make_other("a", layout)]))
    manifest["layers"]["a"] |= damage
    with pytest.raises(RunError, match=complaint):
        decode(tensors, manifest, "b")


def test_files_of_version_1_read_on(make_layer):
    tensors, manifest = encode(Contents([make_layer("a", symmetric=False)]))
    (back,) = decode(tensors, manifest | {"version": 1}).layers
    assert torch.equal(back.packed.dequantize(), make_layer("a", symmetric=False).packed.dequantize())


@pytest.mark.parametrize("manifest", [None, [], {"layers": 3}, "text"])
def test_a_manifest_that_is_none(manifest):
    with pytest.raises(RunError, match="manifest of b is damaged"):
        decode({}, manifest, "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dense_view_of_a_checkpoint(tmp_path, make_layer, make_checkpoint, dtype):
    scales = torch.float16 if dtype == torch.float32 else dtype
    plain = make_layer("h.0.q", bits=3, symmetric=False, dtype=scales)
    turned = make_layer("h.0.c", shape=(48, 64), transposed=True, dtype=scales)
    experts = [
        make_layer(f"h.0.e.up.{i}", param="h.0.e.up", index=i, bits=2 + i % 2, seed=i, dtype=scales)
        for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)
    ]
    layers = [plain, turned, *experts]
    dense = {"norm.weight": torch.arange(4.0)}
    tensors = dense | {name: tensor for layer in layers for name, tensor in layer_tensors(layer, dtype).items()}
    name = str(dtype).removeprefix("torch.")
    files = NativeFiles(make_checkpoint(tmp_path, tensors, quantization_config(layers), dtype=name))
    assert sorted(files.names()) == ["h.0.c.weight", "h.0.e.up", "h.0.q.weight", "norm.weight"]
    assert torch.equal(files.read("norm.weight"), dense["norm.weight"])
    for layer, read in ((plain, files.read("h.0.q.weight")), (turned, files.read("h.0.c.weight").T)):
        assert read.dtype == dtype and torch.equal(read, layer.packed.dequantize().to(dtype))
    assert files.read("h.0.c.weight").shape == (64, 48) and files.read("h.0.c.weight").is_contiguous()
    stacked = torch.stack([e.packed.dequantize() for e in sorted(experts, key=lambda layer: layer.index)])
    assert files.read("h.0.e.up").dtype == dtype and torch.equal(files.read("h.0.e.up"), stacked.to(dtype))


def test_a_checkpoint_that_lacks_something(tmp_path, make_layer, make_checkpoint):
    layers = [make_layer(f"e.{i}", param="e", index=i) for i in (0, 2)]
    tensors = {name: tensor for layer in layers for name, tensor in layer_tensors(layer).items()}
    with pytest.raises(RunError, match="lacks slices of e"):
        NativeFiles(make_checkpoint(tmp_path / "a", tensors, quantization_config(layers)))
    del tensors["e.2.scale"]
    with pytest.raises(RunError, match=r"lacks the tensor e\.2\.scale"):
        NativeFiles(make_checkpoint(tmp_path / "b", tensors, quantization_config(layers)))


def test_slices_of_unlike_shape_are_damage(tmp_path, make_layer, make_checkpoint):
    layers = [make_layer("e.0", param="e", index=0), make_layer("e.1", param="e", index=1, shape=(16, 64))]
    tensors = {name: tensor for layer in layers for name, tensor in layer_tensors(layer).items()}
    with pytest.raises(RunError, match=r"e\.1 has another shape than e\.0"):
        NativeFiles(make_checkpoint(tmp_path, tensors, quantization_config(layers))).read("e")


def test_nothing_is_refused(make_layer):
    odd = make_layer("e.0", param="e", index=0, transposed=True, embedding=True, bits=3, shape=(32, 33), group_size=11)
    assert refusal([odd]) is None


@pytest.mark.parametrize(
    "inputs", [InputQuantizer(6), InputQuantizer(8, True), InputQuantizer(8, True, torch.ones(64))]
)
def test_how_inputs_are_rounded_is_kept_in_runs_and_in_checkpoints(tmp_path, make_layer, make_checkpoint, inputs):
    layer, shift = replace(make_layer("a"), inputs=inputs), inputs.shift
    tensors, manifest = encode(Contents([layer], {"norm.weight": torch.ones(3)}))
    (back,) = decode(tensors, json.loads(json.dumps(manifest))).layers
    files = NativeFiles(make_checkpoint(tmp_path, tensors, quantization_config([layer])))
    assert files.input_quantizer("norm.weight") is None and list(files.names()) == ["norm.weight", "a.weight"]
    for found in (back.inputs, files.input_quantizer("a.weight")):
        assert (found.bits, found.static) == (inputs.bits, inputs.static)
        assert found.shift is None if shift is None else torch.equal(found.shift, shift)


def test_layers_that_share_a_shift_have_a_tensor_each_and_one_of_another_length_is_damage(make_layer):
    inputs = InputQuantizer(8, True, torch.ones(64))
    tensors, manifest = encode(Contents([replace(make_layer(name), inputs=inputs) for name in "ab"]))
    assert tensors["a.input_shift"].data_ptr() != tensors["b.input_shift"].data_ptr()
    tensors["a.input_shift"] = torch.ones(63)
    with pytest.raises(RunError, match=r"a\.input_shift is torch.float32 \[63\], which does not fit 64 inputs"):
        decode(tensors, manifest)
