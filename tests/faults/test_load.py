"""`compress serve` under fifty clients, and told to end while it answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import Command

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
ENVIRONMENT = {"COMPRESS_NO_MEASURING": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(two_blocks, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    flags = "--wbits 4 --group-size 32 --quantizer rtn --format native --nsamples 2 --seqlen 16".split()
    done = Command(["run", two_blocks, *flags, "--calib", text_file, "--out", folder / "small"], folder).finish()
    assert done.code == 0, done.err
    return folder / "small"


def test_fifty_clients_are_answered_and_leave_nothing_behind(checkpoint, tmp_path):
    sizes = ["--clients", 50, "--seconds", 5, "--prompt-tokens", 12, "--new-tokens", 6]
    done = subprocess.run(
        [sys.executable, "-m", "compress", "bench", "serve", str(checkpoint), *map(str, sizes), "--json"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == {} and found["requests"] >= 50 and found["tokens_per_second"] > 0
    first, whole = found["first_token_seconds"], found["answer_seconds"]
    assert first["p50"] <= first["p90"] <= first["p99"] and first["p50"] <= whole["p50"]
    assert found["after"]["handles"] <= found["before"]["handles"] and found["end"]["exit_code"] == 0
    assert found["after"]["threads"] <= found["before"]["threads"] + 1
    assert found["after"]["rss_bytes"] - found["before"]["rss_bytes"] < 32 * 2**20


@pytest.fixture
def server(checkpoint):
    """A server in a process of its own, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "compress", "serve", str(checkpoint), "--port", str(port), "--name", "m"]
    server = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(2400):
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.05)
        yield server, client
    finally:
        server.kill()
        server.communicate()
        client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_begun_is_finished_before_it_ends(server, number):
    server, client = server
    begun = client.completions.create(model="m", prompt="w5 w6", max_tokens=100, stream=True)
    next(iter(begun))
    with ThreadPoolExecutor(3) as threads:
        waiting = [
            threads.submit(client.completions.create, model="m", prompt=f"w{i}", max_tokens=20) for i in range(3, 6)
        ]
        time.sleep(2)  # until they are there
        server.send_signal(number)
        finished = [each.result() for each in waiting]
    usage = [chunk.usage for chunk in begun if chunk.usage is not None]
    assert usage[-1].completion_tokens == 100 and all(each.usage.completion_tokens == 20 for each in finished)
    assert server.wait(60) == 0
    assert server.stderr.read().strip().splitlines()[-1] == "stopped"
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_second_signal_does_not_wait(server):
    server, client = server
    with ThreadPoolExecutor(8) as threads:
        waiting = [
            threads.submit(client.completions.create, model="m", prompt=f"w{i}", max_tokens=100) for i in range(3, 11)
        ]
        time.sleep(0.5)
        server.send_signal(signal.SIGINT)
        time.sleep(0.3)
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        assert server.wait(20) in (0, 130), "a machine so fast finishes them"
        assert "Traceback" not in server.stderr.read()
        assert all(each.exception() is None or isinstance(each.exception(), openai.OpenAIError) for each in waiting)


def test_an_answer_that_nobody_waits_for_does_not_break_the_end(server):
    server, client = server
    for _ in range(3):
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).completions.create(model="m", prompt="w5", max_tokens=110)
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert server.stderr.read().strip().splitlines()[-1] == "stopped"
