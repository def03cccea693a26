"""The rules of ARCHITECTURE.md that can be read off the source."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kernels": "compress.kernels", "calib": "compress.calib", "eval": "compress.eval", "compress": "compress"}
ORDER = [
    "compress.errors",
    "compress.kernels",
    "compress.calib",
    "compress.eval",
    "compress",
]  # a file imports leftwards
METHODS = ("compress.allocate", "compress.prune", "compress.quantize", "compress.recover")
KEEPS_TO_ITSELF = {  # who may import what knows a secret of the outside world
    "transformers": {
        "compress.bench.gradients",
        "compress.bench.make_model",
        "compress.bench.recovery",
        "compress.calib.layers",
        "compress.calib.model",
        "compress.calib.self_text",
        "compress.calib.skeleton",
        "compress.eval.speed",
        "compress.export.reference",
        "compress.gguf_import",
        "compress.gguf_weights",
        "compress.hf",
        "compress.model_folder",
        "compress.serve",
    },
    "accelerate": {"compress.calib.skeleton", "compress.tracker", "compress.trainer"},
    "datasets": {"compress.calib.texts"},
    "lm_eval": {"compress.harness"},
    "matplotlib": {"compress.html_report.figures", "compress.html_report.svg", "compress.plots"},
    "huggingface_hub": {"compress.sources", "compress.calib.texts"},
    "gguf": {"compress.export.gguf", "compress.gguf_file", "compress.gguf_import"},
    "typer": {
        "compress.cli",
        "compress.cli_bench",
        "compress.cli_eval",
        "compress.cli_export",
        "compress.cli_report",
        "compress.cli_serve",
        "compress.cli_speed",
        "compress.flags",
    },
    "peft": {"compress.recover.adapters", "compress.training"},
    "filelock": {"compress.run_dir", "compress.gguf_import", "compress.sources"},
}
PLUGIN = ROOT / "kernels" / "vllm"  # a distribution of its own, for vLLM's environment
ELSEWHERE = "compress.bench.peers.scripts"  # they run in environments that do not have this package


def sources() -> dict[str, ast.Module]:
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.is_relative_to(PLUGIN):
                continue
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = ast.parse(file.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rank(module: str) -> int:
    return max(i for i, name in enumerate(ORDER[:-1]) if inside(module, name)) if lower(module) else len(ORDER) - 1


def lower(module: str) -> bool:
    return any(inside(module, name) for name in ORDER[:-1])


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


SOURCES = sources()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    known = {name for name in imports(SOURCES[module]) if name in SOURCES and name != "compress"}
    assert [name for name in known if rank(name) > rank(module)] == []


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith(METHODS)])
def test_methods_see_tensors_only(module):
    outside = {
        "transformers",
        "datasets",
        "torch.distributed",
        "compress.calib.model",
        "compress.run_dir",
        "compress.pipeline",
    }
    assert imports(SOURCES[module]) & outside == set()


@pytest.mark.parametrize("library", KEEPS_TO_ITSELF)
def test_one_secret_a_file(library):
    own = {name: tree for name, tree in SOURCES.items() if not inside(name, ELSEWHERE)}
    users = {name for name, tree in own.items() if any(inside(n, library) for n in imports(tree))}
    assert users == KEEPS_TO_ITSELF[library]


def test_packages_are_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name for name, tree in SOURCES.items() if any(n.startswith(name + ".") for n in SOURCES)}
    assert set(listed) == folders


def test_modules_can_be_read_in_one_go():
    long = {
        f.name: n for d in FOLDERS for f in (ROOT / d).rglob("*.py") if (n := len(f.read_text().splitlines())) > 400
    }
    assert long == {}


def test_nothing_is_unpickled_and_no_remote_code_runs():
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            for forbidden in ("torch.load(", "import pickle", "trust_remote_code=True", "eval(", "exec("):
                calls = [line for line in text.splitlines() if forbidden in line and f".{forbidden}" not in line]
                assert [c for c in calls if "def eval(" not in c] == [], file
