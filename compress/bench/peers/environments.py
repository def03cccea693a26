"""The environments of peers, and their scripts as processes with a clock and a memory meter."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.bench.peers.rows import TORCH, Peer
from compress.errors import InputError, RunError
from compress.files import write_json
from compress.progress import Reporter
from compress.run_dir import read_json

SCRIPTS = Path(__file__).parent / "scripts"
REPOSITORY = Path(__file__).parents[3]
TORCH_FROM = (  # a CPU build wherever one can be had
    (f"{TORCH}+cpu",),
    (TORCH, "--index-url", "https://download.pytorch.org/whl/cpu"),
    (TORCH,),
)


BAD_INPUT = "InputError: "  # how a line of ours begins that says what to ask for instead


@dataclass(frozen=True)
class Usage:
    """What a process took."""

    exit_code: int  # negative: the signal that ended it
    seconds: float  # of the wall clock, imports and all
    peak_rss_bytes: int


def python_of(peer: Peer, folder: Path, reporter: Reporter) -> Path:
    """The interpreter of a peer's environment in `folder`/NAME, which is made if it is not there with these pins.

    Raises RunError if pip cannot install one, or a part of ours is not here to be installed.
    """
    if not peer.requirements:
        return Path(sys.executable)
    home = folder / peer.name
    mark, python = home / "installed.json", home / "bin" / "python"
    ours = [REPOSITORY / part for part in peer.ours]
    wanted = [*(_packages_here() if peer.on_top else [TORCH]), *peer.requirements, *map(str, ours)]
    if mark.exists() and read_json(mark)["requirements"] == wanted:
        return python
    if lacking := [part for part in ours if not (part / "pyproject.toml").exists()]:
        raise RunError(f"{peer.name} needs {lacking[0]}, which only a clone of the repository has: run it from one")
    reporter.say(f"making the environment of {peer.name} in {home}: {', '.join(wanted)}")
    shutil.rmtree(home, ignore_errors=True)
    _succeed([sys.executable, "-m", "venv", str(home)], peer)
    pip = [str(python), "-m", "pip"]
    if peer.on_top:
        _show_packages_here(python, peer)
        _succeed([*pip, "install", "-q", *peer.requirements], peer)
    else:
        _install_torch(pip, peer)
        _succeed([*pip, "install", "-q", TORCH, *peer.requirements], peer)
    if peer.unwanted:
        _succeed([*pip, "uninstall", "-q", "-y", *peer.unwanted], peer)
    for part in ours:  # as they are here, whatever is edited
        _succeed([*pip, "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(part)], peer)
    write_json(mark, {"requirements": wanted, "packages": _succeed([*pip, "freeze"], peer).split()})
    return python


def _install_torch(pip: list[str], peer: Peer) -> None:
    for source in TORCH_FROM[:-1]:
        if _run([*pip, "install", "-q", *source]).returncode == 0:
            return
    _succeed([*pip, "install", "-q", *TORCH_FROM[-1]], peer)


def _packages_here() -> list[str]:
    """The folders of packages that this interpreter imports from."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _show_packages_here(python: Path, peer: Peer) -> None:
    """Let an environment see this one's packages, behind its own; pip then takes them for installed."""
    place = _succeed([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], peer).strip()
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in _packages_here())
    (Path(place) / "below.pth").write_text(lines, encoding="utf-8")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _succeed(command: list[str], peer: Peer) -> str:
    """What a command prints. Raises RunError with the last line it complains in."""
    done = _run(command)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise RunError(f"cannot make the environment of {peer.name}: {lines[-1] if lines else 'pip failed'}")
    return done.stdout


def ask(peer: Peer, python: Path, action: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a peer's script answers to one request (scripts/protocol.py), with what the process took in `usage`.

    `folder` keeps the request, the answer and what the process printed. Raises RunError with the script's own line if
    it failed, InputError if that is one of ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, answer, log = folder / f"{action}.json", folder / f"{action}.answer.json", folder / f"{action}.log"
    answer.unlink(missing_ok=True)
    write_json(file, {**request, "answer": str(answer)})
    usage = _timed([str(python), str(SCRIPTS / peer.script), action, str(file)], environ_of(peer), log)
    if not answer.exists():
        raise RunError(f"{peer.name} ended with exit code {usage.exit_code} and no answer: see {log}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if line := found.get("failed"):
        raise InputError(line.removeprefix(BAD_INPUT)) if line.startswith(BAD_INPUT) else RunError(line)
    return found | {"usage": usage}


def environ_of(peer: Peer, scripts: Path = SCRIPTS) -> dict[str, str]:
    """Environment variables of a script: its neighbours can be imported, hubs are not asked, nothing of ours leaks."""
    own = os.environ.get("PYTHONPATH", "")
    inherited = own.split(os.pathsep) if own and (peer.on_top or not peer.requirements) else []
    path = os.pathsep.join([str(scripts), *inherited])
    return {**os.environ, "PYTHONPATH": path, "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", **peer.environ}


def _timed(command: list[str], environ: dict[str, str], log: Path) -> Usage:
    """Run a process where its log is, since some leave files of their own, and measure it.

    Linux counts a new process's peak from what its parent holds, so no model is ever opened in this one.
    """
    with log.open("wb") as output:
        started = time.monotonic()
        child = subprocess.Popen(command, env=environ, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    return Usage(child.returncode, seconds, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
