"""What a run is asked to do, as data: read from a TOML file and flags, validated, written back whole."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.allocate.choices import CHOICES, Budget, Choice, read_choices
from compress.calib.model_files import read_text
from compress.errors import InputError
from compress.task import LayerPlan
from compress.training_budget import TrainingBudget

PRUNER, INPUTS, QUANTIZER, DRIFT = "alps", "smoothquant", "gptq", 0.25  # what measured best (README, tables of methods)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Frozen):
    """Which text runs through the model while it is compressed."""

    source: str = Field("c4", description="c4, wikitext2, ptb, pileval, ultrachat, builtin, self, or a text file")
    nsamples: int = Field(128, ge=1, description="sequences")
    seqlen: int = Field(2048, ge=8, description="tokens a sequence, the leading BOS included")
    seed: int = Field(0, ge=0, lt=2**63, description="which sequences are taken")
    refresh_gradients: int = Field(0, ge=0, description="blocks after which gradients are taken anew; 0: never")


def _group_size(others: dict[str, Any]) -> int:
    """Inputs that share a scale unless the user says: all of them where a product of integers is to be worth it."""
    return -1 if others.get("abits", 16) < 16 and others.get("wbits", 16) >= 6 else 128


class Target(_Frozen):
    """What the model is asked to become."""

    sparsity: float = Field(0.0, ge=0.0, lt=1.0, description="share of the blocks' weights to remove")
    pattern: str = Field("unstructured", description="unstructured, n:m (n kept of every m inputs), or blocks as 16x16")
    compare: Literal["row", "layer"] | None = Field(None, description="what unstructured scores compete within")
    wbits: Literal[2, 3, 4, 5, 6, 8, 16] = Field(16, description="bits a weight; 16 leaves weights as they are")
    abits: Literal[4, 6, 8, 16] = Field(16, description="bits of what enters a quantized layer; 16: as it comes")
    group_size: int = Field(default_factory=_group_size, description="inputs that share a scale; -1: one an output")
    symmetric: bool | None = Field(None, description="zero in the middle of the codes; False: stored zero points")
    head_bits: Literal[4, 8, 16] = Field(16, description="bits of the embeddings and the head")
    allocate: str = Field("uniform", description="how sparsity and bits are spread over layers")
    budget: str | None = Field(None, description="what the checkpoint may take: 0.25x, 150MiB, or 3.2bits")

    @field_validator("pattern")
    @classmethod
    def _readable(cls, pattern: str) -> str:
        if pattern != "unstructured":
            n, colon, m = pattern.partition(":")
            rows, cross, columns = pattern.partition("x")
            n_of_m = colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)
            blocks = cross and rows.isdecimal() and columns.isdecimal() and 0 < int(rows) and 0 < int(columns)
            if not (n_of_m or blocks):
                raise ValueError(
                    "should be unstructured, n:m with n kept of every m inputs, such as 2:4, or blocks such as 16x16"
                )
        return pattern

    @field_validator("budget")
    @classmethod
    def _amount(cls, budget: str | None) -> str | None:
        if budget is not None:
            Budget.read(budget)
        return budget

    @model_validator(mode="before")
    @classmethod
    def _kept_to(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("budget") is not None:
            return {"allocate": "budget", **values}
        return values

    @model_validator(mode="after")
    def _budgeted(self) -> "Target":
        if self.budget is None:
            if self.allocate == "budget":
                raise ValueError("allocate budget has nothing to keep to: give --budget, such as 3bits or 0.25x")
            return self
        if self.allocate != "budget":
            raise ValueError(f"a budget says itself how bits are spread: leave out allocate {self.allocate}")
        if self.wbits < 16 or self.sparsity or self.pattern != "unstructured":
            raise ValueError(
                "a budget chooses bits and sparsity itself: leave out --wbits, --sparsity and --pattern; "
                "--set budget.choices=3g64,4g128+2:4 says between what"
            )
        return self

    @model_validator(mode="after")
    def _agreeing(self) -> "Target":
        if self.group_size != -1 and self.group_size < 8:
            raise ValueError("group_size should be -1 (per output channel) or at least 8")
        if self.n_of_m is not None and self.sparsity not in (0.0, self.density_gap):
            raise ValueError(f"pattern {self.pattern} removes {self.density_gap:g} of the weights: leave out sparsity")
        if self.block is not None and not self.sparsity:
            raise ValueError(f"pattern {self.pattern} does not say how many blocks to remove: give sparsity")
        if self.compare is not None and self.pattern != "unstructured":
            raise ValueError(f"compare has nothing to do with pattern {self.pattern}: leave it out")
        spreads = self.allocate not in ("uniform", "budget")
        if spreads and self.n_of_m is not None:
            raise ValueError(f"pattern {self.pattern} fixes every layer's sparsity: leave out allocate {self.allocate}")
        if spreads and not self.sparsity:
            raise ValueError(f"allocate {self.allocate} has nothing to do: give --sparsity")
        return self

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(n kept, of m), or None for another pattern."""
        if ":" not in self.pattern:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def block(self) -> tuple[int, int] | None:
        """(outputs, inputs) of the blocks that are pruned whole, or None for another pattern."""
        if "x" not in self.pattern:
            return None
        rows, columns = self.pattern.split("x")
        return int(rows), int(columns)

    @property
    def density_gap(self) -> float:
        """The sparsity that the target comes to, from the pattern if there is one."""
        return self.sparsity if self.n_of_m is None else 1 - self.n_of_m[0] / self.n_of_m[1]

    def layer_plan(self) -> LayerPlan:
        """The same for a single layer, before an allocation moves it."""
        symmetric = self._symmetric(self.wbits)
        return LayerPlan(
            self.density_gap, self.n_of_m, self.block, self.compare, self.wbits, self.group_size, symmetric, self.abits
        )

    def _symmetric(self, wbits: int) -> bool:
        # More readers take symmetric weights; below four bits a grid that fits is worth more (README, table).
        return wbits >= 4 if self.symmetric is None else self.symmetric

    def plan_of(self, choice: Choice) -> LayerPlan:
        """The plan of a layer that is to become one of a budget's choices."""
        return replace(
            self.layer_plan(),
            sparsity=choice.sparsity,
            pattern=choice.pattern,
            compare=self.compare if choice.pattern is None else None,
            wbits=choice.wbits,
            group_size=self.group_size if choice.group_size is None else choice.group_size,
            symmetric=self._symmetric(choice.wbits),
        )


class Recipe(_Frozen):
    """Everything that decides a run's result."""

    model: str
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="auto: as the model is stored")
    calib: Calibration = Calibration()
    target: Target = Target()
    pruner: str | None = None
    refine: str | None = Field(None, description="what improves the mask that the pruner chose")
    train: str | None = Field(None, description="text that methods which train the model learn from")
    quantizer: str | None = None
    activations: str | None = Field(None, description="how what enters quantized layers becomes codes, with abits")
    drift: float | None = Field(
        None, ge=0, le=1, description="share of the drift of earlier layers that each makes up for; none: 0.25"
    )
    recover: list[str] = Field([], description="what wins back the loss that compression cost, in order")
    recover_for: str = Field("15min", description="what each method that trains may take: 15min, 90s or 200000tokens")
    adapter_bits: Literal[1, 2, 4, 8, 16] = Field(16, description="bits of each number of an adapter's factors")
    scatter: bool = Field(False, description="the last adapters are for the dense model, and lie beside the checkpoint")
    sequential: bool = Field(False, description="within a block, calibrate each layer on already compressed ones")
    format: str = Field("auto", description="auto, compressed-tensors, gptq or native")
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="by method name")

    @field_validator("recover", mode="before")
    @classmethod
    def _listed(cls, recover: Any) -> Any:
        """One text with commas or plus signs between names is a list too, and none is an empty one."""
        if isinstance(recover, str):
            recover = re.split("[,+]", recover)
        if not isinstance(recover, list) or not all(isinstance(name, str) for name in recover):
            return recover
        names = [name.strip().replace("_", "-") for name in recover]
        if "none" in names and len(names) > 1:
            raise ValueError("none stands alone")
        return [] if names == ["none"] else names

    @field_validator("recover_for")
    @classmethod
    def _lasting(cls, recover_for: str) -> str:
        TrainingBudget.read(recover_for)
        return recover_for

    @model_validator(mode="after")
    def _recovers(self) -> "Recipe":
        if self.recover and not (self.prunes or self.quantizes):
            raise ValueError(f"recover {self.recover[0]} has nothing to do: give --wbits, --sparsity or --pattern")
        if not self.recover:
            for name in ("recover_for", "adapter_bits", "scatter"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} {getattr(self, name)} has nothing to do: give --recover")
        return self

    @model_validator(mode="after")
    def _methods(self) -> "Recipe":
        target, prunes, quantizes = self.target, self.prunes, self.quantizes
        if self.pruner and not prunes:
            raise ValueError(f"pruner {self.pruner} has nothing to do: give --sparsity or --pattern")
        if self.refine and not prunes:
            raise ValueError(f"refine {self.refine} has nothing to do: give --sparsity or --pattern")
        if self.refine and target.block is not None:
            raise ValueError(
                f"refine {self.refine} works on single weights, which pattern {target.pattern} does not allow: "
                "leave out refine"
            )
        if self.refine and self.joint:
            raise ValueError(f"refine {self.refine} needs a mask before anything is rounded: leave it out, or --pruner")
        if self.drift and self.sequential:
            raise ValueError("drift is measured with a block as it came, which sequential does not leave: give one")
        if self.quantizer and not quantizes:
            raise ValueError(f"quantizer {self.quantizer} has nothing to do: give --wbits")
        if target.abits < 16 and not quantizes:
            raise ValueError(f"abits {target.abits} is for what enters quantized layers: give --wbits as well")
        if self.activations and target.abits == 16:
            raise ValueError(f"activations {self.activations} has nothing to do: give --abits")
        if not (prunes or quantizes or target.head_bits < 16):
            raise ValueError("nothing to do: give --sparsity, --pattern, --wbits or --head-bits")
        return self

    @property
    def choices(self) -> list[Choice]:
        """What a budget chooses from. Raises ValueError for what is no choice."""
        return read_choices(self.options.get("budget", {}).get("choices", CHOICES))

    @property
    def plans(self) -> list[LayerPlan]:
        """What a layer may become: what the target says, or any of a budget's choices."""
        if self.target.budget is None:
            return [self.target.layer_plan()]
        return [self.target.plan_of(choice) for choice in self.choices]

    @property
    def prunes(self) -> bool:
        """Whether some layer may lose weights."""
        return any(plan.sparsity > 0 for plan in self.plans)

    @property
    def quantizes(self) -> bool:
        """Whether some layer may be quantized."""
        return any(plan.wbits < 16 for plan in self.plans)

    @property
    def steps(self) -> list[tuple[str, str]]:
        """(stage, method) of each step a layer goes through, defaults filled in."""
        steps = []
        if self.target.abits < 16:
            steps.append(("activations", INPUTS if self.activations is None else self.activations))
        if self.prunes and not self.joint:
            steps.append(("prune", PRUNER if self.pruner is None else self.pruner))
            if self.refine is not None:
                steps.append(("refine", self.refine))
        if self.quantizes:
            steps.append(("quantize", self._quantizer))
        return steps + [("recover", name) for name in self.recover]

    @property
    def drift_share(self) -> float:
        """The share of the drift that layers make up for, its default filled in."""
        return (0.0 if self.sequential else DRIFT) if self.drift is None else self.drift

    @property
    def _quantizer(self) -> str:
        return QUANTIZER if self.quantizer is None else self.quantizer

    @property
    def joint(self) -> bool:
        """Whether the quantizer also chooses the mask: it is named as the pruner."""
        return self.quantizes and self.pruner == self._quantizer

    def toml(self) -> str:
        """The recipe as a TOML document that reads back equal."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def differences(self, other: "Recipe") -> list[str]:
        """Dotted keys in which two recipes differ."""
        mine, theirs = _flat(self.model_dump()), _flat(other.model_dump())
        return [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]


def read_recipe(file: Path | None, flags: dict[str, Any]) -> Recipe:
    """A recipe from a TOML file (if any), overridden by nested `flags`.

    Raises InputError with the key, the value and what it should be.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(read_text(file))
        except FileNotFoundError as error:
            raise InputError(f"there is no recipe {file}") from error
        except OSError as error:
            raise InputError(f"cannot read the recipe {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{file} is not a TOML recipe: {error}") from error
    try:
        return Recipe.model_validate(merged(values, flags))
    except ValidationError as error:
        raise InputError(validation_line(error)) from error


def validation_line(error: ValidationError) -> str:
    """The first complaint of pydantic, as one line a user can act on."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "extra_forbidden":
        return f"there is no setting {key}"
    if not key or (first["type"] == "value_error" and isinstance(first["input"], dict)):
        return message
    return f"{key} = {first['input']!r}: {message}"


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values, those of `over` where both have one. Raises InputError where a table meets what is none."""
    both = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and key in both:
            if not isinstance(both[key], dict):
                raise InputError(f"{key} = {both[key]!r}: should be a table, with {', '.join(value)} in it")
            value = merged(both[key], value)
        both[key] = value
    return both


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
