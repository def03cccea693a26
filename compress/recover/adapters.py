"""Adapters of PEFT (arXiv:2106.09685 and others) on compressed linear layers: how they attach, learn and end.

On a packed layer an adapter learns beside the weight and ends as a `Correction`. On any other layer it is folded into the
weight, and where weights are pruned only those that are left learn: W + (B A) ⊙ keep. PEFT finds packed layers by
itself, as they are `nn.Linear`; what it must never do is merge, since it would add numbers to codes.

With `sparse`, single weights S learn beside the product (DSEE, Chen et al., arXiv:2111.00160, section 3.2), at places that
stay as they are chosen (`support`). With a student's `scatter`, adapters are those of LoRAM (Zhang et al.,
arXiv:2502.13533): learned on the compressed model with nothing masked, used on the dense one.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from compress.errors import InputError, RunError
from compress.kernels.correction import Correction
from compress.kernels.linear import PackedLinear, recomputed_linear
from compress.recover.beginnings import leading_inputs, support
from compress.recover.variants import AFTER, NAME, STEPS, STORED, VARIANTS, AdapterOptions, Factors, Variant
from compress.recovery import Learner, ParameterGroup, Recovered, Student, StudentLayer


class MergedAdapter(nn.Module):
    """A linear layer with its adapter in its weight: x (W + (B A) ⊙ keep + S)ᵀ. What is pruned stays exactly zero.

    `keep`: bool [out, in], None: nothing is pruned; `single`: the start of S, None: there is none. The weight is made
    when it is used; in backward its whole gradient is, for as long as that layer takes.
    """

    def __init__(self, adapter: nn.Module, factors: Factors, keep: Tensor | None, single: Correction | None):
        super().__init__()
        self.adapter, self._factors = adapter, factors
        self.register_buffer("pruned", None if keep is None else ~keep, persistent=False)
        self.register_buffer("index", None if single is None else single.index, persistent=False)
        self.value: nn.Parameter | None
        start = None if single is None or single.value is None else nn.Parameter(single.value.float())
        self.register_parameter("value", start)

    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return self._make(*self._learning())

    def _learning(self) -> tuple[Tensor, ...]:
        factors = self._factors(self.adapter)
        return factors if self.value is None else (*factors, self.value)

    def _make(self, a: Tensor, b: Tensor, *values: Tensor) -> Tensor:
        base: Any = self.adapter.base_layer
        frozen = base.values() if isinstance(base, PackedLinear) else base.weight.float()
        with torch.autocast(a.device.type, enabled=False):  # a small B A is lost in bfloat16
            weight = torch.addmm(frozen, b, a)
        if isinstance(pruned := self.pruned, Tensor):
            weight = weight.masked_fill(pruned, 0.0)
        for value in values:
            weight = weight.flatten().index_add(0, self.get_buffer("index").long(), value).view_as(weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        base: Any = self.adapter.base_layer
        out = recomputed_linear(x, self._make, *self._learning())
        return out if base.bias is None else out + base.bias


@dataclass(frozen=True)
class _Adapted:
    """A layer of the student with its adapter."""

    layer: StudentLayer
    adapter: Any  # PEFT's layer
    module: nn.Module  # what stands in the model: the adapter, or what masks it
    fixed: Correction | None  # of an earlier method, below the adapter

    @torch.no_grad()
    def result(self, factors: Factors | None, scatter: bool) -> Recovered:
        if not self.layer.quantized and not scatter:
            return Recovered(weight=self._folded(factors))
        assert factors is not None  # _check refuses others
        a, b = (factor.detach().float() for factor in factors(self.adapter))
        learned = a.ne(0).any(1)  # AdaLoRA leaves rows of zeros
        a, b = a[learned], b[:, learned].contiguous()
        if scatter:
            weight = None if self.layer.quantized else self.layer.module.weight.float()
            return Recovered(None, weight, self.layer.correction, for_dense=Correction(a, b))
        if self.fixed is not None:
            a, b = torch.cat([self.fixed.a.to(a), a]), torch.cat([self.fixed.b.to(b), b], 1)
        return Recovered(correction=Correction(a, b, *self._single()))

    def _single(self) -> tuple[Tensor | None, Tensor | None]:
        """The places and the values of single weights beside a packed one."""
        if isinstance(self.module, MergedAdapter) and self.module.value is not None:
            return self.module.get_buffer("index"), self.module.value.detach().clone()
        return (None, None) if self.fixed is None else (self.fixed.index, self.fixed.value)

    def _folded(self, factors: Factors | None) -> Tensor:
        """The weight of a layer that is not packed, with the adapter in it, float32."""
        if isinstance(self.module, MergedAdapter):
            return self.module.weight()
        if factors is None:
            return _effective_weight(self.adapter)
        a, b = factors(self.adapter)
        return torch.addmm(self.adapter.base_layer.weight.float(), b.float(), a.float())

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns: PEFT's by their own names, and `sparse`."""
        named = dict(self.adapter.named_parameters())
        if isinstance(self.module, MergedAdapter) and self.module.value is not None:
            named["sparse"] = self.module.value
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


class AdapterLearner(Learner):
    """Adapters of one variant over the layers of a student."""

    def __init__(self, tuner: Any, adapted: list[_Adapted], variant: Variant, scatter: bool = False):
        self.tuner, self._adapted, self._variant, self._scatter = tuner, adapted, variant, scatter

    def groups(self) -> list[ParameterGroup]:
        """All of the adapters, as one group."""
        return [ParameterGroup(list(self._parameters().values()))]

    def tensors(self) -> dict[str, Tensor]:
        """What learns, named by its layer."""
        return {name: parameter.data for name, parameter in self._parameters().items()}

    def results(self) -> dict[str, Recovered]:
        """A correction beside a packed weight, or the weight with the adapter folded in; or the layer and one for the dense."""
        return {each.layer.name: each.result(self._variant.factors, self._scatter) for each in self._adapted}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {f"{each.layer.name}.{name}": p for each in self._adapted for name, p in each.parameters().items()}


class AdaLoraLearner(AdapterLearner):
    """AdaLoRA (arXiv:2303.10512): ranks fall from 1.5 x to 1 x `rank` on average, least where they matter most.

    The first tenth of the steps is at the full rank, the second half at the final one. Orthogonality of A and B is not
    asked for: PEFT's model adds that to a loss of its own.
    """

    def __init__(self, tuner: Any, adapted: list[_Adapted], variant: Variant, scatter: bool = False):
        super().__init__(tuner, adapted, variant, scatter)
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

    They are float32 and begin as nothing, or as an earlier correction. Raises InputError for a kind of adapter that a
    layer cannot end with or is too small for, for targets that match no layer, and without peft.
    """
    variant = VARIANTS[options.variant]
    layers = _targets(student, options)
    for layer in layers:
        _check(layer, options, variant, student.scatter)
    directions = leading_inputs(student, layers, options.rank) if variant.leading else {}
    bases = [_base(layer, options, student.scatter) for layer in layers]
    tuner = _injected(bases, options)
    adapted = []
    for base, layer in zip(bases, layers, strict=True):
        adapter = tuner.model.get_submodule(base.key)
        if layer.quantized:
            vars(adapter)["merge"] = _refuse_to_merge
        _as_float(adapter)
        if base.start is not None:
            _begin(adapter, base.start)
        if layer.name in directions:
            adapter.lora_A[NAME].weight.data = directions[layer.name]
        keep = None if layer.quantized or student.scatter else layer.keep
        module = adapter
        if keep is not None or base.single is not None:
            assert variant.factors is not None  # _check refuses others
            module = MergedAdapter(adapter, variant.factors, keep, base.single).to(layer.module.weight.device)
        layer.put(module)
        adapted.append(_Adapted(layer, adapter, module, base.fixed))
    learner = AdaLoraLearner if options.variant == "adalora" else AdapterLearner
    return learner(tuner, adapted, variant, student.scatter)


def _targets(student: Student, options: AdapterOptions) -> list[StudentLayer]:
    last = {name: name.rpartition(".")[2] for name in student.layers}
    if unknown := [target for target in options.targets if target not in last.values()]:
        raise InputError(f"no layer is called {unknown[0]}; there are: {', '.join(dict.fromkeys(last.values()))}")
    return [layer for name, layer in student.layers.items() if not options.targets or last[name] in options.targets]


def _check(layer: StudentLayer, options: AdapterOptions, variant: Variant, scatter: bool) -> None:
    adds = tuple(name for name, each in VARIANTS.items() if each.factors)
    if scatter and options.variant not in STORED:
        what, fit = "to be written for the dense model, and no file could hold", STORED
    elif layer.quantized and options.variant not in STORED:
        what, fit = "quantized, and no file could hold", STORED
    elif layer.keep is not None and variant.factors is None:
        what, fit = "pruned, and would not stay so with", adds
    elif options.sparse and variant.factors is None:
        what, fit = "to have single weights, which do not go with", adds
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
    single: Correction | None  # what its single weights begin as


def _base(layer: StudentLayer, options: AdapterOptions, scatter: bool) -> _Base:
    key, module, earlier = layer.name.replace(".", "-"), layer.module, layer.correction
    single = support(layer, options.sparse, options.rank) if options.sparse else None
    if earlier is None or not isinstance(module, PackedLinear):
        return _Base(key, module, None, None, single)
    start = earlier if VARIANTS[options.variant].starts and earlier.rank and not scatter else None
    factors = (earlier.a, earlier.b) if start is None else (earlier.a[:0], earlier.b[:, :0])
    fixed = Correction(*factors) if single is not None else Correction(*factors, earlier.index, earlier.value)
    module.correction = fixed if fixed.rank or fixed.index is not None else None
    return _Base(key, module, module.correction, start, single)


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
