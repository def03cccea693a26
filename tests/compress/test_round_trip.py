"""A checkpoint as it is served has the perplexity of the weights that it decodes to."""

import math

import pytest
import torch

from compress.calib.data import evaluation_windows
from compress.calib.skeleton import load_tokenizer
from compress.evaluate import evaluate
from compress.hf import compressed_layers, load_model
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe

QUIET, SEQLEN, WINDOWS = Reporter(quiet=True), 48, 4
TARGETS = {
    "2:4 and 4 bits": {"pattern": "2:4", "wbits": 4, "group_size": 32},
    "2:4 and 4 bits, head 8": {"pattern": "2:4", "wbits": 4, "group_size": 32, "head_bits": 8},
    "2 bits": {"wbits": 2, "group_size": 32},
}


@torch.no_grad()
def served_perplexity(folder, text, dtype):
    """By the layers that a server has, a whole window at once."""
    model = load_model(folder, dtype=dtype)
    assert compressed_layers(model)
    total = 0.0
    windows = evaluation_windows(str(text), load_tokenizer(folder), SEQLEN, WINDOWS)
    for window in windows:
        log_p = model(window.unsqueeze(0)).logits[0].float().log_softmax(-1)
        total -= log_p[:-1].gather(1, window[1:, None]).sum().item()
    return math.exp(total / (windows.numel() - len(windows)))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_perplexity_is_that_of_the_decoded_weights(llama_folder, text_file, tmp_path, target, monkeypatch):
    monkeypatch.setenv("COMPRESS_NO_MEASURING", "1")
    flags = {"model": str(llama_folder), "format": "native", "target": target}
    flags["calib"] = {"source": str(text_file), "nsamples": 2, "seqlen": 32}
    compress(read_recipe(None, flags), llama_folder, tmp_path, QUIET)
    decoded = next(iter(evaluate(tmp_path, [str(text_file)], SEQLEN, WINDOWS, QUIET)["perplexity"].values()))
    assert served_perplexity(tmp_path, text_file, torch.float32) == pytest.approx(decoded, rel=1e-3)
    assert served_perplexity(tmp_path, text_file, torch.bfloat16) == pytest.approx(decoded, rel=1e-2)
