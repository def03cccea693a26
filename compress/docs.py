"""Pages made from the source: METHODS.md, and the table of methods in README.md.

`python -m compress.docs` writes them into the folder of the checkout; with `--check` it only says whether they are up
to date, and exits 1 if not.
"""

import sys
from pathlib import Path

from compress.settings import typed
from compress.steps import STAGES, methods

BEGIN, END = "<!-- methods: written by `make docs` -->", "<!-- end of methods -->"
TITLES = {
    "allocate": "Where it goes",
    "activations": "Quantize inputs",
    "prune": "Prune",
    "refine": "Refine the mask",
    "quantize": "Quantize",
    "recover": "Recover",
}


def methods_page() -> str:
    """METHODS.md: every method's docstring and options."""
    parts = ["# Methods", "", "Written by `make docs` from the modules themselves; change those.", ""]
    for stage in STAGES:
        parts += [f"## {TITLES[stage]}", ""]
        for name, module in methods(stage).items():
            parts += [f"### `{name}`", "", (module.__doc__ or "").strip(), ""]
            if module.NEEDS:
                parts += [f"Statistics it reads: {', '.join(f'`{need}`' for need in sorted(module.NEEDS))}.", ""]
            for key, field in module.Options.model_fields.items():
                parts.append(f"- `--set {name}.{key}={typed(field.default)}`: {field.description}")
            parts += [""] * bool(module.Options.model_fields)
    return "\n".join(parts).rstrip() + "\n"


def methods_table() -> str:
    """The table of methods for README.md: a row a stage, each name a link to its section of METHODS.md."""
    rows = ["| stage | methods |", "|---|---|"]
    for stage in STAGES:
        rows.append(f"| {TITLES[stage].lower()} | {', '.join(f'[`{n}`](METHODS.md#{n})' for n in methods(stage))} |")
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """README.md with its table of methods as it should be."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{methods_table()}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    """Write or check the pages of the checkout in the current folder; the exit code."""
    readme = Path("README.md")
    pages = {Path("METHODS.md"): methods_page(), readme: with_table(readme.read_text(encoding="utf-8"))}
    stale = [page for page, text in pages.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    for page in stale:
        if "--check" in arguments:
            sys.stderr.write(f"{page} is out of date: run make docs\n")
        else:
            page.write_text(pages[page], encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
