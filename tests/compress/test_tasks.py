"""Tasks through lm-eval, which is an extra: run where it is installed."""

import json
from importlib.util import find_spec

import pytest
from tiny import tiny_text

from compress.calib.model import Model
from compress.calib.skeleton import load_tokenizer
from compress.checkpoint.formats import open_weights
from compress.errors import InputError
from compress.eval.perplexity import score
from compress.eval.protocols import cut_text
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.tasks import TaskRequest, run_tasks

QUIET = Reporter(quiet=True)
WORDS = tiny_text(2000, seed=1).split()
CHOICES = """task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
DOCUMENTS = """task: tiny_documents
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
LAST_WORDS = """task: tiny_last_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{' ' + choices[0]}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is missing (extra `eval`)")
in_peace = pytest.mark.filterwarnings("ignore")  # of lm-eval and of what it imports


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of choices and one of documents."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": " ".join(WORDS[i : i + 9]), "choices": [WORDS[i + 9], WORDS[i + 30]], "gold": i % 2}
        for i in range(0, 900, 45)
    ]
    pages = [{"page": " ".join(WORDS[i : i + n])} for i, n in ((0, 100), (100, 20), (300, 64))]
    for name, lines in (("choices", rows), ("documents", pages)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "choices.yaml").write_text(CHOICES.format(folder=folder))
    (folder / "documents.yaml").write_text(DOCUMENTS.format(folder=folder))
    (folder / "last_words.yaml").write_text(LAST_WORDS.format(folder=folder))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def checkpoint(llama_folder, out, format):
    target = {"wbits": 4, "group_size": 32}
    values = {"model": str(llama_folder), "quantizer": "rtn", "format": format, "target": target}
    compress(read_recipe(None, values), llama_folder, out, QUIET)
    return out


@needs_lm_eval
@in_peace
@pytest.mark.slow
def test_every_format_goes_through_our_loader_and_gives_the_same(llama_folder, tasks, tmp_path):
    request = TaskRequest(("tiny_choices",), 12, tasks)
    found = {
        format: run_tasks(checkpoint(llama_folder, tmp_path / format, format), request, "cpu", QUIET)
        for format in ("native", "gptq", "compressed-tensors")
    }
    figures = [results.figures["tiny_choices"] for results in found.values()]
    assert figures[0] == figures[1] == figures[2] and figures[0]["documents"] == 12
    acc = figures[0]["metrics"]["acc"]
    assert len(acc["each"]) == 12 and sum(acc["each"]) / 12 == acc["value"] and acc["higher_is_better"]
    assert acc["se"] == pytest.approx((acc["value"] * (1 - acc["value"]) / 11) ** 0.5)
    raw = found["native"].raw
    assert raw["results"]["tiny_choices"]["acc,none"] == acc["value"] and "samples" not in raw
    assert json.dumps(raw) and raw["configs"]["tiny_choices"]["output_type"] == "multiple_choice"


@needs_lm_eval
@in_peace
@pytest.mark.slow
def test_our_protocol_named_lm_eval_is_its_rolling_likelihood(llama_folder, tasks):
    """The tokenizer puts a BOS of its own, which lm-eval alone would score."""
    results = run_tasks(llama_folder, TaskRequest(("tiny_documents",), None, tasks, 2, 48), "cpu", QUIET)
    theirs = results.figures["tiny_documents"]["metrics"]["bits_per_byte"]["value"]
    cut = cut_text("lm-eval", str(tasks / "documents.jsonl"), load_tokenizer(llama_folder), (48, None, None))
    measured = score(Model(llama_folder, open_weights(llama_folder)), cut.windows)
    ours = measured.nll * measured.tokens / cut.nbytes / 0.6931471805599453
    assert ours == pytest.approx(theirs, rel=2e-3)  # lm-eval rounds log-likelihoods to the model's bfloat16


@needs_lm_eval
@in_peace
@pytest.mark.slow
def test_nothing_is_said_on_stdout(llama_folder, tasks, capsys):
    """lm-eval prints the metrics whose error it bootstraps, in the middle of --json."""
    results = run_tasks(llama_folder, TaskRequest(("tiny_last_words",), 4, tasks), "cpu", QUIET)
    assert results.figures["tiny_last_words"]["metrics"]["perplexity"]["se"] > 0
    said = capsys.readouterr()
    assert said.out == "" and "bootstrapping" in said.err


@needs_lm_eval
@in_peace
@pytest.mark.slow
def test_what_cannot_be_run_is_one_line(llama_folder, tasks, tmp_path):
    with pytest.raises(InputError, match="knows no task no_such_task"):
        run_tasks(llama_folder, TaskRequest(("tiny_choices", "no_such_task"), None, tasks), "cpu", QUIET)
    with pytest.raises(InputError, match=r"--include-path .* is no folder"):
        run_tasks(llama_folder, TaskRequest(("x",), None, tmp_path / "none"), "cpu", QUIET)
    (tmp_path / "broken.yaml").write_text(CHOICES.format(folder=tmp_path / "nowhere"))
    with pytest.raises(InputError, match="lm-eval cannot run tiny_choices"):
        run_tasks(llama_folder, TaskRequest(("tiny_choices",), None, tmp_path), "cpu", QUIET)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is here")
def test_the_extra_is_named_where_lm_eval_is_missing(llama_folder):
    with pytest.raises(InputError, match=r'pip install "compress-llm\[eval\]"'):
        run_tasks(llama_folder, TaskRequest(("piqa",)), "cpu", QUIET)
