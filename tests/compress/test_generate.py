import copy
import json

import pytest
from tiny import save_tiny

from compress import cli
from compress.calib.skeleton import load_tokenizer
from compress.errors import InputError
from compress.generate import GenerateOptions, generate
from compress.hf import load_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("generate"), "llama")
    return folder, load_model(folder), load_tokenizer(folder)


def test_text_comes_in_pieces_and_is_the_whole(loaded):
    pieces = []
    done = generate(*loaded[1:], "w5 w6", GenerateOptions(max_new_tokens=10), pieces.append)
    assert done.new_tokens == 10 and len(pieces) >= 10 and "".join(pieces) == done.text
    assert done.prompt_tokens == 3 and done.figures["decode_tokens_per_second"] > 0


def test_greedy_repeats_and_seeds_do(loaded):
    def text(temperature, seed):
        return generate(*loaded[1:], "w5", GenerateOptions(12, temperature, seed)).text

    assert text(0.0, 1) == text(0.0, 2)
    assert text(3.0, 1) == text(3.0, 1) != text(3.0, 2)


def test_one_token_has_no_rate(loaded):
    assert "decode_tokens_per_second" not in generate(*loaded[1:], "w5", GenerateOptions(1)).figures


def test_requests_that_cannot_be_met(loaded):
    with pytest.raises(InputError, match="no chat template"):
        generate(*loaded[1:], "w5", GenerateOptions(chat=True))
    with pytest.raises(InputError, match="do not fit the model's 128"):
        generate(*loaded[1:], "w5 " * 100, GenerateOptions(max_new_tokens=100))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",  # a way out of the sandbox
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{% if",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_fails_or_wants_out_is_one_line_and_only_where_it_is_asked_for(loaded, template):
    _, model, tokenizer = loaded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    assert generate(model, tokenizer, "w5", GenerateOptions(1)).new_tokens == 1
    with pytest.raises(InputError, match=r"chat template does not take this message .*: leave --chat out"):
        generate(model, tokenizer, "w5", GenerateOptions(1, chat=True))


def test_a_tokenizer_of_another_model_is_one_line(loaded):
    _, model, tokenizer = loaded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["strange"])
    with pytest.raises(InputError, match="its tokenizer gave token 200 of 200 embeddings"):
        generate(model, tokenizer, "w5 strange", GenerateOptions(1))


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 4}, {"num_beams": "x"}, {"stop_strings": 5}, {"bad_words_ids": [5]}, {"pad_token_id": 2**63}],
)
def test_a_generation_config_that_cannot_be_followed_is_one_line(loaded, settings):
    folder, _, tokenizer = loaded
    model = load_model(folder)
    vars(model.generation_config).update(settings)
    with pytest.raises(InputError, match=r"as its generation_config\.json says .*: restore that file, or take it away"):
        generate(model, tokenizer, "w5", GenerateOptions(2))


class Halves:
    """A tokenizer whose characters take two tokens each."""

    def decode(self, tokens, skip_special_tokens):
        return "é" * (len(tokens) // 2) + "\ufffd" * (len(tokens) % 2)


def test_no_half_characters_are_passed_on():
    import torch

    from compress.generate import _Stream

    pieces = []
    stream = _Stream(Halves(), pieces.append)
    for token in [[0, 1, 2], *[[i] for i in range(5)]]:
        stream.put(torch.tensor(token))
    assert pieces == ["é", "é"]
    stream.end()
    assert pieces == ["é", "é", "\ufffd"]


def test_the_command(loaded, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["compress", "generate", str(loaded[0]), "w5 w6", "--max-new-tokens", "4", "--json"]
    )
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    data = json.loads(capsys.readouterr().out)
    assert data["new_tokens"] == 4 and data["kernels"] == {}
