"""Losses of a language model's next tokens that never hold all logits at once: cross-entropy, and divergence from a teacher.

A head is most of a small model's work and nearly all of its memory (Gemma's vocabulary is 262,144). So it runs a few
positions at a time, and the gradient that enters the last hidden states is worked out on the way: the head runs once
forward and once backward, and its own weights get none.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_AT_ONCE = 1 << 25  # elements of all float32 pieces of logits together: 128 MB

# Logits [m, vocab_size], which of the positions they are, and float32 buffers of their shape, to the sum of the losses
# there and its slope in each logit, which is one of the buffers.
Slope = Callable[[Tensor, slice, Sequence[Tensor]], tuple[Tensor, Tensor]]


class Head:
    """A function from last hidden states [n, hidden_size] to logits [n, vocab_size], by the model's own code.

    Softcaps and scales of the logits differ between architectures; the model is run with its result put in its place.
    `output`: what the model's base gave, for all else that it holds.
    """

    def __init__(self, lm: Any, output: Any):
        self.lm, self.output, self.base = lm, output, lm.base_model

    @property
    def vocab_size(self) -> int:
        """Logits of a position."""
        return len(self.lm.get_output_embeddings().weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits, recorded by autograd where it is on."""
        stand_in = _StandIn()
        stand_in.output = copy.copy(self.output)
        stand_in.output.last_hidden_state = hidden.unsqueeze(0)
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        setattr(self.lm, self.lm.base_model_prefix, stand_in)
        try:
            return self.lm(input_ids=token, use_cache=False).logits[0]
        finally:
            setattr(self.lm, self.lm.base_model_prefix, self.base)


class _StandIn(nn.Module):
    output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


@dataclass(frozen=True)
class Lesson:
    """What a student is to say at some positions of its text, and how much the two ways to say so weigh."""

    at: Tensor  # [n] int64, positions in the student's flattened last hidden states
    targets: Tensor  # [n] int64, the tokens that follow there
    states: Tensor  # [n, hidden_size], the teacher's last hidden states there
    teacher: Any  # the model whose head makes logits of them
    kl: float
    ce: float


def next_token_loss(lm: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens [n, seqlen] given those before, with its gradient."""
    output, targets = lm.base_model(input_ids=tokens, use_cache=False), tokens[:, 1:].flatten()

    def slope(logits: Tensor, rows: slice, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return _cross_entropy(logits, targets[rows], buffers[0])

    return _through_head(Head(lm, output), output.last_hidden_state[:, :-1].flatten(0, 1), slope, 1)


def distillation_loss(lm: Any, tokens: Tensor, lesson: Lesson) -> Tensor:
    """kl KL(teacher || student) + ce CE in nats, each a mean over the lesson's positions, with its gradient.

    INT2.1's loss (arXiv:2306.08162), both terms as means over tokens. `lm`: the student; `tokens`: [n, seqlen]. Each
    piece of logits is float32.
    """
    output = lm.base_model(input_ids=tokens, use_cache=False)
    teacher = Head(lesson.teacher, output)

    def slope(logits: Tensor, rows: slice, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if not lesson.kl:
            loss, found = _cross_entropy(logits, lesson.targets[rows], buffers[0])
            return loss.mul_(lesson.ce), found.mul_(lesson.ce)
        with torch.no_grad():
            wanted = teacher(lesson.states[rows])
        return _divergence(logits, wanted, lesson, rows, buffers)

    hidden = output.last_hidden_state.flatten(0, 1)[lesson.at]
    return _through_head(Head(lm, output), hidden, slope, 3 if lesson.kl else 1)


def _through_head(head: Head, hidden: Tensor, slope: Slope, n_buffers: int) -> Tensor:
    """The mean over positions of what `slope` gives the sum of, with the gradient of `hidden` [n, hidden_size]."""
    n = len(hidden)
    rows = min(n, max(1, LOGITS_AT_ONCE // (n_buffers * head.vocab_size)))
    buffers = [torch.empty(rows, head.vocab_size, device=hidden.device) for _ in range(n_buffers)]
    total, gradients = torch.zeros((), device=hidden.device), []
    for start in range(0, n, rows):
        part = hidden.detach()[start : start + rows].requires_grad_(hidden.requires_grad)
        logits = head(part)
        with torch.autocast(hidden.device.type, enabled=False):
            rooms = [each[: len(part)] for each in buffers]
            loss, into_logits = slope(logits.detach(), slice(start, start + len(part)), rooms)
        total += loss / n
        if hidden.requires_grad:
            gradients += torch.autograd.grad(logits, part, into_logits.div_(n).to(logits.dtype))
    if not hidden.requires_grad:
        return total
    # The second term is zero, and its gradient is the one found above.
    return total + ((hidden - hidden.detach()) * torch.cat(gradients)).sum()


def _cross_entropy(logits: Tensor, targets: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over tokens of -log p(target), and its slope in each logit, float32 [n, vocab_size].

    All in `x`: at this size new memory costs as much as the arithmetic.
    """
    x.copy_(logits)
    wanted, top = x.gather(1, targets[:, None]), x.amax(1, keepdim=True)
    total = x.sub_(top).exp_().sum(1, keepdim=True)
    loss = (total.log() + top - wanted).sum()
    return loss, x.div_(total).scatter_add_(1, targets[:, None], torch.full_like(total, -1.0))


def _divergence(
    logits: Tensor, wanted: Tensor, lesson: Lesson, rows: slice, buffers: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The sum over tokens of kl KL(p || q) + ce (-log q(target)), q of `logits` and p of `wanted`; slope in each logit."""
    log_q, log_p, p = buffers
    kl, ce, targets = lesson.kl, lesson.ce, lesson.targets[rows, None]
    for buffer, each in ((log_q, logits), (log_p, wanted)):
        torch.log_softmax(buffer.copy_(each), -1, out=buffer)
    torch.exp(log_p, out=p)
    log_p.sub_(log_q)
    loss = kl * torch.stack([torch.dot(each, ratio) for each, ratio in zip(p, log_p, strict=True)]).sum()
    if ce:
        loss = loss - ce * log_q.gather(1, targets).sum()
    slope = log_q.exp_().mul_(kl + ce).sub_(p, alpha=kl)
    return loss, slope.scatter_add_(1, targets, slope.new_full(targets.shape, -ce)) if ce else slope
