import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny

from compress.checkpoint.compressed_tensors import (
    CompressedTensorsFiles,
    layer_tensors,
    quantization_config,
    refusal,
)
from compress.errors import InputError, RunError
from compress.kernels.inputs import InputQuantizer
from compress.pipeline import compress, open_model
from compress.progress import Reporter
from compress.recipe import read_recipe


def _scheme(layer):
    """The library's own idea of how `layer` is stored, and its decompressor."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(_known(quantization_config([layer], ["lm_head"])))
    scheme = config.config_groups["group_0"]
    return scheme, BaseCompressor.get_value_from_registry(scheme.format)


def _known(config):
    """What transformers hands to the library of our quantization_config."""
    return {
        key: value for key, value in config.items() if key not in ("sparsity_config", "transform_config", "version")
    }


def _local(layer, dtype):
    return {name.removeprefix(layer.name + "."): t for name, t in layer_tensors(layer, dtype).items()}


@settings(max_examples=60)
@given(
    out=st.integers(1, 70),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 37),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_the_library_decodes_our_tensors_to_the_same_bits(make_layer, out, groups, dtype, **facts):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scales = torch.float16 if dtype == torch.float32 else dtype
    shape, bits = (out, groups * facts["group_size"]), facts["bits"]
    layer = make_layer(shape=shape, dtype=scales, **facts)
    tensors = _local(layer, dtype)
    offset = 2 ** (bits - 1)
    signed = unpack_from_int32(tensors["weight_packed"], bits, torch.Size(shape))
    assert torch.equal(signed.int() + offset, layer.packed.codes().int())
    if not facts["symmetric"]:
        zero_point = unpack_from_int32(tensors["weight_zero_point"], bits, layer.packed.scale.shape, packed_dim=0)
        assert torch.equal(zero_point.int() + offset, layer.packed.zero_point.int())
    scheme, compressor = _scheme(layer)
    assert set(tensors) == set(compressor.compression_param_names(scheme))
    weight = compressor.decompress(tensors, scheme)["weight"]
    assert weight.dtype == dtype and torch.equal(weight, layer.packed.dequantize().to(dtype))


def test_shapes_and_dtypes_are_those_documented(make_layer):
    layer = make_layer("a", shape=(40, 96), bits=3, symmetric=False, dtype=torch.bfloat16)
    tensors = {name: (str(t.dtype), tuple(t.shape)) for name, t in layer_tensors(layer, torch.bfloat16).items()}
    assert tensors == {
        "a.weight_packed": ("torch.int32", (40, 9)),
        "a.weight_scale": ("torch.bfloat16", (40, 3)),
        "a.weight_shape": ("torch.int64", (2,)),
        "a.weight_zero_point": ("torch.int32", (4, 3)),
    }


def test_layers_that_are_alike_are_one_group(make_layer):
    layers = [make_layer("a"), make_layer("b", shape=(32, 32))]
    config = quantization_config(layers, ["lm_head"])
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and config["ignore"] == ["lm_head"]
    assert {key: group["weights"][key] for key in ("num_bits", "strategy", "group_size", "symmetric", "type")} == {
        "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True, "type": "int",
    }  # fmt: skip
    assert (config["quant_method"], config["format"], group["format"]) == (
        "compressed-tensors", "pack-quantized", "pack-quantized",
    )  # fmt: skip
    assert config["quantization_status"] == "compressed" and config["sparsity_config"] == {}


def test_unlike_layers_are_groups_that_name_them(make_layer):
    layers = [
        make_layer("a"),
        make_layer("b", bits=8),
        make_layer("c", shape=(32, 96), group_size=96),
        make_layer("d", symmetric=False),
        make_layer("e"),
    ]
    config = quantization_config(layers, [])
    kinds = [
        (g["targets"], g["weights"]["strategy"], g["weights"]["num_bits"]) for g in config["config_groups"].values()
    ]
    assert kinds == [(["a", "e"], "group", 4), (["b"], "group", 8), (["c"], "channel", 4), (["d"], "group", 4)]


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"index": 0}, "cannot hold x, a slice of one parameter for all experts: native can"),
        ({"transposed": True}, "cannot hold x, a Conv1D layer"),
        ({"embedding": True}, "cannot hold x, an embedding"),
        ({"bits": 5}, "2, 3, 4 or 8 bits, which x does not have: native"),
    ],
)
def test_what_is_refused_says_why_and_what_to_use(make_layer, facts, complaint):
    assert refusal([make_layer("a"), make_layer("b", bits=3, symmetric=False)]) is None
    assert complaint in refusal([make_layer("a"), make_layer("x", **facts)])


@settings(max_examples=30)
@given(
    out=st.integers(1, 70),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 37),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
)
def test_our_reader_gives_back_what_was_written(tmp_path_factory, make_checkpoint, make_layer, out, groups, **facts):
    layer = make_layer("a", shape=(out, groups * facts["group_size"]), **facts)
    tensors = layer_tensors(layer, torch.float16) | {"norm.weight": torch.arange(3.0)}
    folder = make_checkpoint(tmp_path_factory.mktemp("ct"), tensors, quantization_config([layer], []))
    files = CompressedTensorsFiles(folder)
    assert list(files.names()) == ["norm.weight", "a.weight"]
    assert torch.equal(files.read("a.weight"), layer.packed.dequantize().half())
    assert torch.equal(files.read("norm.weight"), torch.arange(3.0))
    back = files.layer("a")
    assert back.description() == layer.packed.description() and torch.equal(back.packed, layer.packed.packed)


def _settings(targets=("Linear",), layout="pack-quantized", **weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True} | weights
    group = {"targets": list(targets), "weights": weights}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def test_whole_row_groups_are_read_under_both_names(tmp_path, make_layer, make_checkpoint):
    layer = make_layer("a", shape=(32, 64), group_size=64)
    for i, weights in enumerate(({"strategy": "group", "group_size": 64}, {"strategy": "channel"}, {"group_size": -1})):
        files = CompressedTensorsFiles(
            make_checkpoint(tmp_path / str(i), layer_tensors(layer, torch.float16), _settings(**weights))
        )
        assert torch.equal(files.read("a.weight"), layer.packed.dequantize().half())


@pytest.mark.parametrize("zero_point", [None, -3])
def test_one_scale_for_the_whole_tensor_is_read(tmp_path, make_layer, make_checkpoint, zero_point):
    layer = make_layer("a")
    tensors = layer_tensors(layer, torch.float16) | {"a.weight_scale": torch.tensor([0.25], dtype=torch.float16)}
    if zero_point is not None:
        tensors["a.weight_zero_point"] = torch.tensor([zero_point], dtype=torch.int8)  # one is never packed
    described = _settings(strategy="tensor", symmetric=zero_point is None)
    files = CompressedTensorsFiles(make_checkpoint(tmp_path, tensors, described))
    expected = (layer.packed.codes().float() - 8 - (zero_point or 0)).mul(0.25)
    assert torch.equal(files.read("a.weight"), expected.half())


@pytest.mark.parametrize("symmetric", [True, False])
def test_whole_int8_weights_are_read(tmp_path, make_checkpoint, symmetric):
    random = torch.Generator().manual_seed(0)
    signed = torch.randint(-128, 128, (6, 10), generator=random).to(torch.int8)
    scale, zero = (
        torch.rand(6, 1, generator=random).half(),
        torch.randint(-128, 128, (6, 1), generator=random).to(torch.int8),
    )
    tensors = {"a.weight": signed, "a.weight_scale": scale} | ({} if symmetric else {"a.weight_zero_point": zero})
    described = _settings(layout="int-quantized", num_bits=8, strategy="channel", symmetric=symmetric)
    files = CompressedTensorsFiles(make_checkpoint(tmp_path, tensors, described))
    expected = (signed.float() - (0 if symmetric else zero.float())) * scale.float()
    assert list(files.names()) == ["a.weight"] and torch.equal(files.read("a.weight"), expected.half())


def test_a_layer_is_described_by_its_name_then_a_pattern_then_its_class(tmp_path, make_layer, make_checkpoint):
    layers = [make_layer("m.a", bits=2), make_layer("m.b", bits=8), make_layer("n.c", bits=4)]
    tensors = {name: tensor for layer in layers for name, tensor in layer_tensors(layer, torch.float16).items()}
    described = _settings(group_size=32)
    for name, target, bits in (("group_1", "m.a", 2), ("group_2", "re:^m\\.", 8)):
        described["config_groups"][name] = _settings([target], num_bits=bits, group_size=32)["config_groups"]["group_0"]
    files = CompressedTensorsFiles(make_checkpoint(tmp_path, tensors, described))
    for layer in layers:
        assert torch.equal(files.read(layer.param), layer.packed.dequantize().half())


@pytest.mark.parametrize(
    ("described", "complaint"),
    [
        (
            _settings(layout="nvfp4-pack-quantized"),
            'in the compressed-tensors format "nvfp4-pack-quantized": only pack-qua',
        ),
        (_settings(type="float", num_bits=8, strategy="channel"), "8-bit float weights by channel: only integers"),
        (_settings(strategy="block"), "4-bit int weights by block: only integers"),
        (
            _settings() | {"config_groups": {"W4A16": ["Linear"]}},
            r"the config_groups of .* are no descriptions \(W4A16 = ",
        ),
        (_settings(num_bits="4"), r"group_0\.weights\.num_bits = '4'"),
        (_settings(group_size=0, strategy="group"), "weights in groups of 0"),
        (_settings(group_size=[32]), r"group_0\.weights\.group_size"),
        (_settings([5]), r"group_0\.targets\.0"),
        (_settings() | {"config_groups": [1]}, "are no descriptions"),
        (_settings() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "has a sparsity_config"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, make_layer, make_checkpoint, described, complaint):
    with pytest.raises(InputError, match=complaint):
        CompressedTensorsFiles(make_checkpoint(tmp_path, layer_tensors(make_layer("a"), torch.float16), described))


def test_permuted_inputs_are_refused(tmp_path, make_layer, make_checkpoint):
    tensors = layer_tensors(make_layer("a"), torch.float16) | {"a.weight_g_idx": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(InputError, match=r"a in .* permutes its inputs"):
        CompressedTensorsFiles(make_checkpoint(tmp_path, tensors, _settings(group_size=32)))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"a.weight_packed": torch.zeros(32, 7, dtype=torch.int32)}, r"a has codes \[32, 7\] and 2 scales a row"),
        ({"a.weight_scale": torch.ones(32, 4)}, r"4 scales a row, which is not 3 bits for \[32, 64\] in groups of 32"),
        ({"a.weight_scale": torch.ones(5)}, r"a\.weight_scale is \[5\] for 32 rows"),
        ({"a.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}, r"a\.weight_zero_point does not hold 32 rows"),
        ({"a.weight_shape": None}, r"lacks the tensor a\.weight_shape"),
        ({"a.weight_shape": torch.tensor([2**40, 64])}, r"not 3 bits for \[1099511627776, 64\]"),
        ({"a.weight_shape": torch.tensor([32, 2**62])}, r"not 3 bits for \[32, 4611686018427387904\]"),
        ({"a.weight_shape": torch.tensor([32, -64])}, r"not 3 bits for \[32, -64\]"),
        ({"a.weight_shape": torch.tensor([32, 0])}, r"not 3 bits for \[32, 0\]"),
        ({"a.weight_shape": torch.tensor([32])}, "has 1 numbers, not 2"),
        ({"a.weight_shape": torch.tensor([32.0, 64.0])}, r"is F32 \[2\], not I32 or I64 of 1 dimensions"),
        ({"a.weight_packed": torch.zeros(0, 6, dtype=torch.int32)}, r"weight_scale is \[32, 2\] for 0 rows"),
        ({"a.weight_packed": torch.zeros(32, 6)}, r"a\.weight_packed is F32 \[32, 6\], not I32"),
        ({"a.weight_zero_point": torch.zeros(3, 3, dtype=torch.int32)}, "3 zero points for 2 scales a row"),
        ({"a.weight_zero_point": torch.zeros(6, dtype=torch.int32)}, "not I32 of 2 dimensions"),
    ],
)
def test_damage_is_one_line_that_names_it(tmp_path, make_layer, make_checkpoint, changed, complaint):
    layer = make_layer("a", bits=3, symmetric=False)
    tensors = layer_tensors(layer, torch.float16) | changed
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    folder = make_checkpoint(tmp_path, tensors, quantization_config([layer], []))
    with pytest.raises(RunError, match=complaint):
        CompressedTensorsFiles(folder).read("a.weight")


@pytest.mark.parametrize("pattern", ["((((", "(a+)+$", "(?:a|a)*$", "a{99999999999}"])
def test_a_pattern_that_is_none_or_searches_for_ever_is_given_up(tmp_path, make_layer, make_checkpoint, pattern):
    """Names of layers are the file's as well: backtracking through this one takes longer than anybody lives."""
    tensors = layer_tensors(make_layer("a" * 50 + "!"), torch.float16)
    folder = make_checkpoint(tmp_path, tensors, _settings([f"re:{pattern}"], group_size=32))
    files = CompressedTensorsFiles(folder)
    with pytest.raises((InputError, RunError), match=r"which is no pattern of layers|no target in config\.json"):
        files.read("a" * 50 + "!.weight")


def test_a_layer_no_target_is_meant_for_is_damage(tmp_path, make_layer, make_checkpoint):
    folder = make_checkpoint(tmp_path, layer_tensors(make_layer("a"), torch.float16), _settings(["b"], group_size=32))
    with pytest.raises(RunError, match=r"no target in config\.json's quantization_config is meant for a"):
        CompressedTensorsFiles(folder).read("a.weight")


KINDS = {f"W{bits}-{'sym' if sym else 'asym'}": [(bits, sym, 32)] for bits in (2, 3, 4, 8) for sym in (True, False)}
KINDS |= {"mixed": [(4, True, 32), (8, True, 16), (2, True, 32)], "channel": [(4, True, -1)]}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_runs_our_checkpoint_as_the_dense_one(tmp_path, make_layer, make_checkpoint, kind, dtype):
    """Logits of the loaded checkpoint equal those of the decoded dense one bit for bit, with the lines of the card."""
    pytest.importorskip("compressed_tensors")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    layers = []
    for i, name in enumerate(sorted(name for name in dense if "_proj" in name)):
        bits, symmetric, group_size = KINDS[kind][i % len(KINDS[kind])]
        shape = tuple(dense[name].shape)
        facts = {"bits": bits, "symmetric": symmetric, "group_size": shape[1] if group_size == -1 else group_size}
        scales = torch.float16 if dtype == torch.float32 else dtype
        layers.append(make_layer(name.removesuffix(".weight"), shape=shape, dtype=scales, seed=i, **facts))
    packed = {layer.param for layer in layers}
    tensors = {name: tensor for name, tensor in dense.items() if name not in packed}
    tensors |= {name: tensor for layer in layers for name, tensor in layer_tensors(layer, dtype).items()}
    decoded = dense | {layer.param: layer.packed.dequantize().to(dtype) for layer in layers}
    own = json.loads((tmp_path / "dense" / "config.json").read_text())
    make_checkpoint(tmp_path / "decoded", decoded, None, **own)
    ours = make_checkpoint(tmp_path / "ours", tensors, quantization_config(layers, ["lm_head"]), **own)

    lines = [{}] if all(symmetric for _, symmetric, _ in KINDS[kind]) else []
    lines += [{"quantization_config": CompressedTensorsConfig(dequantize=True)}] if len(KINDS[kind]) == 1 else []
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")(tokens).logits
        for line in lines:
            model = AutoModelForCausalLM.from_pretrained(ours, **line)
            assert expected.dtype == dtype and torch.equal(model(tokens).logits, expected)
    files = CompressedTensorsFiles(ours)
    assert sorted(files.names()) == sorted(decoded)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in decoded.items())


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def _with_inputs(described, inputs):
    described["config_groups"]["group_0"]["input_activations"] = inputs
    return described


def test_codes_of_eight_bits_by_channel_lie_unpacked_where_inputs_are_quantized_too(make_layer):
    layer = replace(make_layer(bits=8, group_size=64), inputs=InputQuantizer(8))
    scheme, compressor = _scheme(layer)
    tensors = _local(layer, torch.float16)
    assert scheme.format == "int-quantized" and sorted(tensors) == ["weight", "weight_scale"]
    assert tensors["weight"].dtype == torch.int8 and tensors["weight_scale"].shape == (32, 1)
    decoded = compressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(decoded, layer.packed.dequantize().half())
    inputs = scheme.input_activations
    assert (inputs.num_bits, inputs.dynamic, inputs.strategy, inputs.symmetric) == (8, True, "token", True)


@pytest.mark.parametrize("facts", [{"bits": 4}, {"bits": 8}, {"bits": 8, "group_size": 64}])
def test_inputs_rounded_by_token_are_read_back(tmp_path, make_layer, make_checkpoint, facts):
    layer = replace(make_layer("a", **facts), inputs=InputQuantizer(8))
    assert refusal([layer]) is None
    tensors = layer_tensors(layer, torch.float16) | {"norm.weight": torch.ones(3)}
    files = CompressedTensorsFiles(make_checkpoint(tmp_path, tensors, quantization_config([layer], [])))
    assert files.input_quantizer("a.weight") == InputQuantizer(8)
    assert files.input_quantizer("norm.weight") is None
    assert torch.equal(files.read("a.weight"), layer.packed.dequantize().half())


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (InputQuantizer(8, static=True), "whose norm emits integer codes.*: native can"),
        (InputQuantizer(6), "inputs of 8 bits or of 16, and those of a have neither: native can"),
    ],
)
def test_inputs_that_readers_would_take_for_others_are_refused(make_layer, inputs, complaint):
    assert re.search(complaint, refusal([replace(make_layer("a"), inputs=inputs)]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dynamic": False, "strategy": "tensor"}, "8-bit int inputs with scales by tensor, fixed: only symmetric"),
        ({"type": "float"}, "8-bit float inputs with scales by token, found at run time: only symmetric"),
        ({"symmetric": False}, "only symmetric integers with a scale found for each token are read"),
    ],
)
def test_inputs_quantized_otherwise_are_refused(tmp_path, make_layer, make_checkpoint, changes, complaint):
    described = _with_inputs(_settings(group_size=32), TOKEN | changes)
    with pytest.raises(InputError, match=complaint):
        CompressedTensorsFiles(make_checkpoint(tmp_path, layer_tensors(make_layer("a"), torch.float16), described))


@pytest.mark.parametrize("kind", ["W8A8", "W4A8"])
def test_transformers_runs_quantized_inputs_as_we_do(tmp_path, text_file, kind):
    """To rounding: its scale of a token is 1/127.5 of the largest value, in the model's dtype, and ours 1/127."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    target = {"wbits": 8, "abits": 8} if kind == "W8A8" else {"wbits": 4, "abits": 8, "group_size": 32}
    folder, tokens = save_tiny(tmp_path / "dense"), torch.arange(3, 30)
    calib = {"source": str(text_file), "nsamples": 4, "seqlen": 32}
    recipe = read_recipe(None, {"model": str(folder), "calib": calib, "target": target})
    compress(recipe, folder, tmp_path / "out", Reporter(quiet=True))
    model = open_model(tmp_path / "out")
    hidden = model.embed(tokens)
    for block in model.blocks():
        hidden = block(hidden)
    ours = model.logits(hidden)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens[None], use_cache=False).logits
    assert (theirs - ours).norm() < 0.02 * ours.norm()
