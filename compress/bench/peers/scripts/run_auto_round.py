"""AutoRound: rounding learned by signed gradient descent, a block at a time."""

from pathlib import Path

from auto_round import AutoRound
from protocol import Request, load_dense, main, peer_actions
from torch import nn
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer

BATCH_SIZE = 8  # windows a step, its default


def quantize(request: Request) -> None:
    """Quantize and save in auto-round's own format, with the iterations and the learning rate that the setting names."""
    setting = request.setting
    rounding = AutoRound(
        load_dense(request.model),
        AutoTokenizer.from_pretrained(request.model),
        bits=setting["wbits"],
        group_size=setting["group_size"],
        sym=setting["symmetric"],
        iters=setting["iters"],
        lr=setting["lr"],
        dataset=list(request.calibration.split(BATCH_SIZE)),
        nsamples=len(request.calibration),
        seqlen=request.calibration.shape[1],
        batch_size=BATCH_SIZE,
        device_map="cpu",
    )
    outer = request.checkpoint.with_name("named")
    rounding.quantize_and_save(str(outer), format="auto_round")
    next(outer.iterdir()).rename(request.checkpoint)  # a folder that it names after the model and the bits
    outer.rmdir()


def load(checkpoint: Path) -> nn.Module:
    """Transformers with auto-round's kernel that is written in torch."""
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", device_map="cpu", quantization_config=AutoRoundConfig(backend="torch")
    )


if __name__ == "__main__":
    main(peer_actions(quantize, load))
