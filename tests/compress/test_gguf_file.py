"""Headers of GGUF files that lie: every count, length and place is held against the file before it is believed."""

import os
import struct

import gguf
import pytest
import torch
from gguf_files import write_gguf

from compress.errors import InputError
from compress.gguf_file import read_gguf
from compress.gguf_import import import_gguf

HUGE = (2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def key(name, kind, packed):
    return text(name) + struct.pack("<I", kind) + packed


ARCHITECTURE = key("general.architecture", 8, text("llama"))


def tensor(name="a", dims=(32, 4), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(keys=(ARCHITECTURE,), tensors=(), n_keys=None, n_tensors=None):
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(keys) + b"".join(tensors)


@pytest.fixture
def refusal(tmp_path):
    def read(data):
        file = tmp_path / "a.gguf"
        file.write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_gguf(file)
        assert str(caught.value).isprintable() and "a.gguf" in str(caught.value)
        return str(caught.value)

    return read


def test_a_sound_one_is_read(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(header(tensors=[tensor()]) + bytes(32 + 32 * 4 * 4))
    found = read_gguf(file)
    assert found.architecture == "llama" and torch.equal(found.tensors[0].rounded(torch.float32), torch.zeros(4, 32))


@pytest.mark.parametrize("count", HUGE)
def test_counts_and_lengths_beyond_the_file_end_at_its_end(refusal, count):
    assert "damaged or truncated" in refusal(header(n_keys=count))
    assert "damaged or truncated" in refusal(header(n_tensors=count))
    assert "damaged or truncated" in refusal(header([struct.pack("<Q", count)]))  # the length of a key
    assert "damaged or truncated" in refusal(header([ARCHITECTURE, key("a", 8, struct.pack("<Q", count))]))
    for element in (0, 4, 8, 9, 12, 99):  # arrays of bytes, of integers, of strings, of arrays, of doubles
        assert "damaged or truncated" in refusal(
            header([ARCHITECTURE, key("a", 9, struct.pack("<IQ", element, count))])
        )
    within = struct.pack("<IQ", 8, 2) + struct.pack("<Q", count) + bytes(64)
    assert "damaged or truncated" in refusal(header([ARCHITECTURE, key("a", 9, within)]))


@pytest.mark.parametrize("length", HUGE)
def test_tensors_beyond_the_file_are_refused_before_they_get_memory(refusal, length):
    room = bytes(4096)
    assert "damaged or truncated" in refusal(header(tensors=[tensor(dims=(32, length))]) + room)
    assert "damaged or truncated" in refusal(header(tensors=[tensor(dims=(length // 32 * 32, 1))]) + room)
    assert "damaged or truncated" in refusal(header(tensors=[tensor(offset=length)]) + room)
    lied = text("a") + struct.pack("<I", length % 2**32) + bytes(64)
    assert "damaged or truncated" in refusal(header(tensors=[lied]) + room)


@pytest.mark.parametrize("dims", [(), (0,), (0, 5), (32, 0), (33,)])
def test_shapes_that_hold_nothing_or_half_a_block(refusal, dims):
    assert "damaged or truncated" in refusal(header(tensors=[tensor(dims=dims, kind=8)]) + bytes(4096))


@pytest.mark.parametrize(
    "odd",
    [
        key("general.alignment", 4, struct.pack("<I", 0)),
        key("general.alignment", 5, struct.pack("<i", -8)),
        key("general.alignment", 8, text("32")),
        key("general.alignment", 6, struct.pack("<f", 32.0)),
        key("split.count", 8, text("3")),
        key("split.count", 9, struct.pack("<IQ", 0, 0)),
        key("general.architecture", 4, struct.pack("<I", 5)),
        key("a", 13, b""),
        key("a", 8, struct.pack("<Q", 1) + b"\xff"),
    ],
)
def test_values_of_another_kind_than_meant(refusal, odd):
    assert "damaged or truncated" in refusal(header([ARCHITECTURE, odd], [tensor()]) + bytes(4096))


def test_two_tensors_of_one_name_and_kinds_that_are_none(refusal):
    assert "two tensors share a name" in refusal(header(tensors=[tensor(), tensor()]) + bytes(4096))
    assert "damaged or truncated" in refusal(header(tensors=[tensor(kind=9999)]) + bytes(4096))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.gguf")
    for read in (read_gguf, lambda path: import_gguf(path, tmp_path / "cache")):
        with pytest.raises(InputError, match="no ordinary file"):
            read(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {"block_count": 10**9}}, "block_count is 1000000000, which no model has"),
        ({"keys": {"block_count": 9000}}, "asks for more than .* tensors|holds|lacks|describes"),
        ({"keys": {"embedding_length": 2**31 - 8}}, "tables|holds|describes|makes no|is not a"),
        ({"keys": {"vocab_size": 2**31 - 1}}, "makes no|holds|describes"),
        ({"keys": {"attention.head_count": 0}}, "settings|makes no|fit"),
        ({"keys": {"rope.dimension_count": 2**30}}, "tables|settings|makes no|holds"),
        ({"tensors": [("rope_freqs.weight", (2, 32))]}, "in a way other than Llama 3's"),
    ],
)
def test_settings_that_make_another_model_than_the_tensors(tmp_path, changes, message):
    path = write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(InputError, match=message) as caught:
        import_gguf(path, tmp_path / "cache")
    assert str(caught.value).isprintable()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_integers_of_64_bits_and_empty_lists_pass_through(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    reader = read_gguf(path)
    reader.metadata.update({"a.large": 2**64 - 1, "a.larges": [1, 2**63], "a.none": []})
    from compress.gguf_import import _write_slim_header

    _write_slim_header(reader, tmp_path / "slim.gguf", {})
    fields = gguf.GGUFReader(tmp_path / "slim.gguf").fields
    assert fields["a.large"].contents() == 2**64 - 1 and fields["a.larges"].contents() == [1, 2**63]
