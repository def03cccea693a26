import asyncio
import json

import pytest

from compress import engines
from compress.engines import become, check_listening, command
from compress.errors import InputError
from compress.serve_guard import Guard


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_key(host):
    check_listening(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "example.org", "192.168.1.2", "::"])
def test_other_addresses_need_one(host):
    check_listening(host, "key")
    with pytest.raises(InputError, match="give --api-key"):
        check_listening(host, None)


def test_command_lines(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    line = command("vllm", tmp_path, "127.0.0.1", 8001, 128)
    assert line == ["vllm", "serve", str(tmp_path), *"--host 127.0.0.1 --port 8001 --max-model-len 128".split()]
    gguf = tmp_path / "m.gguf"
    assert command("llama.cpp", gguf, "127.0.0.1", 1, None) == [
        "llama-server",
        "-m",
        str(gguf),
        *"--host 127.0.0.1 --port 1".split(),
    ]


def test_engines_refuse_what_they_do_not_read(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compress"}}')
    with pytest.raises(InputError, match="vllm does not read"):
        command("vllm", tmp_path, "127.0.0.1", 1, None)
    with pytest.raises(InputError, match="a GGUF file, which"):
        command("llama.cpp", tmp_path, "127.0.0.1", 1, None)
    with pytest.raises(InputError, match="use --engine llama"):
        command("vllm", tmp_path / "m.gguf", "127.0.0.1", 1, None)


def test_an_engine_that_is_not_there(monkeypatch):
    monkeypatch.setattr(engines.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="vllm is not installed"):
        become(["vllm", "serve"], None)


def ask(guard, path="/v1/models", key=None, body=(b"",)):
    """Status and body of one request through a guard."""
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    messages[-1]["more_body"] = False
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "path": path, "headers": headers}, receive, send))
    return sent[0]["status"], sent[1]["body"]


async def echo(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def test_the_guard():
    guard = Guard(echo, "key", max_bytes=10)
    assert ask(guard, key="key", body=[b"abc", b"def"]) == (200, b"abcdef")
    assert ask(guard)[0] == ask(guard, key="Key")[0] == ask(guard, key="")[0] == 401
    assert ask(guard, "/health") == (200, b"")
    assert ask(guard, "/load_model", "key")[0] == 404
    status, body = ask(guard, key="key", body=[b"12345", b"678901"])
    assert status == 413 and "10 bytes" in json.loads(body)["error"]["message"]
    assert ask(Guard(echo)) == (200, b"")
