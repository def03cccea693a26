"""Exports to ExecuTorch: the extra `export-executorch`."""

import pytest

from compress.errors import InputError
from compress.export.command import export

pytest.importorskip("executorch", reason="the extra export-executorch is not installed")
pytest.importorskip("torchao", reason="the extra export-executorch is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # a minute each under torch.export


@pytest.mark.parametrize(
    ("target", "kind"), [("W4", "int4 in groups"), ("W8", "int8 by channel"), ("W2", "int4 in groups")]
)
def test_codes_are_taken_over_and_the_file_runs(make_checkpoint, tmp_path, target, kind):
    found = export(make_checkpoint(target), "executorch", tmp_path / "x.pte", verify=True).data
    assert found["types"][kind] == found["verify"]["exact"] == 21
    assert found["verify"]["largest_difference_of_logits"] < 0.05  # an input rounds to another code here and there


def test_corrections_run_beside_them(with_adapter, tmp_path):
    with pytest.raises(InputError, match="4 bits asymmetric, groups of 64: --wbits 4 --symmetric"):
        export(with_adapter, "executorch", tmp_path / "x.pte")
    assert not (tmp_path / "x.pte").exists()
    found = export(with_adapter, "executorch", tmp_path / "x.pte", verify=True, lossy=True).data
    assert found["types"] == {"float32": 30} and found["verify"]["largest_difference_of_logits"] < 1e-5


def test_the_file_is_named_as_the_runtime_wants_it(make_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"ends in \.pte"):
        export(make_checkpoint("W4"), "executorch", tmp_path / "x")
