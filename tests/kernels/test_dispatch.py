import json
import time

import pytest
import torch
from packed_weights import codebook_weight, int_weight

from compress.errors import InputError
from compress.kernels import dispatch
from compress.kernels.dense import Dense
from compress.kernels.dispatch import Preferences, choose, implementations
from compress.kernels.implementation import Case
from compress.kernels.inputs import InputQuantizer
from compress.kernels.timings import TOKENS, Timings, measure

CPU = torch.device("cpu")
UNMEASURED = Preferences(measuring=False)


@pytest.fixture
def timings(tmp_path):
    return Timings(tmp_path / "cache" / "timings.json")


def case(weight=None, inputs=None):
    return Case(weight or int_weight((32, 128), 4, 64), CPU, torch.bfloat16, inputs)


def times(**milliseconds):
    """By implementation, `_` for `-`: figures for TOKENS."""
    return {name.replace("_", "-"): dict(zip(TOKENS, figures, strict=False)) for name, figures in milliseconds.items()}


def test_defaults_where_nothing_is_measured(timings):
    choice = choose(case(), UNMEASURED, timings)
    assert choice.names == "cpu-int4; cpu-decode4 from 16 tokens"
    assert choose(case(), Preferences("dense", None, False), timings).names == "cpu-int4; dense from 16 tokens"
    assert choose(case(), Preferences("packed", None, False), timings).names == "cpu-int4"
    assert choose(case(codebook_weight((16, 64))), UNMEASURED, timings).names == "cpu-lookup; reference from 4 tokens"
    eight = int_weight((32, 128), 8, 128)
    assert choose(case(eight, InputQuantizer(8)), UNMEASURED, timings).names == "cpu-w8a8"
    assert choose(case(eight), UNMEASURED, timings).few.NAME == "cpu-int8"
    assert not timings.path.exists()


def test_the_measured_crossover_decides(timings):
    timings.add(case(), times(cpu_int4=[1, 1, 8, 32, 128], cpu_decode4=[9, 9, 9, 9, 9]))
    choice = choose(case(), Preferences(), timings)
    assert choice.names == "cpu-int4; cpu-decode4 from 64 tokens" and "14.2 x" in choice.why


def test_one_layout_where_a_second_gains_little(timings):
    timings.add(case(), times(cpu_int4=[1, 2, 3, 4, 10], cpu_decode4=[9, 9, 9, 9, 9.5]))
    assert choose(case(), Preferences(), timings).names == "cpu-int4"


def test_what_decodes_is_measured_to_the_end_however_far_behind_it_begins():
    class Slow(Dense):
        NAME, ROLE = "slow", "decode"

        def forward(self, x):
            time.sleep(2e-3)
            return super().forward(x)

    class Given(Slow):
        NAME, ROLE = "given up", "packed"

    found = measure(case(), [Dense, Slow, Given])
    assert list(found["slow"]) == list(found["dense"]) == list(TOKENS) and list(found["given up"]) == [1]


def test_what_was_given_up_on_is_never_chosen_there(timings):
    timings.add(case(), times(cpu_int4=[1, 2, 100], cpu_decode4=[9, 9, 9, 9, 9]))
    assert choose(case(), Preferences(), timings).names == "cpu-int4; cpu-decode4 from 16 tokens"


def test_measuring_once_is_enough(timings, monkeypatch):
    first = choose(case(), Preferences(), timings)
    assert set(json.loads(timings.path.read_text()).popitem()[1][case().key]) >= {"cpu-int4", "cpu-decode4"}
    monkeypatch.setattr(dispatch, "measure", lambda *_: pytest.fail("measured again"))
    assert choose(case(), Preferences(), timings) == first


def test_a_damaged_file_is_measured_again(timings):
    timings.path.parent.mkdir()
    timings.path.write_text("{no json")
    choose(case(), Preferences(), timings)
    assert timings.of(case())


def test_weights_without_values_are_not_measured(timings):
    weight = int_weight((32, 128), 4, 64)
    empty = weight.without_values(32, weight.description())
    assert choose(case(empty), Preferences(), timings).why.startswith("by default")


def test_forcing_fails_rather_than_falls_back(timings):
    assert choose(case(), Preferences(forced="reference"), timings).names == "reference"
    with pytest.raises(InputError, match=r"cpu-int8 cannot serve .*one scale an output"):
        choose(case(), Preferences(forced="cpu-int8"), timings)
    with pytest.raises(InputError, match=r"which there is not: choose .*cpu-int4"):
        choose(case(), Preferences(forced="nonsense"), timings)


def test_the_environment(monkeypatch):
    monkeypatch.setenv(dispatch.FORCE, "dense")
    monkeypatch.setenv(dispatch.DECLINE, "1")
    assert Preferences.from_environment("packed") == Preferences("packed", "dense", False)
    with pytest.raises(InputError, match="choose dense, decode, packed"):
        Preferences.from_environment("quickly")


def test_names_are_unique():
    assert len(implementations()) == len(dispatch.IMPLEMENTATIONS)
