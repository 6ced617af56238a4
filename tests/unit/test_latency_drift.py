"""Latencies of networks timed in turns, where the speed of the machine is made up and so the truth is known."""

import numpy as np
import pytest

from efficientformer.latency.drift import without_drift

TRUTH = np.geomspace(0.2, 30, 60)


def timed(seed, passes, *, noise=0.02, busy=lambda rng, turns: np.ones(turns)):
    """Return the network of each turn and what it took, with the machine ``busy`` times slower."""
    rng = np.random.default_rng(seed)
    networks = np.concatenate([rng.permutation(len(TRUTH)) for _ in range(passes)])
    slow = busy(rng, len(networks))
    return networks, TRUTH[networks] * slow * np.exp(noise * rng.standard_normal(len(networks)))


def spells(rng, turns):
    """Return how slow a machine is whose other half of the core is taken, or free, for some 20 turns at a time."""
    return np.repeat(rng.choice((1.0, 1.45), -(-turns // 20), p=(0.4, 0.6)), 20)[:turns]


def apart(ms):
    """Return how far each network is off, relative to all of them."""
    off = np.log(ms / TRUTH)
    return np.abs(off - np.median(off))


def test_on_a_quiet_machine_it_is_the_median():
    networks, ms = timed(0, 16)
    latency, error = without_drift(networks, ms)
    assert np.abs(latency / TRUTH - 1).max() < 0.03
    assert 0.004 < np.median(error / latency) < 0.01  # of noise of 0.02 in 16 turns, and of the speed's own


def test_a_machine_that_is_busy_in_spells_is_seen_through():
    networks, ms = timed(1, 24, busy=spells)
    latency, error = without_drift(networks, ms)
    raw = np.array([np.median(ms[networks == network]) for network in range(len(TRUTH))])
    assert np.quantile(apart(raw), 0.9) > 0.1
    assert np.median(apart(latency)) < 0.01
    assert np.quantile(apart(latency), 0.9) < 0.025
    assert 0.5 < np.median(apart(latency) / (error / latency)) / 0.6745 < 1.5  # the errors say how far it is off


def test_latencies_are_those_of_the_quiet_times():
    networks, ms = timed(2, 24, busy=spells)
    latency, _ = without_drift(networks, ms)
    assert np.median(latency / TRUTH) == pytest.approx(1.0, abs=0.03)


def test_a_machine_that_slows_down_for_good_favours_nobody():
    networks, ms = timed(3, 12, busy=lambda rng, turns: np.linspace(1, 2, turns))
    latency, _ = without_drift(networks, ms)
    assert np.quantile(apart(latency), 0.9) < 0.02


def test_a_network_disturbed_in_some_turns_is_known_by_the_others():
    networks, ms = timed(4, 20)
    own = np.flatnonzero(networks == 7)
    ms[own[:6]] *= 3
    latency, _ = without_drift(networks, ms)
    assert latency[7] == pytest.approx(TRUTH[7], rel=0.03)


@pytest.mark.parametrize("turns", [1, 2, 3, 40])
def test_a_network_alone_has_a_latency(turns):
    latency, error = without_drift([0] * turns, np.full(turns, 5.0))
    assert latency == pytest.approx([5.0])
    assert error.tolist() == [np.inf if turns == 1 else 0.0]


def test_the_error_of_a_network_alone_is_that_of_its_own_turns():
    rng = np.random.default_rng(6)
    slow = np.repeat(rng.choice((1.0, 1.5), 20), 4)
    _, error = without_drift([0] * 80, 2.0 * slow * (1 + 0.01 * rng.standard_normal(80)))
    assert error[0] > 0.02  # its neighbours cannot say how fast the machine was: they are its own


def test_two_networks_are_compared_in_turns():
    rng = np.random.default_rng(5)
    networks = np.array([0, 1, 1, 0] * 20)
    slow = np.repeat(rng.choice((1.0, 1.6), 20), 4)
    latency, _ = without_drift(networks, np.where(networks, 2.0, 1.0) * slow * (1 + 0.01 * rng.standard_normal(80)))
    assert latency[1] / latency[0] == pytest.approx(2.0, rel=0.01)
