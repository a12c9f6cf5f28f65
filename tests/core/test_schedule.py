"""Weights over steps or frames. The expected numbers of the timings were measured on ComfyUI_IPAdapter_plus."""

from __future__ import annotations

import math

import pytest

from ipadapter_core import AdapterError, WeightSchedule, step_at
from ipadapter_core.schedule import parse_weights

MEASURED = [  # timing, start, end, for 8 frames from 1.0 to 0.2
    ("linear", 0, 9999, (1.0, 0.8857143, 0.7714286, 0.6571429, 0.5428571, 0.4285714, 0.3142857, 0.2)),
    ("linear", 2, 6, (1.0, 1.0, 1.0, 0.7333333, 0.4666667, 0.2, 0.2, 0.2)),
    ("ease in", 0, 9999, (1.0, 0.8219833, 0.652893, 0.5012082, 0.3745348, 0.2792249, 0.2200577, 0.2)),
    ("ease in", 2, 6, (1.0, 1.0, 1.0, 0.6, 0.3071797, 0.2, 0.2, 0.2)),
    ("ease out", 0, 9999, (1.0, 0.9799423, 0.9207751, 0.8254652, 0.6987918, 0.547107, 0.3780167, 0.2)),
    ("ease out", 2, 6, (1.0, 1.0, 1.0, 0.8928203, 0.6, 0.2, 0.2, 0.2)),
    ("ease in-out", 0, 9999, (1.0, 0.9603875, 0.8493959, 0.6890084, 0.5109916, 0.3506041, 0.2396125, 0.2)),
    ("ease in-out", 2, 6, (1.0, 1.0, 1.0, 0.8, 0.4, 0.2, 0.2, 0.2)),
]


def schedule(*weights, over="frames", **options):
    return WeightSchedule(over, weights, **options)


@pytest.mark.parametrize(("timing", "start", "end", "want"), MEASURED)
def test_timings(timing, start, end, want):
    assert schedule(1.0, 0.2, timing=timing, start=start, end=end).factors(8) == pytest.approx(want, abs=1e-6)


def test_a_timing_passes_through_all_weights():
    assert schedule(0.0, 1.0, 0.5).factors(5) == pytest.approx((0, 0.5, 1, 0.75, 0.5))


def test_custom():
    own = schedule(0.1, 0.2, 0.3, timing="custom")
    assert own.factors(5) == (0.1, 0.2, 0.3, 0.3, 0.3)
    assert own.factors(2) == (0.1, 0.2)
    assert schedule(0.1, 0.2, 0.3, timing="custom", start=2, end=4).factors(6) == (0.1, 0.1, 0.1, 0.2, 0.2, 0.2)


def test_one_step_and_one_frame():
    assert schedule(1.0, 0.2).factors(1) == (1.0,)
    assert schedule(0.4, timing="custom").factors(1) == (0.4,)
    assert schedule(1.0, 0.2, start=5).factors(3) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ((), {}, "0 weights for timing 'linear'. Write two or more"),
        ((1.0,), {}, "1 weight for timing 'linear'"),
        ((), {"timing": "custom"}, "0 weights for timing 'custom'"),
        ((0.0, 0.0), {}, "All weights of the schedule are 0"),
        ((1.0, math.inf), {}, "Use finite numbers"),
        ((1.0, 0.0), {"start": 4, "end": 4}, "start 4 is not below end 4"),
    ],
)
def test_schedules_without_sense(weights, options, message):
    with pytest.raises(AdapterError, match=message):
        schedule(*weights, **options)


@pytest.mark.parametrize(
    ("weights", "options", "count", "note"),
    [
        ((1.0, 0.5, 0.2), {"timing": "custom"}, 2, "has 3 weights for 2 frames: the first 2 act"),
        ((1.0, 0.5), {"timing": "custom"}, 3, "has 2 weights for 3 frames: the last one is kept"),
        ((1.0, 0.5), {"start": 9}, 3, "starts at 9, and there are 3 frames: all get the first"),
        ((0.0, 0.0, 1.0), {"timing": "custom", "over": "steps"}, 2, "is 0 in all 2 steps"),
    ],
)
def test_what_has_no_effect_in_a_run(weights, options, count, note):
    assert any(note in sentence for sentence in schedule(*weights, **options).notes(count))


@pytest.mark.parametrize(
    ("weights", "options"), [((1.0, 0.0), {}), ((0.5,), {"timing": "custom"}), ((1.0, 0.5, 0.2), {"timing": "custom"})]
)
def test_nothing_to_note(weights, options):
    assert not list(schedule(*weights, **options).notes(3))


def test_text():
    assert parse_weights("1.0, 0.5\n.25,\n\n-1e-1") == (1.0, 0.5, 0.25, -0.1)
    assert parse_weights(" \n") == ()
    for text in ("1, 2, x", "1, 2, nan", "1, 2, 3:4"):
        with pytest.raises(AdapterError, match="weights: entry 3"):
            parse_weights(text)
    with pytest.raises(AdapterError, match=r"weights: entry 1, '1e5', is too large. Choose numbers from -10 to 10"):
        parse_weights("1e5, 1")


def test_the_step_of_a_sigma():
    sigmas = (14.6, 5.0, 2.0, 0.5, 0.0)
    assert [step_at(sigmas, sigma) for sigma in sigmas] == [0, 1, 2, 3, 3]
    assert [step_at(sigmas, sigma) for sigma in (20.0, 14.6001, 4.9999, 0.3)] == [0, 0, 1, 3]
    assert [step_at(tuple(reversed(sigmas)), sigma) for sigma in (0.0, 0.5, 5.0)] == [0, 1, 3]
