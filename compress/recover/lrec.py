"""LREC: low-rank error correction, adapters beside packed weights that learn to say what the dense model says.

Chai et al., INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank
Adaptation, arXiv:2306.08162, section 3.2. The loss is the divergence from the dense model's next tokens and a little
cross-entropy of the text's own. Any method may have compressed the model; after `low-rank` the adapters go on from its
correction. Needs training text, the packed model in memory (each rank its share of the codes) and the dense model's last
hidden states on disk. Costs a forward and two backwards of the model a step, as blocks are recomputed; neither dense
weights nor the packed layers' inputs are kept for backward (EMEF, section 3.1). Adds rank x (in + out) numbers a layer
to the checkpoint.
"""

from typing import ClassVar

from pydantic import Field

from compress.recover.adapters import AdapterLearner, attach
from compress.recover.variants import STORED, AdapterOptions
from compress.recovery import Student

NEEDS: frozenset[str] = frozenset()
KEEPS_CODES = True  # so that many ranks need not have all of them each


class Options(AdapterOptions):
    """The adapters and how they are trained."""

    OFFERED: ClassVar[tuple[str, ...]] = STORED

    rank: int = Field(32, ge=1, description="rank of B A, unless an earlier method has set it")
    alpha: float = Field(128.0, gt=0, description="B A is scaled by alpha / rank (rslora: / √rank)")
    ce: float = Field(0.06, ge=0, description="weight of the cross-entropy of the text's own next tokens")


def recover_model(student: Student, options: Options) -> AdapterLearner:
    """Adapters on all linear layers, or on those that `targets` names."""
    return attach(student, options)
