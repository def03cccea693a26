"""What a run is asked to do, as data: read from a TOML file and flags, validated, written back whole."""

import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.errors import InputError
from compress.task import LayerPlan

PRUNER, QUANTIZER = "alps", "gptq"  # what measured best (README, tables of methods)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Frozen):
    """Which text runs through the model while it is compressed."""

    source: str = Field("c4", description="c4, wikitext2, ptb, pileval, ultrachat, builtin, self, or a text file")
    nsamples: int = Field(128, ge=1, description="sequences")
    seqlen: int = Field(2048, ge=8, description="tokens a sequence, the leading BOS included")
    seed: int = Field(0, ge=0, lt=2**63, description="which sequences are taken")
    refresh_gradients: int = Field(0, ge=0, description="blocks after which gradients are taken anew; 0: never")


class Target(_Frozen):
    """What the model is asked to become."""

    sparsity: float = Field(0.0, ge=0.0, lt=1.0, description="share of the blocks' weights to remove")
    pattern: str = Field("unstructured", description="unstructured, n:m (n kept of every m inputs), or blocks as 16x16")
    compare: Literal["row", "layer"] | None = Field(None, description="what unstructured scores compete within")
    wbits: Literal[2, 3, 4, 8, 16] = Field(16, description="bits a weight; 16 leaves weights as they are")
    group_size: int = Field(128, description="inputs that share a scale; -1: one scale an output channel")
    symmetric: bool | None = Field(None, description="zero in the middle of the codes; False: stored zero points")
    head_bits: Literal[4, 8, 16] = Field(16, description="bits of the embeddings and the head")
    allocate: str = Field("uniform", description="how sparsity is spread over layers")

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
        if self.allocate != "uniform" and self.n_of_m is not None:
            raise ValueError(f"pattern {self.pattern} fixes every layer's sparsity: leave out allocate {self.allocate}")
        if self.allocate != "uniform" and not self.sparsity:
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
        # More readers take symmetric weights; below four bits a grid that fits is worth more (README, table).
        symmetric = self.wbits >= 4 if self.symmetric is None else self.symmetric
        return LayerPlan(
            self.density_gap, self.n_of_m, self.block, self.compare, self.wbits, self.group_size, symmetric
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
    sequential: bool = Field(False, description="within a block, calibrate each layer on already compressed ones")
    format: str = Field("auto", description="auto, compressed-tensors, gptq or native")
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="by method name")

    @model_validator(mode="after")
    def _methods(self) -> "Recipe":
        target = self.target
        prunes, quantizes = target.density_gap > 0, target.wbits < 16
        if self.pruner and not prunes:
            raise ValueError(f"pruner {self.pruner} has nothing to do: give --sparsity or --pattern")
        if self.refine and not prunes:
            raise ValueError(f"refine {self.refine} has nothing to do: give --sparsity or --pattern")
        if self.refine and target.block is not None:
            raise ValueError(
                f"refine {self.refine} works on single weights, which pattern {target.pattern} does not allow: "
                "leave out refine"
            )
        if self.quantizer and not quantizes:
            raise ValueError(f"quantizer {self.quantizer} has nothing to do: give --wbits")
        if not (prunes or quantizes or target.head_bits < 16):
            raise ValueError("nothing to do: give --sparsity, --pattern, --wbits or --head-bits")
        return self

    @property
    def steps(self) -> list[tuple[str, str]]:
        """(stage, method) of each step a layer goes through, defaults filled in."""
        steps = []
        if self.target.density_gap > 0:
            steps.append(("prune", PRUNER if self.pruner is None else self.pruner))
            if self.refine is not None:
                steps.append(("refine", self.refine))
        if self.target.wbits < 16:
            steps.append(("quantize", QUANTIZER if self.quantizer is None else self.quantizer))
        return steps

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
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"there is no recipe {file}") from error
        except OSError as error:
            raise InputError(f"cannot read the recipe {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
