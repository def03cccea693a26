import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from compress.calib.model import Model
from compress.calib.weight_files import WeightFiles
from compress.errors import InputError, RunError
from compress.eval import stream
from compress.eval.divergence import divergence
from compress.eval.perplexity import score
from compress.eval.windows import whole_windows

WINDOWS = whole_windows(torch.randint(3, 200, (4, 40), generator=torch.Generator().manual_seed(0)))


def opened(folder):
    return Model(folder, WeightFiles(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and one with other weights, two blocks deep: nothing is asked of the shape but the vocabulary."""
    dense = save_tiny(tmp_path_factory.mktemp("dense"))
    other = tmp_path_factory.mktemp("other")
    save_tiny(other, num_hidden_layers=2)
    lm = AutoModelForCausalLM.from_pretrained(other)
    for parameter in lm.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    lm.save_pretrained(other)
    return other, dense


@pytest.mark.parametrize("small", [False, True])
def test_it_is_the_divergence_of_whole_logits(folders, monkeypatch, small):
    if small:
        monkeypatch.setattr(stream, "LOGITS_AT_ONCE", 9 * 200)
        monkeypatch.setattr(stream, "FLOATS_AT_ONCE", 4 * 200)
    kl, agreed, nll = [], [], []
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    with torch.no_grad():
        for window in WINDOWS:
            log_q, log_p = (lm(window.inputs[None]).logits[0, :-1].double().log_softmax(-1) for lm in models)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            agreed.append((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
            nll.append([-each.gather(1, window.targets[:, None]).mean() for each in (log_q, log_p)])
    steps = []
    found = divergence(opened(folders[0]), opened(folders[1]), WINDOWS, lambda: steps.append(1))
    kl, agreed, nll = torch.stack(kl), torch.stack(agreed), torch.tensor(nll)
    for mean, each in (
        (found.kl, kl),
        (found.top1, agreed),
        (found.nll, nll[:, 0]),
        (found.dense_nll, nll[:, 1]),
        (found.excess, nll[:, 0] - nll[:, 1]),
    ):
        assert mean.value == pytest.approx(each.mean().item(), rel=1e-4, abs=1e-7)
        assert mean.se == pytest.approx((each.std() / 2).item(), rel=1e-3, abs=1e-7)
    assert found.kl.value > 0.01 and found.tokens == 4 * 39 and len(steps) == 2 + 3 + 4


def test_a_model_is_no_distance_from_itself(folders):
    found = divergence(opened(folders[1]), opened(folders[1]), WINDOWS)
    assert (found.kl.value, found.top1.value, found.excess.value) == (0.0, 1.0, 0.0)
    assert found.nll.value == score(opened(folders[1]), WINDOWS).nll


def test_words_that_cannot_come_add_nothing(folders, monkeypatch):
    model = opened(folders[1])
    whole = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: whole(hidden).index_fill(-1, torch.tensor([0, 1]), -torch.inf))
    assert divergence(model, model, WINDOWS).kl.value == 0.0


def test_another_vocabulary_is_refused(folders, tmp_path):
    other = save_tiny(tmp_path, vocab_size=201)
    with pytest.raises(InputError, match=r"knows 200 tokens and .* 201"):
        divergence(opened(folders[1]), opened(other), WINDOWS)


def test_a_damaged_model_is_named(folders):
    model = opened(folders[1])
    model.lm.get_output_embeddings().weight[5, 5] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        divergence(model, opened(folders[1]), WINDOWS)
