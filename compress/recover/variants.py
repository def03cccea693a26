"""Kinds of adapters that PEFT has, how each is asked for, and which product B A it adds to a weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compress.recovery import TrainOptions

NAME = "default"  # PEFT's name of the only adapter
STEPS = 1000  # of AdaLoRA's schedule, however many the optimizer makes
BEFORE, AFTER = STEPS // 10, STEPS // 2  # its steps at the full and at the final rank

Factors = Callable[[Any], tuple[Tensor, Tensor]]  # PEFT's layer to A [rank, in], B [out, rank], scale included


class AdapterOptions(TrainOptions):
    """What every method that trains adapters takes."""

    OFFERED: ClassVar[tuple[str, ...]] = ()  # none: all

    lr: float = Field(3e-4, gt=0, description="highest learning rate")
    variant: str = Field("lora", description="kind of adapter")
    rank: int = Field(16, ge=1, description="rank of B A, unless an earlier method has set it; of oft the block size")
    alpha: float = Field(32.0, gt=0, description="B A is scaled by alpha / rank (rslora: / √rank)")
    sparse: float = Field(0.0, ge=0, lt=1, description="share of each layer's weights that learn singly beside B A")
    targets: tuple[str, ...] = Field((), description="last names of layers to adapt, such as q_proj,v_proj; none: all")

    def adds(self, name: str, shape: tuple[int, int], before: tuple[int, int]) -> tuple[int, int]:
        """The rank and the number of single weights of a packed layer's correction at most, on average over layers.

        `name`: of the layer; `before`: those that earlier methods have added.
        """
        rank, single = before
        if self.targets and name.rpartition(".")[2] not in self.targets:
            return before
        if not (rank and VARIANTS[self.variant].starts):
            rank += self.rank
        return rank, max(single, n_single(shape, self.sparse))

    @field_validator("variant")
    @classmethod
    def _offered(cls, given: str) -> str:
        offered = cls.OFFERED or tuple(VARIANTS)
        if given not in offered:
            raise ValueError(f"take one of {', '.join(offered)}")
        return given

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        return tuple(name.strip() for name in given.split(",")) if isinstance(given, str) else given


def n_single(shape: tuple[int, int], share: float) -> int:
    """How many weights of a layer [out, in] learn singly, for `sparse`."""
    return max(1, round(share * shape[0] * shape[1])) if share else 0


@dataclass(frozen=True)
class Variant:
    """One kind of adapter."""

    config: str  # PEFT's class
    settings: Callable[[AdapterOptions], dict[str, Any]]
    factors: Factors | None = None  # None: what it does to a weight is not to add a product
    small: bool = True  # A and B take less room than the weight
    starts: bool = False  # A and B may start as an earlier correction
    leading: bool = False  # A starts as the directions in which the layer's inputs are largest


def _lora(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight * layer.scaling[NAME]


def _adalora(layer: Any) -> tuple[Tensor, Tensor]:
    scale = layer.scaling[NAME] / (layer.ranknum[NAME] + 1e-5)
    return layer.lora_A[NAME] * layer.lora_E[NAME], layer.lora_B[NAME] * scale


def _vera(layer: Any) -> tuple[Tensor, Tensor]:
    a, b = layer.vera_A[NAME][:, : layer.in_features], layer.vera_B[NAME][: layer.out_features]
    return layer.vera_lambda_d[NAME].unsqueeze(1) * a, layer.vera_lambda_b[NAME].unsqueeze(1) * b


def _miss(layer: Any) -> tuple[Tensor, Tensor]:
    block = layer.miss_block[NAME]  # [rank, out]; input j is added to the sum j % rank
    rank = len(block)
    return torch.eye(rank, device=block.device).repeat(1, -(-layer.in_features // rank))[
        :, : layer.in_features
    ], block.T


def _randlora(layer: Any) -> tuple[Tensor, Tensor]:
    a, b = layer.get_scaled_bases(NAME)
    return a, b * layer.scaling[NAME]


def _sized(**more: Any) -> Callable[[AdapterOptions], dict[str, Any]]:
    return lambda options: {"r": options.rank, "lora_alpha": options.alpha, **more}


def _shrinking(options: AdapterOptions) -> dict[str, Any]:
    ranks = {"init_r": options.rank + -(-options.rank // 2), "target_r": options.rank}
    return {**ranks, "lora_alpha": options.alpha, "total_step": STEPS, "tinit": BEFORE, "tfinal": AFTER}


VARIANTS = {
    "lora": Variant("LoraConfig", _sized(), _lora, starts=True),
    "rslora": Variant("LoraConfig", _sized(use_rslora=True), _lora, starts=True),
    "eva": Variant("LoraConfig", _sized(), _lora, leading=True),
    "adalora": Variant("AdaLoraConfig", _shrinking, _adalora),
    "vera": Variant("VeraConfig", lambda options: {"r": options.rank}, _vera),
    "miss": Variant("MissConfig", lambda options: {"r": options.rank}, _miss),
    "randlora": Variant(
        "RandLoraConfig", lambda options: {"r": options.rank, "randlora_alpha": options.alpha}, _randlora, small=False
    ),
    "dora": Variant("LoraConfig", _sized(use_dora=True)),
    "bone": Variant("MissConfig", lambda options: {"r": options.rank, "init_weights": "bat"}),
    "oft": Variant("OFTConfig", lambda options: {"oft_block_size": options.rank}),
}
STORED = tuple(name for name, variant in VARIANTS.items() if variant.factors and variant.small)  # beside packed weights
