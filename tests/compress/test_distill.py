"""Losses in pieces: they and their gradients equal those of all logits at once."""

import pytest
import torch
from tiny import tiny_lm
from torch.nn import functional

from compress import distill
from compress.distill import Lesson, distillation_loss, next_token_loss

TOKENS = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(0))


def models(architecture):
    student, teacher = tiny_lm(architecture).requires_grad_(False), tiny_lm(architecture).requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return student, teacher


def positions(share=1.0):
    """Positions in the flattened tokens that have a next one."""
    at = torch.arange(TOKENS.numel()).view(TOKENS.shape)[:, :-1].flatten()
    return at[torch.rand(len(at), generator=torch.Generator().manual_seed(2)) < share]


def lesson(teacher, kl, ce, at):
    states = teacher.base_model(TOKENS).last_hidden_state.flatten(0, 1)[at]
    return Lesson(at, TOKENS.flatten()[at + 1], states, teacher, kl, ce)


def plain(student, teacher, kl, ce, at):
    """The loss of all logits at once, by torch's own functions."""
    log_q = student(TOKENS).logits.flatten(0, 1)[at].log_softmax(-1)
    log_p = teacher(TOKENS).logits.flatten(0, 1)[at].log_softmax(-1)
    divergence = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return kl * divergence + ce * functional.nll_loss(log_q, TOKENS.flatten()[at + 1])


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (1.0, 0.06), (0.5, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # gemma2 caps its logits
def test_the_distillation_loss_in_pieces_is_the_plain_one(monkeypatch, architecture, kl, ce, share):
    monkeypatch.setattr(distill, "POSITIONS", 5)
    monkeypatch.setattr(distill, "WORDS", 60)
    student, teacher = models(architecture)
    at = positions(share)
    weight = student.base_model.layers[0].mlp.down_proj.weight.requires_grad_()
    wanted = plain(student, teacher, kl, ce, at)
    gradient = torch.autograd.grad(wanted, weight)[0]
    ours = distillation_loss(student, TOKENS, lesson(teacher, kl, ce, at))
    torch.testing.assert_close(ours.detach(), wanted.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, weight)[0], gradient, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        assert distillation_loss(student, TOKENS, lesson(teacher, kl, ce, at)).item() == pytest.approx(
            wanted.item(), abs=1e-5
        )


def test_a_model_differs_from_itself_by_nothing_and_learns_nothing():
    student, _ = models("llama")
    weight = student.base_model.layers[0].mlp.down_proj.weight.requires_grad_()
    with torch.no_grad():
        given = lesson(student, 1.0, 0.0, positions())
    loss = distillation_loss(student, TOKENS, given)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-7


def test_the_teacher_has_a_head_of_its_own():
    student, teacher = models("llama")
    given = lesson(teacher, 1.0, 0.0, positions())
    same_states = Lesson(given.at, given.targets, given.states, student, 1.0, 0.0)
    assert distillation_loss(student, TOKENS, given) != distillation_loss(student, TOKENS, same_states)


def test_cross_entropy_is_the_same_by_either_way():
    student, teacher = models("llama")
    ours = distillation_loss(student, TOKENS, lesson(teacher, 0.0, 1.0, positions()))
    assert ours.item() == pytest.approx(next_token_loss(student, TOKENS).item(), abs=1e-6)


def test_no_more_logits_than_allowed_are_held(monkeypatch):
    monkeypatch.setattr(distill, "POSITIONS", 5)
    monkeypatch.setattr(distill, "WORDS", 60)
    student, teacher = models("llama")
    given = lesson(teacher, 1.0, 0.1, positions())
    distillation_loss(student, TOKENS, given)  # which finds out that words can be taken apart
    sizes = []
    head = student.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    distillation_loss(student, TOKENS, given)
    head.remove()
    assert max(sizes) == 5 * 60 and sum(sizes) == 2 * 45 * 200
    assert student.lm_head.weight.shape == (200, student.config.hidden_size)


def test_a_head_that_mixes_words_is_taken_whole(monkeypatch):
    monkeypatch.setattr(distill, "POSITIONS", 5)
    monkeypatch.setattr(distill, "WORDS", 60)
    (student, teacher), at = models("llama"), positions()
    for each in (student, teacher):
        each.lm_head.register_forward_hook(lambda module, args, out: out * (out.shape[-1] / 100))
    weight = student.base_model.layers[0].mlp.down_proj.weight.requires_grad_()
    wanted, ours = (
        plain(student, teacher, 1.0, 0.3, at),
        distillation_loss(student, TOKENS, lesson(teacher, 1.0, 0.3, at)),
    )
    torch.testing.assert_close(ours.detach(), wanted.detach(), atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(each, weight)[0] for each in (ours, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
