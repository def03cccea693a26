import pytest
import yaml

from compress.checkpoint.card import loading, model_card

FACTS = {
    "name": "tiny-w4",
    "base_model": 'odd/na"me: #1',
    "license": "apache-2.0",
    "version": "0.1.0",
    "command": "compress run odd --wbits 4",
    "recipe": 'model = "odd"\n',
    "format": "native",
    "perplexity": {"wikitext2": {"dense": 12.3456, "compressed": 13.0}, "ptb": {"compressed": 20.0}},
    "bytes": {"dense": 1_250_000_000, "compressed": 999_600},
    "bits_per_weight": 4.254,
    "sparsity": 0.5,
    "limits": ["Tried on English only."],
}


def _config(*symmetric):
    return {"config_groups": {str(i): {"weights": {"symmetric": value}} for i, value in enumerate(symmetric)}}


def test_a_card_tells_all_the_facts():
    card = model_card(FACTS)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": FACTS["base_model"], "license": "apache-2.0", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["compress", "native"],
    }  # fmt: skip
    for line in (
        "# tiny-w4",
        "compress run odd --wbits 4",
        'model = "odd"',
        "| perplexity, wikitext2 | 12.346 | 13.000 |",
        "| perplexity, ptb |  | 20.000 |",
        "| size | 1.25 GB | 1 MB |",
        "| bits per weight |  | 4.25 |",
        "| weights that are zero |  | 50.0% |",
        'compress generate tiny-w4 "Once upon a time"',
        "- Tried on English only.",
    ):
        assert line in body.splitlines()


def test_what_is_not_known_is_left_out():
    card = model_card({"format": "dense"})
    assert "base_model" not in card and "Measured" not in card and "recipe" not in card and "None" not in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["compress"]
    assert "from_pretrained" in card and "## Limits" in card


def test_a_path_may_differ_from_the_name():
    assert "compress generate ./out" in model_card(FACTS | {"path": "./out"})


@pytest.mark.parametrize(
    ("format_name", "config", "needed", "absent"),
    [
        ("compressed-tensors", _config(True), 'from_pretrained("x")', "dequantize"),
        ("compressed-tensors", _config(True, True), "Do not ask for `dequantize=True`", "CompressedTensorsConfig"),
        ("compressed-tensors", _config(False), 'from_pretrained("x", quantization_config=as_dense)', "cannot load"),
        ("compressed-tensors", _config(True, False), "transformers 5.23 cannot load", "from_pretrained"),
        ("gptq", {}, "`gptqmodel` and `optimum` installed", "compress generate"),
        ("native", {}, "import compress.hf", "installed"),
        ("dense", {}, 'from_pretrained("x")', "installed"),
    ],
)
def test_the_line_that_loads_depends_on_the_format(format_name, config, needed, absent):
    text = loading(format_name, config, "x")
    assert needed in text and absent not in text
