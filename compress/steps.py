"""Find a method by name: the file compress/<folder>/<name>.py is the method, and the verb it defines says its stage."""

import pkgutil
from collections.abc import Callable
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
from compress.task import LayerTask

STAGES = {  # stage: the folder of its methods, and the verbs that make a file one of them
    "allocate": ("allocate", ("allocate_layers",)),
    "prune": ("prune", ("prune_layer", "prune_model")),
    "refine": ("prune", ("refine_layer",)),
    "quantize": ("quantize", ("quantize_layer",)),
}


@dataclass(frozen=True)
class Step:
    """A method with its options, ready for layers."""

    stage: str
    name: str
    needs: frozenset[str]  # the fields of LayerStats it reads
    options: MethodOptions
    run: Callable[[LayerTask], LayerTask]
    flops: Callable[[int, int], float]  # of a layer [out, in], beyond the column sweep of a method that reads Hessians


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
    every = [_step(recipe, stage, name) for stage, name in recipe.steps]  # all, so that all options are checked
    steps = [step for step in every if not whole_model(step.stage, step.name)]
    if recipe.calib.refresh_gradients and not any(step.needs & FIELDS for step in steps):
        raise InputError("calib.refresh_gradients has nothing to do: no method of this recipe reads gradients")
    if recipe.train is not None and len(steps) == len(every):
        raise InputError(f"train {recipe.train} has nothing to do: no method of this recipe trains the model")
    return steps


def find_trial_steps(recipe: Recipe, pruner: str | None) -> list[Step]:
    """What a layer goes through when an allocation tries a sparsity on it: the recipe's pruner and refiner, or `pruner`.

    `pruner` comes with its defaults unless it is the recipe's own. Raises InputError for one that there is not, or that
    works on whole models.
    """
    own = [(stage, name) for stage, name in recipe.steps if stage in ("prune", "refine")]
    steps = own if pruner is None else [("prune", pruner)]
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
    verb = getattr(method, verb_of(stage, method))
    return Step(stage, name, frozenset(needs), options, _bound(verb, options), _flops(method, options))


def _flops(method: ModuleType, options: MethodOptions) -> Callable[[int, int], float]:
    """What a method says of its own cost, if it does."""
    said: Callable[[int, int, MethodOptions], float] = getattr(method, "flops", lambda *_: 0.0)
    return lambda out_features, in_features: said(out_features, in_features, options)


def _bound(
    verb: Callable[[LayerTask, MethodOptions], LayerTask], options: MethodOptions
) -> Callable[[LayerTask], LayerTask]:
    """A method's verb with its options filled in."""
    return lambda task: verb(task, options)
