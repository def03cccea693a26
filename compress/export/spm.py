"""tokenizer.model from a tokenizer.json that says the same.

llama.cpp's converter takes a folder without tokenizer.model for one of the byte-level tokenizers it knows by what they
make of one text, and can pick a wrong one in silence (it does for Gemma). A tokenizer.json of SentencePiece's kind (BPE
with byte_fallback) says all that matters: SentencePiece merges the pair whose piece has the best score first, and the
merges are in that order, so the score of a piece is minus the rank of the first merge that makes it.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from compress.calib.builtin_text import evaluation_text
from compress.calib.model_files import read_object
from compress.errors import InputError, RunError

PROBE = 20_000  # characters of which both tokenizers have to make the same tokens
FOREIGN = "\n\n\n  naïve 日本語 Ω≈ç√ 🙂\t{x: [1, 22, 333, 0123456789]}  don't"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
LEAST = -1e9  # of a piece that no merge makes


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE in other words."""
    model = tokenizer.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def write_tokenizer_model(tokenizer_json: Path, out: Path) -> None:
    """Write the tokenizer.model that a tokenizer.json of SentencePiece's kind stands for.

    Raises RunError where it makes other tokens of a text than the tokenizer it was made of.
    """
    import sentencepiece
    from tokenizers import Tokenizer

    described = read_object(tokenizer_json)
    serialized = tokenizer_model(described)
    out.write_bytes(serialized)
    ours = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    text = evaluation_text()[:PROBE] + FOREIGN
    if ours.Encode(text) != Tokenizer.from_file(str(tokenizer_json)).encode(text, add_special_tokens=False).ids:
        raise RunError(
            f"{tokenizer_json} cannot be said as a tokenizer.model: put the model's own tokenizer.model beside it"
        )


def tokenizer_model(tokenizer: Mapping[str, Any]) -> bytes:
    """A serialized SentencePiece ModelProto of a tokenizer.json. Raises InputError if its ids have gaps."""
    format_: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    model, added = tokenizer["model"], {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    pieces = {index: piece for piece, index in model["vocab"].items()}
    pieces |= {index: token["content"] for index, token in added.items()}
    if pieces.keys() != set(range(len(pieces))):
        raise InputError("the ids of tokenizer.json have gaps: put the model's own tokenizer.model beside it")
    scores = _scores(model["merges"])
    proto = format_.ModelProto()
    for index in range(len(pieces)):
        piece = pieces[index]
        kind = _kind(piece, added.get(index), model.get("unk_token"))
        proto.pieces.add(piece=piece, score=0.0 if kind != NORMAL else scores.get(piece, LEAST), type=kind)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = BPE, len(pieces), True
    spec.unk_id = next((i for i, piece in pieces.items() if piece == model.get("unk_token")), 0)
    spec.bos_id = spec.eos_id = spec.pad_id = -1  # the tokenizer's settings say which they are
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = _puts_space_first(tokenizer)
    return bytes(proto.SerializeToString())


def _scores(merges: list[Any]) -> dict[str, float]:
    """The score of each piece that a merge makes."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    return scores


def _kind(piece: str, added: Mapping[str, Any] | None, unknown: str | None) -> int:
    if piece == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return BYTE if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else NORMAL


def _puts_space_first(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space goes before every text: Llama 2's normalizer prepends one, Gemma's does not."""
    normalizer, splitter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [normalizer, *normalizer.get("normalizers", [])]
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or (splitter.get("type") == "Metaspace" and splitter.get("prepend_scheme", "always") != "never")
