import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import InputError
from compress.pipeline import open_model
from compress.plan import plan_layers
from compress.recipe import Recipe, read_recipe
from compress.steps import find_steps

OK = {"model": "m", "target": {"sparsity": 0.5}}


@given(
    st.fixed_dictionaries(
        {"sparsity": st.floats(0.01, 0.99), "wbits": st.sampled_from([2, 3, 4, 8, 16]), "symmetric": st.booleans()}
    ),
    st.dictionaries(st.sampled_from(["gptq", "sparsegpt"]), st.fixed_dictionaries({"damping": st.floats(0.001, 1)})),
)
def test_toml_reads_back_equal(tmp_path_factory, target, options):
    recipe = Recipe(model="m", target=target, options=options)
    file = tmp_path_factory.mktemp("r") / "recipe.toml"
    file.write_text(recipe.toml())
    assert read_recipe(file, {}) == recipe


def test_flags_override_a_file_key_by_key(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('model = "m"\n[target]\nsparsity = 0.5\nwbits = 4\n')
    recipe = read_recipe(file, {"target": {"wbits": 3}})
    assert (recipe.target.sparsity, recipe.target.wbits) == (0.5, 3)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"target": {"sparsity": 1.0}}, r"target\.sparsity = 1\.0: should be less than 1"),
        ({"target": {"sparsity": -0.1}}, r"target\.sparsity = -0\.1: should be greater than or equal to 0"),
        ({"target": {"wbits": 7}}, r"target\.wbits = 7: should be 2, 3, 4, 5, 6, 8 or 16"),
        ({"target": {"pattern": "4:2"}}, r"target\.pattern = '4:2': should be unstructured, n:m with n kept"),
        ({"target": {"pattern": "2:4", "sparsity": 0.6}}, r"pattern 2:4 removes 0\.5 of the weights"),
        ({"target": {"pattern": "16x0", "sparsity": 0.6}}, r"target\.pattern = '16x0': should be .* such as 16x16"),
        ({"target": {"pattern": "16x16", "wbits": 4}}, "pattern 16x16 does not say how many blocks to remove"),
        ({"target": {"pattern": "2:4", "compare": "layer"}}, "compare has nothing to do with pattern 2:4"),
        ({"target": {"pattern": "4x4", "compare": "layer", "sparsity": 0.5}}, "compare has nothing to do with"),
        ({"target": {"sparsity": 0.5, "compare": "block"}}, r"target\.compare = 'block': should be 'row' or 'layer'"),
        ({"target": {"wbits": 4}, "refine": "dsnot"}, "refine dsnot has nothing to do: give --sparsity or --pattern"),
        (
            {"target": {"pattern": "16x16", "sparsity": 0.5}, "refine": "dsnot"},
            "16x16 does not allow: leave out refine",
        ),
        ({"target": {"group_size": 0, "wbits": 4}}, r"group_size should be -1"),
        ({"target": {"sparsty": 0.5}}, r"there is no setting target\.sparsty"),
        ({"target": {}}, "nothing to do"),
        ({"target": {"wbits": 4}, "pruner": "wanda"}, "pruner wanda has nothing to do: give --sparsity or --pattern"),
        ({"target": {"sparsity": 0.5}, "quantizer": "rtn"}, "quantizer rtn has nothing to do: give --wbits"),
        ({"target": {"sparsity": 0.5}, "calib": {"nsamples": 0}}, r"calib\.nsamples = 0: should be greater"),
    ],
)
def test_what_cannot_be_meant_is_one_line(values, line):
    with pytest.raises(InputError, match=line) as error:
        read_recipe(None, {"model": "m", **values})
    assert "\n" not in str(error.value)


def test_a_model_is_asked_for():
    with pytest.raises(InputError, match="model is missing"):
        read_recipe(None, {"target": {"sparsity": 0.5}})


def test_a_pattern_says_the_sparsity():
    recipe = Recipe(model="m", target={"pattern": "5:16"})
    assert recipe.target.layer_plan().sparsity == pytest.approx(11 / 16)
    assert recipe.steps == [("prune", "alps")]


def test_blocks_go_into_the_plan():
    plan = Recipe(model="m", target={"pattern": "16x8", "sparsity": 0.5}).target.layer_plan()
    assert (plan.block, plan.pattern, plan.sparsity) == ((16, 8), None, 0.5)


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("48x16", "q_proj has 64 outputs and 64 inputs, which blocks of 48x16 do not divide: choose another pattern"),
        ("16x48", "q_proj has 64 outputs and 64 inputs, which blocks of 16x48 do not divide"),
        ("64x16", "k_proj has 32 outputs and 64 inputs, which blocks of 64x16 do not divide"),
    ],
)
def test_blocks_that_do_not_divide_a_layer_are_refused(llama_folder, pattern, line):
    recipe = Recipe(model="m", target={"pattern": pattern, "sparsity": 0.5})
    with pytest.raises(InputError, match=line):
        plan_layers(open_model(llama_folder), recipe)


def test_a_mask_is_refined_before_weights_are_rounded():
    recipe = Recipe(model="m", target={"sparsity": 0.5, "wbits": 4}, pruner="wanda", refine="dsnot")
    assert recipe.steps == [("prune", "wanda"), ("refine", "dsnot"), ("quantize", "gptq")]


@pytest.mark.parametrize(
    ("wbits", "asked", "symmetric"), [(4, None, True), (3, None, False), (2, True, True), (8, False, False)]
)
def test_few_bits_get_zero_points_unless_told_otherwise(wbits, asked, symmetric):
    assert Recipe(model="m", target={"wbits": wbits, "symmetric": asked}).target.layer_plan().symmetric == symmetric


def test_differences_name_the_keys():
    other = Recipe(model="m", target={"sparsity": 0.5}, calib={"seed": 3}, options={"sparsegpt": {"damping": 0.1}})
    assert Recipe(**OK).differences(other) == ["calib.seed", "options.sparsegpt.damping"]
    assert Recipe(**OK).differences(Recipe(**OK)) == []


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"pruner": "wnda"}, "there is no method 'wnda' to prune with; did you mean wanda"),
        ({"options": {"alps": {"dampin": 1}}}, "alps: there is no setting dampin"),
        ({"options": {"alps": {"damping": 7}}}, "alps: damping = 7: should be less than or equal to 1"),
        ({"refine": "dnsot"}, "there is no method 'dnsot' to refine with; did you mean dsnot"),
        ({"refine": "wanda"}, "there is no method 'wanda' to refine with"),
        ({"refine": "dsnot", "options": {"dsnot": {"max_cycles": 0}}}, "dsnot: max_cycles = 0: should be greater"),
        ({"options": {"gptq": {"damping": 0.1}}}, "options for gptq, which this recipe does not use"),
        ({"train": "some.txt"}, "train some.txt has nothing to do: no method of this recipe trains the model"),
        ({"calib": {"refresh_gradients": 2}}, "refresh_gradients has nothing to do: no method of this recipe reads"),
    ],
)
def test_methods_and_their_options_are_checked(values, line):
    with pytest.raises(InputError, match=line):
        find_steps(read_recipe(None, OK | values))


def test_flags_do_not_replace_a_key_that_should_be_a_table(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('model = "m"\ncalib = "wikitext2"\n')
    with pytest.raises(InputError, match="calib = 'wikitext2': should be a table, with nsamples in it"):
        read_recipe(file, {"calib": {"nsamples": 4}})


def test_an_empty_method_is_not_the_default_one():
    with pytest.raises(InputError, match="there is no method ''"):
        find_steps(Recipe(**OK, pruner=""))


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 50_000, "model = 'x'\n[target]\nwbits = 1e999", "\ud800", "a" * 10_000]
)
def test_a_file_that_means_harm_is_one_line(tmp_path, text):
    (tmp_path / "r.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError) as caught:
        read_recipe(tmp_path / "r.toml", {})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1200
    (tmp_path / "r.toml").unlink()
    os.mkfifo(tmp_path / "r.toml")
    with pytest.raises(InputError, match="is no ordinary file"):
        read_recipe(tmp_path / "r.toml", {})


def test_a_seed_that_torch_cannot_take_is_refused():
    with pytest.raises(InputError, match=r"calib\.seed"):
        read_recipe(None, {**OK, "calib": {"seed": 2**63}})
