"""Adapters of PEFT (arXiv:2106.09685 and others) on compressed linear layers: how they attach, learn and end.

On a packed layer an adapter learns beside the weight and ends as a `Correction`. On any other layer it is folded into the
weight, and where weights are pruned only those that are left learn: W + (B A) ⊙ keep. PEFT finds packed layers by
itself, as they are `nn.Linear`; what it must never do is merge, since it would add numbers to codes.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from compress.errors import InputError, RunError
from compress.kernels.correction import Correction
from compress.kernels.linear import CorrectedLinear, PackedLinear, recomputed_linear
from compress.recover.variants import AFTER, NAME, STEPS, STORED, VARIANTS, AdapterOptions, Factors, Variant
from compress.recovery import Learner, ParameterGroup, Recovered, Student, StudentLayer


class MaskedAdapter(nn.Module):
    """A pruned linear layer with its adapter: x (W + (B A) ⊙ keep)ᵀ. What is pruned stays exactly zero."""

    def __init__(self, adapter: nn.Module, factors: Factors, keep: Tensor):
        super().__init__()
        self.adapter, self._factors = adapter, factors
        self.register_buffer("pruned", ~keep, persistent=False)

    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return self._make(*self._factors(self.adapter))

    def _make(self, a: Tensor, b: Tensor) -> Tensor:
        base: Any = self.adapter.base_layer
        with torch.autocast(a.device.type, enabled=False):  # a small B A is lost in bfloat16
            return torch.addmm(base.weight.float(), b, a).masked_fill(self.get_buffer("pruned"), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        base: Any = self.adapter.base_layer
        out = recomputed_linear(x, self._make, *self._factors(self.adapter))
        return out if base.bias is None else out + base.bias


@dataclass(frozen=True)
class _Adapted:
    """A layer of the student with its adapter."""

    layer: StudentLayer
    adapter: Any  # PEFT's layer
    module: nn.Module  # what stands in the model: the adapter, or what masks it
    fixed: Correction | None  # of an earlier method, below the adapter

    @torch.no_grad()
    def result(self, factors: Factors | None) -> Recovered:
        if isinstance(self.module, MaskedAdapter):
            return Recovered(weight=self.module.weight())
        if factors is None:
            return Recovered(weight=_effective_weight(self.adapter))
        a, b = (factor.detach().float() for factor in factors(self.adapter))
        if self.layer.packed is None:
            return Recovered(weight=torch.addmm(self.adapter.base_layer.weight.float(), b, a))
        learned = a.ne(0).any(1)  # AdaLoRA leaves rows of zeros
        a, b = a[learned], b[:, learned].contiguous()
        if self.fixed is None:
            return Recovered(self.layer.packed, correction=Correction(a, b))
        a, b = torch.cat([self.fixed.a.to(a), a]), torch.cat([self.fixed.b.to(b), b], 1)
        return Recovered(self.layer.packed, correction=Correction(a, b, self.fixed.index, self.fixed.value))


class AdapterLearner(Learner):
    """Adapters of one variant over the layers of a student."""

    def __init__(self, tuner: Any, adapted: list[_Adapted], variant: Variant):
        self.tuner, self._adapted, self._variant = tuner, adapted, variant

    def groups(self) -> list[ParameterGroup]:
        """All of the adapters, as one group."""
        return [ParameterGroup(list(self._parameters().values()))]

    def tensors(self) -> dict[str, Tensor]:
        """What learns, named by its layer."""
        return {name: parameter.data for name, parameter in self._parameters().items()}

    def results(self) -> dict[str, Recovered]:
        """A correction beside a packed weight, or the weight with the adapter folded in."""
        return {each.layer.name: each.result(self._variant.factors) for each in self._adapted}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{each.layer.name}.{name}": parameter
            for each in self._adapted
            for name, parameter in each.adapter.named_parameters()
            if parameter.requires_grad
        }


class AdaLoraLearner(AdapterLearner):
    """AdaLoRA (arXiv:2303.10512): ranks fall from 1.5 x to 1 x `rank` on average, least where they matter most.

    The first tenth of the steps is at the full rank, the second half at the final one. Orthogonality of A and B is not
    asked for: PEFT's model adds that to a loss of its own.
    """

    def __init__(self, tuner: Any, adapted: list[_Adapted], variant: Variant):
        super().__init__(tuner, adapted, variant)
        allocator = tuner.rankallocator
        for name, parameter in tuner.model.named_parameters():
            if parameter.requires_grad:
                for sums in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                    sums[name] = torch.zeros_like(parameter.data)
        self._values = {n: p for n, p in tuner.model.named_parameters() if "lora_E" in n}
        self._gone = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in self._values.items()}
        self._settled = torch.tensor(False)

    @torch.no_grad()
    def update(self, progress: float, lr: float) -> Mapping[str, float]:
        """Take from the ranks what the schedule says. Gives the mean rank of a layer."""
        step = min(round(progress * STEPS), STEPS - AFTER)
        if not self._settled:
            allocator, last = self.tuner.rankallocator, step == STEPS - AFTER
            if last:
                allocator.update_ipt(self.tuner.model)
            _, rows = allocator.update_and_allocate(self.tuner.model, step, force_mask=last)
            for name, kept in (rows or {}).items():
                self._gone[name].copy_(~torch.tensor(kept).unsqueeze(1))
            self._settled.fill_(last)
        for name, value in self._values.items():
            value.masked_fill_(self._gone[name], 0.0)
        ranks = sum(int((~gone).sum()) for gone in self._gone.values())
        return {"rank": ranks / len(self._gone)}

    def tensors(self) -> dict[str, Tensor]:
        """What learns, and what decides on ranks."""
        allocator = self.tuner.rankallocator
        sums = {"importance": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc, "gone": self._gone}
        named = {f"{kind}.{name}": tensor for kind, tensors in sums.items() for name, tensor in tensors.items()}
        return {**super().tensors(), **named, "settled": self._settled}


def attach(student: Student, options: AdapterOptions) -> AdapterLearner:
    """Put adapters in place of the student's layers; nothing but them learns.

    They are float32 and begin as nothing, or as the product of an earlier correction. Raises InputError for a kind of
    adapter that a layer cannot end with or is too small for, for targets that match no layer, and without peft.
    """
    variant = VARIANTS[options.variant]
    layers = _targets(student, options)
    for layer in layers:
        _check(layer, options, variant)
    bases = [_base(layer, variant) for layer in layers]
    tuner = _injected(bases, options)
    adapted = []
    for base, layer in zip(bases, layers, strict=True):
        adapter = module = tuner.model.get_submodule(base.key)
        if layer.packed is not None:
            vars(adapter)["merge"] = _refuse_to_merge
        elif layer.keep is not None:
            assert variant.factors is not None  # _check refuses others
            module = MaskedAdapter(adapter, variant.factors, layer.keep.to(layer.module.weight.device))
        _as_float(adapter)
        if base.start is not None:
            _begin(adapter, base.start)
        layer.put(module)
        adapted.append(_Adapted(layer, adapter, module, base.fixed))
    learner = AdaLoraLearner if options.variant == "adalora" else AdapterLearner
    return learner(tuner, adapted, variant)


def _targets(student: Student, options: AdapterOptions) -> list[StudentLayer]:
    last = {name: name.rpartition(".")[2] for name in student.layers}
    if unknown := [target for target in options.targets if target not in last.values()]:
        raise InputError(f"no layer is called {unknown[0]}; there are: {', '.join(dict.fromkeys(last.values()))}")
    return [layer for name, layer in student.layers.items() if not options.targets or last[name] in options.targets]


def _check(layer: StudentLayer, options: AdapterOptions, variant: Variant) -> None:
    if layer.packed is not None and options.variant not in STORED:
        what, fit = "quantized, and no file could hold", STORED
    elif layer.keep is not None and variant.factors is None:
        what, fit = "pruned, and would not stay so with", tuple(n for n, each in VARIANTS.items() if each.factors)
    else:
        return
    raise InputError(f"{layer.name} is {what} a {options.variant} adapter: take one of {', '.join(fit)}")


@dataclass(frozen=True)
class _Base:
    """What an adapter goes on."""

    key: str
    module: nn.Linear
    fixed: Correction | None  # what `module` has of an earlier correction
    start: Correction | None  # what the adapter begins as


def _base(layer: StudentLayer, variant: Variant) -> _Base:
    key, module, earlier = layer.name.replace(".", "-"), layer.module, layer.correction
    if earlier is None or layer.packed is None:
        return _Base(key, module, None, None)
    assert isinstance(module, PackedLinear)  # as layers with packed weights are
    start = earlier if variant.starts and earlier.rank else None
    fixed = earlier if start is None else Correction(earlier.a[:0], earlier.b[:, :0], earlier.index, earlier.value)
    if not fixed.rank and fixed.index is None:
        return _Base(key, module, None, start)
    return _Base(key, CorrectedLinear(module, fixed), fixed, start)


def _injected(bases: list[_Base], options: AdapterOptions) -> Any:
    """PEFT's tuner over a module that has these layers and nothing else."""
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError as error:
        raise InputError('adapters need peft: pip install "compress-llm[train]"') from error
    variant = VARIANTS[options.variant]
    settings = variant.settings(options)
    if ranks := {base.key: base.start.rank for base in bases if base.start is not None}:
        settings["rank_pattern"] = ranks
    config = getattr(peft, variant.config)(target_modules=[base.key for base in bases], **settings)
    holder = nn.ModuleDict({base.key: base.module for base in bases})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](holder, config, NAME)
        except ValueError as error:
            raise InputError(f"{options.variant} adapters of rank {options.rank}: {error}") from error


def _as_float(adapter: Any) -> None:
    """PEFT gives adapters the dtype of a floating base, and in that dtype it also takes DoRA's norms."""
    for name, tensor in (*adapter.named_parameters(), *adapter.named_buffers()):
        if not name.startswith("base_layer.") and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for magnitude in getattr(adapter, "lora_magnitude_vector", {}).values():
        magnitude.weight.data = adapter.base_layer.weight.data.float().norm(dim=1)


@torch.no_grad()
def _begin(adapter: Any, start: Correction) -> None:
    adapter.scaling[NAME] = 1.0
    adapter.lora_A[NAME].weight.copy_(start.a)
    adapter.lora_B[NAME].weight.copy_(start.b)


def _effective_weight(adapter: nn.Module) -> Tensor:
    """float32 [out, in], from the outputs of the unit vectors."""
    adapter = copy.deepcopy(adapter)
    base: Any = adapter.base_layer
    base.float().bias = None
    return adapter(torch.eye(base.in_features, device=base.weight.device)).T.contiguous()


def _refuse_to_merge(*_: Any, **__: Any) -> NoReturn:
    raise RunError("an adapter cannot be merged into packed codes: it stays beside them, as a correction")
