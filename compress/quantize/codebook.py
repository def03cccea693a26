"""Codebook: several consecutive inputs share codes that name learned vectors, which add up to the weights.

Additive codebooks as in AQLM (Egiazarian et al., Extreme Compression of Large Language Models via Additive Quantization,
arXiv:2401.06118), started by residual k-means in the metric of the Hessian's diagonal and one sweep that hands each
vector's error on to the columns still to come, as GPTVQ does (van Baalen et al., arXiv:2402.15319, algorithm 1). From
there on codebooks (least squares, by conjugate gradients), row scales and codes (beam search, one group of inputs at a
time) are improved in turn, all three in the metric of the full Hessian. Needs the Hessian; costs about five times as much
as gptq: each iteration compares every vector with each codebook `beam_size` times, and takes seven products of the weight
with the Hessian. Two codebooks of 8 bits for 8 inputs are 2 bits a weight; codebooks and one scale a row come on top.
"""

from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from compress.calib.stats import damped, inverse_factor
from compress.errors import InputError
from compress.kernels.codebook_weight import CodebookWeight, decode_vectors
from compress.kernels.weights import storable
from compress.options import MethodOptions
from compress.quantize.vectors import beam_search, k_means, nearest_weighted, refined
from compress.settle import settle_columns
from compress.task import LayerPlan, LayerTask

NEEDS = frozenset({"hessian"})
MOST_VECTORS = 2**18  # that k-means sees of a layer
BLOCK_SIZE = 128  # columns whose errors are handed on together
SEED = 0
OF_A_MIN = 40  # finding the least of many distances takes as long as this many multiply-adds for each


class Options(MethodOptions):
    """The shape of the codebooks, and how long codes and codebooks are improved."""

    vector_size: int = Field(8, ge=2, le=32, description="consecutive inputs that share their codes")
    code_bits: int = Field(8, ge=2, le=12, description="bits of a code; a codebook has 2**code_bits vectors")
    n_codebooks: int | None = Field(None, ge=1, le=8, description="vectors that add up; none: as --wbits asks")
    beam_size: int = Field(4, ge=1, le=64, description="sums of vectors kept while codes are chosen; 1: greedy")
    iterations: int = Field(3, ge=0, description="times that codebooks, scales and codes are improved in turn")
    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal added to its diagonal")


def planned(shape: tuple[int, int], plan: LayerPlan, options: Options) -> CodebookWeight:
    """The weight that a layer [out, in] of this plan becomes, without values.

    Raises InputError where the options do not come to `plan.wbits`, or the layer cannot be cut into vectors; and for a
    plan that prunes, since a sum of codebook vectors is not zero where it should be.
    """
    if plan.sparsity:
        raise InputError("codebook cannot keep pruned weights at zero: leave out --sparsity and --pattern, or use gptq")
    n_codebooks, rest = divmod(plan.wbits * options.vector_size, options.code_bits)
    if rest or (options.n_codebooks or n_codebooks) != n_codebooks:
        said = f"{options.n_codebooks or n_codebooks} x {options.code_bits} bits for {options.vector_size} inputs"
        raise InputError(f"codebook: {said} are not --wbits {plan.wbits}: change n_codebooks, code_bits or vector_size")
    if shape[1] % options.vector_size:
        raise InputError(
            f"codebook: vectors of {options.vector_size} do not divide {shape[1]} inputs: change vector_size"
        )
    return CodebookWeight.planned(shape, n_codebooks, options.code_bits, options.vector_size)


def flops(out_features: int, in_features: int, options: Options) -> float:
    """Beyond a sweep over the columns: comparisons with codebooks, and products of the weight with the Hessian."""
    vectors, n_codebooks = out_features * in_features / options.vector_size, options.n_codebooks or 2
    compared = vectors * n_codebooks * options.beam_size * 2**options.code_bits * (options.iterations + 1)
    return 14.0 * options.iterations * out_features * in_features**2 + compared * (2 * options.vector_size + OF_A_MIN)


@dataclass(frozen=True)
class _State:
    """A layer's codes, codebooks and scales while they are improved."""

    codes: Tensor  # [out, groups, n_codebooks] int64
    codebooks: Tensor  # [n_codebooks, 2**code_bits, d] float32, values that float16 holds
    scale: Tensor  # [out, 1] float32, likewise

    def vectors(self) -> Tensor:
        """What the codes stand for, before the scale: [out, in]."""
        return decode_vectors(self.codes, self.codebooks)


def quantize_layer(task: LayerTask, options: Options) -> LayerTask:
    """Quantize one layer to its plan's bits."""
    out_features, in_features = task.weight.shape
    wanted = planned((out_features, in_features), task.plan, options)
    factor, damping = inverse_factor(task.stats, options.damping)
    if damping != options.damping:
        task = task.noted(f"codebook: damping raised from {options.damping:g} to {damping:g} to factorize the Hessian")
    scale = storable(task.weight.square().mean(1, keepdim=True).sqrt(), torch.float16)
    with damped(task.stats, damping) as hessian:
        codebooks = _start_codebooks(task.weight / scale, scale, hessian.diagonal(), wanted)
    state = _sweep(task.weight, _State(torch.empty(0), codebooks, scale), factor, options.beam_size)
    best, least = state, task.stats.output_energy(state.vectors() * state.scale - task.weight)
    for _ in range(options.iterations):
        with damped(task.stats, damping) as hessian:
            state = _fit_codebooks(task.weight, state, hessian)
            state = _fit_scale(task.weight, state, hessian)
            state = _improve_codes(task.weight, state, hessian, options.beam_size)
        error = task.stats.output_energy(state.vectors() * state.scale - task.weight)
        if error < least:
            best, least = state, error
    return task.quantized(CodebookWeight.from_codes(best.codes, best.codebooks.half(), best.scale.half()))


def _start_codebooks(rows: Tensor, scale: Tensor, diagonal: Tensor, wanted: CodebookWeight) -> Tensor:
    """Codebooks [n_codebooks, 2**code_bits, d] by residual k-means of the vectors in `rows` [out, in].

    An input's error counts as much as the Hessian's `diagonal` [in] says, a row's as its squared scale [out, 1].
    """
    generator = torch.Generator().manual_seed(SEED)
    d = wanted.vector_size
    vectors = rows.reshape(-1, d)
    chosen = torch.randperm(len(vectors), generator=generator)[:MOST_VECTORS].to(rows.device)
    groups = rows.shape[1] // d
    residual = vectors[chosen]
    weights = scale.square()[chosen // groups] * diagonal.unflatten(0, (-1, d))[chosen % groups]
    weights = weights / weights.mean()
    codebooks = []
    for _ in range(wanted.n_codebooks):
        codebook = k_means(residual, weights, 2**wanted.code_bits, generator)
        codebooks.append(codebook)
        residual = residual - codebook[nearest_weighted(residual, weights, codebook)]
    return torch.stack(codebooks).half().float()


def _sweep(weight: Tensor, start: _State, factor: Tensor, beam_size: int) -> _State:
    """Choose all codes, group after group, with the columns still to come absorbing each group's error.

    `factor`: the upper Cholesky factor U of the inverse Hessian. What is lost for good with an error e of group g, after
    all later columns made up for what they can, is |e U_gg⁻¹|², so that is the distance codes are chosen by.
    """
    d, codebooks = start.codebooks.shape[2], start.codebooks
    columns = (weight / start.scale).T.clone(memory_format=torch.contiguous_format)
    pivots = _diagonal_blocks(factor, d)
    metrics = torch.linalg.solve_triangular(pivots, torch.eye(d, device=weight.device).expand_as(pivots), upper=True)
    codes = torch.empty(weight.shape[0], len(metrics), len(codebooks), dtype=torch.int64, device=weight.device)
    settled = torch.empty(d, weight.shape[0], device=weight.device)

    def settle(i: int, column: Tensor) -> Tensor:
        group, within = divmod(i, d)
        if within == 0:
            metric = metrics[group]
            codes[:, group] = beam_search(columns[i : i + d].T @ metric, codebooks @ metric, beam_size)
            settled.copy_(decode_vectors(codes[:, group : group + 1], codebooks).T)
        return settled[within].clone()

    settle_columns(columns, factor, settle, BLOCK_SIZE, unit=d)
    return replace(start, codes=codes)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks [n / size, size, size] along the diagonal of a matrix [n, n]."""
    blocks = matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _improve_codes(weight: Tensor, state: _State, hessian: Tensor, beam_size: int) -> _State:
    """Choose each group's codes anew, all others as they are, in the metric of the full Hessian. No row's error grows."""
    d, codebooks = state.codebooks.shape[2], state.codebooks
    lower = torch.linalg.cholesky(_diagonal_blocks(hessian, d))
    codes, vectors = state.codes.clone(), state.vectors()
    delta = weight / state.scale - vectors
    length = max(BLOCK_SIZE // d, 1) * d
    for start in range(0, weight.shape[1], length):
        stop = min(start + length, weight.shape[1])
        pull = delta @ hessian[:, start:stop]
        for at in range(start, stop, d):
            group, here = at // d, slice(at, at + d)
            metric = lower[group]
            offset = torch.linalg.solve_triangular(
                metric.T, pull[:, at - start : at - start + d], upper=True, left=False
            )
            old = vectors[:, here]
            target = old @ metric + offset
            found = refined(target, beam_search(target, codebooks @ metric, beam_size), codebooks @ metric)
            new = decode_vectors(found.unsqueeze(1), codebooks)
            better = ((new - old) @ metric - offset).square().sum(1) < offset.square().sum(1)
            codes[better, group] = found[better]
            change = torch.where(better.unsqueeze(1), old - new, 0.0)
            delta[:, here] += change
            pull[:, at - start + d :] += change @ hessian[here, at + d : stop]
    return replace(state, codes=codes)


def _fit_codebooks(weight: Tensor, state: _State, hessian: Tensor, steps: int = 3) -> _State:
    """Codebooks nearer to least tr((W - V) H (W - V)ᵀ) for the codes there are, by conjugate gradients.

    Preconditioned with the blocks of the normal equations that belong to one vector each.
    """
    codes, scale, d = state.codes, state.scale, state.codebooks.shape[2]

    def gathered(gradient: Tensor) -> Tensor:
        """What a gradient [out, in] of the weights is for the codebooks."""
        rows = (gradient * scale).reshape(-1, d)
        sums = [
            torch.zeros_like(codebook).index_add_(0, codes[..., m].flatten(), rows)
            for m, codebook in enumerate(state.codebooks)
        ]
        return torch.stack(sums)

    blocks = _diagonal_blocks(hessian, d)
    inverse = torch.stack(
        [_inverse_blocks(codes[..., m], scale, blocks, book) for m, book in enumerate(state.codebooks)]
    )
    fitted = state.codebooks
    residual = gathered((weight - state.vectors() * scale) @ hessian)
    better = (inverse @ residual.unsqueeze(-1)).squeeze(-1)
    direction, size = better, (residual * better).sum()
    for _ in range(steps):
        curved = gathered((decode_vectors(codes, direction) * scale) @ hessian)
        curvature = (direction * curved).sum()
        if not curvature > 0:
            break
        length = size / curvature
        fitted = fitted + length * direction
        residual = residual - length * curved
        better = (inverse @ residual.unsqueeze(-1)).squeeze(-1)
        before, size = size, (residual * better).sum()
        direction = better + size / before * direction
    return replace(state, codebooks=fitted.half().float())


def _inverse_blocks(codes: Tensor, scale: Tensor, blocks: Tensor, codebook: Tensor) -> Tensor:
    """The inverse of what each vector of a codebook has to do with itself in the normal equations: [k, d, d].

    `codes`: [out, groups]. `blocks`: [groups, d, d], of the Hessian.
    """
    k, groups = len(codebook), codes.shape[1]
    at = codes * groups + torch.arange(groups, device=codes.device)
    mass = torch.zeros(k * groups, device=scale.device)
    mass.index_add_(0, at.flatten(), scale.square().expand(-1, groups).flatten())
    own = (mass.view(k, groups) @ blocks.flatten(1)).view(k, *blocks.shape[1:])
    size = own.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(size > 0, 1e-4 * size, 1.0)  # a vector without a code: its gradient is zero anyway
    own.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    return torch.linalg.inv(own)


def _fit_scale(weight: Tensor, state: _State, hessian: Tensor) -> _State:
    """The best scale of each row for the vectors it has; rows for which there is none keep theirs."""
    vectors = state.vectors()
    pulled = vectors @ hessian
    along, size = (pulled * weight).sum(1, keepdim=True), (pulled * vectors).sum(1, keepdim=True)
    scale = storable(torch.where((along > 0) & (size > 0), along / size, state.scale), torch.float16)
    return replace(state, scale=scale)
