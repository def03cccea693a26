import pytest

from compress.bench.quality import SETTINGS, bench_quality
from compress.errors import InputError


def test_standard_settings_are_measured_against_the_dense_model(llama_folder, text_file, tmp_path):
    names = ["magnitude 50%", "sparsegpt 50%"]
    calib, text = (str(text_file), 2, 32), (str(text_file), 2)
    report = bench_quality(str(llama_folder), tmp_path, calib, text, names, "cpu")
    assert [row["setting"] for row in report.data["runs"]] == names
    for row in report.data["runs"]:
        assert row["ratio"] == row["perplexity"] / report.data["dense"]["perplexity"]
        assert row["layer_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "sparsegpt_50" / "model.safetensors").is_file()  # its checkpoints are kept
    assert bench_quality(str(llama_folder), tmp_path, calib, text, names, "cpu").data == report.data


def test_an_unknown_setting_is_refused_and_the_known_ones_are_listed(llama_folder, text_file, tmp_path):
    with pytest.raises(InputError, match="magnitude 50%"):
        bench_quality(str(llama_folder), tmp_path, (str(text_file), 2, 32), (str(text_file), 2), ["all"], "cpu")
    assert len(SETTINGS) > 10
