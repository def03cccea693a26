import re

import pytest
from typer.testing import CliRunner

from compress.bench.ranks import bench_ranks
from compress.cli import app
from compress.errors import InputError, RunError
from compress.recipe import read_recipe

SMALL = {"nsamples": 4, "seqlen": 32}


def recipe(folder, text, **target):
    calib = {"source": str(text), **SMALL}
    return read_recipe(None, {"model": str(folder), "target": target or {"wbits": 8}, "calib": calib})


def test_seconds_by_stage_and_whether_the_files_agree(llama_folder, text_file):
    data = bench_ranks(recipe(llama_folder, text_file), [1, 2]).data
    assert data["same"] and [run["ranks"] for run in data["runs"]] == [1, 2]
    for run in data["runs"]:
        assert {"observe", "solve", "forward", "whole run"} <= run["seconds"].keys()
        assert run["files"].keys() == {"model.safetensors"}


def test_a_run_that_fails_is_no_row(llama_folder, text_file, capfd):
    with pytest.raises(RunError, match="the run with 2 ranks failed"):
        bench_ranks(recipe(llama_folder, text_file, wbits=4, group_size=100), [2, 1])
    assert re.search("^error: .*groups of 100", capfd.readouterr().err, re.MULTILINE)


def test_one_number_has_nothing_to_be_compared_with(llama_folder, text_file):
    with pytest.raises(InputError, match="give two numbers of ranks"):
        bench_ranks(recipe(llama_folder, text_file), [2])
    assert CliRunner().invoke(app, ["bench", "ranks", "m", "--ranks", "0"]).exit_code == 2
