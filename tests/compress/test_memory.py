"""The point of streaming: memory holds a block, not the model."""

import json
import subprocess
import sys

import pytest
from tiny import save_tiny
from transformers import LlamaConfig

from compress.bench.make_model import RandomModel, make_model


def peak(folder, out):
    flags = ["--sparsity", "0.5", "--pruner", "magnitude", "--wbits", "4", "--quantizer", "rtn", "--json"]
    command = [sys.executable, "-m", "compress", "run", str(folder), *flags, "--group-size", "64", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_model_of_630_mb_takes_less_than_half_of_that(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
    make_model(RandomModel(LlamaConfig(vocab_size=1000, **sizes), shard_bytes=100_000_000), tmp_path / "large")
    large, tiny = peak(tmp_path / "large", tmp_path / "a"), peak(save_tiny(tmp_path / "tiny"), tmp_path / "b")
    assert large["dense_bytes"] > 600e6
    assert large["peak_rss_bytes"] - tiny["peak_rss_bytes"] < 0.45 * large["dense_bytes"]
