"""What is read of a folder that somebody else has written: ordinary files of its own, whole JSON objects, short lines."""

import json
import os

import pytest

from compress.calib.model_files import MOST_BYTES, check_file, check_text_files, read_object
from compress.checkpoint.formats import open_weights
from compress.errors import InputError, RunError


def refusal(call, *arguments, kind=InputError):
    with pytest.raises(kind) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.json").write_text('{"key": 1}')
    return tmp_path / "model"


@pytest.mark.parametrize("target", ["../secret.json", "/etc/passwd", "sub/../../secret.json"])
def test_links_that_leave_the_folder_are_not_followed(folder, target):
    (folder / "sub").mkdir()
    (folder / "config.json").symlink_to(target)
    assert "is a link out of its folder" in refusal(read_object, folder / "config.json")
    assert "is a link out of its folder" in refusal(check_text_files, folder)


def test_a_folder_that_is_a_link_out_is_no_way_out_either(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "corrections.safetensors").write_text("")
    (folder / "adapter").symlink_to(tmp_path / "elsewhere")
    assert "out of its folder" in refusal(check_file, folder / "adapter" / "corrections.safetensors", folder)


def test_links_inside_the_folder_and_into_the_hubs_blobs_are(folder, tmp_path):
    (folder / "a.json").write_text('{"a": 1}')
    (folder / "b.json").symlink_to("a.json")
    assert read_object(folder / "b.json") == {"a": 1}
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "123").write_text('{"a": 2}')
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert read_object(snapshot / "config.json") == {"a": 2}
    (snapshot / "other.json").symlink_to("../../../secret.json")
    assert "out of its folder" in refusal(read_object, snapshot / "other.json")
    (tmp_path / "here").symlink_to(folder)  # how the folder itself is reached is the user's own business
    assert read_object(tmp_path / "here" / "a.json") == {"a": 1}


def test_pipes_devices_and_folders_are_no_files(folder):
    os.mkfifo(folder / "config.json")
    assert "is no ordinary file" in refusal(read_object, folder / "config.json")
    assert "is no ordinary file" in refusal(open_weights, folder)
    os.mkfifo(folder / "model.safetensors")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("{}")
    assert "is no ordinary file" in refusal(open_weights, folder)
    (folder / "tokenizer.json").mkdir()
    assert "is no ordinary file" in refusal(check_text_files, folder)
    (folder / "loop.json").symlink_to("loop.json")
    assert "cannot read" in refusal(read_object, folder / "loop.json")


def test_a_file_longer_than_any_such_is_not_read(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on disk
    assert "more than any such file" in refusal(read_object, folder / "config.json")
    assert "more than any such file" in refusal(check_text_files, folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "null", "[" * 50_000, '{"a": ' * 50_000, "9" * 5_000, b"\xff\xfe{}"]
)
def test_what_is_no_json_object_is_one_line_of_the_asked_kind(folder, text):
    (folder / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "a.json" in refusal(read_object, folder / "a.json")
    assert "a.json" in refusal(read_object, folder / "a.json", RunError, kind=RunError)


@pytest.mark.parametrize(
    ("weight_map", "line"),
    [
        ({"x": "../model.safetensors"}, "points outside its folder"),
        ({"x": "/etc/passwd"}, "points outside its folder"),
        ({"x": ".."}, "points outside its folder"),
        ({"x": "a/b.safetensors"}, "points outside its folder"),
        ({"x": 5, "y": 6}, "has no weight_map"),
        ({"x": ["model.safetensors"]}, "has no weight_map"),
        (["model.safetensors"], "has no weight_map"),
        ({"x": "pytorch_model.bin"}, "is no safetensors file"),
        ({"x": "x" * 5000 + ".safetensors"}, "cannot read"),
        ({"x": "\0.safetensors"}, "cannot read|lacks"),
        ({"x": "\ud800.safetensors"}, "cannot read|lacks"),
        ({}, "names no file"),
    ],
)
def test_an_index_names_safetensors_files_of_its_folder_and_nothing_else(folder, weight_map, line):
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=line) as caught:
        open_weights(folder)
    assert str(caught.value).isprintable()


def test_names_from_a_file_cannot_write_to_the_terminal(folder):
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"x": "\x1b[2J\r\n\u202e.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert r"\x1b[2J\r\n\u202e.safetensors" in refusal(open_weights, folder)
