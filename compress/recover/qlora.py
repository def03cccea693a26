"""QLoRA: adapters beside packed weights learn from text; the weights stay as they are quantized.

Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314, eq. 5, on whichever grid the recipe
quantizes to rather than on NF4. The loss is the cross-entropy of the text's next tokens. With `--scatter` the adapters are
for the dense model, as with `lora`. Needs a quantized model, training text and the packed model in memory (each rank its
share of the codes). Costs a forward and two backwards of the model a step, as blocks are recomputed, and adds rank x
(in + out) numbers a layer to the checkpoint.
"""

from typing import ClassVar

from pydantic import Field

from compress.errors import InputError
from compress.recover.adapters import AdapterLearner, attach
from compress.recover.variants import STORED, AdapterOptions
from compress.recovery import Student

NEEDS: frozenset[str] = frozenset()
KEEPS_CODES = True  # so that many ranks need not have all of them each
PACKED_ONLY = True  # known before the run, if the recipe quantizes nothing
SCATTERS = True  # its adapters may be for the dense model


class Options(AdapterOptions):
    """The adapters and how they are trained."""

    OFFERED: ClassVar[tuple[str, ...]] = STORED

    lr: float = Field(2e-4, gt=0, description="highest learning rate")
    alpha: float = Field(16.0, gt=0, description="B A is scaled by alpha / rank (rslora: / √rank)")
    kl: float = Field(0.0, ge=0, description="weight of the divergence from the dense model's next tokens")
    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy of the text's own next tokens")


def recover_model(student: Student, options: Options) -> AdapterLearner:
    """Adapters on all linear layers, or on those that `targets` names. Raises InputError if no layer is quantized."""
    if not any(layer.quantized for layer in student.layers.values()):
        raise InputError("qlora works on quantized layers: give --wbits, or take --recover lora")
    return attach(student, options)
