"""How well a latency table predicts networks it has never seen.

    python benchmarks/latency_prediction.py [--engine openvino --precision bf16] [--networks 50] [--threads 1]

For each engine and precision: draw the sample a table of the space is made of (V1 networks of CIFAR-10's size, stem
stride 1 or 2) and further networks at random, time all of them in turns, fit the table to the sample only, and compare
its predictions with the other networks' latencies: mean and worst error, rank correlation, and how many fell within
the table's error bars. In turns, because what is tested is the table and not whether the machine was as busy later as
before. Each of the other networks is opened twice: how far its two copies are apart is what no prediction can know, as
they differ by nothing but where their memory lies. Writes the figures and a plot.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save

from efficientformer.latency.design import TableSpace, design, sample
from efficientformer.latency.measure import MAX_SPREAD, NETWORKS, opened, table_of, time_engines
from efficientformer.latency.table import LatencyTable
from efficientformer.reporting.page import new_figure, png
from efficientformer.spec.arch import ArchSpec

TARGETS = (("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"), ("onnxruntime", "fp32"))
SEED = 2206_01191  # of the unseen networks; the table's sample has seed 0


def unseen(space: TableSpace, networks: int, count: int) -> list[ArchSpec]:
    """Draw networks that are not in the table's sample."""
    known, rng = set(design(space, networks)), random.Random(SEED)
    found: dict[ArchSpec, None] = {}
    while len(found) < count:
        spec = sample(space, rng)
        if spec not in known:
            found[spec] = None
    return list(found)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value."""
    return np.argsort(np.argsort(values))


def judge(table: LatencyTable, specs: list[ArchSpec], measured: list[float]) -> dict[str, Any]:
    """Compare predictions with measurements."""
    predictions = [table.predict(spec) for spec in specs]
    predicted = np.array([each.ms for each in predictions])
    bars = np.array([each.error_ms for each in predictions])
    truth = np.array(measured)
    error = predicted / truth - 1
    return {
        "mean_error_percent": round(100 * float(np.abs(error).mean()), 2),
        "worst_error_percent": round(100 * float(np.abs(error).max()), 2),
        "bias_percent": round(100 * float(error.mean()), 2),
        "rank_correlation": round(float(np.corrcoef(ranks(predicted), ranks(truth))[0, 1]), 4),
        "within_error_bar_percent": round(100 * float((np.abs(predicted - truth) <= bars).mean()), 1),
        "fastest_ms": round(float(truth.min()), 4),
        "slowest_ms": round(float(truth.max()), 4),
        "predicted_ms": [round(float(value), 4) for value in predicted],
        "measured_ms": [round(float(value), 4) for value in truth],
    }


def copies(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Compare the latencies of two copies of each network."""
    apart = 100 * np.abs(second / first - 1)
    return {
        "copies_apart_mean_percent": round(float(apart.mean()), 2),
        "copies_apart_worst_percent": round(float(apart.max()), 2),
    }


def draw(name: str, figures: dict[str, Any], path: Path) -> None:
    """Plot predicted against measured latency."""
    figure = new_figure(4.5, 4.5)
    axes = figure.subplots()
    ends = (0.9 * figures["fastest_ms"], 1.1 * figures["slowest_ms"])
    axes.loglog(ends, ends, color="grey", linewidth=0.8)
    axes.loglog(figures["measured_ms"], figures["predicted_ms"], ".")
    axes.set_title(f"{name}: mean error {figures['mean_error_percent']} %, worst {figures['worst_error_percent']} %")
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("predicted, ms")
    axes.grid(alpha=0.3)
    path.write_bytes(png(figure))


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine")
    parser.add_argument("--precision")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--networks", type=int, default=50, help="unseen networks")
    parser.add_argument("--sample", type=int, default=NETWORKS, help="networks the table is made of")
    parser.add_argument("--max-spread", type=float, default=MAX_SPREAD, help="see efficientformer latency-table")
    parser.add_argument("--tables", type=Path, help="keep the tables in this folder")
    options = parser.parse_args()
    space = TableSpace()
    for engine, precision in TARGETS:
        if options.engine not in (None, engine) or options.precision not in (None, precision):
            continue
        start = time.perf_counter()
        sample_specs = design(space, options.sample)
        others = unseen(space, options.sample, options.networks)
        specs = [*sample_specs, *others, *others]
        with opened(specs, engine, precision, options.threads) as engines:
            timings = time_engines(engines, max_spread=options.max_spread)
            count = len(sample_specs)
            measured = [timing.ms for timing in timings]
            table = table_of(space, sample_specs, measured[:count], engines[0], threads=options.threads)
        seconds = time.perf_counter() - start
        if options.tables is not None:
            table.save(options.tables / f"{engine}-{precision}.json")
        first, second = np.split(np.array(measured[count:]), 2)
        figures = judge(table, others, first.tolist()) | copies(first, second)
        figures |= {"seconds": round(seconds, 1), "table_networks": table.networks, "spread": table.spread}
        short = {name: value for name, value in figures.items() if not isinstance(value, list)}
        print(f"{engine} {precision}: {short}", flush=True)
        suffix = "" if options.threads is None else f"-{options.threads}-threads"
        described = {"space": str(space), "threads": options.threads, **figures}
        path = save(f"latency-prediction-{engine}-{precision}{suffix}", described, (engine, "efficientformer"))
        draw(f"{engine} {precision}", figures, path.with_suffix(".png"))
        print(path.relative_to(RESULTS.parents[1]), flush=True)


if __name__ == "__main__":
    main()
