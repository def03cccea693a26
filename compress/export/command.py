"""`compress export`: check that it can be exact, write it, read it back, and say what there is."""

from pathlib import Path
from typing import Any

from compress.errors import RunError
from compress.export.source import Source
from compress.export.targets import Comparison, Exported, check_out, check_shift, find_target
from compress.report import Report, size, table


def export(folder: Path, name: str, out: Path, verify: bool = False, lossy: bool = False) -> Report:
    """Write the checkpoint in `folder` as the runtime `name` reads it, to `out`; then, if asked, compare the two.

    Raises InputError for what the runtime cannot hold exactly, unless `lossy`; RunError if `verify` finds a packed
    weight that differs all the same.
    """
    target = find_target(name)
    check_out(target, name, out)
    source = Source(folder)
    check_shift(source)
    exported: Exported = target.write(source, out, lossy)
    compared: Comparison | None = target.verify(source, exported) if verify else None
    if compared is not None and compared.exact < compared.packed and not lossy:
        raise RunError(
            f"{compared.packed - compared.exact} of {compared.packed} packed weights in {out} differ, by up to "
            f"{compared.largest:.1e}: this is a defect of compress or of {name}'s converter, please report it"
        )
    return _report(name, exported, compared)


def _report(name: str, exported: Exported, compared: Comparison | None) -> Report:
    files = {str(file): _bytes(file) for file in exported.files}
    data: dict[str, Any] = {"runtime": name, "files": files, "types": dict(exported.kinds), "notes": exported.notes}
    rows = [[file, size(count)] for file, count in files.items()]
    rows += [[f"parameters as {kind}", str(count)] for kind, count in sorted(exported.kinds.items())]
    notes = list(exported.notes)
    if compared is not None:
        data["verify"] = {
            "packed": compared.packed,
            "exact": compared.exact,
            "largest_difference": compared.largest,
            "largest_difference_of_dense": compared.others,
            "largest_difference_of_logits": compared.logits,
        }
        rows.append(["packed weights equal bit for bit", f"{compared.exact} of {compared.packed}"])
        rows.append(["largest difference of a packed weight", f"{compared.largest:.1e}"])
        rows.append(["largest difference of any other", f"{compared.others:.1e}"])
        if compared.logits is not None:
            rows.append(["largest difference of logits", f"{compared.logits:.1e}"])
        notes += compared.notes
        data["notes"] = notes
    return Report(data, [table("", [name, ""], rows), *notes])


def _bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )
