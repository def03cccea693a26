"""tokenizer.model made from tokenizer.json."""

import json

import pytest
from byte_fallback import byte_fallback_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from compress.errors import InputError, RunError
from compress.export.spm import is_sentencepiece, tokenizer_model, write_tokenizer_model

sentencepiece = pytest.importorskip("sentencepiece", reason="the extra export-gguf is not installed")
pytest.importorskip("google.protobuf", reason="the extra export-gguf is not installed")


def described(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="w0123456789 é\n", min_size=1, max_size=30), prepend=st.booleans())
def test_both_make_the_same_tokens(text, prepend):
    tokenizer = byte_fallback_tokenizer(prepend)
    made = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model(described(tokenizer)))
    assert made.Encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_kinds_of_pieces():
    made = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model(described(byte_fallback_tokenizer())))
    assert made.IsControl(1) and made.IsUnknown(3) and made.IsByte(4 + 65) and made.IdToPiece(4 + 65) == "<0x41>"
    assert (
        made.GetScore(made.PieceToId("▁w"))
        == 0
        > made.GetScore(made.PieceToId("12"))
        > made.GetScore(made.PieceToId("0"))
    )


def test_only_byte_fallback_is_sentencepiece():
    assert is_sentencepiece(described(byte_fallback_tokenizer())) and not is_sentencepiece(described(tiny_tokenizer()))


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path):
    tokenizer = described(byte_fallback_tokenizer())
    tokenizer["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RunError, match=r"put the model's own tokenizer\.model beside it"):
        write_tokenizer_model(tmp_path / "tokenizer.json", tmp_path / "tokenizer.model")


def test_ids_with_gaps_are_refused():
    tokenizer = described(byte_fallback_tokenizer())
    tokenizer["model"]["vocab"].pop("<unused9>", None)
    with pytest.raises(InputError, match="gaps"):
        tokenizer_model(tokenizer)
