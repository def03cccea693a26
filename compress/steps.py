"""Find a method by name: the file compress/<folder>/<name>.py is the method, and the verb it defines says its stage."""

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from compress.calib.gradients import FIELDS
from compress.errors import InputError
from compress.options import MethodOptions
from compress.recipe import Recipe, validation_line
from compress.task import LayerPlan, LayerTask

STAGES = {  # stage: the folder of its methods, and the verbs that make a file one of them
    "allocate": ("allocate", ("allocate_layers", "choose_plans")),
    "activations": ("quantize", ("scale_inputs",)),
    "prune": ("prune", ("prune_layer", "prune_model")),
    "refine": ("prune", ("refine_layer",)),
    "quantize": ("quantize", ("quantize_layer",)),
    "recover": ("recover", ("recover_layer", "recover_model")),
}


@dataclass(frozen=True)
class Step:
    """A method with its options, ready for layers."""

    stage: str
    name: str
    needs: frozenset[str]  # the fields of LayerStats it reads
    options: MethodOptions
    run: Callable[[Any], Any]  # a LayerTask to the next one; in the stage "activations" an InputTask
    flops: Callable[[int, int], float]  # of a layer [out, in], beyond the column sweep of a method that reads Hessians
    rows_alone: bool = (
        False  # once the mask is there, no output depends on another: layers of one input are solved as one
    )
    matrices: int = 0  # [in, in], that it holds at once beside the Hessian

    def applies(self, plan: LayerPlan) -> bool:
        """Whether a layer's plan asks for anything that this step does."""
        if self.stage == "activations":
            return plan.abits < 16
        return plan.wbits < 16 if self.stage in ("quantize", "recover") else plan.sparsity > 0


def methods(stage: str) -> dict[str, ModuleType]:
    """Every method of a stage by name, in alphabetical order."""
    folder, verbs = STAGES[stage]
    found = {}
    for entry in pkgutil.iter_modules(import_module(f"compress.{folder}").__path__):
        module = import_module(f"compress.{folder}.{entry.name}")
        if any(hasattr(module, verb) for verb in verbs):
            found[entry.name.replace("_", "-")] = module
    return found


def verb_of(stage: str, module: ModuleType) -> str:
    """The verb with which a method serves a stage."""
    return next(verb for verb in STAGES[stage][1] if hasattr(module, verb))


def whole_model(stage: str, name: str) -> bool:
    """Whether a method works on a whole model rather than on one layer at a time."""
    return verb_of(stage, find_method(stage, name)).endswith("_model")


def find_method(stage: str, name: str) -> ModuleType:
    """The module of one method. Raises InputError that lists what there is."""
    found = methods(stage)
    if name not in found:
        close = get_close_matches(name, found, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(found)}"
        raise InputError(f"there is no method {name!r} to {stage} with; {hint}")
    return found[name]


def find_options(stage: str, name: str, values: dict[str, Any]) -> MethodOptions:
    """A method's options, its defaults overridden by `values`. Raises InputError naming the option."""
    try:
        return find_method(stage, name).Options.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{name}: {validation_line(error)}") from error


def find_steps(recipe: Recipe) -> list[Step]:
    """What each layer goes through, in order; methods of the whole model are not among them.

    Raises InputError for an unknown method or option, and for settings that no method of the recipe reads.
    """
    used = {name for _, name in recipe.steps} | {recipe.target.allocate}
    if unused := [name for name in recipe.options if name not in used]:
        raise InputError(f"options for {unused[0]}, which this recipe does not use (it uses {', '.join(sorted(used))})")
    both = [name for name, method in methods("quantize").items() if hasattr(method, "CHOOSES_MASKS")]
    if recipe.joint and recipe.pruner not in both:
        raise InputError(f"pruner {recipe.pruner} only rounds: take one of {', '.join([*methods('prune'), *both])}")
    every = [_step(recipe, stage, name) for stage, name in recipe.steps]  # all, so that all options are checked
    steps = [step for step in every if not whole_model(step.stage, step.name)]
    if recipe.calib.refresh_gradients and not any(step.needs & FIELDS for step in steps):
        raise InputError("calib.refresh_gradients has nothing to do: no method of this recipe reads gradients")
    if recipe.drift and not find_drift(recipe, steps):
        raise InputError(f"drift {recipe.drift:g} has nothing to do: no method of this recipe reads Hessians")
    if recipe.train is not None and len(steps) == len(every):
        raise InputError(f"train {recipe.train} has nothing to do: no method of this recipe trains the model")
    return steps


def find_drift(recipe: Recipe, steps: Iterable[Step]) -> float:
    """The share of the drift that layers make up for: none where no step reads Hessians, as it takes one to say how."""
    return recipe.drift_share if any("hessian" in step.needs for step in steps) else 0.0


def find_trial_steps(recipe: Recipe, stand_ins: Mapping[str, str | None]) -> list[Step]:
    """What a layer goes through when an allocation tries a plan on it: the recipe's own steps, or what stands in for one.

    `stand_ins`: for each stage that trials have (prune, quantize), None or a quicker method in place of the recipe's; it
    comes with its defaults unless it is the recipe's own. A pruner of the recipe's own has its refiner with it.
    Raises InputError for a method that there is not, or that works on whole models.
    """
    steps = []
    for stage, name in recipe.steps:
        tried = "prune" if stage == "refine" else stage
        if tried in stand_ins and stand_ins[tried] is None:
            steps.append((stage, name))
        elif stage in stand_ins:
            steps.append((stage, str(stand_ins[stage])))
    if whole := [name for stage, name in steps if whole_model(stage, name)]:
        raise InputError(
            f"{recipe.target.allocate} tries pruners on parts of the model, and {whole[0]} works on a whole one: "
            "take another pruner, such as wanda"
        )
    return [_step(recipe, stage, name) for stage, name in steps]


def _step(recipe: Recipe, stage: str, name: str) -> Step:
    """A method with the options that the recipe has for it."""
    method = find_method(stage, name)
    options = find_options(stage, name, recipe.options.get(name, {}))
    needs = method.needs(options) if hasattr(method, "needs") else method.NEEDS
    verb = verb_of(stage, method)
    others = (_quantizer(recipe, name),) if verb == "recover_layer" else ()
    run, alone = _bound(getattr(method, verb), options, *others), getattr(method, "ROWS_ALONE", False)
    matrices = getattr(method, "MATRICES", int("hessian" in needs))
    return Step(stage, name, frozenset(needs), options, run, _flops(method, options), alone, matrices)


def _quantizer(recipe: Recipe, reader: str) -> Callable[[LayerTask], LayerTask]:
    """The recipe's quantizer, for a method that may quantize once more. Raises InputError if there is none."""
    for stage, name in recipe.steps:
        if stage == "quantize":
            return _step(recipe, stage, name).run
    raise InputError(f"{reader} makes up for what quantization does to a layer: give --wbits")


def _flops(method: ModuleType, options: MethodOptions) -> Callable[[int, int], float]:
    """What a method says of its own cost, if it does."""
    said: Callable[[int, int, MethodOptions], float] = getattr(method, "flops", lambda *_: 0.0)
    return lambda out_features, in_features: said(out_features, in_features, options)


def _bound(verb: Callable[..., Any], options: MethodOptions, *others: Any) -> Callable[[Any], Any]:
    """A method's verb with its options, and what else it takes, filled in."""
    return lambda task: verb(task, options, *others)
