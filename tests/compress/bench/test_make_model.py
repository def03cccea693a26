import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import compress.bench.make_model
from compress.bench.make_model import SHAPES, RandomModel, bench_make_model, make_model
from compress.calib.builtin_text import evaluation_text
from compress.calib.data import calibration_windows
from compress.calib.weight_files import read_all
from compress.cli_bench import bench
from compress.errors import InputError
from compress.pipeline import open_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True, scope="module")
def quick_text():
    """The builtin text that need not be parsed out of sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress.bench.make_model, "calibration_text", evaluation_text)
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("shape") / "config.json"
    values = {"model_type": "llama", "vocab_size": 800, "initializer_range": 0.05, **SIZES}
    file.write_text(json.dumps(values))
    return file


@pytest.fixture(scope="module")
def made(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "model"
    return out, bench_make_model(str(config_file), out, 2, 0).data


def test_it_is_a_model_that_a_run_can_calibrate(made, text_file):
    folder, data = made
    model = open_model(folder)
    assert model.dtype == torch.bfloat16 and model.n_blocks == data["layers"] == 2
    tokens = calibration_windows(str(text_file), model.tokenizer, 2, 32, 0)
    assert (tokens[:, 0] == 1).all() and 2 < tokens[:, 1:].max() < 800
    hidden = model.embed(tokens[0])
    for block in model.blocks():
        hidden = block(hidden)
        assert 0.045 < block.layers[-1].weight.float().std() < 0.055
        assert (block.module.input_layernorm.weight == 1).all()
    assert model.logits(hidden).isfinite().all()
    assert model.tokenizer.decode(tokens[0, 1:]) in text_file.read_text()


def test_the_seed_decides_the_bytes(made, config_file, tmp_path):
    def weights(folder):
        return (folder / "model.safetensors").read_bytes()

    again, other = tmp_path / "again", tmp_path / "other"
    for out, seed in ((again, 0), (other, 1)):
        bench_make_model(str(config_file), out, 2, seed)
    assert weights(again) == weights(made[0]) != weights(other)
    assert (again / "tokenizer.json").read_bytes() == (made[0] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("architecture", ["mixtral", "gemma3_text"])
def test_other_architectures_have_what_their_checkpoints_have(architecture, tmp_path):
    more = {"num_local_experts": 4} if architecture == "mixtral" else {"head_dim": 16, "sliding_window": 16}
    config = AutoConfig.for_model(architecture, vocab_size=400, **SIZES, **more)
    make_model(RandomModel(config, dtype=torch.float32), tmp_path / "model")
    model = open_model(tmp_path / "model")
    assert not model.unused
    hidden = model.embed(torch.arange(24))
    for block in model.blocks():
        hidden = block(hidden)
    assert model.logits(hidden).isfinite().all()
    tensors, _ = read_all(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (not config.tie_word_embeddings)
    if architecture == "mixtral":
        assert any("experts.3" in name for name in tensors), "as the hub has them: a tensor an expert"


def test_the_table_has_the_shapes_of_the_models():
    counts = {"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "tinyllama-1.1b": 1_100_048_384}
    counts |= {"olmoe-1b-7b": 6_919_161_856}
    for name, values in SHAPES.items():
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        assert lm.num_parameters() == counts[name]


def test_what_cannot_be_made_is_one_line(tmp_path, config_file):
    with pytest.raises(InputError, match="there is no shape 'llama-8b': give one of llama-7b, "):
        bench_make_model("llama-8b", tmp_path / "a", None, 0)
    with pytest.raises(InputError, match="holds something already"):
        bench_make_model(str(config_file), config_file.parent, None, 0)
    with pytest.raises(InputError, match="has no room for 259"):
        make_model(RandomModel(AutoConfig.for_model("llama", vocab_size=200, **SIZES)), tmp_path / "b")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is no JSON object"):
        bench_make_model(str(tmp_path / "config.json"), tmp_path / "c", None, 0)


def test_the_command_line_makes_one(config_file, tmp_path):
    said = CliRunner().invoke(bench, ["make-model", str(config_file), str(tmp_path / "m"), "--layers", "1", "--json"])
    assert said.exit_code == 0, said.output
    data = json.loads(said.stdout)
    assert data["layers"] == 1 and open_model(tmp_path / "m").n_blocks == 1
    assert data["bytes"] == (tmp_path / "m" / "model.safetensors").stat().st_size
