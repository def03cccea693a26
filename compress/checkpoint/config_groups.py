"""How a compressed-tensors checkpoint says that layers are quantized: `config_groups`, read and checked.

Any tool may have written them. What is not read here is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from compress.errors import InputError, RunError
from compress.kernels.inputs import InputQuantizer
from compress.recipe import validation_line

READABLE = ("pack-quantized", "int-quantized", "naive-quantized")  # formats
PATIENCE = 1.0  # seconds that a pattern of config.json may search a layer's name


class _Weights(BaseModel):
    """What config.json says of weights, with the defaults of the library."""

    model_config = ConfigDict(frozen=True, strict=True)

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None

    @property
    def by(self) -> str:
        """What shares a scale."""
        inferred = "tensor" if self.group_size is None else "channel" if self.group_size == -1 else "group"
        return self.strategy or inferred


class _Inputs(BaseModel):
    """What config.json says of inputs, with the defaults of the library."""

    model_config = ConfigDict(frozen=True, strict=True)

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False
    strategy: str = "tensor"


class _Group(BaseModel):
    """Layers that are quantized alike."""

    model_config = ConfigDict(frozen=True, strict=True)

    targets: list[str]
    format: str | None = None
    weights: _Weights | None = None
    input_activations: _Inputs | None = None


@dataclass(frozen=True)
class Kind:
    """How the layers of a target are quantized, checked to be read here."""

    bits: int
    symmetric: bool
    by: str  # group, channel or tensor
    group_size: int  # -1: what `by` says
    inputs: InputQuantizer | None


def read_targets(settings: Mapping[str, Any], where: str) -> dict[str, Kind]:
    """How layers are quantized, by target. Raises InputError for what is not read here, or no description."""
    try:
        groups = TypeAdapter(dict[str, _Group]).validate_python(settings.get("config_groups", {}))
    except ValidationError as error:
        complaint = validation_line(error)
        raise InputError(f"the config_groups of {where} are no descriptions ({complaint}): export it again") from error
    found: dict[str, Kind] = {}
    for group in groups.values():
        if group.weights is not None:
            layout = group.format or settings.get("format")
            if layout not in READABLE:
                raise InputError(
                    f'{where} is in the compressed-tensors format "{layout}": only {", ".join(READABLE)} are read'
                )
            found |= dict.fromkeys(group.targets, _kind(group.weights, _inputs(group.input_activations, where), where))
    return found


def _kind(weights: _Weights, inputs: InputQuantizer | None, where: str) -> Kind:
    if weights.type != "int" or weights.by not in ("group", "channel", "tensor") or not 2 <= weights.num_bits <= 8:
        raise InputError(
            f"{where} has {weights.num_bits}-bit {weights.type} weights by {weights.by}: "
            "only integers of 2 to 8 bits by group, channel or tensor are read"
        )
    size = -1 if weights.group_size is None else weights.group_size
    if weights.by == "group" and size < 1:
        raise InputError(f"{where} has weights in groups of {size}: restore its config.json")
    return Kind(weights.num_bits, weights.symmetric, weights.by, size, inputs)


def _inputs(said: _Inputs | None, where: str) -> InputQuantizer | None:
    """How inputs become codes."""
    if said is None:
        return None
    per_token = said.dynamic is True and said.strategy == "token"
    if not per_token or said.type != "int" or not said.symmetric or not 2 <= said.num_bits <= 8:
        way = "found at run time" if said.dynamic else "fixed"
        raise InputError(
            f"{where} has {said.num_bits}-bit {said.type} inputs with scales by {said.strategy}, {way}: only "
            "symmetric integers with a scale found for each token are read"
        )
    return InputQuantizer(said.num_bits)


def kind_of(layer: str, targets: Mapping[str, Kind]) -> Kind:
    """How one layer is quantized: by its own name, a pattern "re:...", or its class, in the library's order."""
    if layer in targets:
        return targets[layer]
    for target in sorted(targets):
        if target.startswith("re:") and _fits(target.removeprefix("re:"), layer):
            return targets[target]
    if "Linear" in targets:
        return targets["Linear"]
    raise RunError(f"no target in config.json's quantization_config is meant for {layer}: restore config.json")


def _fits(pattern: str, layer: str) -> bool:
    """Whether a pattern of config.json is meant for a layer; one that searches for ever is given up."""
    try:
        return regex.match(pattern, layer, timeout=PATIENCE) is not None
    except (regex.error, TimeoutError, RecursionError) as error:
        raise InputError(
            f"config.json has the target re:{pattern}, which is no pattern of layers: restore it"
        ) from error
