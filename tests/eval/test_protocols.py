"""Each protocol against its tool's own loop, written out slowly, on a tiny model."""

import json
import math
import re

import pytest
import torch
from tiny import save_tiny, tiny_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.calib.model import Model
from compress.calib.weight_files import WeightFiles
from compress.errors import InputError
from compress.eval.perplexity import score
from compress.eval.protocols import PROTOCOLS, cut_text

WORDS = tiny_text(400).split()
LINES = "".join(" ".join(WORDS[i : i + 50]) + " \n" + (" \n" if i % 100 else "") for i in range(0, 400, 50))
ANY = (None, None, None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("llama"), max_position_embeddings=64)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text(LINES)
    return str(file)


def measured(tiny, protocol, text, sizes):
    cut = cut_text(protocol, text, tiny[1], sizes)
    return score(Model(tiny[2], WeightFiles(tiny[2])), cut.windows), cut


@torch.no_grad()
def nll(lm, tokens):
    """The model's own loss of each token but the first, [n - 1]."""
    logits = lm(tokens[None]).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


def joined(tokenizer):
    """As the papers' loaders do: WikiText's rows are lines, blank ones empty."""
    rows = [line if line.strip() else "" for line in LINES.splitlines(keepends=True)]
    return tokenizer("\n\n".join(rows), return_tensors="pt").input_ids[0]


@pytest.mark.parametrize("protocol", ["wanda", "gptq"])
def test_wanda_takes_whole_windows_of_the_joined_rows(tiny, text, protocol):
    lm, tokenizer, _ = tiny
    tokens, seqlen = joined(tokenizer), 32
    nsamples = tokens.numel() // seqlen
    nlls = [nll(lm, tokens[i * seqlen : (i + 1) * seqlen]).mean() * seqlen for i in range(nsamples)]
    theirs = torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)).item()
    found, cut = measured(tiny, protocol, text, (seqlen, None, None))
    assert found.perplexity == pytest.approx(theirs, rel=1e-6)
    assert cut.windows[0].inputs[0] == 1 and cut.windows[1].inputs[0] != 1


def test_strided_is_the_guides_loop_with_each_token_counted_once(tiny, text):
    lm, tokenizer, _ = tiny
    tokens, max_length, stride = joined(tokenizer), 48, 20
    total, count, weighed, weights, reached = 0.0, 0, 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        targets = nll(lm, tokens[begin:end])[-(end - reached) :]
        total, count = total + targets.sum().item(), count + len(targets)
        weighed, weights = weighed + targets.mean().item() * (end - reached - 1), weights + end - reached - 1
        reached = end
        if end == len(tokens):
            break
    found, _ = measured(tiny, "strided", text, (max_length, stride, None))
    assert found.tokens == count == len(tokens) - 1
    assert found.nll == pytest.approx(total / count, rel=1e-6)
    assert found.nll == pytest.approx(weighed / weights, rel=1e-2)  # as the guide weighs them


def test_llama_cpp_scores_second_halves(tiny, text):
    lm, tokenizer, _ = tiny
    tokens, n_ctx, total, count = tokenizer(LINES[:-1], return_tensors="pt").input_ids[0], 32, 0.0, 0
    for i in range(len(tokens) // n_ctx):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx].clone()
        chunk[0] = tokenizer.bos_token_id
        of_each = nll(lm, chunk)
        for j in range(n_ctx // 2, n_ctx - 1):
            total, count = total + of_each[j].item(), count + 1
    found, _ = measured(tiny, "llama.cpp", text, (n_ctx, None, None))
    assert found.tokens == count and found.nll == pytest.approx(total / count, rel=1e-6)


def test_lm_eval_scores_every_document_by_itself(tiny, tmp_path):
    lm, tokenizer, _ = tiny
    documents = [" ".join(WORDS[:70]), " ".join(WORDS[70:80]) + " \n", " ".join(WORDS[80:200])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"page": document}) + "\n" for document in documents))
    total = 0.0
    for document in documents:
        ids = [1, *tokenizer(document, add_special_tokens=False).input_ids]
        for start in range(0, len(ids) - 1, 32):
            end = min(start + 32, len(ids) - 1)
            begin = 0 if not start else end - 32
            total += nll(lm, torch.tensor(ids[begin : end + 1]))[start - begin :].sum().item()
    found, cut = measured(tiny, "lm-eval", str(tmp_path / "d.jsonl"), (32, None, None))
    assert found.tokens == 200 and found.nll * 200 == pytest.approx(total, rel=1e-6)
    assert cut.words == sum(len(re.split(r"\s+", document)) for document in documents) == 201
    assert cut.nbytes == sum(len(document.encode()) for document in documents)
    some = cut_text("lm-eval", str(tmp_path / "d.jsonl"), tokenizer, (32, None, 1))
    assert some.words == 70 and len(some.windows) == 3


def test_ours_scores_every_token_after_a_bos(tiny, text):
    lm, tokenizer, _ = tiny
    ids = tokenizer(LINES, add_special_tokens=False, return_tensors="pt").input_ids[0]
    windows = [torch.cat([torch.tensor([1]), row]) for row in ids[: len(ids) // 31 * 31].view(-1, 31)]
    found, _ = measured(tiny, "compress", text, (32, None, None))
    assert found.nll == pytest.approx(torch.cat([nll(lm, w) for w in windows]).mean().item(), rel=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_only_the_first_windows_if_asked(tiny, text, protocol):
    whole = cut_text(protocol, text, tiny[1], (16, None, None)).windows
    some = cut_text(protocol, text, tiny[1], (16, None, 2)).windows
    wanted = whole if protocol == "lm-eval" else whole[:2]  # one document
    assert [w.targets.tolist() for w in some] == [w.targets.tolist() for w in wanted]


def test_what_cannot_be_meant_is_one_line(tiny, text, tmp_path):
    with pytest.raises(InputError, match="no protocol wikitext: choose compress, wanda, gptq"):
        cut_text("wikitext", text, tiny[1], ANY)
    with pytest.raises(InputError, match="less than one window of 2048"):
        cut_text("wanda", text, tiny[1], ANY)
    with pytest.raises(InputError, match="--stride 17 leaves tokens out"):
        cut_text("strided", text, tiny[1], (16, 17, None))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="holds no text to score"):
        cut_text("lm-eval", str(tmp_path / "empty.txt"), tiny[1], ANY)


def test_the_standard_windows_are_the_tools(tiny, tmp_path):
    (tmp_path / "long.txt").write_text(tiny_text(5000))
    lengths = {
        name: len(cut_text(name, str(tmp_path / "long.txt"), tiny[1], ANY).windows[0].inputs) for name in PROTOCOLS
    }
    assert lengths == {
        **{"compress": 2048, "wanda": 2048, "gptq": 2048, "strided": 1024, "llama.cpp": 512, "lm-eval": 2048}
    }
    assert math.isclose(
        sum(len(w.targets) for w in cut_text("strided", str(tmp_path / "long.txt"), tiny[1], ANY).windows), 5000
    )
