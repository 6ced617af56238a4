"""From latencies of whole networks to the marginal costs of their parts.

A part's cost is a smooth function of its channels: a constant, linear and quadratic terms with a bend at the median
width; and a rest, as engines compute channels in blocks, and one that is half empty takes as long as a full one. All
have factors that are not negative, for each kind of part and each map size. What every network has once (the call of
the engine, the constants of embeddings and head) cannot be told apart, and stands in the base. What does not add up by
parts is the cache: weights that no longer fit in it must be read from slower memory in every run. So the network's
weights have a cost of their own, which grows as steeply as measured between each power of two and the next: steeply
where a cache overflows, and less so once it is of no use any more. And every block and embedding costs more with each
doubling of the network's weights, which presumably drive its activations out of the cache. The factors are fitted to
relative errors, so that small networks count as much as large ones, and refitted with less weight on networks that
stand out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from efficientformer.latency.parts import Part, doublings, parts_of, steps, weights_of
from efficientformer.spec.arch import ArchSpec

Array = npt.NDArray[np.float64]
Term = tuple[object, ...]
Value = tuple[float, float]

UNIT = 64.0  # channels are counted in this unit, so that terms are of a like size
BLOCK = 32  # channels that engines compute together: two vectors of AVX-512, or a tile of bf16 values with AMX
RIDGE = 1e-2  # pull towards zero of terms the sample hardly shows, relative to the weight of all networks
HUBER = 2.0  # networks further off than this many robust standard deviations lose weight
FOLDS = 8
MILLION = 1e6
BASE, GROWTH = "base", "growth"
FEWEST_BEYOND = 8  # networks with more weights than the last power of two at which their cost bends


@dataclass(frozen=True)
class Fit:
    """Fitted costs, as (value, standard error) in milliseconds.

    Attributes:
        base: What every network costs.
        parts: Cost of every part asked for, and what each doubling of the network's weights adds to it, in
            milliseconds; its errors are such that the bars of whole networks are right.
        smallest: Weights from which doublings count, in millions: those of the smallest network.
        weights: Threshold in millions of weights, and what each million between it and the next one costs.
        spread: Relative standard error of the prediction of a network the fit has not seen (cross-validation).
        errors: Relative error of each network when it was left out, (networks,).
    """

    base: Value
    parts: dict[Part, tuple[float, float, float]]
    smallest: float
    weights: dict[float, Value]
    spread: float
    errors: Array


def fit_parts(specs: Sequence[ArchSpec], ms: Sequence[float], wanted: Sequence[Part]) -> Fit:
    """Fit the costs of parts to the latencies of networks.

    Args:
        specs: The networks.
        ms: Their latencies in milliseconds.
        wanted: The parts whose cost is returned.
    """
    latency = np.asarray(ms, np.float64)
    networks = [Counter(parts_of(spec)) for spec in specs]
    sizes = [weights_of(spec) / MILLION for spec in specs]
    knots = _knots({part.width for parts in networks for part in parts if part.is_block})
    bends = _bends(sizes)
    grown = [doublings(size, min(sizes)) for size in sizes]
    rows = [_row(*network, knots, bends) for network in zip(networks, sizes, grown, strict=True)]
    columns = {term: index for index, term in enumerate(dict.fromkeys(term for row in rows for term in row))}
    matrix = np.stack([_vector(row, columns) for row in rows])
    errors = _cross_validate(matrix, latency)
    factors, covariance = _robust(matrix, latency)

    def cost(terms: Mapping[Term, float]) -> Value:
        vector = _vector(terms, columns)
        return float(vector @ factors), math.sqrt(max(0.0, float(vector @ covariance @ vector)))

    base = min(cost({term: 1.0}) for term in columns if term[-1] == BASE)
    parts = {}
    for part in wanted:
        terms = _terms(part, knots)
        if all(term in columns for term in terms):  # else no measured network has its kind on its map
            _, error = cost(_in_network(terms, float(np.median(grown))))
            ms_, _ = cost(_in_network(terms, 0))
            growth, _ = cost({term: value for term, value in terms.items() if term[-1] == GROWTH})
            parts[part] = (max(0.0, ms_ - base[0]) if part.kind == "stem" else ms_, error, growth)
    weights = {bend: cost({("weights", bend): 1.0}) for bend in bends}
    spread = _scale(errors)
    own = [_error_of(counts, parts) / value for counts, value in zip(networks, latency.tolist(), strict=True)]
    factor = _factor(np.array(own), errors, spread)
    parts = {part: (ms_, factor * error, growth) for part, (ms_, error, growth) in parts.items()}
    return Fit(base, parts, min(sizes), weights, spread, errors)


def _error_of(counts: Mapping[Part, int], parts: Mapping[Part, tuple[float, float, float]]) -> float:
    """Return the error of a network's cost if those of its parts were independent, in milliseconds."""
    return math.sqrt(sum((count * parts[part][1]) ** 2 for part, count in counts.items() if part in parts))


def _factor(own: Array, errors: Array, spread: float) -> float:
    """Return what the parts' errors are to be multiplied with.

    They are not independent: costs that mostly occur together are hardly known one by one, while their sum is. So they
    count as much as it takes for 95 % of the networks, each predicted by a fit that has not seen it, to lie within two
    standard errors: of its parts and, beside these, the spread.

    Args:
        own: Relative error of each network's cost if those of its parts were independent, (networks,).
        errors: Relative error of its prediction, (networks,).
        spread: Their standard deviation.
    """
    needed = np.sqrt(np.maximum(0.0, (errors / 2) ** 2 - spread**2)) / np.maximum(own, 1e-12)
    return float(min(1.0, np.quantile(needed, 0.95)))


def _row(
    parts: Mapping[Part, int], size: float, grown: float, knots: Sequence[float], bends: Sequence[float]
) -> dict[Term, float]:
    """Return the terms of a network and their values; ``size`` is in millions of weights, ``grown`` its doublings."""
    row: dict[Term, float] = {("weights", bend): share for bend, share in zip(bends, steps(size, bends), strict=True)}
    for part, count in parts.items():
        for term, value in _in_network(_terms(part, knots), grown).items():
            row[term] = row.get(term, 0.0) + count * value
    return row


def _in_network(terms: Mapping[Term, float], grown: float) -> dict[Term, float]:
    """Return the terms of a part in a network that is so many doublings larger than the smallest."""
    return {term: grown * value if term[-1] == GROWTH else value for term, value in terms.items()}


def _vector(terms: Mapping[Term, float], columns: Mapping[Term, int]) -> Array:
    vector = np.zeros(len(columns))
    for term, value in terms.items():
        vector[columns[term]] = value
    return vector


def _knots(widths: Collection[int]) -> tuple[float, ...]:
    """Return the median of the widths of blocks, where a cost may bend; nothing if there are few."""
    return (float(np.median(list(widths))),) if len(widths) > 4 else ()


def _bends(sizes: Sequence[float]) -> tuple[float, ...]:
    """Return the powers of two, in millions of weights, at which the cost of weights may change.

    They begin above the smallest network, as what all have is in the costs of parts; enough networks are beyond each.
    """
    largest = sorted(sizes)[-min(len(sizes), FEWEST_BEYOND)]
    first, last = math.ceil(math.log2(min(sizes))), math.floor(math.log2(largest))
    return tuple(2.0**power for power in range(first, last + 1))


def _terms(part: Part, knots: Sequence[float]) -> dict[Term, float]:
    """Return the terms of a part's cost and their values."""
    group = (part.kind, part.source, part.grid, part.stride)
    dim, width = part.dim / UNIT, part.width / UNIT
    if part.is_block:
        hidden2 = part.expansion * width * width
        terms = {"1": 1.0, "width": width, "width2": width * width, "hidden2": hidden2, GROWTH: hidden2}
        terms |= {f"bend {knot:g}": max(0.0, width - knot / UNIT) for knot in knots}
        terms["rest"] = part.expansion * width * _rest(part.width)
    elif part.kind.startswith("first "):
        terms = {"width": width}
    elif part.kind == "head":
        terms = {"dim": dim, "dim width": dim * width}
    elif part.kind == "stem":
        half = part.width // 2  # what its first convolution puts out
        terms = {BASE: 1.0, "width2": width * width}
        terms["rest"] = half / UNIT * _rest(part.width) + _rest(half) * width
    else:  # the width it puts out is the dim of the next embedding or of the head: together one linear term
        terms = {"dim": dim, "dim width": dim * width, GROWTH: dim * width}
        for knot in knots:  # engines do less in a second with few channels
            terms |= {
                f"dim to {knot:g}": min(dim, knot / UNIT) * width,
                f"width to {knot:g}": dim * min(width, knot / UNIT),
            }
        terms["rest"] = dim * _rest(part.width) + _rest(part.dim) * width
    return {(*group, name): value for name, value in terms.items()}


def _rest(channels: int) -> float:
    """Return how many channels are missing to whole blocks."""
    return -channels % BLOCK / UNIT


def _robust(matrix: Array, latency: Array) -> tuple[Array, Array]:
    """Return factors that are not negative, (terms,), and their covariance (terms, terms)."""
    weights = 1 / latency
    factors = _solve(matrix * weights[:, None], latency * weights)
    for _ in range(3):
        residual = matrix @ factors / latency - 1
        limit = HUBER * max(_scale(residual), 1e-4)
        weights = np.sqrt(np.minimum(1.0, limit / np.maximum(np.abs(residual), 1e-12))) / latency
        factors = _solve(matrix * weights[:, None], latency * weights)
    used = factors > 0
    inner = matrix[:, used] * weights[:, None]
    ridge = (RIDGE * np.linalg.norm(inner, axis=0)) ** 2
    covariance = np.zeros((len(factors), len(factors)))
    inverse = np.linalg.pinv(inner.T @ inner + np.diag(ridge))
    covariance[np.ix_(used, used)] = inverse * _scale(matrix @ factors / latency - 1) ** 2
    return factors, covariance


def _solve(matrix: Array, target: Array) -> Array:
    """Least squares with a ridge and without negative factors: Lawson and Hanson's active sets on scaled columns."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1
    columns = matrix / scale
    gram = columns.T @ columns + RIDGE**2 * np.eye(len(scale))
    goal = columns.T @ target
    factors, active = np.zeros(len(scale)), np.zeros(len(scale), bool)
    for _ in range(3 * len(scale)):
        gradient = np.where(active, -np.inf, goal - gram @ factors)
        best = int(gradient.argmax())
        if gradient[best] <= 1e-10 * len(target):
            break
        active[best] = True
        while True:
            trial = np.zeros(len(scale))
            trial[active] = np.linalg.solve(gram[np.ix_(active, active)], goal[active])
            negative = active & (trial <= 0)
            if not negative.any():
                break
            step = float(np.min(factors[negative] / np.maximum(factors[negative] - trial[negative], 1e-300)))
            factors = factors + step * (trial - factors)
            active &= factors > 1e-15
            factors[~active] = 0
        factors = trial
    result: Array = factors / scale
    return result


def _cross_validate(matrix: Array, latency: Array) -> Array:
    """Return the relative error of each network when the fit has not seen it, (networks,)."""
    errors = np.zeros(len(latency))
    fold = np.arange(len(latency)) % min(FOLDS, len(latency))
    for number in np.unique(fold):
        held_out = fold == number
        if held_out.all():
            continue
        factors, _ = _robust(matrix[~held_out], latency[~held_out])
        errors[held_out] = matrix[held_out] @ factors / latency[held_out] - 1
    return errors


def _scale(values: Array) -> float:
    """Return a standard deviation about zero that a few outliers do not move."""
    return float(1.4826 * np.median(np.abs(values)))
