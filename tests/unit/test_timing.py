"""The timing harness: turns, warm-up, sync, and figures of the right runs."""

import pytest

from efficientformer.runtime import timing
from efficientformer.runtime.timing import Timing, environment, time_together
from efficientformer.spec.errors import UsageError


def test_subjects_take_turns_after_a_warm_up():
    calls = []
    subjects = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    told = []
    found = time_together(
        subjects, rounds=4, warmup=2, burst=2, settle_s=0, progress=lambda done, of: told.append((done, of))
    )
    assert "".join(calls) == "aabb" + "aaabbb" * 2  # each turn: one untimed run, then a burst
    assert [each.runs for each in found.values()] == [4, 4]
    assert told == [(2, 4), (4, 4)]


def test_durations_come_from_the_clock_after_the_sync(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)

    def work(seconds):
        now[0] += seconds

    found = time_together(
        {"slow": lambda: work(0.010), "fast": lambda: work(0.001)}, rounds=6, sync=lambda: work(0.002)
    )
    assert found["slow"].median_ms == pytest.approx(12)
    assert found["fast"].median_ms == pytest.approx(3)


def test_timing_summarises():
    timing_ = Timing.of([0.001 * value for value in range(1, 102)])
    assert timing_.median_ms == pytest.approx(51)
    assert (timing_.p10_ms, timing_.p90_ms, timing_.min_ms) == pytest.approx((11, 91, 1))
    assert timing_.to_dict()["runs"] == 101


@pytest.mark.parametrize("options", [{"rounds": 0}, {"burst": 0}])
def test_nothing_to_time(options):
    with pytest.raises(UsageError, match="Nothing to time"):
        time_together({"a": lambda: None}, **options)
    with pytest.raises(UsageError, match="Nothing to time"):
        time_together({})


def test_environment_names_what_is_installed_only():
    found = environment("numpy", "no-such-package")
    assert set(found["versions"]) == {"numpy"}
    assert found["cores"] >= 1
    assert str(found["cores"]) in found["hardware"]
