import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import save_tiny
from tokenizers import Tokenizer

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from compress.checkpoint.formats import open_weights  # noqa: E402
from compress.pipeline import compress  # noqa: E402
from compress.progress import Reporter  # noqa: E402
from compress.recipe import read_recipe  # noqa: E402

KEY = "a-key"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}w4"
QUICK = {"max_retries": 0, "timeout": 60}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model = save_tiny(folder / "model", "llama")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    flags = {"model": str(model), "quantizer": "rtn", "format": "native"}
    flags |= {"target": {"wbits": 4, "group_size": 32}, "calib": {"source": "builtin", "nsamples": 2, "seqlen": 16}}
    compress(read_recipe(None, flags), model, folder / "tiny-4", Reporter())
    assert open_weights(folder / "tiny-4").packed
    words = Tokenizer.from_file(str(folder / "tiny-4" / "tokenizer.json"))
    words.add_tokens(["strange"])  # which the model has no embedding of
    words.save(str(folder / "tiny-4" / "tokenizer.json"))
    return folder / "tiny-4"


@pytest.fixture(scope="module")
def url(native):
    """A server on loopback, in a process of its own, that is ended at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(native), "--port", str(port), "--max-model-len", "64", "--device", "cpu"]
    program = [sys.executable, "-m", "compress", *arguments, "--api-key", KEY]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=_environment()) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(server, address)
            yield address
        finally:
            server.terminate()
            server.communicate(timeout=20)


def _environment():
    return {**os.environ, "COMPRESS_NO_MEASURING": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def ask(url, body=None, key=KEY):
    """Status and text of one request; a POST if there is a body."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _wait(server, address):
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(server.stderr.read())
        try:
            assert ask(f"{address}/health") == (200, '{"status":"ok"}')
        except urllib.error.URLError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("the server never answered")


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, **QUICK)


def chat(client, content="w5 w6", **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="tiny-4", messages=messages, max_tokens=8, temperature=0, **more)


def complete(client, prompt="w5 w6 w7", **more):
    asked = {"max_tokens": 8, "temperature": 0, **more}
    return client.completions.create(model="tiny-4", prompt=prompt, **asked)


pytestmark = pytest.mark.slow


def test_models_are_listed_without_a_cache_of_downloads(client):
    assert [model.id for model in client.models.list()] == ["tiny-4"]


def test_chat_whole_and_streamed(client):
    whole = chat(client)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True)]
    assert whole.usage.completion_tokens == 8 and whole.choices[0].finish_reason == "length"
    assert len(pieces) > 3 and "".join(pieces).split() == whole.choices[0].message.content.split()


def test_completions_whole_and_streamed(client):
    whole = complete(client)
    pieces = [chunk.choices[0].text for chunk in complete(client, stream=True)]
    assert whole.usage.prompt_tokens == 4 and "".join(pieces).split() == whole.choices[0].text.split()


def test_responses(client):
    done = client.responses.create(model="tiny-4", input="w5 w6", max_output_tokens=8, temperature=0)
    assert done.usage.output_tokens == 8 and done.output_text


def test_an_answer_ends_where_the_length_does(client):
    done = complete(client, "w5 " * 60, max_tokens=500)
    assert done.usage.total_tokens <= 64


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: complete(client, "w5 " * 80),
        lambda client: complete(client, ["w5"]),
        lambda client: complete(client, max_tokens=0),
        lambda client: complete(client, stream=True, max_tokens=-3),
        lambda client: complete(client, extra_body={"logit_bias": {"x": 1}, "temperature": "hot"}),
        lambda client: client.chat.completions.create(model="tiny-4", messages=[{"content": "w5"}]),
        lambda client: client.chat.completions.create(model="tiny-4", messages=[{"role": "user", "content": 5}]),
        lambda client: client.completions.create(model="another", prompt="w5"),
    ],
)
def test_bad_requests_are_said_to_be_bad(client, ask):
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)):
        ask(client)
    assert complete(client).usage.completion_tokens == 8


def test_malformed_input_is_survived(client, url):
    for body in (b"{", b"[]", b"\xff\x00", b"", b'{"model": "tiny-4"}', b'{"messages": [[[]]], "model": "tiny-4"}'):
        status, text = ask(f"{url}/v1/chat/completions", body)
        assert 400 <= status < 500, (body, text)
    assert ask(f"{url}/v1/completions", b" " * 3_000_000)[0] == 413
    assert complete(client).usage.completion_tokens == 8


def test_a_word_without_an_embedding_is_refused_and_the_next_request_answered(url):
    for prompt, status in (("w5 strange", 400), ("w5", 200)):
        body = json.dumps({"model": "tiny-4", "prompt": prompt, "max_tokens": 2}).encode()
        answered, said = ask(f"{url}/v1/completions", body)
        assert answered == status and ("no embedding" in said) == (status == 400), said


def test_a_wrong_key_is_refused(url):
    for key in ("another", ""):
        status, text = ask(f"{url}/v1/models", key=key)
        assert status == 401 and "API key" in json.loads(text)["error"]["message"]
    with pytest.raises(openai.AuthenticationError):
        complete(openai.OpenAI(base_url=f"{url}/v1", api_key="another", **QUICK))
    assert ask(f"{url}/health", key="")[0] == 200


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/systemone", "/docs", "/openapi.json"])
def test_nothing_else_is_offered(url, path):
    assert ask(f"{url}{path}", b'{"model": "x"}')[0] == 404


def test_two_clients_at_once(client):
    alone = [complete(client, prompt).choices[0].text for prompt in ("w5 w6", "w9 w100 w3")]
    with ThreadPoolExecutor(2) as both:
        texts = list(both.map(lambda prompt: complete(client, prompt).choices[0].text, ["w5 w6", "w9 w100 w3"] * 3))
    assert texts == alone * 3


def test_a_client_that_leaves_is_survived(client):
    for _ in range(3):
        stream = complete(client, stream=True, max_tokens=50)
        next(iter(stream))
        stream.close()
    assert complete(client).usage.completion_tokens == 8
