"""Losses of a language model's next tokens that never hold all logits: cross-entropy, and divergence from a teacher.

A head is most of a small model's work and nearly all of its memory (Gemma's vocabulary is 262,144). So logits are made
for a few positions and a few words at a time, small enough for a cache, twice: first for the sum over all words, then
for the loss and the gradient that enters the last hidden states. Making them twice takes a quarter of the time that
few positions and all words take, since those wait for the head's weights. The head's weights get no gradient.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

POSITIONS, WORDS = 512, 4096  # of a piece of logits


class Head:
    """A function from last hidden states [n, hidden_size] to logits [n, words], by the model's own code.

    Softcaps and scales of the logits differ between architectures; the model is run with its result put in its place.
    `output`: what the model's base gave, for all else that it holds.
    """

    def __init__(self, lm: Any, output: Any):
        self.lm, self.output, self.base, self.layer = lm, output, lm.base_model, lm.get_output_embeddings()

    @property
    def vocab_size(self) -> int:
        """Logits of a position."""
        return len(self.layer.weight)

    @property
    def by_words(self) -> bool:
        """Whether some words' logits are those that a head with only their rows gives: nothing mixes words afterwards."""
        if self.lm not in _BY_WORDS:
            weight = self.layer.weight
            hidden = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
            some = slice(self.vocab_size // 2, self.vocab_size)
            with torch.no_grad():
                whole, part = self(hidden).float(), self(hidden, some).float()
            same = part.shape == whole[:, some].shape and torch.allclose(part, whole[:, some], rtol=0.02, atol=0.02)
            _BY_WORDS[self.lm] = same
        return _BY_WORDS[self.lm]

    def __call__(self, hidden: Tensor, words: slice | None = None) -> Tensor:
        """The logits of all words or of some, recorded by autograd where it is on."""
        stand_in = _StandIn()
        stand_in.output = copy.copy(self.output)
        stand_in.output.last_hidden_state = hidden.unsqueeze(0)
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        setattr(self.lm, self.lm.base_model_prefix, stand_in)
        try:
            with self._only(words):
                return self.lm(input_ids=token, use_cache=False).logits[0]
        finally:
            setattr(self.lm, self.lm.base_model_prefix, self.base)

    @contextmanager
    def _only(self, words: slice | None) -> Iterator[None]:
        """The output layer with the rows of some words alone."""
        whole = dict(self.layer._parameters)
        try:
            for name, parameter in whole.items():
                if words is not None and parameter is not None:
                    self.layer._parameters[name] = nn.Parameter(parameter.data[words], requires_grad=False)
            yield
        finally:
            self.layer._parameters.update(whole)


_BY_WORDS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class _StandIn(nn.Module):
    output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


@dataclass(frozen=True)
class Lesson:
    """What a student is to say at some positions of its text, and how much the two ways to say so weigh."""

    at: Tensor  # [n] int64, positions in the student's flattened last hidden states
    targets: Tensor  # [n] int64, the tokens that follow there
    states: Tensor | None  # [n, hidden_size], the teacher's last hidden states there; None: kl is 0
    teacher: Any  # the model whose head makes logits of them
    kl: float
    ce: float


def next_token_loss(lm: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens [n, seqlen] given those before, with its gradient."""
    output = lm.base_model(input_ids=tokens, use_cache=False)
    heads = _Heads(Head(lm, output), None, 0.0, 1.0)
    hidden = output.last_hidden_state[:, :-1].flatten(0, 1)
    return heads.loss(hidden, hidden.detach(), tokens[:, 1:].flatten())


def distillation_loss(lm: Any, tokens: Tensor, lesson: Lesson) -> Tensor:
    """kl KL(teacher || student) + ce CE in nats, each a mean over the lesson's positions, with its gradient.

    INT2.1's loss (arXiv:2306.08162), both terms as means over tokens. `lm`: the student; `tokens`: [n, seqlen]. Logits
    are float32 from where the head has made them.
    """
    output = lm.base_model(input_ids=tokens, use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)[lesson.at]
    if not lesson.kl:
        return _Heads(Head(lm, output), None, 0.0, lesson.ce).loss(hidden, hidden.detach(), lesson.targets)
    assert lesson.states is not None  # which kl is taken to
    teacher = Head(lesson.teacher, output)
    states = lesson.states.to(teacher.layer.weight.dtype)
    return _Heads(Head(lm, output), teacher, lesson.kl, lesson.ce).loss(hidden, states, lesson.targets)


@dataclass(frozen=True)
class _Heads:
    """A student's head, beside a teacher's if its words weigh anything."""

    student: Head
    teacher: Head | None
    kl: float
    ce: float

    def loss(self, hidden: Tensor, states: Tensor, targets: Tensor) -> Tensor:
        """The mean over positions, with its gradient in `hidden` [n, hidden_size]."""
        n = len(hidden)
        rows = max(1, POSITIONS * WORDS // (WORDS if self._by_words else self.student.vocab_size))
        total, gradients = 0.0, []
        for start in range(0, n, rows):
            some = slice(start, start + rows)
            part = hidden.detach()[some].requires_grad_(hidden.requires_grad)
            loss, gradient = self._part(part, states[some], targets[some])
            total += loss / n
            gradients.append(gradient / n)
        found = torch.full((), total, device=hidden.device)
        if not hidden.requires_grad:
            return found
        # The second term is zero, and its gradient is the one found above.
        return found + ((hidden - hidden.detach()) * torch.cat(gradients)).sum()

    @property
    def _by_words(self) -> bool:
        return self.student.by_words and (self.teacher is None or self.teacher.by_words)

    def _pieces(self) -> Iterator[slice]:
        """The vocabulary, some words at a time."""
        vocab_size = self.student.vocab_size
        step = WORDS if self._by_words else vocab_size
        return (slice(start, min(start + step, vocab_size)) for start in range(0, vocab_size, step))

    @torch.no_grad()
    def _normalizer(self, head: Head, hidden: Tensor) -> Tensor:
        """log of the sum over all words of exp(logit), [n, 1] float32."""
        found = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
        for words in self._pieces():
            logits = head(hidden, words)
            top = logits.amax(1, keepdim=True).float()
            found = torch.logaddexp(found, (logits - top).exp_().sum(1, keepdim=True).log_().add_(top))
        return found

    def _part(self, hidden: Tensor, states: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        """The sum over some positions, and its gradient in `hidden`, float32 as it."""
        of_student = self._normalizer(self.student, hidden)
        of_teacher = None if self.teacher is None else self._normalizer(self.teacher, states)
        total, gradient = 0.0, torch.zeros_like(hidden, dtype=torch.float32)
        for words in self._pieces():
            logits = self.student(hidden, words)
            log_q = logits.detach() - of_student  # float32, as what is taken off
            row = ((targets >= words.start) & (targets < words.stop)).nonzero().flatten()
            word = targets[row] - words.start
            total -= self.ce * log_q[row, word].sum(dtype=torch.float64).item()
            if self.teacher is None or of_teacher is None:
                slope = log_q.exp_().mul_(self.ce)
            else:
                with torch.no_grad():
                    log_p = self.teacher(states, words) - of_teacher
                p = log_p.exp()
                total += self.kl * torch.dot(p.flatten(), log_p.sub_(log_q).flatten()).item()
                slope = log_q.exp_().mul_(self.kl + self.ce).sub_(p, alpha=self.kl)
            slope[row, word] -= self.ce
            if hidden.requires_grad:
                gradient += torch.autograd.grad(logits, hidden, slope.to(logits.dtype))[0]
        return total, gradient
