"""LoRA: a low-rank update of each layer learns from text, and so do PEFT's other kinds of adapters.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, section 4.1. The loss is the
cross-entropy of the text's next tokens. Layers that are not quantized end as ordinary weights, the adapter folded in
and what is pruned still zero; beside quantized ones the adapter stays, where its kind adds a product of low rank: lora,
rslora, eva, adalora, vera, miss. With `--scatter` the adapters are for the dense model instead, as in LoRAM (Zhang et al.,
arXiv:2502.13533): they lie in OUT/adapter-for-dense, with zeros where channels were taken out, and the compressed layers
stay as they are. `sparse` lets single weights learn as well (DSEE, Chen et al., arXiv:2111.00160), at places where the
layer has lost most. Needs training text and all of the model in memory. Costs a forward and two backwards of the
model a step, as blocks are recomputed.
"""

from pydantic import Field

from compress.recover.adapters import AdapterLearner, attach
from compress.recover.variants import AdapterOptions
from compress.recovery import Student

NEEDS: frozenset[str] = frozenset()
KEEPS_CODES = True  # so that many ranks need not have all of them each
SCATTERS = True  # its adapters may be for the dense model


class Options(AdapterOptions):
    """The adapters and how they are trained."""

    kl: float = Field(0.0, ge=0, description="weight of the divergence from the dense model's next tokens")
    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy of the text's own next tokens")


def recover_model(student: Student, options: Options) -> AdapterLearner:
    """Adapters on all linear layers, or on those that `targets` names."""
    return attach(student, options)
