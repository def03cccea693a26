import asyncio
import json
import os
import shutil
import sys

import pytest

from compress import engines
from compress.cli_serve import serve
from compress.engines import become, check_listening, command, has_plugin, needs_plugin
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
    (folder := tmp_path / "small-1.5").mkdir()
    line = command("vllm", folder, "127.0.0.1", 8001, 128)
    listening = "--host 127.0.0.1 --port 8001 --served-model-name small-1.5 --max-model-len 128"
    assert line == ["vllm", "serve", str(folder), *listening.split()]
    gguf = tmp_path / "m-1.5.gguf"
    line = ["llama-server", "-m", str(gguf), *"--host 127.0.0.1 --port 1 --alias m-1.5".split()]
    assert command("llama.cpp", gguf, "127.0.0.1", 1) == line
    assert command("llama.cpp", gguf, "127.0.0.1", 1, 64, "mine") == [*line[:-1], "mine", "--ctx-size", "64"]


def test_engines_refuse_what_they_do_not_read(tmp_path):
    with pytest.raises(InputError, match="a GGUF file, which"):
        command("llama.cpp", tmp_path, "127.0.0.1", 1)
    with pytest.raises(InputError, match="use --engine llama"):
        command("vllm", tmp_path / "m.gguf", "127.0.0.1", 1)


def test_the_native_layout_needs_a_plugin(tmp_path):
    for method in ("compress", "compressed-tensors"):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
        assert needs_plugin(tmp_path) == (method == "compress")


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A program called vllm on PATH; in its environment there is no plug-in."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return program


def test_serve_becomes_the_engine(engine, tmp_path, monkeypatch):
    became = []
    monkeypatch.setattr(engines.os, "execv", lambda *line: became.append(line) or sys.exit())
    monkeypatch.setattr(engines.os, "environ", environ := dict(os.environ))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        serve(tmp_path, "vllm", name="mine", port=8009, api_key="secret")
    listening = "--host 127.0.0.1 --port 8009 --served-model-name mine"
    assert became == [(str(engine), [str(engine), "serve", str(tmp_path), *listening.split()])]
    assert environ["VLLM_API_KEY"] == environ["LLAMA_API_KEY"] == "secret"
    other = tmp_path / "another"
    shutil.copy(engine, other)
    with pytest.raises(SystemExit):
        serve(tmp_path, "vllm", engine_binary=str(other))
    assert became[1][0] == str(other)
    with pytest.raises(InputError, match="not vllm's"):
        serve(tmp_path, "vllm", device="cpu")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compress"}}')
    with pytest.raises(InputError, match="pip install compress-vllm"):
        serve(tmp_path, "vllm")


def test_an_engine_that_is_not_there():
    with pytest.raises(InputError, match="no-such-program is not installed"):
        become(["vllm", "serve"], None, "no-such-program")


def test_a_plugin_is_looked_for_where_the_engine_is(engine, monkeypatch):
    assert not has_plugin(engine)
    (engine.parent / "python").symlink_to(sys.executable)
    assert not has_plugin(engine)
    (site := engine.parent.parent / "compress_vllm-1.dist-info").mkdir()
    (site / "METADATA").write_text("Name: compress-vllm\nVersion: 1\n")
    monkeypatch.setenv("PYTHONPATH", str(site.parent))
    assert has_plugin(engine)


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
