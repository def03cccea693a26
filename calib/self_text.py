"""Calibration text that needs no data: what the model itself writes, sampled from its BOS at temperature 1.

After LLM-QAT (Liu et al., arXiv:2305.17888, section 3.1). Costs a generation of nsamples x seqlen tokens with the whole
model in memory.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from compress.calib.data import bos_token_id
from compress.calib.skeleton import load_config, quiet
from compress.calib.weight_files import WeightFiles
from compress.errors import InputError, RunError

BATCH = 32  # windows sampled together

Progress = Callable[[int, int], None]  # tokens of each window done, in all


def self_generated_windows(
    folder: Path, tokenizer: Any, nsamples: int, seqlen: int, seed: int, progress: Progress | None = None
) -> Tensor:
    """`nsamples` windows that the model of `folder` writes, int64 [nsamples, seqlen], the same for the same seed.

    A window starts with the BOS that the tokenizer uses; a model without one starts from its end-of-text token, which
    is left out of the window. The end of a text is never sampled, so that every window is full.
    Raises RunError if the weights do not fit in the memory that is free, InputError if nothing can start a text.
    """
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise InputError(f"{folder} is packed, and --calib self runs dense models only: use builtin or a text file")
    _check_memory(folder)
    bos = bos_token_id(tokenizer)
    start = bos if bos is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError(
            f"{folder}: a text cannot be started, the tokenizer has neither BOS nor EOS: use a file or builtin"
        )
    length = seqlen - (bos is not None)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=load_config(folder), dtype="auto", use_safetensors=True, local_files_only=True
        ).eval()
    stops = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()  # the folder's own may ask for top_k or another temperature
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length,
        max_new_tokens=length,
        eos_token_id=stops if stops is not None else tokenizer.eos_token_id,
        pad_token_id=start,
    )
    batches = [min(BATCH, nsamples - first) for first in range(0, nsamples, BATCH)]
    windows = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for done, size in enumerate(batches):
            report = StoppingCriteriaList([_Report(progress, done * length, len(batches) * length)])
            prompt = torch.full((size, 1), start)
            mask = torch.ones_like(prompt)
            windows.append(
                model.generate(prompt, attention_mask=mask, generation_config=settings, stopping_criteria=report)
            )
    return torch.cat(windows)[:, -seqlen:].clone()


class _Report(StoppingCriteria):
    """Counts generated tokens; never stops anything."""

    def __init__(self, progress: Progress | None, before: int, total: int):
        self.progress, self.before, self.total = progress, before, total

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.progress:
            self.progress(self.before + input_ids.shape[1] - 1, self.total)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _check_memory(folder: Path) -> None:
    """Refuse before the machine starts to swap or the kernel kills the process."""
    needed, free = WeightFiles(folder).nbytes(), available_memory()
    if needed > free:
        raise RunError(
            f"--calib self needs the whole model in memory, {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: "
            "use --calib builtin or a text file"
        )


def available_memory() -> int:
    """Bytes a new process may use without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
