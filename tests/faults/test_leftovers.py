"""What a kill between two files leaves is neither missed nor left lying."""

import json
import shutil
import signal

import pytest
from commands import Command, Faults

ADAPTER = "adapter-for-dense"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scatter(two_blocks, text_file, tmp_path_factory):
    """A finished run with adapters for the dense model, and the command that made it."""
    folder = tmp_path_factory.mktemp("scatter")
    flags = "--wbits 2 --quantizer rtn --group-size 32 --recover lora --scatter --recover-for 128tokens --nsamples 2"
    more = "--set lora.seqlen=32 --set lora.batch_size=2 --set lora.kl=0 --set lora.ce=1 --seqlen 32 --json"
    command = ["run", two_blocks, *f"{flags} {more}".split(), "--calib", text_file, "--out", folder / "out"]
    done = Command(command, folder).finish()
    assert done.code == 0, done.err
    return command, folder / "out", json.loads(done.out)


@pytest.mark.parametrize("lost", ["folder", "adapter_model.safetensors", "adapter_config.json"])
def test_a_lost_adapter_for_the_dense_model_is_made_again(scatter, digested, lost):
    command, out, result = scatter
    before = digested(out)
    held = sum(file.stat().st_size for file in (out / ADAPTER).iterdir())
    assert result["adapter_for_dense_bytes"] == held and result["compressed_bytes"] == sum(
        file.stat().st_size for file in out.glob("*.safetensors")
    )
    if lost == "folder":
        shutil.rmtree(out / ADAPTER)
    else:
        (out / ADAPTER / lost).unlink()
    again = Command(command, out.parent).finish()
    assert again.code == 0 and f"{ADAPTER} is missing or damaged: it is made again" in again.err
    assert digested(out) == before


@pytest.mark.parametrize(
    ("happening", "left"),
    [
        (("os.remove", "recovery_1.safetensors"), "run/recovery_1.safetensors"),
        (("os.rename", "config.json"), "model.safetensors"),
        (("os.rename", "result.json"), "config.json"),
        (("os.remove", "0000.json"), "run/result.json"),
        (("os.rename", "README.md"), "config.json"),
    ],
)
def test_what_a_kill_between_two_files_leaves_is_used_or_goes(every_stage, straight, digested, out, happening, left):
    command = [*every_stage, "--out", out]
    killed = Command(command, out.parent, Faults(save_seconds=0, end=happening)).finish()
    assert killed.code == -signal.SIGKILL and (out / left).is_file()
    assert Command(command, out.parent).finish().code == 0
    assert digested(out) == straight
    assert not list((out / "run" / "blocks").iterdir()) and not list((out / "run").glob("recovery_?.*"))
    assert not list(out.rglob("*.partial"))


def test_a_card_that_was_not_written_after_the_evaluation_is_written(every_stage, straight, digested, out):
    """The evaluation counts as done once the card has it: killed in between, it is measured again."""
    command = [*every_stage, "--out", out]
    assert Command(command[: command.index("--eval")] + command[-2:], out.parent).finish().code == 0
    before = (out / "README.md").read_bytes()
    killed = Command(command, out.parent, Faults(end=("os.rename", "README.md"))).finish()
    assert killed.code == -signal.SIGKILL and (out / "README.md").read_bytes() == before
    assert Command(command, out.parent).finish().code == 0 and digested(out) == straight
