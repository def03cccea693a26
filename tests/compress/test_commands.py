import shutil

import pytest

from compress.commands import run_command
from compress.errors import InputError
from compress.recipe import read_recipe


@pytest.fixture
def run(llama_folder, text_file):
    calib = {"source": str(text_file), "nsamples": 2, "seqlen": 32}
    recipe = read_recipe(None, {"model": str(llama_folder), "calib": calib, "target": {"sparsity": 0.5}})
    return lambda out, text=None, dry_run=False: run_command(recipe, out, (text, 2), dry_run)


def test_a_model_that_is_not_ours_is_never_overwritten(llama_folder, tmp_path, run):
    other = shutil.copytree(llama_folder, tmp_path / "other")
    before = (other / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a model that compress did not write"):
        run(other)
    (other / "config.json").unlink()
    with pytest.raises(InputError, match="holds a model that compress did not write"):
        run(other)
    assert (other / "model.safetensors").read_bytes() == before


def test_a_run_removed_by_hand_starts_over_in_its_folder(tmp_path, run):
    first = run(tmp_path / "a").data
    shutil.rmtree(tmp_path / "a" / "run")
    assert run(tmp_path / "a").data["compressed_bytes"] == first["compressed_bytes"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_out_that_cannot_be_a_folder_is_refused(tmp_path, run, dry_run):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "link"):
        with pytest.raises(InputError, match=r"cannot be made, since .* is no folder"):
            run(out, dry_run=dry_run)


@pytest.mark.parametrize("text", ["no-such.txt", "self", "nonsense", "pileval"])
def test_a_text_that_cannot_be_measured_on_is_refused_before_the_work(tmp_path, run, text):
    with pytest.raises(InputError):
        run(tmp_path / "a", text)
    assert not (tmp_path / "a").exists()
