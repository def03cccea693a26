"""How long a training may be."""

import pytest

from compress.training_budget import TrainingBudget


@pytest.mark.parametrize(
    ("text", "seconds", "tokens"),
    [
        ("15min", 900, None),
        ("90s", 90, None),
        ("1.5h", 5400, None),
        ("200000tokens", None, 200000),
        ("10 min", 600, None),
    ],
)
def test_it_is_read(text, seconds, tokens):
    assert TrainingBudget.read(text) == TrainingBudget(seconds, tokens)


@pytest.mark.parametrize("text", ["", "15", "min", "0min", "-3s", "10 minutes", "1e5tokens"])
def test_what_is_none_is_refused(text):
    with pytest.raises(ValueError, match="such as 15min, 90s or 200000tokens"):
        TrainingBudget.read(text)
