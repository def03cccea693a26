"""What travels along with a checkpoint, and what stays behind."""

import json

import pytest
from checkpoints import save_packed, save_small

from compress.calib.model import Model
from compress.calib.weight_files import WeightFiles
from compress.checkpoint.save import copy_along, plain_config
from compress.errors import InputError
from compress.export.source import Source


@pytest.fixture
def folders(tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    for each in (folder, out):
        each.mkdir()
    (folder / "tokenizer.json").write_text('{"auto_map" : "a token"}')
    (folder / "generation_config.json").write_text('{ "top_k":5}')
    return folder, out


def test_files_are_copied_byte_by_byte_and_code_is_not(folders):
    folder, out = folders
    for name in ("evil.py", "config.json", "quantize_config.json", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
    copy_along(folder, out)
    assert {file.name for file in out.iterdir()} == {"tokenizer.json", "generation_config.json"}
    assert all((out / file.name).read_bytes() == (folder / file.name).read_bytes() for file in out.iterdir())


@pytest.mark.parametrize("key", ["auto_map", r"auto\u005fmap"])
def test_what_asks_others_to_run_code_stays_behind(folders, key):
    """llama.cpp's converter trusts whatever a tokenizer's configuration names, repositories on the hub as well."""
    folder, out = folders
    asking = json.dumps({"auto_map": {"AutoTokenizer": ["owner/name--evil.A", None]}, "bos_token": "<s>"})
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text(asking.replace("auto_map", key))
    copy_along(folder, out)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        assert json.loads((out / name).read_text()) == {"bos_token": "<s>"}


def test_neither_does_the_checkpoints_own_configuration_ask(tmp_path):
    folder = save_small(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoConfig": "owner/name--evil.A"}}))
    config = plain_config(Model(folder, WeightFiles(folder)))
    assert "auto_map" not in config and config["model_type"] == "llama"


def test_exports_say_nothing_of_code_either(tmp_path):
    config = save_packed(tmp_path / "model", "gptq") / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"auto_map": {"AutoConfig": "evil.A"}}))
    dense = Source(config.parent).dense_config
    assert dense == {key: value for key, value in settings.items() if key != "quantization_config"}


def test_a_damaged_configuration_does_not_travel(folders):
    folder, out = folders
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*tokenizer_config\.json"):
        copy_along(folder, out)
