"""Configurations and tokenizers of strangers: no code of theirs runs, and nothing is built that the files are not for."""

import json
import shutil

import pytest
import torch

from compress.calib.skeleton import TENSORS, load_config, load_tokenizer, skeleton
from compress.errors import InputError
from compress.hf import load_model
from compress.pipeline import open_model
from compress.sources import resolve_model

EVIL = "raise SystemExit('code of the folder ran')\n"


@pytest.fixture
def folder(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "llama")


def edit(folder, name="config.json", **changes):
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_layers": 10**9},
        {"encoder_layers": 2**63},
        {"num_labels": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"sub": [{"n_layer": 10**9}]},
    ],
)
def test_lists_longer_than_any_model_has_are_never_made(folder, change):
    with pytest.raises(InputError, match="which no model has"):
        load_config(edit(folder, **change))


def test_a_model_of_far_more_tensors_than_the_files_is_not_built(folder):
    config = load_config(edit(folder, num_hidden_layers=9_999, layer_types=None))
    with pytest.raises(InputError, match=f"more than {TENSORS * (30 + TENSORS)} tensors, and its files have far fewer"):
        skeleton(config, torch.float32, 30)


def test_tables_of_a_made_up_size_are_refused_before_there_is_room_for_them(folder):
    with pytest.raises(InputError, match=f"asks for tables of {4 * 10**12} bytes"):
        skeleton(load_config(edit(folder, head_dim=10**12, rope_parameters=None)), torch.float32, 30)


@pytest.mark.parametrize("read", [open_model, load_model])
@pytest.mark.parametrize(
    "change", [{"vocab_size": 10**12}, {"intermediate_size": 10**9}, {"num_hidden_layers": 40, "layer_types": None}]
)
def test_weights_that_the_files_do_not_hold_get_no_memory(folder, read, change):
    with pytest.raises(InputError) as caught:
        read(edit(folder, **change))
    assert "unexpected" not in str(caught.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_attention_is_never_fetched_from_the_hub(folder, key, wrapped):
    """Such names are of repositories whose code transformers would load where the package kernels is installed."""
    name = "kernels-community/flash-attn"
    with pytest.raises(InputError, match=f"attention by code of {name}, which is never run"):
        load_config(edit(folder, **{key: {"": name} if wrapped else name}))


@pytest.mark.parametrize(
    ("asked", "taken"), [("eager", "eager"), ("flash_attention_2", None), ("none such", None), (5, None), ([], None)]
)
def test_attention_is_computed_by_torch(folder, asked, taken):
    edit(folder, attn_implementation=asked, experts_implementation="owner/name", _attn_implementation_internal="a/b")
    assert load_config(folder)._attn_implementation == taken
    for model in (open_model(folder).lm, load_model(folder)):
        assert model.config._attn_implementation == (taken or "sdpa")


def test_code_of_the_folder_never_runs(folder, monkeypatch):
    """Not even after a question: transformers would ask on the terminal whether it may."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(EVIL)
    edit(
        folder,
        auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A", "AutoTokenizer": ["evil.A", "evil.A"]},
    )
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]}, tokenizer_class="A")
    resolve_model(str(folder))
    open_model(folder)
    load_model(folder)
    with pytest.raises(InputError, match="its tokenizer does not load"):
        load_tokenizer(folder)


def test_an_adapter_beside_a_model_is_not_added_unasked(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/etc"}))
    for read in (load_model, lambda path: resolve_model(str(path))):
        with pytest.raises(InputError, match=r"or holds one: merge it .* or take adapter_config\.json away"):
            read(folder)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file", "chat_template_file"])
def test_a_tokenizer_reads_no_file_of_another_folder(folder, tmp_path, key):
    (tmp_path / "secret.json").write_text('{"a secret": 0}')
    edit(folder, "tokenizer_config.json", **{key: str(tmp_path / "secret.json")})
    tokenizer = load_tokenizer(folder)
    assert "a secret" not in tokenizer.get_vocab() and "a secret" not in str(tokenizer.chat_template)


def test_numbers_of_blocks_that_are_none_are_unused_tensors(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    odd = [f"model.layers.{number}.x" for number in ("x", "-1", "007", "9" * 5000, "\u0663", "")]
    save_file(tensors | {name: torch.ones(1) for name in odd}, folder / "model.safetensors", {"format": "pt"})
    assert set(open_model(folder).unused) == set(odd)
