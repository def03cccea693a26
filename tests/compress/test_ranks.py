"""Several processes share one run: what comes out does not depend on how many, and any of them may be lost."""

import hashlib
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from rank_commands import run_ranks, start_ranks
from tiny import save_tiny

from compress.calib.products import dealt, panels
from compress.calib.ranks import ALONE, Ranks
from compress.errors import InputError

CALIB = ["--nsamples", "7", "--seqlen", "32"]  # 7: some turns leave a rank without a sequence


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("moe"), architecture="qwen3_moe", dtype=torch.bfloat16)


def files(out):
    """What a checkpoint holds, without README.md, which tells of seconds and memory."""
    found = sorted(file for file in out.rglob("*") if file.is_file() and not file.is_relative_to(out / "run"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found if file.name != "README.md"}


def arguments(folder, text, out, *flags):
    return ["run", folder, "--calib", text, *CALIB, "--out", out, *flags]


RECIPES = {
    "gradients, hessians and drift": "--sparsity 0.5 --pruner gblm --wbits 4 --group-size 32",
    "gradients of pruned blocks": "--pattern 2:4 --pruner gblm --refresh-gradients 2 --sequential",
    "inputs in codes": "--wbits 8 --abits 8 --quantizer rtn",
    "static codes": "--wbits 8 --abits 8 --activations outliertune --head-bits 8",
    "a budget": "--budget 4bits --group-size 32",
    "corrections and training": "--wbits 2 --group-size 32 --recover low-rank,lrec,pv --recover-for 500tokens "
    "--set lrec.seqlen=32 --set lrec.micro_batch_size=1 --set pv.seqlen=32 --set pv.micro_batch_size=2",
}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """Several panels of products are made of what enters its down_proj."""
    return save_tiny(tmp_path_factory.mktemp("wide"), dtype=torch.bfloat16, intermediate_size=1152, num_hidden_layers=2)


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
def test_the_checkpoint_does_not_depend_on_the_number_of_ranks(tmp_path, wide_folder, text_file, flags):
    found = []
    for count in (1, 2, 3):
        out = tmp_path / str(count)
        ended = run_ranks(arguments(wide_folder, text_file, out, *flags.split()), tmp_path, count)
        assert [rank.code for rank in ended] == [0] * count, [rank.err for rank in ended]
        assert [bool(rank.out) for rank in ended] == [True] + [False] * (count - 1)  # one of them tells
        found.append(files(out))
    assert found[0] == found[1] == found[2]


def test_experts_that_some_ranks_sequences_do_not_reach(tmp_path, moe_folder, text_file):
    flags = "--sparsity 0.5 --pruner wanda --refine dsnot --wbits 4 --group-size 32 --nsamples 3".split()
    found = []
    for count in (1, 3):
        ended = run_ranks(arguments(moe_folder, text_file, tmp_path / str(count), *flags), tmp_path, count)
        assert ended[0].code == 0, ended[0].err
        found.append(files(tmp_path / str(count)))
    assert found[0] == found[1]


def test_a_lost_rank_ends_all_with_one_line_and_another_number_of_ranks_goes_on(tmp_path, llama_folder, text_file):
    flags = "--sparsity 0.5 --pruner gblm --wbits 4 --group-size 32".split()
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_ranks(arguments(llama_folder, text_file, whole, *flags), tmp_path, 1)
    ranks = start_ranks(arguments(llama_folder, text_file, out, *flags), tmp_path, 3)
    finished = out / "run" / "blocks" / "0000.json"
    assert ranks[2].reaches(finished.exists)
    ranks[2].signal(signal.SIGKILL)
    codes = [rank.finish().code for rank in ranks]
    lines = [line for rank in ranks for line in rank.err.splitlines() if line.startswith("error")]
    assert codes == [3, 3, -signal.SIGKILL]
    assert len(lines) == 1 and "another rank is gone" in lines[0], lines
    ended = run_ranks(arguments(llama_folder, text_file, out, *flags), tmp_path, 2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert '"replayed", "block": 0' in (out / "run" / "log.jsonl").read_text()
    assert files(out) == files(whole)


def test_a_rank_that_is_lost_while_all_train_ends_all_with_one_line(tmp_path, llama_folder, text_file):
    """The others wait for its share of the codes, in the midst of a forward or a backward."""
    flags = "--wbits 2 --group-size 32 --quantizer rtn --recover lrec --recover-for 20000tokens --set lrec.seqlen=32"
    ranks = start_ranks(arguments(llama_folder, text_file, tmp_path / "out", *flags.split()), tmp_path, 3)
    journal = tmp_path / "out" / "run" / "log.jsonl"
    assert ranks[1].reaches(lambda: journal.exists() and "held_out" in journal.read_text())
    ranks[1].signal(signal.SIGKILL)
    codes = [rank.finish().code for rank in ranks]
    lines = [line for rank in ranks for line in rank.err.splitlines() if line.startswith("error")]
    assert codes == [3, -signal.SIGKILL, 3]
    assert len(lines) == 1 and "another rank is gone" in lines[0], lines


def test_one_line_where_every_rank_meets_the_same_error(tmp_path, llama_folder, text_file):
    flags = "--wbits 4 --group-size 32 --nsamples 2".split()
    ended = run_ranks(arguments(llama_folder, text_file, tmp_path / "out", *flags), tmp_path, 3)
    lines = [line for rank in ended for line in rank.err.splitlines() if line.startswith("error")]
    assert [rank.code for rank in ended] == [2, 2, 2]
    assert lines == ["error: 2 calibration sequences are too few for 3 ranks: raise --nsamples"]


@pytest.mark.parametrize("start", ["compress", "torchrun"])
def test_ranks_are_started(tmp_path, llama_folder, text_file, start):
    flags = [str(each) for each in arguments(llama_folder, text_file, tmp_path / start, "--wbits", "8")]
    ours = [sys.executable, "-P", "-m", "compress", *flags]
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command = [*ours, "--ranks", "2"] if start == "compress" else [*torchrun, *ours]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^Checkpoint in", done.stdout, re.MULTILINE)) == 1
    assert (tmp_path / start / "config.json").exists()


@pytest.fixture
def two_machines():
    """Two network namespaces with an address each, joined by a cable, as `ip` makes them."""
    names, cables = [f"ranks{os.getpid()}{end}" for end in "ab"], [f"rk{os.getpid()}{end}"[-14:] for end in "ab"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs the command ip, and the right to make network namespaces")
    subprocess.run(["ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1]], check=True)
    for name, cable, last in zip(names, cables, (1, 2), strict=True):
        inside = ["ip", "netns", "exec", name]
        subprocess.run(["ip", "link", "set", cable, "netns", name], check=True)
        subprocess.run([*inside, "ip", "addr", "add", f"10.77.0.{last}/24", "dev", cable], check=True)
        for each in (cable, "lo"):
            subprocess.run([*inside, "ip", "link", "set", each, "up"], check=True)
    yield list(zip(names, cables, strict=True))
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_two_machines_that_share_a_folder(tmp_path, llama_folder, text_file, two_machines):
    flags = "--sparsity 0.5 --pruner wanda --wbits 4 --group-size 32".split()
    run_ranks(arguments(llama_folder, text_file, tmp_path / "one", *flags), tmp_path, 1)
    command = [
        sys.executable,
        "-P",
        "-m",
        "compress",
        *map(str, arguments(llama_folder, text_file, tmp_path / "two", *flags)),
    ]
    torchrun = [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--no-python",
    ]
    meeting = ["--master-addr", "10.77.0.1", "--master-port", "29511"]
    machines = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *torchrun, *meeting, "--node-rank", str(number), *command],
            env={**os.environ, "GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number, (name, cable) in enumerate(two_machines)
    ]  # fmt: skip
    ends = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    assert b"Checkpoint in" in ends[0][0] and not ends[1][0]
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize(
    ("flags", "line"),
    [([], "error: nothing to do"), (["--wbits", "4"], "error: no model no-such-model")],
    ids=["flags", "model"],
)
def test_started_ranks_that_fail_end_with_one_line(tmp_path, text_file, flags, line):
    command = [sys.executable, "-P", "-m", "compress", "run", "no-such-model", "--calib", str(text_file), *flags]
    done = subprocess.run([*command, "--ranks", "2"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(line), done.stderr


def test_every_sequence_has_its_turn_and_its_rank():
    ranks = [Ranks(number, 3) for number in range(3)]
    assert sorted(index for rank in ranks for index in rank.share(7)) == list(range(7))
    for rank in ranks:
        places = [(place, turn) for place, turn in rank.turns(7)]
        assert [index for _, turn in places for _, index in turn] == list(range(7))
        own = [index for place, turn in places for number, index in turn if number == rank.number]
        assert own == list(rank.share(7))
        assert [place for place, _ in places if place is not None] == list(range(len(own)))
    with pytest.raises(InputError, match="2 calibration sequences are too few for 3 ranks"):
        ranks[0].share(2)


def test_work_is_dealt_by_cost():
    owners = Ranks(0, 2).owners({"q": 3.0, "o": 1.0, "gate": 4.0, "down": 7.0})
    assert owners.of == {"down": 0, "gate": 1, "q": 1, "o": 0}
    assert owners.has("down") and not owners.has("q")
    assert ALONE.owners({"q": 1.0}).has("q")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_products_are_dealt_in_stretches_of_one_cost(count):
    widths = {"q": 4096, "o": 4096, "gate": 4096, "down": 11008}
    ranks = dealt(widths, count, drift=True)
    cost = [0] * count
    for name, makers in ranks.items():
        assert len(makers) == len(panels(widths[name]))
        for rank, rows in zip(makers, panels(widths[name]), strict=True):
            cost[rank] += (rows.stop - rows.start) * (rows.stop + widths[name])
    dearest = 512 * 2 * 11008  # a panel
    assert max(cost) - min(cost) <= 2 * dearest
    assert sum(len(set(makers)) for makers in ranks.values()) <= len(widths) + count - 1  # who is sent an input
