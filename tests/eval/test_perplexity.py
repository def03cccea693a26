import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from compress.calib.model import Model
from compress.calib.weight_files import WeightFiles
from compress.errors import RunError
from compress.eval import stream
from compress.eval.perplexity import perplexity, score
from compress.eval.windows import Window

WINDOWS = torch.randint(3, 200, (3, 40), generator=torch.Generator().manual_seed(0))


def test_it_is_the_models_own_loss_over_every_token_but_the_first(tmp_path):
    folder = save_tiny(tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        nll = sum(lm(window[None], labels=window[None]).loss.double() for window in WINDOWS) / 3
    measured = perplexity(Model(folder, WeightFiles(folder)), WINDOWS)
    assert measured.nll == pytest.approx(nll.item(), rel=1e-6)
    assert measured.perplexity == pytest.approx(nll.exp().item(), rel=1e-5)
    assert measured.tokens == 3 * 39


def test_logits_in_small_pieces_give_the_same(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path)
    whole = perplexity(Model(folder, WeightFiles(folder)), WINDOWS)
    monkeypatch.setattr(stream, "LOGITS_AT_ONCE", 7 * 200)
    monkeypatch.setattr(stream, "FLOATS_AT_ONCE", 2 * 200)
    steps = []
    pieces = perplexity(Model(folder, WeightFiles(folder)), WINDOWS, lambda: steps.append(1))
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-7)
    assert len(steps) == 3 + 3


def test_windows_of_many_lengths_score_their_own_targets(tmp_path):
    folder = save_tiny(tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    windows = [
        Window(WINDOWS[0, :30], WINDOWS[0, 11:31], 10),
        Window(WINDOWS[1, :7], WINDOWS[1, 3:5], 2),
        Window(WINDOWS[2, :30], WINDOWS[2, 1:30]),
    ]
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logits = lm(window.inputs[None]).logits[0, window.first : window.first + len(window.targets)]
            nll += torch.nn.functional.cross_entropy(logits.double(), window.targets, reduction="sum").item()
            tokens += len(window.targets)
    measured = score(Model(folder, WeightFiles(folder)), windows)
    assert measured.tokens == tokens
    assert measured.nll == pytest.approx(nll / tokens, rel=1e-6)


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    folder = save_tiny(tmp_path)
    model = Model(folder, WeightFiles(folder))
    model.lm.get_output_embeddings().weight[5, 5] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        perplexity(model, WINDOWS)
