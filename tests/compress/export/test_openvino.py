"""Exports to OpenVINO: the extra `export-openvino`."""

import pytest
import torch

from compress.errors import InputError
from compress.export.command import export
from compress.export.openvino import EXACT, NAME
from compress.export.reference import reference_logits, reference_model
from compress.export.source import Source

openvino = pytest.importorskip("openvino", reason="the extra export-openvino is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # a minute each under torch.export


@pytest.mark.parametrize(("target", "kind"), [("W4 asymmetric", "u4"), ("W8 asymmetric", "u8"), ("W2", "u2")])
def test_weights_bit_for_bit_and_logits_in_float32(make_checkpoint, tmp_path, target, kind):
    found = export(make_checkpoint(target), "openvino", tmp_path / "x", verify=True).data
    assert found["types"][kind] == found["verify"]["exact"] == 21
    assert found["verify"]["largest_difference_of_logits"] < 1e-5


def test_corrections_are_in_the_graph_and_texts_may_be_of_any_length(with_adapter, tmp_path):
    found = export(with_adapter, "openvino", tmp_path / "x", verify=True).data["verify"]
    assert found["exact"] == 21 and found["largest_difference_of_logits"] < 1e-5
    compiled = openvino.Core().compile_model(tmp_path / "x" / NAME, "CPU", EXACT)
    ids = torch.tensor([[1, 300, 262, 7, 9, 280, 61]])
    ours = reference_logits(reference_model(Source(with_adapter)), ids)
    assert torch.allclose(torch.from_numpy(compiled(ids.numpy())[0]), ours, atol=1e-5)


def test_rounded_inputs_are_refused(make_checkpoint, tmp_path):
    with pytest.raises(InputError, match="which OpenVINO does not do"):
        export(make_checkpoint("W8A8"), "openvino", tmp_path / "x")
