"""Checkpoints beside the first: changes with the errors of pairs, and how the table shows them."""

import io
import math
import re
import statistics

import pytest
from rich.console import Console

from compress.comparison import compare, comparison_table

RIGHT = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
NATS, TOKENS = ([30.0, 42.0, 9.0], [33.0, 43.0, 12.0]), [10, 15, 5]


def measured(which, tokens=TOKENS):
    nll = sum(NATS[which]) / sum(TOKENS)
    row = {"text": "wiki", "protocol": "lm-eval", "perplexity": math.exp(nll), "perplexity_se": 1.25}
    row |= {"window_nll": NATS[which], "window_tokens": tokens, "word_perplexity": math.exp(2 * nll)}
    row |= {"kl": 0.25 * which, "kl_se": 0.01, "top1": 0.75, "top1_se": 0.02}
    acc = {"value": sum(RIGHT[which]) / 8, "se": 0.2, "each": RIGHT[which]}
    metrics = {"acc": acc, "perplexity": {"value": 20.0 + 5 * which, "se": 4.0, "each": None}}
    return {"measured": [row], "tasks": {"piqa": {"metrics": metrics}}, "bytes": 2**20 * (4 - which)}


def cells(*data):
    return {row["measure"]: row["cells"] for row in compare(data)}


def test_tasks_differ_by_document():
    first, second = cells(measured(0), measured(1))["piqa, acc"]
    differences = [b - a for a, b in zip(*RIGHT, strict=True)]
    assert first == {"value": 0.75, "se": 0.2, "change": None, "change_se": None}
    assert second["change"] == pytest.approx(-0.25) and second["value"] == 0.5
    assert second["change_se"] == pytest.approx(statistics.stdev(differences) / math.sqrt(8))
    unknown = cells(measured(0), measured(1))["piqa, perplexity"][1]
    assert unknown["change"] == 5.0 and unknown["change_se"] is None


def test_perplexities_are_a_ratio_whose_error_is_that_of_the_same_windows():
    second = cells(measured(0), measured(1))["perplexity, wiki, lm-eval"][1]
    assert second["change"] == pytest.approx(math.exp(7 / 30))
    excess = [(b - a - n * 7 / 30) for a, b, n in zip(*NATS, TOKENS, strict=True)]
    assert second["change_se"] == pytest.approx(second["change"] * math.sqrt(1.5 * sum(e * e for e in excess)) / 30)
    others = cells(measured(0), measured(1, tokens=[15, 10, 5]))["perplexity, wiki, lm-eval"][1]
    assert others["change"] == second["change"] and others["change_se"] is None  # not the same windows: no pairs


def test_a_table_has_a_column_each_and_nothing_in_brackets_where_nothing_is_compared():
    rows = compare([measured(0), measured(1), measured(0)])
    console = Console(width=160, file=io.StringIO())
    console.print(comparison_table(["dense", "small", "same"], rows))
    lines = console.file.getvalue().splitlines()
    found = {line[:30].strip(): [cell.strip() for cell in re.split(r" {2,}", line[30:].strip())] for line in lines}
    assert found["KL in nats, wiki, lm-eval"] == ["0.0000 ± 0.0100", "0.2500 ± 0.0100", "0.0000 ± 0.0100"]
    assert found["same top token, wiki, lm-eval"] == 3 * ["75.00 ± 2.00 %"]
    assert found["piqa, acc"] == ["0.750 ± 0.200", "0.500 (-0.250 ± 0.164)", "0.750 (+0.000 ± 0.000)"]
    assert found["size of the weights"] == ["4.0 MiB", "3.0 MiB (× 0.750)", "4.0 MiB (× 1.000)"]
