"""Tiny models with a tokenizer of SentencePiece's kind, which llama.cpp's converter can say in a GGUF file."""

from pathlib import Path

from tiny import tiny_lm
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
MERGES = [("▁", "w"), ("1", "2"), ("▁w", "1"), ("▁w", "12"), ("3", "4"), ("▁w1", "2")]
LETTERS = ["▁", *"w0123456789"]
PIECES = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
PIECES += [piece for piece in dict.fromkeys(left + right for left, right in MERGES) if piece not in PIECES]
PIECES += [f"<unused{i}>" for i in range(320 - len(PIECES))]


def byte_fallback_tokenizer(prepend: bool = False) -> PreTrainedTokenizerFast:
    """BPE of 320 pieces: Gemma's kind, or, with a space put first, Llama 2's."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    model = models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_tiny(folder: Path, architecture: str = "llama", prepend: bool = False, **changes) -> Path:
    """A tiny model with this tokenizer, as a folder."""
    tiny_lm(architecture, vocab_size=len(PIECES), **changes).save_pretrained(folder)
    byte_fallback_tokenizer(prepend).save_pretrained(folder)
    return folder
