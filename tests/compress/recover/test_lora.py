import pytest
import torch
from students import inputs_of, random_layer, student_of, train

from compress.errors import InputError
from compress.quantize import rtn
from compress.recover import lora, lrec, qlora
from compress.recover.variants import STORED, VARIANTS
from compress.task import LayerPlan

METHODS = (lora, lrec, qlora)
PACKED = LayerPlan(wbits=2, group_size=16)


def layer(plan):
    return random_layer(plan, lambda task: rtn.quantize_layer(task, rtn.Options()) if plan.wbits < 16 else task)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_dense_layer_does_is_learned_beside_packed_weights(method):
    task = layer(PACKED)
    student, x = student_of(task), inputs_of(task)
    wanted, before = x @ task.original.T, student.lm["layer"](x)
    learner = method.recover_model(student, method.Options())
    assert torch.equal(student.lm["layer"](x), before)
    losses = train(learner, lambda: (student.lm["layer"](x) - wanted).square().mean(), 60, 3e-3)
    (result,) = learner.results().values()
    assert result.packed is None and result.correction.rank == method.Options().rank
    assert losses[-1] < losses[0] / 10


def test_what_each_learns_from():
    assert (lora.Options().kl, lora.Options().ce) == (qlora.Options().kl, qlora.Options().ce) == (0, 1)
    assert lrec.Options().kl == 1 and 0 < lrec.Options().ce < 0.1


def test_lora_has_every_variant_and_the_others_those_that_can_be_stored_beside_packed_weights():
    for name in VARIANTS:
        assert lora.Options(variant=name).variant == name
        for method in (lrec, qlora):
            if name in STORED:
                method.Options(variant=name)
            else:
                with pytest.raises(ValueError, match="take one of lora, rslora, eva, adalora, vera, miss"):
                    method.Options(variant=name)


def test_qlora_needs_packed_weights():
    for plan in (LayerPlan(), LayerPlan(sparsity=0.5)):
        with pytest.raises(InputError, match="qlora works on quantized layers"):
            qlora.recover_model(student_of(layer(plan)), qlora.Options())
