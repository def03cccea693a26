import pytest

from compress.errors import InputError
from compress.export import targets
from compress.export.targets import Comparison, find_target, target_names


def test_the_runtimes_there_are():
    assert target_names() == ["executorch", "gguf", "onnx", "openvino"]
    with pytest.raises(InputError, match='no export to "coreml": choose executorch, gguf, onnx, openvino'):
        find_target("coreml")


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    for name in target_names():
        with pytest.raises(InputError, match=rf"pip install 'compress-llm\[export-{name}\]'"):
            find_target(name)


def test_one_weight_that_differs_is_counted():
    import torch

    found, weight = Comparison(), torch.ones(2, 3)
    found.add(True, weight, weight.clone())
    found.add(True, weight, weight * (1 + 2.0**-20))
    found.add(False, weight.bfloat16(), weight)
    assert (found.packed, found.exact, found.others) == (2, 1, 0.0) and 0 < found.largest < 1e-5
