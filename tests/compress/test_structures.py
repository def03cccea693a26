"""What is left after structures were taken out computes what the whole model computes without them."""

import pytest
import torch
from tiny import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import InputError
from compress.pipeline import open_model
from compress.structures import CHANNELS, HEADS, find_structures, masked, with_sizes

CASES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
    "qwen3": {},
    "gemma2": {"num_key_value_heads": 1},
    "gemma3_text": {"num_key_value_heads": 1},
    "smollm3": {},
    "granite": {},
    "cohere": {},
    "starcoder2": {},
    "phi": {"num_key_value_heads": 4},
}


def loaded(folder):
    model = open_model(folder)
    for index in range(model.n_blocks):
        model.load_block(index)
    return model


def random_choice(structures, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for kind in structures.kinds:
        scores = torch.rand(structures.n_blocks, kind.size, generator=generator)
        keep[kind.name] = scores >= scores.topk(widths[kind.name]).values[:, -1:]
    return keep


def smaller(model, structures, keep, widths):
    """A plain transformers model of what is left."""
    config = with_sizes(model.config.to_dict(), structures.sizes(widths))
    small = AutoModelForCausalLM.from_config(type(model.config).from_dict(config)).eval()
    state = {}
    for name, tensor in model.lm.state_dict().items():
        if name.startswith(model.path + "."):
            index, _, short = name.removeprefix(model.path + ".").partition(".")
            chosen = {kind: each[int(index)] for kind, each in keep.items()}
            tensor = structures.removed(short, tensor, chosen)
        state[name] = tensor
    small.load_state_dict(state, strict=True)
    return small


@pytest.mark.parametrize("architecture", CASES)
def test_what_is_left_computes_what_the_masked_model_computes(tmp_path, architecture):
    model = loaded(save_tiny(tmp_path, architecture, **CASES[architecture]))
    for parameter in model.lm.parameters():  # biases and norms of a new model are zeros and ones
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    structures = find_structures(model, heads=True, multiple_of=8)
    widths = {kind.name: kind.widths[len(kind.widths) // 2 - 1] for kind in structures.kinds}
    assert all(widths[kind.name] < kind.size for kind in structures.kinds)
    keep = random_choice(structures, widths)
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        whole = model.lm(tokens, use_cache=False).logits
        with masked(model.modules, structures, keep):
            without = model.lm(tokens, use_cache=False).logits
        left = smaller(model, structures, keep, widths)(tokens, use_cache=False).logits
    torch.testing.assert_close(left, without, rtol=1e-4, atol=2e-5)
    assert (without - whole).abs().max() > 1e-2
    with torch.no_grad():
        assert torch.equal(model.lm(tokens, use_cache=False).logits, whole), "the masks stayed on"


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_sparsity_is_the_share_of_the_blocks_linear_weights(tmp_path, architecture):
    model = loaded(save_tiny(tmp_path, architecture))
    structures = find_structures(model, heads=True, multiple_of=8)
    before = sum(p.numel() for n, p in model.lm.named_parameters() if "proj" in n)
    assert structures.n_weights == before
    for widths in structures.choices(0.3):
        small = smaller(model, structures, random_choice(structures, widths), widths)
        after = sum(p.numel() for n, p in small.named_parameters() if "proj" in n)
        assert structures.sparsity(widths) == pytest.approx(1 - after / before)
        assert structures.sparsity(widths) == pytest.approx(0.3, abs=4 * 3 * 64 * 3 / before)
        assert widths[CHANNELS] % 8 == 0


def test_every_size_is_written_and_reads_back_in_a_config(tmp_path):
    model = open_model(save_tiny(tmp_path, "qwen2", num_key_value_heads=4))
    structures = find_structures(model, heads=True, multiple_of=8)
    sizes = structures.sizes({CHANNELS: 64, HEADS: 3})
    assert sizes == {"num_key_value_heads": 3, "num_attention_heads": 3, "intermediate_size": 64, "head_dim": 16}
    config = AutoConfig.for_model(**with_sizes(model.config.to_dict(), sizes))
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (3, 16, 64)
    nested = with_sizes({"text_config": {"intermediate_size": 1}, "vision": 2}, {"intermediate_size": 5})
    assert nested == {"text_config": {"intermediate_size": 5}, "vision": 2}


def test_only_numbers_of_heads_that_the_config_takes_are_offered(tmp_path):
    llama = find_structures(open_model(save_tiny(tmp_path / "a", "llama", num_key_value_heads=4)), True, 8)
    assert next(k.widths for k in llama.kinds if k.name == HEADS) == (1, 2, 4), "3 does not divide hidden_size 64"
    qwen = find_structures(open_model(save_tiny(tmp_path / "b", "qwen3", num_key_value_heads=4)), True, 8)
    assert next(k.widths for k in qwen.kinds if k.name == HEADS) == (1, 2, 3, 4)


def test_widths_suit_the_groups_of_a_later_quantization(tmp_path):
    structures = find_structures(open_model(save_tiny(tmp_path)), heads=True, multiple_of=8, group_size=32)
    for widths in structures.choices(0.3):
        assert widths[CHANNELS] % 32 == 0


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("gpt2", "gpt2"), ("mixtral", "mixtral"), ("phi3", "phi3"), ("olmo2", "heads=false"), ("stablelm", "heads=false")],
)
def test_other_architectures_are_refused_in_one_line(tmp_path, architecture, said):
    model = open_model(save_tiny(tmp_path, architecture))
    with pytest.raises(InputError, match=said) as refused:
        find_structures(model, heads=True, multiple_of=8)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("architecture", ["olmo2", "stablelm"])
def test_channels_alone_go_where_heads_cannot(tmp_path, architecture):
    structures = find_structures(open_model(save_tiny(tmp_path, architecture)), heads=False, multiple_of=8)
    assert [kind.name for kind in structures.kinds] == [CHANNELS]


def test_a_sparsity_out_of_reach_is_refused_with_the_nearest(tmp_path):
    structures = find_structures(open_model(save_tiny(tmp_path)), heads=False, multiple_of=64)
    with pytest.raises(InputError, match="only to 0"):
        structures.choices(0.9)
