import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from gguf_files import write_gguf
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open

from compress import sources
from compress.errors import InputError
from compress.presets import HUB_IDS, PACKAGES, ModelPackage
from compress.sources import HUB_ID, resolve_model

DEMO = PACKAGES["gemma-3-270m"]


def refusal(name, **options):
    with pytest.raises(InputError) as caught:
        resolve_model(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "llama")


def test_presets_are_well_formed():
    assert all(alias == alias.lower() and HUB_ID.fullmatch(hub_id) for alias, hub_id in HUB_IDS.items())
    assert not HUB_IDS.keys() & PACKAGES.keys()
    assert HUB_IDS["llama-7b"] == "huggyllama/llama-7b" and HUB_IDS["llama-2-7b"] == "meta-llama/Llama-2-7b-hf"
    assert HUB_IDS["qwen2.5-0.5b"] == "Qwen/Qwen2.5-0.5B" and HUB_IDS["pythia-70m"] == "EleutherAI/pythia-70m"


def test_a_folder_is_itself_and_wins_over_an_alias_of_its_name(folder, monkeypatch):
    assert resolve_model(str(folder)) == folder
    folder.rename(folder.with_name("llama-7b"))
    monkeypatch.chdir(folder.parent)
    assert resolve_model("llama-7b").name == "llama-7b"


def test_an_empty_folder_does_not_hide_an_alias(tmp_path, monkeypatch):
    (tmp_path / "llama-7b").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_from_hub", lambda hub_id, revision, cache: f"{hub_id} at {revision}")
    assert resolve_model("LLaMA-7B", revision="main") == "huggyllama/llama-7b at main"


def test_unknown_names_get_the_closest_aliases(tmp_path):
    assert "did you mean llama-7b" in refusal("lama-7b")
    assert "pass a folder" in refusal("zzz")
    assert "no file" in refusal(tmp_path / "x.gguf")
    assert "no folder" in refusal(tmp_path / "x/y/z") or "no model" in refusal(tmp_path / "x/y/z")
    assert "revision" in refusal(tmp_path, revision="v1")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", "{}", "PEFT adapter.*merge_and_unload"),
        ("model_index.json", "{}", "diffusers"),
        ("q4.gguf", "", r"GGUF.*q4\.gguf"),
        ("notes.txt", "", r"no config\.json"),
    ],
)
def test_folders_that_are_no_model_are_named_for_what_they_are(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        resolve_model(str(tmp_path))


def test_damaged_and_foreign_configurations(folder):
    edit_config(folder, model_type="martian", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert "never run" in refusal(folder)
    edit_config(folder, model_type="martian")
    (folder / "config.json").write_text(json.dumps({"model_type": "martian"}))
    assert "pip install -U transformers" in refusal(folder)
    for damaged in ("{", "[]", "{}", '{"model_type": "llama", "hidden_size": "many"}'):
        (folder / "config.json").write_text(damaged)
        assert "config.json" in refusal(folder), damaged


def test_known_models_never_run_code_of_their_folder(folder):
    edit_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("model_type", "saved_as"),
    [("bert", "BertForMaskedLM"), ("vit", "ViTForImageClassification"), ("t5", "T5ForConditionalGeneration")],
)
def test_other_kinds_of_model_are_refused_by_type(folder, model_type, saved_as):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [saved_as]}))
    assert f"is a {model_type} model ({saved_as}), not a causal language model" in refusal(folder)


def test_a_language_model_saved_without_its_head_is_refused(folder):
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    assert "LlamaForSequenceClassification" in refusal(folder)
    edit_config(folder, architectures=None)
    assert resolve_model(str(folder)) == folder


def test_pickled_weights_and_missing_tokenizers_are_refused(folder):
    tokenizers = list(folder.glob("tokenizer*"))
    for file in tokenizers:
        file.rename(folder.parent / file.name)
    assert "no tokenizer" in refusal(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights only (pytorch_model.bin)" in refusal(folder)


class FakeHub:
    """What sources asks of huggingface_hub, answered from a folder; says what was downloaded."""

    def __init__(self, folder, names=None, error=None):
        self.folder, self.error, self.downloaded = folder, error, []
        self.names = names or [path.name for path in folder.iterdir()]

    def model_info(self, hub_id, revision, timeout):
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def hf_hub_download(self, repo_id, filename, revision, cache_dir):
        self.downloaded.append(filename)
        return str(self.folder / filename)

    def snapshot_download(self, repo_id, revision, cache_dir, allow_patterns=None, local_files_only=False):
        if local_files_only and not self.folder.is_dir():
            raise FileNotFoundError("nothing cached")
        self.downloaded += allow_patterns or []
        return str(self.folder)

    def install(self, monkeypatch):
        monkeypatch.setattr(sources, "HfApi", lambda: self)
        monkeypatch.setattr(sources, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(sources, "snapshot_download", self.snapshot_download)
        return self


def hub_error(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


def test_a_hub_model_is_downloaded_without_pickles_and_second_copies(folder, monkeypatch):
    own = {path.name for path in folder.iterdir()}
    names = [*own, "pytorch_model.bin", "consolidated.safetensors", "original/params.json", "run.py", "README.md"]
    hub = FakeHub(folder, names).install(monkeypatch)
    assert resolve_model("someone/llama") == folder
    assert set(hub.downloaded) == own


def test_what_a_hub_model_is_shows_before_its_weights_are_downloaded(folder, monkeypatch):
    hub = FakeHub(folder, ["config.json", "pytorch_model.bin", "tokenizer.json"]).install(monkeypatch)
    assert "someone/opt holds pickled weights only (pytorch_model.bin)" in refusal("someone/opt")
    assert hub.downloaded == []
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    hub = FakeHub(folder).install(monkeypatch)
    assert "someone/vit is a vit model" in refusal("someone/vit")
    assert hub.downloaded == ["config.json"]
    FakeHub(folder, ["adapter_config.json", "adapter_model.safetensors"]).install(monkeypatch)
    assert "PEFT adapter" in refusal("someone/adapter")
    FakeHub(folder, ["config.json"]).install(monkeypatch)
    assert "no weights" in refusal("someone/empty")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "meta-llama/Llama-2-7b-hf is gated: accept its licence"),
        (RepositoryNotFoundError, "no model of that name"),
        (RevisionNotFoundError, "no revision v9"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(tmp_path, monkeypatch, kind, message):
    FakeHub(tmp_path, error=hub_error(kind)).install(monkeypatch)
    assert message in refusal("llama-2-7b", revision="v9")


def test_a_model_downloaded_before_is_used_offline_and_the_log_says_so(folder, monkeypatch, caplog):
    FakeHub(folder, error=ConnectionError("offline")).install(monkeypatch)
    assert resolve_model("llama-7b") == folder
    assert "downloaded before" in caplog.text
    (folder / "model.safetensors").unlink()  # a download that was interrupted is no model
    assert "cannot reach" in refusal("llama-7b")


def test_without_a_network_it_says_what_to_do_in_seconds(tmp_path):
    script = "from compress.sources import resolve_model\nresolve_model('llama-7b')"
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONSAFEPATH": "1"}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, cwd=tmp_path
    )
    line = result.stderr.strip().splitlines()[-1]
    assert "InputError: cannot reach 127.0.0.1:9 for huggyllama/llama-7b" in line
    assert "`hf download huggyllama/llama-7b`" in line
    assert time.monotonic() - started < 60  # importing transformers is most of it


def packaged(monkeypatch, content, digest=None):
    """A pip package that brings a model, as the demo's does."""
    module = ModuleType("packaged_model")
    module.MODEL_NAME, module.EXPECTED_SHA256 = "tiny.gguf", digest or hashlib.sha256(content).hexdigest()

    def assemble(path, overwrite):
        path.write_bytes(content)
        if hashlib.sha256(content).hexdigest() != module.EXPECTED_SHA256:
            raise ValueError("sha256 did not match")

    module.assemble = assemble
    monkeypatch.setitem(sys.modules, "packaged_model", module)
    monkeypatch.setitem(PACKAGES, "tiny", ModelPackage("tiny-gguf", "packaged_model", "demo"))
    return module


def test_a_packaged_model_is_checked_imported_once_and_its_copy_removed(tmp_path, monkeypatch, tiny_gguf):
    module = packaged(monkeypatch, tiny_gguf.read_bytes())
    folder = resolve_model("tiny", cache_dir=tmp_path)
    assert (folder / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.gguf"))
    module.assemble = None  # not asked a second time
    assert resolve_model("tiny", cache_dir=tmp_path) == folder


def test_a_damaged_or_missing_package_is_named_with_the_command(tmp_path, monkeypatch, tiny_gguf):
    packaged(monkeypatch, tiny_gguf.read_bytes(), digest="0" * 64)
    assert "tiny-gguf is damaged" in refusal("tiny", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))
    monkeypatch.setitem(sys.modules, "packaged_model", None)
    assert 'tiny-gguf: `pip install "compress-llm[demo]"`' in refusal("tiny", cache_dir=tmp_path)


@pytest.fixture
def tiny_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.skipif(importlib.util.find_spec(DEMO.module) is None, reason=f"needs the package {DEMO.package}")
def test_the_demo_model_comes_out_as_bfloat16_safetensors(tmp_path):
    folder = resolve_model("gemma-3-270m", cache_dir=tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == 236 and "lm_head.weight" not in weights.keys()
        norm = weights.get_tensor("model.norm.weight")
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [262144, 640]
    assert norm.dtype == torch.bfloat16 and norm.float().mean().item() == pytest.approx(25.3464, abs=1e-3)
    started = time.monotonic()
    assert resolve_model("gemma-3-270m", cache_dir=tmp_path) == folder
    assert time.monotonic() - started < 5
