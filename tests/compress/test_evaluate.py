"""`compress eval`: rows of what was measured, tables, and flags that do not fit together."""

import json
import math
import shutil
import sys

import pytest
from tiny import save_tiny, tiny_tokenizer

from compress.cli import main
from compress.errors import InputError
from compress.evaluate import TextRequest, measure_texts
from compress.pipeline import open_model
from compress.progress import Reporter

QUIET = Reporter(quiet=True)


@pytest.fixture
def call(llama_folder, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", "eval", str(llama_folder), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def test_a_row_has_both_models_and_the_ratio_of_their_perplexities(llama_folder, text_file, tmp_path):
    other = open_model(save_tiny(tmp_path, num_hidden_layers=1))
    requests = [TextRequest(str(text_file), name, 32, None, 3) for name in ("compress", "llama.cpp")]
    rows = measure_texts(open_model(llama_folder), requests, QUIET, other)
    alone = measure_texts(open_model(llama_folder), requests, QUIET)
    for row, one in zip(rows, alone, strict=True):
        assert row["perplexity"] == pytest.approx(one["perplexity"]) and row["perplexity_se"] > 0
        assert row["excess_nll"] == pytest.approx(math.log(row["perplexity"] / row["dense_perplexity"]), abs=1e-9)
        assert row["kl"] > 0 and 0 <= row["top1"] <= 1 and "kl" not in one
    assert [row["tokens"] for row in rows] == [3 * 31, 3 * 15] == [row["tokens"] for row in alone]


def test_a_model_that_reads_the_text_otherwise_is_refused(llama_folder, text_file, tmp_path):
    other = shutil.copytree(llama_folder, tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = None  # puts no BOS
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match="has another tokenizer"):
        request = TextRequest(str(text_file), seqlen=32, max_windows=2)
        measure_texts(open_model(llama_folder), [request], QUIET, open_model(other))


def test_several_protocols_in_one_command(call, llama_folder, text_file):
    flags = ["--ppl", text_file, "--protocol", "wanda,lm-eval", "--seqlen", 64, "--max-windows", 2]
    code, out, _ = call(*flags, "--json")
    found = json.loads(out)
    assert code == 0 and [row["protocol"] for row in found["measured"]] == ["wanda", "lm-eval"]
    assert found["perplexity"] == {"words": found["measured"][0]["perplexity"]}
    whole = found["measured"][1]
    assert whole["word_perplexity"] == pytest.approx(math.exp(whole["nll"] * whole["tokens"] / 4000))
    assert whole["bits_per_byte"] == pytest.approx(math.log2(whole["byte_perplexity"]))
    code, out, _ = call(*flags[:2], "--seqlen", 64, "--max-windows", 2, "--against", llama_folder)
    assert code == 0 and "0.0000 ± 0.0000" in out and "100.00" in out and "a word" not in out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--protocol", "llamacpp"], "no protocol llamacpp"),
        (["--tasks-out", "x.json"], "give --tasks"),
        (["--limit", "3"], "give --tasks"),
        (["--tasks", "piqa", "--against", "x"], "give --ppl"),
        (["--tasks", "piqa", "--protocol", "wanda"], "give --ppl"),
        (["--ppl", "builtin", "--against", "no-such-model"], "no model no-such-model"),
        (["no-such-model", "--ppl", "builtin"], "no model no-such-model"),
        (["other", "--tasks", "piqa", "--tasks-out", "x.json"], "one checkpoint"),
        (["--ppl", "builtin", "--save", "nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(call, flags, line):
    code, out, err = call(*flags)
    assert code == 2 and out == "" and line in err.strip().splitlines()[-1]


@pytest.fixture
def smaller(tmp_path):
    return save_tiny(tmp_path / "smaller", num_hidden_layers=2)


def test_several_checkpoints_make_one_table(call, llama_folder, smaller, text_file, tmp_path):
    """The change of a perplexity is what --against measures of the two, with its error."""
    flags = ["--ppl", text_file, "--protocol", "compress,lm-eval", "--seqlen", 32, "--max-windows", 4]
    code, out, _ = call(smaller, *flags, "--json", "--save", tmp_path / "all.json")
    found = json.loads(out)
    assert code == 0 and found == json.loads((tmp_path / "all.json").read_text())
    assert list(found["checkpoints"]) == [llama_folder.name, "smaller"]
    alone = measure_texts(open_model(smaller), [TextRequest(str(text_file), "compress", 32, None, 4)], QUIET)
    assert found["checkpoints"]["smaller"]["measured"][0]["window_nll"] == alone[0]["window_nll"]
    request = TextRequest(str(text_file), "compress", 32, None, 4)
    pair = measure_texts(open_model(smaller), [request], QUIET, open_model(llama_folder))[0]
    rows = {row["measure"]: row["cells"] for row in found["compared"]}
    assert list(rows) == [
        "perplexity, words, compress",
        "perplexity, words, lm-eval",
        "word perplexity, words, lm-eval",
        "size of the weights",
    ]
    first, second = rows["perplexity, words, compress"]
    assert first["value"] == pytest.approx(pair["dense_perplexity"]) and first["change"] is None
    assert math.log(second["change"]) == pytest.approx(pair["excess_nll"])
    assert second["change_se"] == pytest.approx(second["change"] * pair["excess_nll_se"])
    assert second["change_se"] < second["se"]
    sizes = [one["bytes"] for one in found["checkpoints"].values()]
    assert rows["size of the weights"][1]["change"] == sizes[1] / sizes[0]
    code, out, _ = call(smaller, *flags, "--against", llama_folder)
    assert (
        code == 0
        and "KL in nats, words, compress" in out
        and "(× " in out
        and f"changes from {llama_folder.name}" in out
    )


def test_what_is_measured_stays_when_a_later_checkpoint_fails(call, smaller, text_file, tmp_path):
    config = smaller / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 200', '"vocab_size": 100'))
    flags = ["--ppl", text_file, "--seqlen", 32, "--max-windows", 2, "--save", tmp_path / "all.json"]
    code, out, _ = call(smaller, *flags)
    assert code in (2, 3) and out == ""
    (kept,) = json.loads((tmp_path / "all.json").read_text())["checkpoints"].values()
    assert kept["perplexity"]["words"] > 1
