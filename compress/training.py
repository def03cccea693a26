"""Train a whole model in memory: LoRA (PEFT's) on the linear layers of its blocks, its own weights frozen.

Weights stay in the model's dtype, adapters and their gradients are float32. A language model's head is most of a small
model's work and all of its memory, so the loss is taken a few positions at a time and its gradient with it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from compress.calib.model import Model
from compress.calib.weight_files import read_all
from compress.distill import next_token_loss
from compress.errors import InputError, RunError
from compress.files import write_tensors
from compress.structures import Masks, Structure, Structures, masked

ADAPTER = "default"
SECONDS = "seconds"  # in the metadata of a saved state


def require_peft() -> None:
    """Raise InputError if peft, which the extra `train` brings, is not installed."""
    if find_spec("peft") is None:
        raise InputError('training needs peft: pip install "compress-llm[train]"')


class Trainee:
    """A causal language model with trainable adapters, seen by its structures.

    All of the model is loaded. The adapters start as nothing: B is zero. Their output is not scaled (alpha = rank).
    Needs peft: see `require_peft`.
    """

    def __init__(self, model: Model, structures: Structures, rank: int, seed: int):
        for index in range(model.n_blocks):
            model.load_block(index)
        self.model, self.structures, self.seed, self.device = model, structures, seed, model.device
        self.layers: list[dict[str, Any]] = []  # by block: PEFT's layers by their name within it
        names = {layer.name: layer.name.split(".", model.path.count(".") + 2)[-1] for layer in self._linear()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._inject(list(names), rank)
        for index, block in enumerate(model.modules):
            prefix = f"{model.path}.{index}."
            inside = [short for full, short in names.items() if full.startswith(prefix)]
            self.layers.append({short: block.get_submodule(short) for short in inside})

    def _linear(self) -> Iterator[Any]:
        for index in range(self.model.n_blocks):
            yield from (layer for layer in self.model.layers_of(index) if isinstance(layer.owner, nn.Linear))

    def _inject(self, names: list[str], rank: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), self.model.lm, ADAPTER)
        for name, parameter in self.model.lm.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def factors(self, block: int, layer: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of one layer's adapter, float32."""
        adapted = self.layers[block][layer]
        return adapted.lora_A[ADAPTER].weight, adapted.lora_B[ADAPTER].weight

    def parameters(self) -> dict[str, Tensor]:
        """Every trainable tensor by name."""
        return {name: p for name, p in self.model.lm.named_parameters() if p.requires_grad}

    def loss(self, tokens: Tensor, masks: Masks, frozen_only: bool = False) -> Tensor:
        """Mean cross-entropy of the next token, in nats, with structures masked (see `masked`). `tokens`: [n, seqlen]."""
        with masked(self.model.modules, self.structures, masks, frozen_only):
            return next_token_loss(self.model.lm, tokens.to(self.device))

    def groups(self, block: int, kind: Structure) -> list[Tensor]:
        """The adapters' part in each structure of a block: views [size, ...] of B's rows and A's columns."""
        rows = [self.factors(block, port.layer)[1].view(kind.size, -1) for port in kind.writers]
        return [*rows, self.factors(block, kind.reader.layer)[0].T.unflatten(0, (kind.size, -1))]

    @torch.no_grad()
    def scores(self, batches: list[Tensor]) -> Masks:
        """How much each structure's reader gets of it: sum over its weights of |W| ‖x‖, by structure [blocks, size].

        Wanda's score (Sun et al., arXiv:2306.11695, eq. 1) summed over the structure, x over all tokens of `batches`
        [n, seqlen]; known as Wanda-sp since FLAP (An et al., arXiv:2312.11983).
        """
        readers = [
            (i, k, self.layers[i][k.reader.layer].base_layer) for i in range(self.model.n_blocks) for k in self.kinds
        ]
        with ExitStack() as stack:
            seen = [stack.enter_context(_squares(layer)) for _, _, layer in readers]
            for tokens in batches:
                self.model.lm.base_model(tokens.to(self.device), use_cache=False)
        scores: dict[str, list[Tensor]] = {kind.name: [] for kind in self.kinds}
        for (_, kind, layer), squares in zip(readers, seen, strict=True):
            inputs = layer.weight.float().abs().sum(0) * squares.sqrt()
            scores[kind.name].append(inputs.view(kind.size, -1).sum(1))
        return {name: torch.stack(rows) for name, rows in scores.items()}

    @property
    def kinds(self) -> tuple[Structure, ...]:
        """The kinds of structures."""
        return self.structures.kinds

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapters to the weights, in float32 and rounded once, and take them off."""
        for block, layers in zip(self.model.modules, self.layers, strict=True):
            for name, adapted in layers.items():
                layer = adapted.get_base_layer()
                layer.weight.copy_(layer.weight.float() + adapted.get_delta_weight(ADAPTER))
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, layer)
        self.layers = []


@contextmanager
def _squares(layer: Any) -> Iterator[Tensor]:
    """The sum over tokens of each input's square, float32 [in_features], while open."""
    total = torch.zeros(layer.weight.shape[1], device=layer.weight.device)

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        total.add_(args[0].float().square().flatten(0, -2).sum(0))

    hook = layer.register_forward_pre_hook(add)
    try:
        yield total
    finally:
        hook.remove()


@dataclass
class Session:
    """Where a training run keeps what it needs to go on, and who is told how it goes."""

    file: Path
    tell: Callable[[int, dict[str, Any]], None]  # the step just done, and its figures
    writes: bool = True  # False: another rank does
    earlier: float = 0.0  # seconds that went into the state which `restore` gave
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Spent on the training so far, without what a kill lost."""
        return round(self.earlier + time.monotonic() - self.started, 3)

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Put a state on disk in place of the one before."""
        if self.writes:
            write_tensors(self.file, tensors, {SECONDS: repr(self.seconds)})

    def restore(self) -> dict[str, Tensor] | None:
        """The last state saved. Raises RunError if the file is damaged."""
        if not self.file.exists():
            return None
        try:
            tensors, metadata = read_all(self.file)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{self.file} is damaged ({error}): remove it to train from the start") from error
        self.earlier = float(metadata[SECONDS])
        return tensors


def optimizer_state(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Adam's moments and step counts, as tensors with names."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{index}.{key}": value for index, each in state.items() for key, value in each.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_state` named."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name.removeprefix(prefix + ".").split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
