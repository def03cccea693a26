"""A Llama of a true shape with random weights, written a layer at a time, to measure memory and time with.

python tests/models/random_llama.py FOLDER --shape tinyllama-1.1b
"""

import argparse
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.checkpoint.writer import ShardWriter

SHAPES = {
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4),
    "llama-7b": (4096, 11008, 32, 32, 32),
    "memory-test": (1024, 2816, 24, 16, 16),  # 630 MB
}


def write_random_llama(folder: Path, shape: str, vocab_size: int = 32000, shard_bytes: int = 500_000_000) -> Path:
    """bfloat16 shards, config and a word tokenizer in `folder`."""
    hidden, ffn, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder, shard_bytes)
    for name, parameter in skeleton.state_dict().items():
        if parameter.dim() == 1:
            writer.add(name, torch.ones(parameter.shape, dtype=torch.bfloat16))
        else:
            writer.add(name, torch.randn(parameter.shape, dtype=torch.bfloat16, generator=generator) * 0.02)
    writer.finish()
    tiny_tokenizer().save_pretrained(folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    arguments = parser.parse_args()
    write_random_llama(arguments.folder, arguments.shape)
