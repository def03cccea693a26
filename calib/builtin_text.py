"""Two texts that arrive with Python itself, for machines without a network: one to calibrate on, one to measure on.

Docstrings of the standard library are the longer one (about 360,000 Gemma tokens with Python 3.11, enough for 128
windows of 2048), the language reference in pydoc_data is the other (about 113,000). They share no page, but they are one
kind of prose: a text of the model's own domain calibrates better, and a figure measured here compares with nothing
published. The words differ a little between Python versions.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from compress.errors import InputError

SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
SHORTEST = 120  # characters: below, a docstring is a label and no prose


def calibration_text() -> str:
    """Docstrings of the standard library's modules, classes and functions, in order of path and line, each once.

    The sources are parsed, never imported. Raises InputError where Python is installed without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    docstrings: dict[str, None] = {}  # a dictionary for its order: copies (decimal, _pydecimal) count once
    for file in sorted(folder.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(file.relative_to(folder).parts):
            docstrings |= dict.fromkeys(_docstrings(file))
    if not docstrings:
        raise InputError(f"{folder} holds no Python sources, so there is no builtin text: give a text file instead")
    return "\n\n".join(docstrings)


def evaluation_text() -> str:
    """The language reference that `help()` shows, by topic. Raises InputError where Python is installed without it."""
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise InputError(
            "this Python has no pydoc_data, so there is no builtin text: give a text file instead"
        ) from error
    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def _docstrings(file: Path) -> Iterator[str]:
    """The longer docstrings of one source file, in order of line."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and deliberately broken samples
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text and len(text) >= SHORTEST:
            yield text
