"""Packed weights taken apart: codes, which are whole numbers, and the values they stand for, which can learn.

Each layout that learns is a class. What its codes stand for is at every time exactly what it packs to: parameters are
rounded to what a checkpoint stores on their way into the weight, and gradients pass by the rounding.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.kernels.codebook_weight import CodebookWeight, decode_vectors
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import Grid, IntWeight, PackedWeight
from compress.quantize.vectors import AT_ONCE, refined
from compress.recover.learned import stored_scale, straight_through


@dataclass(frozen=True)
class Limits:
    """How far codes may move at once."""

    share: float = 1.0  # of the places whose codes may change
    trust: float = 0.0  # longest change of the weight, as a share of its norm; 0: any, and codes of a grid jump
    force: bool = False  # what may change changes, though another code is no nearer


class Codes(ABC):
    """The codes of one layer, changed in place, and parameters that say what they stand for.

    A place is what has codes of its own: `unit` consecutive inputs of one output. Places are numbered row by row.
    """

    unit: int
    codes: Tensor  # integers, a row an output
    keep: Tensor | None  # bool [out, in], False where a weight stays zero; None: nowhere
    parameters: dict[
        str, nn.Parameter
    ]  # float32; one of size 1 is as large as what it stands for, so rates are relative

    @abstractmethod
    def values(self) -> Tensor:
        """The weight, float32 [out, in], differentiable in the parameters."""

    @abstractmethod
    def packed(self) -> PackedWeight:
        """The weight as a checkpoint holds it: it decodes to `values`, bit for bit."""

    @abstractmethod
    def _movable(self, miss: Tensor, force: bool) -> Tensor:
        """bool [places]: whose codes would change, given what they miss [places, unit]."""

    @abstractmethod
    def _nearest(self, places: Tensor, wanted: Tensor, limits: Limits) -> Tensor:
        """New codes [n, ...] of `places` [n] that come near to `wanted` [n, unit]."""

    @abstractmethod
    def _decoded(self, places: Tensor, codes: Tensor) -> Tensor:
        """What codes [n, ...] would stand for at `places` [n]: [n, unit]."""

    @abstractmethod
    def _put(self, places: Tensor, codes: Tensor) -> None:
        """Change the codes of `places`."""

    def confined(self, reference: Tensor) -> Tensor:
        """A reference [out, in] that what could not change for now leaves no farther off than it takes to change."""
        return reference

    def gradients(self, of_weight: Tensor) -> dict[str, Tensor]:
        """What a gradient [out, in] of the weight is for each parameter, by the chain rule."""
        with torch.enable_grad():
            values = self.values()
        found = torch.autograd.grad(values, list(self.parameters.values()), of_weight.float())
        return dict(zip(self.parameters, found, strict=True))

    @torch.no_grad()
    def approach(self, reference: Tensor, limits: Limits, gradient: Tensor | None = None) -> float:
        """Move codes so that the weight comes nearer to `reference` [out, in] float32. Returns the share that changed.

        PV-Tuning's V step (arXiv:2405.14852, section 3.2). As many places change as `limits` allow: those first that miss
        most or, given the loss's `gradient` [out, in], those whose way to the reference lowers the loss most to first
        order, and none whose way raises it.
        """
        values = self.values()
        flat, wanted = values.view(-1, self.unit), reference.view(-1, self.unit)
        miss = wanted - flat
        towards = miss if gradient is None else gradient.view(-1, self.unit).neg()
        scores = torch.where(self._movable(miss, limits.force), (miss * towards).sum(1).clamp(min=0), 0.0)
        n_places = len(flat) if self.keep is None else int(self.keep.sum())
        places = subspace(scores, limits.share, n_places)
        codes = self._nearest(places, wanted[places], limits)
        change = (self._decoded(places, codes) - flat[places]).square().sum(1)
        taken = change > 0
        if limits.trust:
            taken &= within(change, limits.trust * float(values.norm()))
        self._put(places[taken], codes[taken])
        return int(taken.sum()) / max(n_places, 1)


def subspace(scores: Tensor, share: float, n_places: int) -> Tensor:
    """The places of the largest scores [n], largest first, at most a `share` of `n_places`, none whose score is zero."""
    candidates = scores.nonzero().squeeze(1)
    most = min(math.ceil(share * n_places), len(candidates))
    return candidates[scores[candidates].topk(most).indices]


def within(squares: Tensor, length: float) -> Tensor:
    """bool [n]: the first changes, of squared norms [n], that come to `length` together, and one more."""
    before = squares.double().cumsum(0) - squares
    return before <= length**2


class GridCodes(Codes):
    """Integers on a grid. Scales learn, as a share of what they were; zero points stay, and so zero stays a value."""

    unit = 1

    def __init__(self, weight: IntWeight, keep: Tensor | None):
        self.codes, self.keep, self.bits, self.group_size = weight.codes(), keep, weight.bits, weight.group_size
        self.symmetric, self.dtype = weight.symmetric, weight.scale.dtype
        middle = torch.full_like(weight.scale, 2 ** (weight.bits - 1), dtype=torch.float32)
        self.zero_point = middle if weight.zero_point is None else weight.zero_point.float()
        self.start = weight.scale.float()
        self.parameters = {"scale": nn.Parameter(torch.ones_like(self.start))}

    def scale(self) -> Tensor:
        """[out, groups] float32, as stored."""
        return stored_scale(self.start * self.parameters["scale"], self.dtype)

    def values(self) -> Tensor:
        """The weight, float32 [out, in], differentiable in the parameters."""
        steps = self._grouped(self.codes).float().sub_(self.zero_point.unsqueeze(-1))
        return (steps * self.scale().unsqueeze(-1)).flatten(1)

    def packed(self) -> PackedWeight:
        """The weight as a checkpoint holds it."""
        return self._integers()

    def _integers(self) -> IntWeight:
        grid = Grid(self.scale().detach(), self.zero_point, self.bits)
        return IntWeight.from_codes(self.codes, grid, self.group_size, self.symmetric, self.dtype)

    def confined(self, reference: Tensor) -> Tensor:
        """The reference [out, in] within half a step of the weight."""
        values, half = self.values(), self.scale().repeat_interleave(self.group_size, dim=1) / 2
        return reference.clamp(values - half, values + half)

    def _grouped(self, tensor: Tensor) -> Tensor:
        return tensor.view(*self.start.shape, self.group_size)

    def _movable(self, miss: Tensor, force: bool) -> Tensor:
        """Those more than half a step away on a side where there is another code; if forced, however near."""
        steps, codes = self._grouped(miss) / self.scale().unsqueeze(-1), self._grouped(self.codes)
        room = torch.where(steps > 0, codes < 2**self.bits - 1, codes > 0)
        movable = (room & (steps.abs() > (0.0 if force else 0.5))).flatten()
        return movable if self.keep is None else movable & self.keep.flatten()

    def _nearest(self, places: Tensor, wanted: Tensor, limits: Limits) -> Tensor:
        """The nearest code; the next one on the way there where change is forced or the weight is not to jump."""
        old = self.codes.flatten()[places].float()
        exact = wanted.squeeze(1) / self._of(self.scale(), places) + self._of(self.zero_point, places)
        move = (exact - old).round()
        if limits.force:
            move = torch.where(move == 0, (exact - old).sign(), move)
        if limits.trust:
            move = move.clamp(-1, 1)
        return (old + move).clamp(0, 2**self.bits - 1)

    def _decoded(self, places: Tensor, codes: Tensor) -> Tensor:
        steps = codes - self._of(self.zero_point, places)
        return (steps * self._of(self.scale(), places)).unsqueeze(1)

    def _of(self, each: Tensor, places: Tensor) -> Tensor:
        """What each place [n] has of a value of its group, from [out, groups]."""
        return each.flatten()[places // self.group_size]

    def _put(self, places: Tensor, codes: Tensor) -> None:
        self.codes.view(-1)[places] = codes.to(self.codes.dtype)


class Sparse24GridCodes(GridCodes):
    """Integers of which two in four have codes. No other ever gets one."""

    def __init__(self, weight: Sparse24IntWeight, keep: Tensor | None):
        self.kept = weight.keep() if keep is None else keep
        super().__init__(weight.to_int(), self.kept)

    def packed(self) -> PackedWeight:
        """The weight as a checkpoint holds it."""
        return Sparse24IntWeight.from_int(self._integers(), self.kept)


class VectorCodes(Codes):
    """Numbers of codebook vectors. Codebooks and the scale of each row learn."""

    keep = None

    def __init__(self, weight: CodebookWeight):
        self.codes, self.unit = weight.codes(), weight.vector_size
        self.start, self.dtype = weight.scale.float(), weight.scale.dtype
        codebooks = weight.codebooks.float()
        self.size = codebooks.square().mean((1, 2), keepdim=True).sqrt().clamp(min=torch.finfo(torch.float16).tiny)
        self.codebooks_dtype = weight.codebooks.dtype
        self.parameters = {
            "scale": nn.Parameter(torch.ones_like(self.start)),
            "codebooks": nn.Parameter(codebooks / self.size),
        }

    def scale(self) -> Tensor:
        """[out, 1] float32, as stored."""
        return stored_scale(self.start * self.parameters["scale"], self.dtype)

    def codebooks(self) -> Tensor:
        """[n_codebooks, 2**code_bits, d] float32, as stored."""
        exact = self.size * self.parameters["codebooks"]
        return straight_through(exact.detach().to(self.codebooks_dtype).float(), exact)

    def values(self) -> Tensor:
        """The weight, float32 [out, in], differentiable in the parameters."""
        return decode_vectors(self.codes, self.codebooks()) * self.scale()

    def packed(self) -> CodebookWeight:
        """The weight as a checkpoint holds it."""
        codebooks, scale = self.codebooks().detach().to(self.codebooks_dtype), self.scale().detach().to(self.dtype)
        return CodebookWeight.from_codes(self.codes, codebooks, scale)

    def _movable(self, miss: Tensor, force: bool) -> Tensor:
        return torch.ones(len(miss), dtype=torch.bool, device=miss.device)  # only a search could tell

    def _nearest(self, places: Tensor, wanted: Tensor, limits: Limits) -> Tensor:
        """Each code in turn the best beside the others; where change is forced and none is better, the best exchange."""
        codebooks, old = self.codebooks(), self.codes.flatten(0, 1)[places].long()
        targets = wanted / self._scale_of(places)
        size = max(1, AT_ONCE // codebooks.shape[1])
        found = []
        for target, codes in zip(targets.split(size), old.split(size), strict=True):
            new = refined(target, codes, codebooks)
            if limits.force:
                same = (new == codes).all(1)
                new[same] = exchanged(target[same], codes[same], codebooks)
            found.append(new)
        return torch.cat(found)

    def _decoded(self, places: Tensor, codes: Tensor) -> Tensor:
        return decode_vectors(codes.unsqueeze(1), self.codebooks()) * self._scale_of(places)

    def _scale_of(self, places: Tensor) -> Tensor:
        return self.scale()[places // self.codes.shape[1]]

    def _put(self, places: Tensor, codes: Tensor) -> None:
        self.codes.view(-1, self.codes.shape[2])[places] = codes.to(self.codes.dtype)


def exchanged(targets: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """Codes [n, n_codebooks] after one of them, and another in its place, came nearest to the targets [n, d]."""
    left = targets - decode_vectors(codes.unsqueeze(1), codebooks)
    least, best = torch.full_like(left[:, 0], torch.inf), codes
    for m, codebook in enumerate(codebooks):
        alone = left + codebook[codes[:, m]]
        distances = torch.cdist(alone, codebook).scatter_(1, codes[:, m : m + 1], torch.inf)
        distance, code = distances.min(1)
        nearer = distance < least
        least = torch.where(nearer, distance, least)
        best = torch.where(nearer.unsqueeze(1), codes.index_copy(1, torch.tensor([m]), code.unsqueeze(1)), best)
    return best


def taken_apart(weight: PackedWeight, keep: Tensor | None) -> Codes:
    """The codes of a layer, and what learns beside them. Raises InputError for a layout whose codes cannot move."""
    if isinstance(weight, CodebookWeight):
        return VectorCodes(weight)
    if isinstance(weight, Sparse24IntWeight):
        return Sparse24GridCodes(weight, keep)
    if isinstance(weight, IntWeight):
        return GridCodes(weight, keep)
    raise InputError(f"pv cannot change the codes of a {type(weight).__name__}: quantize with gptq or codebook")
