import pytest

from compress.errors import InputError
from compress.settings import method_options, read_setting, read_value, split_settings


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("magnitude", {"pruner": "magnitude"}),
        ("gptq", {"quantizer": "gptq"}),
        ("wanda+rtn", {"pruner": "wanda", "quantizer": "rtn"}),
        ("wanda@uniform", {"pruner": "wanda", "target": {"allocate": "uniform"}}),
        ("sparsegpt:sequential=true", {"pruner": "sparsegpt", "sequential": True}),
        ("wanda:calib.nsamples=64", {"pruner": "wanda", "calib": {"nsamples": 64}}),
        ("wanda:target.pattern=16x16", {"pruner": "wanda", "target": {"pattern": "16x16"}}),
        (
            "sparsegpt@uniform:sparsegpt.damping=0.1,sparsegpt.block-size=64,target.group_size=32",
            {
                "pruner": "sparsegpt",
                "target": {"allocate": "uniform", "group_size": 32},
                "options": {"sparsegpt": {"damping": 0.1, "block_size": 64}},
            },
        ),
    ],
)
def test_a_setting_is_recipe_values(text, values):
    assert read_setting(text) == values


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("wnda", "did you mean wanda"),
        ("wanda+nothing", "there is no method 'nothing'"),
        ("wanda+sparsegpt", "both a pruner"),
        ("gptq+rtn", "both a quantizer"),
        ("wanda@", "write PRUNER"),
        ("wanda:", "write PRUNER"),
        ("wanda:sequential", "KEY=VALUE"),
        ("wanda:.a=1", "KEY=VALUE"),
        ("wanda:what.ever=1", "neither METHOD.OPTION nor a recipe's key"),
        ("wanda:wanda.a.b=1", "neither METHOD.OPTION nor a recipe's key"),
        ("wanda:model=x", "the same in every run"),
        ("wanda:pruner=magnitude", "pruner is there already"),
        ("wanda:sequential=true,sequential=false", "sequential is there already"),
        ("wanda@uniform:target.allocate=uniform", "target.allocate is there already"),
    ],
)
def test_what_cannot_be_meant_is_named(text, line):
    with pytest.raises(InputError, match=line) as refused:
        read_setting(text)
    assert f"setting {text}" in str(refused.value)


def test_commas_part_settings_but_not_the_keys_of_one():
    texts = ['a,b:x=1,y="p,q",z=[1, 2],c+d@e', "b:x=1,y='r:s,t'", "a"]
    assert split_settings(texts) == ["a", 'b:x=1,y="p,q",z=[1, 2]', "c+d@e", "b:x=1,y='r:s,t'"]


@pytest.mark.parametrize("text", ["", "a,,b", "a,"])
def test_an_empty_setting_is_refused(text):
    with pytest.raises(InputError, match="empty setting"):
        split_settings([text])


def test_values_are_toml_or_text():
    assert [read_value(text) for text in ("0.05", "true", "[1, 2]", "2:4", "'2'", "l1")] == [
        *(0.05, True, [1, 2], "2:4", "2", "l1")
    ]


def test_set_wants_method_key_and_value():
    assert method_options(["gptq.damping=0.05", "gptq.act-order=true"]) == {
        "gptq": {"damping": 0.05, "act_order": True}
    }
    for pair in ("gptq", "gptq=1", ".a=1", "gptq.=1"):
        with pytest.raises(InputError, match=r"METHOD\.KEY=VALUE"):
            method_options([pair])
