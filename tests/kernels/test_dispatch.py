import json
import time

import pytest
import torch
from packed_weights import codebook_weight, int_weight

from compress.errors import InputError
from compress.kernels import dispatch
from compress.kernels.dense import Dense, Reference
from compress.kernels.dispatch import Preferences, choose, implementations
from compress.kernels.gemm.launch import TILES, Tiling, candidates
from compress.kernels.implementation import Case
from compress.kernels.inputs import InputQuantizer
from compress.kernels.timings import TOKENS, Timing, Timings, measure

CPU = torch.device("cpu")
UNMEASURED = Preferences(measuring=False)


@pytest.fixture
def timings(tmp_path):
    return Timings(tmp_path / "cache" / "timings.json")


def case(weight=None, inputs=None):
    return Case(weight or int_weight((32, 128), 4, 64), CPU, torch.bfloat16, inputs)


def times(**milliseconds):
    """By implementation, `_` for `-`: figures for TOKENS."""
    timed = {name: [Timing(each) for each in figures] for name, figures in milliseconds.items()}
    return {name.replace("_", "-"): dict(zip(TOKENS, figures, strict=False)) for name, figures in timed.items()}


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


class Tiled(Dense):
    NAME, ROLE, TILED = "tiled", "packed", True

    def candidates(self, tokens):
        return candidates(tokens, TILES)


def slow_by(*wanted):
    """A clock by which tiles of so many tokens are the fastest, and all else takes ten seconds."""

    def seconds(implementation, inputs):
        return 1.0 if [each.block_m for each in implementation.tilings] in [[m] for m in wanted] else 10.0

    return seconds


def test_the_fastest_tiles_are_kept_and_taken(timings, monkeypatch):
    found = measure(case(), [Tiled, Dense], slow_by(32, 64))
    tiles = {tokens: timing.tiling for tokens, timing in found["tiled"].items()}
    assert tiles == {
        **{tokens: Tiling.of(tokens, TILES[0]) for tokens in (1, 4, 16)},  # none of what may be is faster: the rule
        64: Tiling.of(64, TILES[2]),
        256: Tiling.of(256, TILES[2]),  # half of the rule's
    }
    assert all(timing.tiling is None for timing in found["dense"].values())
    timings.add(case(), found)
    assert timings.of(case()) == found
    monkeypatch.setattr(dispatch, "implementations", lambda: {"tiled": Tiled, "reference": Reference})
    timings.add(case(), found | {"reference": found["dense"]})
    choice = choose(case(), Preferences(), timings)
    few, many = choice.made(case())
    assert (choice.few, many) == (Tiled, None) and list(few.tilings) == [tiles[tokens] for tokens in TOKENS]
    assert choose(case(), UNMEASURED, Timings(timings.path / "none")).made(case())[0].tilings == ()


def test_tiles_are_measured_where_nothing_else_serves(timings, monkeypatch):
    monkeypatch.setattr(dispatch, "implementations", lambda: {"tiled": Tiled})
    few, _ = choose(case(), Preferences(), timings).made(case())
    assert [each.tokens for each in few.tilings] == list(TOKENS)


def test_a_little_faster_is_not_enough_for_other_tiles():
    clock = {4: 1.02, 2: 1.0, 8: 0.98}
    found = measure(case(), [Tiled], lambda made, _: clock[made.tilings[0].waves])
    assert {timing.tiling.waves for timing in found["tiled"].values()} == {8}
    found = measure(case(), [Tiled], lambda made, _: clock[made.tilings[0].waves] + 1)
    assert {timing.tiling.waves for timing in found["tiled"].values()} == {4}


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
