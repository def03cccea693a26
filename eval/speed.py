"""Speed of checkpoints as plain transformers runs them: tokens a second of a prompt, milliseconds a token after it."""

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.calib.model_files import first_line
from compress.calib.skeleton import quiet
from compress.errors import InputError


@dataclass(frozen=True)
class SpeedProtocol:
    """What is timed: a prompt of `seqlen` tokens, then `new_tokens` greedy ones, batch 1, `repeats` times."""

    seqlen: int = 512
    new_tokens: int = 64
    repeats: int = 5


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats."""

    prefill_tokens_per_second: float
    decode_ms_per_token: float

    def beside(self, baseline: "Speed") -> dict[str, float]:
        """The figures, and how many times as fast as `baseline` they are (1.5: half as fast again)."""
        return {
            **asdict(self),
            "prefill_speedup": self.prefill_tokens_per_second / baseline.prefill_tokens_per_second,
            "decode_speedup": baseline.decode_ms_per_token / self.decode_ms_per_token,
        }


def measure_speed(
    folders: list[Path], protocol: SpeedProtocol, device: str = "cpu", on_step: Callable[[], None] = lambda: None
) -> list[Speed]:
    """The speed of each checkpoint, all in memory at once.

    They take turns, so that whatever else the machine does in the meantime meets all of them; each has one turn that
    does not count before. `on_step` is called after each turn: len(folders) x (repeats + 1) times.
    Raises InputError for a folder that transformers alone does not load, or whose model has no key-value cache.
    """
    models = [_load(folder, device) for folder in folders]
    turns: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(protocol.repeats + 1):
        for model, seconds in zip(models, turns, strict=True):
            seconds.append(_turn(model, protocol))
            on_step()
    return [_speed(seconds[1:], protocol) for seconds in turns]


def _speed(turns: list[tuple[float, float]], protocol: SpeedProtocol) -> Speed:
    prefill, decode = (median(each) for each in zip(*turns, strict=True))
    return Speed(protocol.seqlen / prefill, 1000 * decode / protocol.new_tokens)


def _load(folder: Path, device: str) -> PreTrainedModel:
    """A model as any user of transformers would load it, in the dtype of its config."""
    try:
        with quiet():
            model, about = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # each quantizer and configuration raises its own
        raise _not_loaded(folder, first_line(error)) from error
    if missing := sorted(about["missing_keys"]):
        raise _not_loaded(folder, f"it finds no {missing[0]}")
    if getattr(model, "quantization_method", None) == "compress":
        raise _not_loaded(folder, "it needs a plug-in, which is in this process")
    return model.to(device).eval()


def _not_loaded(folder: Path, reason: str) -> InputError:
    return InputError(
        f"transformers does not load {folder} by itself ({reason}), so it cannot be timed: "
        "leave it out, or write it with --format compressed-tensors"
    )


@torch.no_grad()
def _turn(model: PreTrainedModel, protocol: SpeedProtocol) -> tuple[float, float]:
    """Seconds of the prompt, and of the tokens after it."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, protocol.seqlen), generator=generator).to(model.device)
    last: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        last["logits_to_keep"] = 1  # as generation does; all logits of a long prompt would cost more than the blocks
    started = _now(model.device)
    out = model(prompt, use_cache=True, **last)
    if getattr(out, "past_key_values", None) is None:
        raise InputError(
            f"{model.config.model_type} keeps no keys and values of past tokens: its speed is not measured"
        )
    token = _greedy(out.logits)
    prefilled = _now(model.device)
    for _ in range(protocol.new_tokens):
        out = model(token, past_key_values=out.past_key_values, use_cache=True, **last)
        token = _greedy(out.logits)
    return prefilled - started, _now(model.device) - prefilled


def _greedy(logits: Tensor) -> Tensor:
    """The most likely next token, [1, 1], from logits [1, tokens, vocab_size]."""
    return logits[:, -1:].argmax(-1)


def _now(device: torch.device) -> float:
    """Seconds, after all that the device was asked to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
