"""Is a folder a model this package can work on? Asked before anything long begins, answered in one line."""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers import __version__ as transformers_version

from compress.calib.model_files import CODE, check_text_files, read_object
from compress.calib.skeleton import load_config
from compress.calib.weight_files import WeightFiles
from compress.errors import InputError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "tekken.json",
    "tokenizer_config.json",
)


def check_model_folder(folder: Path) -> None:
    """Raise InputError unless the folder holds a causal language model: config.json, whole safetensors, a tokenizer."""
    check_kind({path.name for path in folder.iterdir()}, str(folder))
    check_text_files(folder)
    check_config(folder / "config.json", str(folder))
    WeightFiles(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{folder} holds no tokenizer: copy the model's tokenizer.json and tokenizer_config.json into it"
        )


def check_kind(names: set[str], where: str) -> None:
    """Raise InputError if these file names are those of an adapter, a pipeline or GGUF files, not of a model."""
    if "adapter_config.json" in names:  # beside a model as well: transformers would add it to the weights, unasked
        raise InputError(
            f"{where} is a PEFT adapter, or holds one: merge it into its base model (peft's merge_and_unload), "
            "save that, and pass the saved folder; or take adapter_config.json away"
        )
    if "config.json" in names:
        return
    if "model_index.json" in names:
        raise InputError(f"{where} is a diffusers pipeline, not a language model: pass a causal language model")
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        raise InputError(f"{where} holds GGUF files: pass one of them by its path, as {where}/{ggufs[0]}")
    raise InputError(f"{where} holds no config.json: pass a model folder, a .gguf file, an alias or a hub id")


def check_config(path: Path, where: str) -> None:
    """Raise InputError unless config.json describes a causal language model that transformers has its own code for."""
    settings = read_object(path)
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"config.json of {where} names no model_type: restore or download it again")
    if model_type not in CONFIG_MAPPING:
        if CODE in settings:
            raise InputError(
                f"{where} ({model_type}) needs Python code from its own repository, which is never run: "
                "use a model that transformers has code for"
            )
        raise InputError(
            f"transformers {transformers_version} has no model_type {model_type} ({where}): "
            "upgrade with `pip install -U transformers`"
        )
    _check_causal(load_config(path.parent), settings, where)


def _check_causal(config: Any, settings: dict[str, Any], where: str) -> None:
    """A class for the type is not enough: BERT has one too, so the class the weights were saved from counts as well."""
    saved_as = settings.get("architectures") or []
    if not isinstance(saved_as, list) or not all(isinstance(name, str) for name in saved_as):
        raise InputError(f"config.json of {where} is damaged (architectures is no list): restore or download it again")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        own = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
        if not saved_as or any(name == own or name.endswith(("ForCausalLM", "LMHeadModel")) for name in saved_as):
            return
    kind = f"{config.model_type} model ({saved_as[0]})" if saved_as else f"{config.model_type} model"
    raise InputError(f"{where} is a {kind}, not a causal language model: pass one, such as llama-7b or gemma-3-270m")
