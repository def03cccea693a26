import json

import pytest
import torch
from safetensors.torch import load_file

from compress.calib.weight_files import WeightFiles
from compress.checkpoint.writer import ShardWriter


def _write(folder, tensors, **limits):
    writer = ShardWriter(folder, **limits)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


TENSORS = {f"layer.{i}": torch.full((5,), float(i)) for i in range(7)}  # 20 bytes each


def test_what_fits_is_one_file(tmp_path):
    size = _write(tmp_path / "new", TENSORS)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.safetensors"]
    assert size == (tmp_path / "new" / "model.safetensors").stat().st_size
    read = load_file(tmp_path / "new" / "model.safetensors")
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


def test_more_is_shards_and_an_index(tmp_path):
    size = _write(tmp_path, TENSORS, max_shard_bytes=60)
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*shards, "model.safetensors.index.json"]
    assert [len(load_file(tmp_path / shard)) for shard in shards] == [3, 3, 1]
    assert size == sum((tmp_path / shard).stat().st_size for shard in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 140
    assert index["weight_map"] == {f"layer.{i}": shards[i // 3] for i in range(7)}
    files = WeightFiles(tmp_path)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    _write(tmp_path, {"a": torch.ones(1), "b": torch.ones(99), "c": torch.ones(1)}, max_shard_bytes=60)
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [1, 1, 1]


@pytest.mark.parametrize(("first", "second"), [(60, 1000), (1000, 60), (60, 40), (60, 60)])
def test_an_earlier_run_is_replaced_and_other_files_stay(tmp_path, first, second):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("not ours")
    _write(tmp_path, {name: -tensor for name, tensor in TENSORS.items()}, max_shard_bytes=first)
    (tmp_path / "config.json").write_text("{}")
    _write(tmp_path, TENSORS, max_shard_bytes=second)
    assert not (tmp_path / "config.json").exists()
    assert (tmp_path / "tokenizer.json").exists()
    (tmp_path / "adapter_model.safetensors").unlink()
    files = WeightFiles(tmp_path)
    assert set(files.names()) == TENSORS.keys()
    assert len(list(tmp_path.glob("*.safetensors"))) == {1000: 1, 60: 3, 40: 4}[second]
    assert (tmp_path / "model.safetensors.index.json").exists() == (second != 1000)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())


def test_an_unfinished_writer_leaves_an_earlier_checkpoint_alone(tmp_path):
    old = {name: -tensor for name, tensor in TENSORS.items()}
    _write(tmp_path, old)
    (tmp_path / "config.json").write_text("{}")
    writer = ShardWriter(tmp_path, max_shard_bytes=20)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    assert len(list(tmp_path.glob("*.new"))) == 6  # all but the shard in memory are on disk already
    files = WeightFiles(tmp_path)
    assert (tmp_path / "config.json").exists() and all(torch.equal(files.read(n), t) for n, t in old.items())
    (tmp_path / "model-00007.new.partial").write_text("cut off")
    ShardWriter(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_an_unfinished_first_writer_leaves_no_weights(tmp_path):
    ShardWriter(tmp_path, max_shard_bytes=20).add("a", torch.ones(9))
    writer = ShardWriter(tmp_path, max_shard_bytes=20)
    writer.add("a", torch.ones(9))
    writer.add("b", torch.ones(9))
    assert list(tmp_path.glob("*.safetensors*")) == [] and len(list(tmp_path.iterdir())) == 1


def test_a_view_is_kept_without_what_it_looks_into(tmp_path):
    whole = torch.arange(1000.0)
    writer = ShardWriter(tmp_path)
    writer.add("view", whole[10:20])
    writer.add("turned", whole[:6].reshape(2, 3).T)
    held = sum(tensor.untyped_storage().nbytes() for tensor in writer._shard.values())
    assert held == 16 * 4
    writer.finish()
    assert torch.equal(WeightFiles(tmp_path).read("turned"), whole[:6].reshape(2, 3).T)


def test_misuse_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path)
    with pytest.raises(ValueError, match="a checkpoint without tensors"):
        writer.finish()
    writer.add("a", torch.ones(1))
    with pytest.raises(ValueError, match="a was added twice"):
        writer.add("a", torch.ones(1))
