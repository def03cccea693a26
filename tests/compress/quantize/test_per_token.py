from inputs import input_task, random_inputs

from compress.quantize.per_token import NEEDS, Options, scale_inputs


def test_nothing_is_folded_and_nothing_has_to_be_known():
    task = input_task(random_inputs())
    assert scale_inputs(task, Options()) is task and not task.static and not NEEDS
