import json
import subprocess
import sys

import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from compress.calib.skeleton import load_tokenizer
from compress.checkpoint.formats import open_weights
from compress.errors import InputError
from compress.hf import compressed_layers, load_model
from compress.kernel_report import kernel_report
from compress.kernels.inference import CompressedLinear, PackedEmbedding
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.sources import resolve_model

IDS = torch.tensor([[1, 5, 9, 17, 33, 7, 8, 199]])
TARGETS = {
    "native": {"wbits": 4, "group_size": 32, "head_bits": 8},
    "compressed-tensors": {"wbits": 4, "group_size": 32},
    "gptq": {"wbits": 4, "group_size": 32},
}


def checkpoint(model, out, target, format_name="native", quantizer="rtn"):
    flags = {"model": str(model), "quantizer": quantizer, "format": format_name, "target": target}
    flags["calib"] = {"source": "builtin", "nsamples": 2, "seqlen": 16}
    compress(read_recipe(None, flags), resolve_model(str(model)), out, Reporter())
    return out


@pytest.fixture(scope="module", autouse=True)
def unmeasured(tmp_path_factory):
    """No timings are made, and none that other processes have kept are read: the defaults decide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_NO_MEASURING", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def native(llama_folder, tmp_path_factory):
    return checkpoint(llama_folder, tmp_path_factory.mktemp("hf") / "native", TARGETS["native"])


def dense_logits(folder):
    """Logits of the decoded weights in the model's own class, in float32."""
    files = open_weights(folder)
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(load_model(folder).config.__class__(**config)).float().eval()
    state = {name: files.read(name).float() for name in files.plain}
    state |= {name: files.unpacked(layers[0]).dequantize() for name, layers in files.packed.items()}  # not rounded
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing)
    model.tie_weights()
    with torch.no_grad():
        return model(IDS).logits


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize("format_name", TARGETS)
def test_every_format_gives_our_layers(llama_folder, tmp_path, format_name):
    out = checkpoint(llama_folder, tmp_path / "out", TARGETS[format_name], format_name)
    model = load_model(out, dtype=torch.float32)
    layers = compressed_layers(model)
    assert len(layers) == 21 + (format_name == "native")
    assert all(layer.choice.few.NAME == "cpu-int4" for name, layer in layers.items() if name != "lm_head")
    torch.testing.assert_close(logits(model), dense_logits(out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "target",
    [
        {"wbits": 2, "group_size": 32},
        {"wbits": 3, "group_size": 64},
        {"wbits": 8, "group_size": -1},
        {"wbits": 4, "pattern": "2:4", "sparsity": 0.5, "group_size": 32},
        {"wbits": 8, "abits": 8},
    ],
)
def test_native_layouts(llama_folder, tmp_path, target):
    flags = {"sparsity", "pattern"} & target.keys()
    out = checkpoint(llama_folder, tmp_path / "out", target, quantizer="rtn" if not flags else "gptq")
    quantized = "abits" in target
    expected = dense_logits(out)
    found = logits(load_model(out, dtype=torch.float32))
    if quantized:  # what the dense view rounds by hooks is not in `dense_logits`
        assert 1e-5 < (found - expected).norm() / expected.norm() < 0.1
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_of_one_input_are_one(native):
    model = load_model(native)
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    assert attention.q_proj.joint is attention.k_proj.joint is attention.v_proj.joint
    assert mlp.gate_proj.joint is mlp.up_proj.joint is not attention.q_proj.joint
    assert isinstance(attention.o_proj, CompressedLinear) and isinstance(mlp.down_proj, CompressedLinear)


def test_a_row_of_padding_does_not_stop_a_packed_embedding(tmp_path):
    folder = save_tiny(tmp_path / "gemma", "gemma3_text", tie_word_embeddings=True, pad_token_id=0)
    out = checkpoint(folder, tmp_path / "out", {"wbits": 4, "group_size": 32, "head_bits": 4})
    model = load_model(out, dtype=torch.float32)
    torch.testing.assert_close(logits(model), dense_logits(out), rtol=1e-4, atol=1e-4)


def test_a_tied_embedding_is_looked_up_and_multiplied(native):
    model = load_model(native)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert "lm_head" in compressed_layers(model) or not model.config.tie_word_embeddings


def test_gemma_scales_its_packed_embedding(tmp_path):
    folder = save_tiny(tmp_path / "gemma", "gemma3_text", tie_word_embeddings=True)
    out = checkpoint(folder, tmp_path / "out", {"wbits": 4, "group_size": 32, "head_bits": 8})
    model = load_model(out, dtype=torch.float32)
    assert "lm_head" in compressed_layers(model)
    torch.testing.assert_close(logits(model), dense_logits(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_what_is_no_linear_layer_is_decoded(tmp_path, architecture):
    folder = save_tiny(tmp_path / "model", architecture)
    out = checkpoint(folder, tmp_path / "out", {"wbits": 4, "group_size": 32})
    model = load_model(out, dtype=torch.float32)
    files = open_weights(out)
    state = model.state_dict()
    decoded = [name for name in files.packed if name in state and state[name].numel()]
    assert decoded and all(torch.equal(state[name], files.read(name).float()) for name in decoded)
    assert torch.isfinite(logits(model)).all()


def test_prompts_and_forced_kernels(native, monkeypatch):
    layers = compressed_layers(load_model(native, "dense"))
    assert {layer.choice.many.NAME for layer in layers.values() if layer.choice.many} == {"dense"}
    monkeypatch.setenv("COMPRESS_KERNEL", "cpu-int8")
    with pytest.raises(InputError, match="cpu-int8 cannot serve"):
        load_model(native)


def test_bad_folders_are_refused(native, tmp_path):
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        (tmp_path / "config.json").write_text((native / "config.json").read_text())
        load_model(tmp_path)
    with pytest.raises(InputError, match="tokenizer does not load"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("plugged", [False, True])
def test_transformers_alone_stops_and_with_the_plug_in_loads(native, plugged):
    program = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"{'import compress.hf' if plugged else ''}\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(native)!r})\n"
        "print('loaded', type(model.model.layers[0].mlp.down_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if plugged:
        assert done.stdout.split() == ["loaded", "CompressedLinear"] and "MISSING" not in done.stderr
    else:
        assert done.returncode != 0 and "loaded" not in done.stdout and "size" in done.stderr


def test_a_loaded_model_is_not_saved_as_something_else(native, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        load_model(native).save_pretrained(tmp_path)


def test_the_report_names_who_serves_each_layer(native, llama_folder):
    report = kernel_report(native, "dense", "cpu")
    lines = {line["layer"]: line for line in report.data["kernels"]}
    layers = compressed_layers(load_model(native, "dense"))
    assert {name: line["kernel"].split(" from ")[0] for name, line in lines.items() if name in layers} == {
        name: layer.choice.names.split(" from ")[0] for name, layer in layers.items() if name in lines
    }  # the largest layer of an input says for all from how many tokens
    assert lines["model.layers.0.mlp.up_proj"]["kernel"].startswith("cpu-int4; dense from")
    with pytest.raises(InputError, match="no packed layers"):
        kernel_report(llama_folder, "dense", "cpu")


def test_a_dense_model_keeps_its_logits_and_its_head_gets_plain_strides(llama_folder):
    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    model = load_model(llama_folder)
    assert compressed_layers(model) == {} and torch.equal(logits(model), logits(plain))
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    with torch.no_grad():
        model(IDS, logits_to_keep=1)
    assert seen == [(64, 64, 1)]
