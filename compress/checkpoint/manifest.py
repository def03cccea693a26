"""What the tensors of a file in the native layout cannot say themselves: a line of JSON for each layer.

Version 1 knew one memory layout, that of `IntWeight`, and is read as well.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from torch import Tensor

from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError, RunError
from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.correction import Correction, correction_from, part_shapes
from compress.kernels.inputs import InputQuantizer
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight, PackedWeight

VERSION = 2
INT = "int"  # the layout that goes without saying
PARTS = ("packed", "places", "codebooks", "scale", "zero_point")  # tensors of a layer, of all layouts
SHIFT = "input_shift"  # NAME.input_shift: what a layer subtracts from its inputs
INPUTS = {"abits", "static_inputs", "shifted_inputs"}  # in a layer's line, about what enters it
CORRECTION = "correction."  # NAME.correction.a and so on: what is added to a layer's weight
PLACE = {
    "layout",
    "param",
    "index",
    "transposed",
    "embedding",
    "correction",
    *INPUTS,
}  # in a layer's line, but not about its weight


class CorrectionEntry(BaseModel):
    """What the tensors of a layer's correction cannot say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int = Field(default=0, ge=0)
    bits: Literal[1, 2, 4, 8, 16] = 16
    single: int = Field(default=0, ge=0)  # weights that are added one by one

    @classmethod
    def of(cls, correction: Correction) -> "CorrectionEntry":
        """The line of a correction."""
        return cls.model_validate({"rank": correction.rank, "bits": correction.bits, "single": correction.single})

    def parts(self, shape: tuple[int, int] = (0, 0)) -> tuple[str, ...]:
        """Which tensors the correction has."""
        return tuple(part_shapes(shape, self.rank, self.bits, self.single))

    def build(self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Correction:
        """The correction of the layer `name` of `shape` (out, in). Raises RunError where the tensors do not fit."""
        try:
            return correction_from(tensors, shape, self.rank, self.bits, self.single)
        except ValueError as error:
            raise RunError(f"the correction of {name} is damaged ({error}): restore its file") from error


class LayerEntry(BaseModel):
    """A layer's line in the manifest. What its name already says is left out of the JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    WEIGHT: ClassVar[type[PackedWeight]]
    UNIT: ClassVar[str]  # the fact that divides a row into parts of equal length

    in_features: int = Field(ge=1)
    param: str | None = None  # None: NAME.weight
    index: int | None = Field(default=None, ge=0)
    transposed: bool = False
    embedding: bool = False
    abits: int | None = Field(default=None, ge=2, le=8)  # of what enters the layer; None: it is not rounded
    static_inputs: bool = False
    shifted_inputs: bool = False
    correction: CorrectionEntry | None = None

    @property
    def facts(self) -> dict[str, int]:
        """What the weight's class calls its description."""
        return self.model_dump(exclude=PLACE)

    @property
    def parts(self) -> tuple[str, ...]:
        """Which tensors the layer has."""
        added = () if self.correction is None else self.correction.parts()
        shift = [SHIFT] if self.shifted_inputs else []
        return (*self.WEIGHT.expected(0, self.facts), *shift, *(f"{CORRECTION}{part}" for part in added))

    def build(self, name: str, tensors: Mapping[str, Tensor]) -> StoredLayer:
        """The layer from its tensors, by part. Raises RunError where they do not fit this line."""
        packed, facts = tensors["packed"], self.facts
        for part, (shape, dtypes) in self.WEIGHT.expected(packed.shape[0] if packed.dim() else 0, facts).items():
            tensor = tensors[part]
            if self.in_features % facts[self.UNIT] or tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                said = ", ".join(f"{key} {value}" for key, value in facts.items())
                raise RunError(
                    f"{name}.{part} is {tensor.dtype} {list(tensor.shape)}, which does not fit {said}: the file is "
                    "damaged, restore it"
                )
        param = self.param or f"{name}.weight"
        weight, inputs = self.WEIGHT.from_tensors(tensors, facts), self.inputs(name, tensors.get(SHIFT))
        added = self._added(name, tensors, weight.shape)
        return StoredLayer(name, param, self.index, self.transposed, weight, self.embedding, inputs, added)

    def _added(self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Correction | None:
        if self.correction is None:
            return None
        parts = {part: tensors[f"{CORRECTION}{part}"] for part in self.correction.parts()}
        return self.correction.build(name, parts, shape)

    def inputs(self, name: str, shift: Tensor | None) -> InputQuantizer | None:
        """How what enters the layer is rounded, with the tensor of its shift. Raises RunError where that does not fit."""
        if shift is not None and (tuple(shift.shape), shift.dtype) != ((self.in_features,), torch.float32):
            raise RunError(
                f"{name}.{SHIFT} is {shift.dtype} {list(shift.shape)}, which does not fit {self.in_features} inputs: the "
                "file is damaged, restore it"
            )
        return None if self.abits is None else InputQuantizer(self.abits, self.static_inputs, shift)


class IntEntry(LayerEntry):
    """The line of an `IntWeight`. Its layout is not written: files of before there were others read on."""

    WEIGHT: ClassVar[type[PackedWeight]] = IntWeight
    UNIT = "group_size"

    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=1)
    symmetric: bool = True


class Sparse24IntEntry(IntEntry):
    """The line of a `Sparse24IntWeight`."""

    WEIGHT = Sparse24IntWeight

    layout: Literal["int-2:4"]
    in_features: int = Field(ge=4, multiple_of=4)


class CodebookEntry(LayerEntry):
    """The line of a `CodebookWeight`."""

    WEIGHT = CodebookWeight
    UNIT = "vector_size"

    layout: Literal["codebook"]
    n_codebooks: int = Field(ge=1)
    code_bits: int = Field(ge=1, le=16)
    vector_size: int = Field(ge=1)


LAYOUTS: dict[str, type[IntEntry] | type[CodebookEntry]] = {
    INT: IntEntry,
    "int-2:4": Sparse24IntEntry,
    "codebook": CodebookEntry,
}


def _layout(entry: Any) -> str:
    """Which layout a manifest's line, or one already read, is of."""
    return str(entry.get("layout", INT) if isinstance(entry, dict) else getattr(entry, "layout", INT))


AnyEntry = Annotated[
    Annotated[IntEntry, Tag(INT)]
    | Annotated[Sparse24IntEntry, Tag("int-2:4")]
    | Annotated[CodebookEntry, Tag("codebook")],
    Discriminator(_layout),
]


def entry_of(layer: StoredLayer) -> AnyEntry:
    """The line that describes `layer`."""
    name, entry = next(pair for pair in LAYOUTS.items() if pair[1].WEIGHT is type(layer.packed))
    facts: dict[str, Any] = {
        **layer.packed.description(),
        **({} if name == INT else {"layout": name}),
        "param": None if layer.param == f"{layer.name}.weight" else layer.param,
        "index": layer.index,
        "transposed": layer.transposed,
        "embedding": layer.embedding,
        "abits": None if layer.inputs is None else layer.inputs.bits,
        "static_inputs": layer.inputs is not None and layer.inputs.static,
        "shifted_inputs": layer.inputs is not None and layer.inputs.shift is not None,
        "correction": None if layer.correction is None else CorrectionEntry.of(layer.correction),
    }
    return entry(**facts)


class Manifest(BaseModel):
    """What the tensors of one file cannot say themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = VERSION
    layers: dict[str, AnyEntry] = {}
    masks: dict[str, int] = {}  # layer -> how many weights a row of its mask has

    @classmethod
    def parse(cls, raw: Any, where: str) -> "Manifest":
        """Check what a file says. Raises InputError for a newer version, RunError for anything that makes no sense."""
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise InputError(
                f"{where} is in version {version} of the native layout, and this compress reads {VERSION}: update compress"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in first["loc"]) or "manifest"
            raise RunError(
                f"the manifest of {where} is damaged ({place}: {first['msg']}): restore this file"
            ) from error

    def dump(self) -> dict[str, Any]:
        """As JSON-able values, without what has its default."""
        return {"version": self.version, **self.model_dump(exclude_defaults=True, exclude={"version"})}
