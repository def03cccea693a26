import json
import struct

import gguf
import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf_files import F16, F32, Q8, write_gguf
from safetensors.torch import load_file
from tiny import tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.calib.weight_files import WeightFiles
from compress.errors import InputError
from compress.files import sha256
from compress.gguf_import import import_gguf


def assert_same_models(ours, theirs):
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma3", {"tie_word_embeddings": True}),
        ("qwen3moe", {"tie_word_embeddings": False, "moe_intermediate_size": 768}),
        ("gpt2", {"tie_word_embeddings": True, "max_position_embeddings": 1024}),
    ],
)
def test_the_import_is_what_transformers_loads_bit_for_bit(tmp_path, architecture, changes):
    path = write_gguf(tmp_path / "tiny.gguf", architecture, kinds=(Q8, F16, F32), **changes)
    folder = import_gguf(path, tmp_path / "cache")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert ours.dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    assert_same_models(ours, theirs)
    mine, own = ours.config.to_dict(), theirs.config.to_dict()
    skipped = {"architectures", "_name_or_path", "quantization_config", "_pre_quantization_dtype"}
    assert {k: v for k, v in mine.items() if k not in skipped} == {k: v for k, v in own.items() if k not in skipped}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_the_tokenizer_is_the_one_transformers_builds(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    ours = AutoTokenizer.from_pretrained(import_gguf(path, tmp_path / "cache"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours("ab a")["input_ids"] == theirs("ab a")["input_ids"]
    assert ours("ab a")["input_ids"][0] == 1


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [((F32,), torch.float32), ((F16,), torch.float16), ((F16, F32), torch.float16), ((Q8, F16), torch.bfloat16)],
)
def test_floats_keep_their_type_and_quantized_files_become_bfloat16(tmp_path, kinds, dtype):
    folder = import_gguf(write_gguf(tmp_path / "tiny.gguf", kinds=kinds), tmp_path / "cache")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_tied_head_is_stored_once_and_the_rest_as_a_checkpoint_has_it(tmp_path):
    folder = import_gguf(write_gguf(tmp_path / "tiny.gguf", tie_word_embeddings=True), tmp_path / "cache")
    tied = set(WeightFiles(folder).names())
    assert "lm_head.weight" not in tied and "model.embed_tokens.weight" in tied
    folder = import_gguf(write_gguf(tmp_path / "other.gguf", tie_word_embeddings=False), tmp_path / "cache")
    assert set(WeightFiles(folder).names()) == tied | {"lm_head.weight"}


def test_the_same_file_is_imported_once_and_another_anew(tmp_path):
    path, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    calls = []
    first = import_gguf(path, cache, lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == len(calls) == 30
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert import_gguf(path, cache, lambda done, total: calls.append((done, total))) == first
    assert len(calls) == 30 and (first / "model.safetensors").stat().st_mtime_ns == written
    assert first.name.endswith(sha256(path)[:16])
    write_gguf(path, kinds=(F16,))
    assert import_gguf(path, cache) != first


def test_an_import_that_dies_leaves_nothing_that_is_taken_for_whole(tmp_path):
    path, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"

    def die(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(path, cache, die)
    assert not list((cache / "gguf").glob("*/config.json"))
    remains = cache / "gguf" / f"tiny-{sha256(path)[:16]}.partial"  # what SIGKILL leaves
    remains.mkdir()
    (remains / "model.safetensors").write_bytes(b"half")
    WeightFiles(import_gguf(path, cache))
    assert not remains.exists()


def test_the_import_waits_for_another_process(tmp_path):
    path, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    folder = import_gguf(path, cache)
    with FileLock(str(folder) + ".lock", timeout=0):
        assert import_gguf(path, cache) == folder  # a finished one needs no lock


def test_llama_3_rope_comes_back_from_its_divisors(tmp_path):
    path = tmp_path / "tiny.gguf"
    theirs = tiny_lm(
        "llama",
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    divisors = (plain / theirs.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 7.9 and divisors.min() < 1.01
    path = write_gguf_with_divisors(path, divisors.astype(np.float32))
    ours = AutoModelForCausalLM.from_pretrained(import_gguf(path, tmp_path / "cache"))
    torch.testing.assert_close(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    path = write_gguf_with_divisors(path, np.linspace(1, 8, 8, dtype=np.float32))
    with pytest.raises(InputError, match="rotary frequencies"):
        import_gguf(path, tmp_path / "cache")


def write_gguf_with_divisors(path, divisors):
    write_gguf(path, tensors=[("rope_freqs.weight", divisors.shape)])
    reader = gguf.GGUFReader(path, "r+")
    next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight").data[:] = divisors
    reader.data.flush()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["blk.1.attn_q.weight"]}, r"lacks model\.layers\.1\.self_attn\.q_proj\.weight \(1 of"),
        ({"tensors": [("blk.0.attn_sinks.weight", (4,))]}, r"holds blk\.0\.attn_sinks\.weight"),
        (
            {"tensors": [("blk.0.ffn_up.weight", (64, 64))]},
            r"holds 4096 values for model\.layers\.0\.\S+, and its settings say \[128, 64\]",
        ),
        ({"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}.items()}, r"llama\.rope\.scaling\.type"),
    ],
)
def test_a_model_that_would_come_out_wrong_is_refused(tmp_path, changes, message):
    path = write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(InputError, match=message):
        import_gguf(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_unknown_architectures_split_and_damaged_files_are_refused(tmp_path):
    cache = tmp_path / "cache"
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_tensor("v.weight", np.zeros((4, 32), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    with pytest.raises(InputError, match="architecture clip"):
        import_gguf(path, cache)
    whole = write_gguf(path).read_bytes()
    for name, content in {
        "cut": whole[:-4000],
        "header": whole[:300],
        "empty": b"",
        "zip": b"PK" + whole,
        "future": whole[:4] + struct.pack("<I", 9) + whole[8:],
    }.items():
        damaged = tmp_path / f"{name}.gguf"
        damaged.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.gguf"):
            import_gguf(damaged, cache)
    with pytest.raises(InputError, match=r"missing\.gguf"):
        import_gguf(tmp_path / "missing.gguf", cache)
