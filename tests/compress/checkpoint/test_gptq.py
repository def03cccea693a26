import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.checkpoint.gptq import GPTQFiles, layer_tensors, quantization_config, refusal, side_files
from compress.errors import InputError, RunError


def _fields(words, bits, count):
    """Bits [i * bits, (i + 1) * bits) of a little-endian stream of 32-bit words, for each row of `words`."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    weights = 1 << np.arange(bits)
    return stream[:, : count * bits].reshape(len(words), count, bits).astype(np.int64) @ weights


def _words(fields, bits):
    """The inverse of `_fields`: int32 words, rows filled up with zeros."""
    stream = (fields[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(fields), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view(np.int32)


def _decode(tensors, bits, offset):
    """A second reader, written from the format's description: w[n, k] = scales[g[k], n] * (q[k, n] - z[g[k], n])."""
    qweight, qzeros, scales, g_idx = (tensors[f"a.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx"))
    codes = _fields(qweight.T, bits, len(g_idx)).T  # [in, out]
    zeros = (_fields(qzeros, bits, scales.shape[1]) + offset) % 2**bits
    return (scales.astype(np.float64)[g_idx] * (codes - zeros[g_idx])).T


@settings(max_examples=30)
@given(
    outs=st.integers(1, 3),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 96]),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_an_independent_reader_decodes_our_tensors(make_layer, outs, groups, **facts):
    layer = make_layer("a", shape=(32 * outs, groups * facts["group_size"]), **facts)
    assert refusal([layer]) is None
    tensors = layer_tensors(layer)
    assert np.array_equal(_decode(tensors, facts["bits"], 1), layer.packed.dequantize().double().numpy())


def test_shapes_dtypes_and_zeros_are_those_documented(make_layer):
    tensors = layer_tensors(make_layer("a", shape=(64, 96), dtype=torch.bfloat16))
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()} == {
        "a.qweight": ("torch.int32", (12, 64)),
        "a.qzeros": ("torch.int32", (3, 8)),
        "a.scales": ("torch.float16", (3, 64)),
        "a.g_idx": ("torch.int32", (96,)),
    }
    assert tensors["a.qzeros"].unique().tolist() == [0x77777777]  # the word GPTQModel writes
    assert layer_tensors(make_layer("a", bits=8))["a.qzeros"].unique().tolist() == [0x7F7F7F7F]
    assert tensors["a.g_idx"].tolist() == [0] * 32 + [1] * 32 + [2] * 32


def test_the_config_says_what_vllm_and_transformers_ask_for(make_layer):
    ignore = ["lm_head", "model.layers.0.mlp.gate"]
    config = quantization_config([make_layer("a"), make_layer("b", shape=(32, 32))], ignore)
    expected = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32",
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.gate$": {}}
    assert side_files({"quantization_config": config}) == {"quantize_config.json": config}
    json.dumps(config)
    whole = quantization_config([make_layer("lm_head", group_size=64)], [])
    assert whole["group_size"] == -1 and whole["lm_head"] is True and "dynamic" not in whole


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"index": 0}, "x, a slice of one parameter for all experts: native can"),
        ({"transposed": True}, "x, a Conv1D layer: native can"),
        ({"embedding": True}, "x, an embedding: native can"),
        ({"bits": 3}, "4 or 8 bits, since vLLM loads no others, and x has neither: compressed-tensors can"),
        ({"symmetric": False}, "symmetric, since vLLM loads nothing else, and x is not: compressed-tensors can"),
        ({"shape": (33, 64)}, "multiples of 32, which x does not have: compressed-tensors can"),
        ({"shape": (32, 48), "group_size": 16}, "multiples of 32, which x does not have"),
        ({"bits": 8}, "one number of bits and one group size for all layers"),
        ({"group_size": 16}, "one number of bits and one group size for all layers"),
    ],
)
def test_what_is_refused_says_why_and_what_to_use(make_layer, facts, complaint):
    assert complaint in refusal([make_layer("a"), make_layer("x", **facts)])


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    outs=st.integers(1, 2),
    groups=st.integers(1, 3),
    layout=st.sampled_from(["gptq", "gptq_v2"]),
    g_idx=st.sampled_from(["ordered", "permuted", "absent"]),
    seed=st.integers(0, 99),
)
def test_both_versions_are_read_in_any_order(
    tmp_path_factory, make_checkpoint, bits, outs, groups, layout, g_idx, seed
):
    random = np.random.default_rng(seed)
    out, length, offset = 32 * outs, 32 * groups, layout == "gptq"
    order = np.arange(length, dtype=np.int32) // 32
    if g_idx == "permuted":
        random.shuffle(order)
    arrays = {
        "a.qweight": _words(random.integers(0, 2**bits, (out, length)), bits).T.copy(),
        "a.qzeros": _words((random.integers(0, 2**bits, (groups, out)) - offset) % 2**bits, bits),
        "a.scales": random.random((groups, out)).astype(np.float16),
        "a.g_idx": order,
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    expected = torch.from_numpy(_decode(tensors, bits, offset)).half()
    if g_idx == "absent":
        del tensors["a.g_idx"]
    described = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": layout}
    folder = make_checkpoint(tmp_path_factory.mktemp("gptq"), tensors | {"a.bias": torch.ones(out)}, described)
    files = GPTQFiles(folder)
    assert list(files.names()) == ["a.bias", "a.weight"]
    assert torch.equal(files.read("a.weight"), expected)


def test_our_reader_gives_back_what_was_written(tmp_path, make_layer, make_checkpoint):
    layer = make_layer("a", shape=(64, 96), dtype=torch.bfloat16)
    folder = make_checkpoint(tmp_path, layer_tensors(layer), quantization_config([layer], []), dtype="bfloat16")
    assert torch.equal(GPTQFiles(folder).read("a.weight"), layer.packed.dequantize().bfloat16())


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_other_layouts_are_refused_by_name(tmp_path, make_layer, make_checkpoint, key):
    folder = make_checkpoint(tmp_path, layer_tensors(make_layer("a")), {"quant_method": "gptq", key: "marlin"})
    with pytest.raises(InputError, match='in the gptq format "marlin": only gptq, gptq_v2 are read'):
        GPTQFiles(folder)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"a.qzeros": torch.zeros(2, 5, dtype=torch.int32)}, r"qzeros \[2, 5\] .* do not fit"),
        ({"a.qzeros": torch.zeros(3, 4, dtype=torch.int32)}, r"qzeros \[3, 4\] .* do not fit"),
        ({"a.scales": torch.ones(2, 64)}, r"scales \[2, 64\], which do not fit"),
        ({"a.g_idx": torch.full((64,), 2, dtype=torch.int32)}, r"a\.g_idx does not name one of 2 groups"),
        ({"a.g_idx": torch.full((64,), -1, dtype=torch.int32)}, r"a\.g_idx does not name one of 2 groups"),
        ({"a.g_idx": torch.zeros(63, dtype=torch.int32)}, r"for each of 64 inputs"),
        ({"a.g_idx": torch.zeros(64)}, r"a\.g_idx is F32 \[64\], not I32 or I64 of 1 dimensions"),
        ({"a.g_idx": torch.zeros(8, 8, dtype=torch.int32)}, r"a\.g_idx is I32 \[8, 8\], not"),
        ({"a.scales": torch.ones(2, 0).half()}, r"scales \[2, 0\], which do not fit"),
        ({"a.scales": torch.ones(0, 32).half()}, r"scales \[0, 32\], which do not fit"),
        ({"a.scales": torch.tensor(1.0).half()}, r"a\.scales is F16 \[\], not F16 or BF16 or F32 of 2 dimensions"),
        ({"a.scales": torch.ones(2, 32, dtype=torch.int32)}, r"a\.scales is I32 \[2, 32\], not F16"),
        ({"a.qweight": torch.zeros(8, 32)}, r"a\.qweight is F32 \[8, 32\], not I32 of 2 dimensions"),
        ({"a.qweight": torch.zeros(0, 32, dtype=torch.int32)}, r"qweight \[0, 32\].* do not fit"),
        ({"a.qzeros": torch.zeros(8, dtype=torch.int32)}, r"a\.qzeros is I32 \[8\], not I32 of 2 dimensions"),
    ],
)
def test_damage_is_one_line_that_names_it(tmp_path, make_layer, make_checkpoint, changed, complaint):
    layer = make_layer("a")
    folder = make_checkpoint(tmp_path, layer_tensors(layer) | changed, quantization_config([layer], []))
    with pytest.raises(RunError, match=complaint):
        GPTQFiles(folder).read("a.weight")
