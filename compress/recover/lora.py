"""LoRA: a low-rank update of each layer learns from text, and so do PEFT's other kinds of adapters.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, section 4.1. The loss is the
cross-entropy of the text's next tokens. Layers that are not quantized end as ordinary weights, the adapter folded in
and what is pruned still zero; beside quantized ones the adapter stays, where its kind adds a product of low rank: lora,
rslora, adalora, vera, miss. Needs training text and all of the model in memory. Costs a forward and two backwards of the
model a step, as blocks are recomputed.
"""

from pydantic import Field

from compress.recover.adapters import AdapterLearner, attach
from compress.recover.variants import AdapterOptions
from compress.recovery import Student

NEEDS: frozenset[str] = frozenset()


class Options(AdapterOptions):
    """The adapters and how they are trained."""

    kl: float = Field(0.0, ge=0, description="weight of the divergence from the dense model's next tokens")
    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy of the text's own next tokens")


def recover_model(student: Student, options: Options) -> AdapterLearner:
    """Adapters on all linear layers, or on those that `targets` names."""
    return attach(student, options)
