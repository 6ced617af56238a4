"""Latencies of networks that were timed in turns on a machine whose speed changes.

On a shared machine neighbours take cache, memory and half a core for a tenth of a second or for minutes, and a quiet
moment may never come. But whatever slows one turn slows the turns before and after it: how far these are from what
their networks usually take says how fast the machine was, and that is taken out of the turn. What is left of the
disturbance is as often too little as too much, so a network's median over its turns counts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

NEIGHBOURS = 8  # turns around one that say how fast the machine was; half of them before it
ROUNDS = 4  # speeds and latencies are found from each other
QUIET = 0.25  # latencies are those of the quarter of all turns in which the machine was fastest


def without_drift(networks: npt.ArrayLike, ms: npt.ArrayLike) -> tuple[Array, Array]:
    """Return the latency of each network, and its standard error relative to the other networks' latencies.

    Args:
        networks: Number of the network of each turn, in the order of time, (turns,). Every network has a turn, and
            their order should differ from pass to pass.
        ms: What the turn took, in milliseconds, (turns,).

    Returns:
        Latencies and standard errors in milliseconds, each (networks,). An error is infinite if its network had one
        turn only. A single network is compared with nothing: its error is that of the median of its turns.
    """
    turn_of = np.asarray(networks, np.intp)
    logs = np.log(np.asarray(ms, np.float64))
    turns = [np.flatnonzero(turn_of == network) for network in range(int(turn_of.max()) + 1)]
    level = _medians(logs, turns)
    if len(turns) == 1:
        latency = np.exp([np.quantile(logs, QUIET)])
        return latency, latency * _errors(logs - level, turns)
    around = _around(len(logs))
    for _ in range(ROUNDS):
        speed = np.median((logs - level[turn_of])[around], axis=1)
        level = _medians(logs - speed, turns)
    latency = np.exp(level + np.quantile(speed, QUIET))
    return latency, latency * _errors(logs - speed - level[turn_of], turns)


def _around(count: int) -> npt.NDArray[np.intp]:
    """Return the nearest other turns of each, (turns, at most NEIGHBOURS): at both ends more of one side."""
    width = min(NEIGHBOURS, count - 1)
    order = np.arange(count)
    first = np.clip(order - width // 2, 0, count - 1 - width)
    others = first[:, None] + np.arange(width)  # (turns, width)
    result: npt.NDArray[np.intp] = others + (others >= order[:, None])  # not the turn itself
    return result


def _medians(values: Array, turns: list[npt.NDArray[np.intp]]) -> Array:
    """Return the median of each network's turns, (networks,)."""
    return np.array([np.median(values[index]) for index in turns])


def _errors(residuals: Array, turns: list[npt.NDArray[np.intp]]) -> Array:
    """Return the relative standard error of each network's median, (networks,)."""
    return np.array([error_of_median(residuals[index]) if len(index) > 1 else np.inf for index in turns])


def error_of_median(values: Array) -> float:
    """Return the standard error of the median of some values, from their median absolute deviation.

    Of a normal distribution the standard deviation is 1.4826 times that, and the error of a median is 1.2533 times the
    error of a mean.
    """
    deviation = np.median(np.abs(values - np.median(values)))
    return float(1.2533 * 1.4826 * deviation / np.sqrt(len(values)))
