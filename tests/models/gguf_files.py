"""Random GGUF files of tiny models, written with gguf-py."""

import gguf
import numpy as np
from tiny import tiny_lm
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

Q8, F16, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
TOKENS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *(f"<0x{byte:02X}>" for byte in range(176)),
    "▁",
    "a",
    "b",
    "▁a",
    "ab",
    "▁ab",
]
TOKENS += [f"w{i}" for i in range(200 - len(TOKENS))]


def settings(architecture, model):
    config = model.config
    values = {
        "context_length": 128,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": 128,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "gpt2":
        return values | {"attention.layer_norm_epsilon": 1e-5}
    values |= {"attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0}
    if architecture != "llama":
        values |= {"attention.key_length": 16, "attention.value_length": 16}
    if architecture == "qwen3moe":
        values |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 768}
    return values


def stored_shapes(architecture, model):
    """Name and shape of each tensor as llama.cpp would write it."""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, target in get_gguf_hf_weights_map(model, processor).items():
        shape = shapes[target]
        if target == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if "_exps" in name:
            name += ".weight"
            shape = (shape[0], shape[1] // (1 if "down" in name else 2), shape[2])
        if architecture == "gpt2" and len(shape) == 2 and name.startswith("blk"):
            shape = shape[::-1]
        yield name, shape


def write_gguf(path, architecture="llama", kinds=(Q8,), drop=(), keys=(), tensors=(), **changes):
    """A random GGUF model; matrices take the quantization types of `kinds` in turn, vectors are float32."""
    model = tiny_lm({"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}.get(architecture, architecture), **changes)
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for key, value in {**settings(architecture, model), **dict(keys)}.items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(
            f"{architecture}.{key}", value, gguf.GGUFValueType.UINT32 if kind.name == "INT32" else kind
        )
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types([3, 3, 3, 2, *[6] * 176, *[1] * (len(TOKENS) - 180)])
    for name, identifier in (("bos", 1), ("eos", 2), ("unknown", 3), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", identifier)
    for turn, (name, shape) in enumerate((dict(stored_shapes(architecture, model)) | dict(tensors)).items()):
        if name in drop:
            continue
        kind = kinds[turn % len(kinds)] if len(shape) > 1 else F32
        values = random.standard_normal(shape, np.float32)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
