"""What a page says of a sweep, read from its folder."""

from pathlib import Path
from typing import Any

from compress.errors import InputError
from compress.html_report.run_data import command, run_folder, trainings
from compress.recipe import read_recipe
from compress.run_dir import Journal, read_json
from compress.sweep import folder_name


def sweep_data(path: Path) -> dict[str, Any]:
    """sweep.json of the sweep in `path`, with more of each row: "name", "best", "training", "recipe", "command".

    "best": no other run of the sweep is as small and as good. "common": the pieces that all settings have, which no
    name repeats. Raises InputError if there is nothing to tell.
    """
    data = read_json(path / "sweep.json")
    if not data["runs"]:
        raise InputError(f"{path} has no finished run yet: the same `compress sweep` goes on")
    common, names = short_names([row["setting"] for row in data["runs"]])
    best = frontier(data["runs"])
    rows = [
        row | {"name": names[row["setting"]], "best": index in best} | _of_its_folder(path, row, data["protocol"])
        for index, row in enumerate(data["runs"])
    ]
    return {"kind": "sweep", "name": path.resolve().name, **data, "common": common, "runs": rows}


def _of_its_folder(path: Path, row: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """A run's training, its recipe and the line that repeats it, where its folder is still there."""
    folder = run_folder(path / folder_name(row["setting"], row["target"]))
    if folder is None or not (folder / "recipe.toml").is_file():
        return {"training": [], "recipe": None, "command": None}
    recipe = read_recipe(folder / "recipe.toml", {})
    repeat = command(f"{path.resolve().name}-again", protocol)
    return {"training": trainings(Journal(folder / "log.jsonl").read()), "recipe": recipe.toml(), "command": repeat}


def frontier(rows: list[dict[str, Any]]) -> set[int]:
    """Rows that no other row beats: in size, perplexity, or both, with neither worse."""
    places = {i: (row["compressed_bytes"], row["perplexity"]) for i, row in enumerate(rows) if "failed" not in row}

    def beaten(own: tuple[float, float]) -> bool:
        return any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in places.values())

    return {index for index, own in places.items() if not beaten(own)}


def short_names(settings: list[str]) -> tuple[list[str], dict[str, str]]:
    """The pieces that all settings share, and each setting's name without them.

    >>> short_names(["gptq:a=1,b=2", "gptq:a=1,b=3"])
    (['gptq', 'a=1'], {'gptq:a=1,b=2': 'b=2', 'gptq:a=1,b=3': 'b=3'})
    """
    pieces = {setting: setting.replace(":", ",", 1).split(",") for setting in settings}
    first = next(iter(pieces.values()))
    common = [piece for piece in first if all(piece in own for own in pieces.values())]
    names = {}
    for setting, own in pieces.items():
        left = [piece for piece in own if piece not in common]
        names[setting] = ", ".join(left) or own[0]
    if len(pieces) == 1 or len(set(names.values())) < len(pieces):  # the same pieces in another order
        return [], {setting: setting for setting in pieces}
    return common, names
