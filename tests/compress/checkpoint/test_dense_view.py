import pytest
import torch

from compress.checkpoint.dense_view import PackedFiles, decoded, model_dtype, quantization_settings, read_config
from compress.errors import InputError


def test_decoding_in_pieces_is_decoding(make_weight):
    for symmetric in (True, False):
        weight = make_weight(shape=(16384 + 3, 8), group_size=4, symmetric=symmetric)
        assert torch.equal(decoded(weight, torch.bfloat16), weight.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "has no config.json: it is no checkpoint, or one that was never finished"),
        ("{", "cannot read .*config.json"),
        ("[]", "config.json is no JSON object"),
    ],
)
def test_a_config_that_is_none(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_config(tmp_path)


def test_the_dtype_is_the_configs_or_else_the_first_dense_tensors(tmp_path, make_checkpoint):
    tensors = {"a.scales": torch.ones(2, dtype=torch.float32), "b.weight": torch.ones(2, dtype=torch.bfloat16)}
    entries = PackedFilesOfNothing(make_checkpoint(tmp_path, tensors, {})).entries
    assert model_dtype({"dtype": "float16"}, entries) == torch.float16
    assert model_dtype({"torch_dtype": "float32"}, entries) == torch.float32
    assert model_dtype({"text_config": {"dtype": "torch.float16"}}, entries) == torch.float16
    assert model_dtype({}, entries) == torch.bfloat16
    with pytest.raises(InputError, match='names the dtype "float8": only float16, bfloat16, float32 are read'):
        model_dtype({"dtype": "float8"}, entries)


def test_settings_are_found_in_a_text_config_too():
    assert quantization_settings({}) == {}
    assert quantization_settings({"quantization_config": {"a": 1}}) == {"a": 1}
    assert quantization_settings({"text_config": {"quantization_config": {"a": 1}}}) == {"a": 1}
    with pytest.raises(InputError, match="no JSON object"):
        quantization_settings({"quantization_config": ["a"]})


class PackedFilesOfNothing(PackedFiles):
    def find_packed(self):
        return {}


def test_what_is_not_packed_is_handed_over_as_it_is(tmp_path, make_checkpoint):
    tensors = {"norm.weight": torch.arange(3.0)}
    files = PackedFilesOfNothing(make_checkpoint(tmp_path, tensors, {}))
    assert list(files.names()) == ["norm.weight"]
    assert files.read("norm.weight").dtype == torch.float32  # although the model's dtype is float16
