import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from compress.errors import InputError
from compress.eval.speed import Speed, SpeedProtocol, measure_speed
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe

SHORT = SpeedProtocol(seqlen=16, new_tokens=3, repeats=2)


def test_each_model_gets_its_figures_and_takes_its_turns(llama_folder, tmp_path):
    turns = []
    other = save_tiny(tmp_path / "gpt2", "gpt2")
    speeds = measure_speed([llama_folder, other], SHORT, on_step=lambda: turns.append(1))
    assert len(turns) == 2 * 3
    assert all(speed.prefill_tokens_per_second > 0 and speed.decode_ms_per_token > 0 for speed in speeds)


def test_twice_as_fast_is_two_whichever_way_the_figure_runs():
    beside = Speed(200.0, 5.0).beside(Speed(100.0, 10.0))
    assert beside["prefill_speedup"] == beside["decode_speedup"] == 2.0
    assert beside["prefill_tokens_per_second"] == 200.0


def test_a_format_of_our_own_is_refused(llama_folder, tmp_path):
    target = {"wbits": 4, "group_size": 32}
    values = {"model": str(llama_folder), "quantizer": "rtn", "format": "native", "target": target}
    compress(read_recipe(None, values), llama_folder, tmp_path / "native", Reporter(quiet=True))
    with pytest.raises(InputError, match=r"transformers does not load .* --format compressed-tensors"):
        measure_speed([tmp_path / "native"], SHORT)


def test_a_model_without_a_cache_of_keys_and_values_is_refused(tmp_path):
    with pytest.raises(InputError, match="mamba keeps no keys and values"):
        measure_speed([save_tiny(tmp_path, "mamba")], SHORT)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="transformers does not load"):
        measure_speed([tmp_path], SHORT)


def test_a_model_that_would_be_filled_with_noise_is_refused(llama_folder, tmp_path):
    other = shutil.copytree(llama_folder, tmp_path / "part")
    tensors = load_file(other / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"finds no model\.layers\.1\.mlp\.up_proj\.weight"):
        measure_speed([other], SHORT)
