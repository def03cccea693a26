"""Where adapters begin: the directions in which a layer's inputs are largest, and the single weights that learn beside B A."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.kernels.correction import Correction
from compress.recover.variants import n_single
from compress.recovery import Student, StudentLayer

PASSES = 3  # over the text, each sharper
OVERSAMPLED = 2  # times as many directions are followed as are wanted
WINDOWS = 16  # of the text at most
SEED = 0


def leading_inputs(student: Student, layers: Sequence[StudentLayer], rank: int) -> dict[str, Tensor]:
    """By layer the `rank` directions with most of the energy of what enters it, float32 [rank, in], orthonormal.

    EVA's start for A (Paischer et al., arXiv:2410.07170, section 3.1): the first right singular vectors of the inputs, which
    are those of X Xᵀ. They are found by subspace iteration (Halko et al., arXiv:0909.4061, algorithm 4.4), which needs
    no matrix of in x in. EVA's shift of rank between layers is left out. Raises InputError for a rank that a layer is
    too small for, or a student without text.
    """
    if student.windows is None:
        raise InputError("eva adapters start from what the layers' inputs are, and there is no text here")
    modules = {layer.name: student.lm.get_submodule(layer.name) for layer in layers}
    if small := [name for name, module in modules.items() if int(module.in_features) < rank]:  # type: ignore[arg-type]
        raise InputError(f"eva adapters of rank {rank}: {small[0]} has fewer inputs")
    windows, base = student.windows[:WINDOWS], student.lm.base_model

    def run() -> None:
        for window in windows.split(1):
            base(input_ids=window.to(next(student.lm.parameters()).device), use_cache=False)  # type: ignore[operator]

    return leading_directions(modules, run, rank)


@torch.no_grad()
def leading_directions(modules: Mapping[str, nn.Module], run: Callable[[], None], rank: int) -> dict[str, Tensor]:
    """The same of what enters these linear layers while `run` runs; it is called three times."""
    random = torch.Generator().manual_seed(SEED)
    spans: dict[str, Tensor] = {}
    for name, module in modules.items():
        size: Any = module.in_features
        start = torch.randn(size, min(OVERSAMPLED * rank, size), generator=random)
        spans[name] = torch.linalg.qr(start).Q.to(next(module.parameters()).device)
    for turn in range(PASSES):
        with _products(modules, spans) as products:
            run()
        for name, product in products.items():
            if turn + 1 < PASSES:
                spans[name] = torch.linalg.qr(product).Q
            else:
                within = spans[name].T @ product  # X Xᵀ in the coordinates of the span
                spans[name] = spans[name] @ torch.linalg.eigh((within + within.T) / 2).eigenvectors.flip(1)
    return {name: span[:, :rank].T.contiguous() for name, span in spans.items()}


@contextmanager
def _products(modules: Mapping[str, nn.Module], spans: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Σ x xᵀ V of what enters each layer while open, float32 [in, n], for V in `spans`."""
    sums = {name: torch.zeros_like(span) for name, span in spans.items()}

    def adds(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float().flatten(0, -2)
            sums[name].addmm_(x.T, x @ spans[name])

        return add

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(adds(name)).remove)
        yield sums


@torch.no_grad()
def support(layer: StudentLayer, share: float, rank: int) -> Correction:
    """The places of single weights that learn, with zeros for values, or those of an earlier correction with its values.

    DSEE's (arXiv:2111.00160, algorithm 1): the largest of what the best product of rank `rank` leaves, here of what a
    packed layer has lost; of a layer that is not packed, of its weight. No pruned weight is among them. `share`: of the
    layer's weights. Raises InputError where the dense weight is in other units (`StudentLayer.dense`).
    """
    lost, earlier, kept = _lost(layer), layer.correction, layer.kept
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        u, s, v = torch.svd_lowrank(lost, min(rank, *lost.shape))
    left = (lost - u * s @ v.T).abs()
    if kept is not None:
        left.masked_fill_(~kept.to(left.device), -1.0)
    start = torch.zeros(left.numel(), device=left.device)
    if earlier is not None and earlier.index is not None and earlier.value is not None:
        places = earlier.index.long().to(left.device)
        left.view(-1)[places] = torch.inf
        start[places] = earlier.value.float().to(left.device)
    n = max(n_single((left.shape[0], left.shape[1]), share), 0 if earlier is None else earlier.single)
    index = left.flatten().topk(min(n, int((left >= 0).sum()))).indices.sort().values
    empty = lost.new_zeros(0, lost.shape[1]), lost.new_zeros(lost.shape[0], 0)
    return Correction(*empty, index.int(), start[index])


def _lost(layer: StudentLayer) -> Tensor:
    """What a packed layer lacks of its dense weight; the weight of another layer. float32 [out, in]."""
    if (packed := layer.packed) is None:
        return layer.module.weight.float()
    lost = layer.dense().to(layer.module.weight.device) - packed.dequantize()
    return lost if layer.correction is None else lost - layer.correction.delta().to(lost.device)
