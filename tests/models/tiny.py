"""Models small enough for unit tests: real architectures, random weights, real files."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Tokenizer

VOCAB = 200
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    "gemma2": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
    "bloom": {"n_layer": 3, "n_head": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "mamba": {"state_size": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
    },
}
ARCHITECTURES = (
    "llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 phi olmo2 gpt_neox opt gpt2 bloom falcon stablelm starcoder2 "
    "cohere granite smollm3 mixtral qwen3_moe deepseek_v3 mamba"
).split()
SHARED = Path(__file__).resolve().parents[3] / "shared"

transformers.utils.logging.disable_progress_bar()


def tiny_lm(architecture: str, **changes):
    """A random model of an architecture, always the same one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SIZES, **SPECIAL.get(architecture, {}), **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word "w3" ... "w199", and a BOS put first."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def byte_tokenizer() -> Qwen2Tokenizer:
    """One token a character of `tiny_text` and no BOS; transformers opens qwen2 folders with no other class."""
    vocab = {"<|endoftext|>": 0} | {letter: i + 3 for i, letter in enumerate("w0123456789\u0120")}
    return Qwen2Tokenizer(vocab=vocab, merges=[])


def tiny_text(words: int = 4000, seed: int = 0) -> str:
    """Words with some structure: each is close to the one before."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 12, (words,), generator=generator).cumsum(0) % (VOCAB - 3) + 3
    return " ".join(f"w{i}" for i in steps.tolist())


def save_tiny(folder: Path, architecture: str = "llama", **changes) -> Path:
    """A tiny model with its tokenizer, as a folder."""
    tiny_lm(architecture, **changes).save_pretrained(folder)
    tokenizer = byte_tokenizer() if architecture == "qwen2" else tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder
