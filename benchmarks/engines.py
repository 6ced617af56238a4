"""EfficientFormer-L1, V2-S0 and small mobile networks of timm, one image at 224: engine by engine, in turns of one run.

    python benchmarks/engines.py [--rounds 60] [--only WORD,...] [--solo]

Every subject has a process of its own and prepares itself (export, compilation) before anything is timed. Weights are
random, BatchNorms have statistics. The rate of large matrix products is measured in the same run: a network's MACs at
that rate are its floor on this machine. ``--solo`` times each subject again alone, which shows whether the subjects
disturb each other.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from common import ours, peer, plot, random_network, save, show, start
from peers import MATRIX, export_timm

from efficientformer.export.qdq import Quantiser
from efficientformer.runtime.engines import open_engine
from efficientformer.runtime.samples import sample_batch
from efficientformer.runtime.timing import Timing, take_turns
from efficientformer.spec.count import count
from efficientformer.spec.variants import VARIANTS

L1, S0 = "efficientformer_l1", "efficientformerv2_s0"
MOBILE = ("mobilenetv2_100", "mobilenetv2_140", "mobilenetv3_large_100", "mobilevitv2_100", "efficientnet_lite0")
REFERENCE = "timm eager fp32"
PACKAGES = ("efficientformer", "timm", "torch", "onnxruntime", "openvino")
FLOP = 2 * MATRIX**3


def quantised(path: Path, target: Path, *, signed: bool = False) -> Path:
    """Write a network in int8, its scales set on the package's photographs: right for timing."""
    manifest = open_engine(path, "onnxruntime").manifest
    Quantiser(path, sample_batch(manifest.preprocess), signed=signed).write(target, manifest)
    return target


def commands(scratch: Path) -> dict[str, tuple[str, ...]]:
    """Return what is compared, by name."""
    plain = scratch / "timm.onnx"
    export_timm(L1, plain)
    l1, s0 = (random_network(name, scratch).exported for name in (L1, S0))
    int8 = quantised(l1, scratch / "l1-int8.onnx")
    signed = quantised(l1, scratch / "l1-int8-openvino.onnx", signed=True)
    found = {
        REFERENCE: peer("torch", model=L1),
        "timm torch.compile fp32": peer("torch", model=L1, compile=True),
        "timm export, ONNX Runtime": peer("onnxruntime", path=str(plain)),
        "timm converted, OpenVINO defaults": peer("openvino", model=L1),
        "timm converted, OpenVINO fp32": peer("openvino", model=L1, precision="f32"),
        "ours ONNX Runtime fp32": ours(l1, "onnxruntime", "fp32"),
        "ours OpenVINO fp32": ours(l1, "openvino", "fp32"),
        "ours OpenVINO bf16": ours(l1, "openvino", "bf16"),
        "ours OpenVINO int8": ours(int8, "openvino", "int8"),
        "ours OpenVINO, made for it, int8": ours(signed, "openvino", "int8"),
        "ours ONNX Runtime int8": ours(int8, "onnxruntime", "int8"),
    }
    for precision in ("fp32", "bf16"):
        hint = {"fp32": "f32", "bf16": "bf16"}[precision]
        found[f"ours V2-S0 OpenVINO {precision}"] = ours(s0, "openvino", precision)
        found |= {f"{name} OpenVINO {precision}": peer("openvino", model=name, precision=hint) for name in MOBILE}
    rates = {f"gemm {precision}": peer("gemm", precision=precision) for precision in ("fp32", "bf16", "int8")}
    return found | rates


def floors(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """Print and return how far our networks are from the rate of a large matrix product in their precision."""
    found = {}
    for name, timing in timings.items():
        rate = timings.get(f"gemm {name.rpartition(' ')[2]}")
        if rate is None or not name.startswith("ours"):
            continue
        flop = 2 * count(VARIANTS[S0 if "V2-S0" in name else L1]).macs
        floor_ms = flop * rate.median_ms / FLOP
        found[name] = {"floor_ms": round(floor_ms, 4), "times_floor": round(timing.median_ms / floor_ms, 3)}
        times, share = timing.median_ms / floor_ms, 100 * floor_ms / timing.median_ms
        print(f"{name:<44} floor {floor_ms:.2f} ms, {times:.2f} times it ({share:.0f} % of the rate)")
    return found


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", default="", help="subjects whose name holds one of these words: timm,ours,gemm")
    parser.add_argument("--solo", action="store_true", help="time each subject again, alone")
    options = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        words = options.only.split(",")
        wanted = {k: v for k, v in commands(scratch).items() if any(word in k for word in words)}
        subjects, skipped = start(wanted, stack)
        turns = {name: partial(subject.turn, "1") for name, subject in subjects.items()}
        timings = take_turns(turns, rounds=options.rounds)
        solo = (
            {name: take_turns({name: turn}, rounds=options.rounds)[name] for name, turn in turns.items()}
            if options.solo
            else {}
        )
    figures: dict[str, object] = {"image": "1x3x224x224", "weights": "random", "skipped": skipped}
    figures["timings"] = show({k: v for k, v in timings.items() if not k.startswith("gemm")}, REFERENCE)
    figures["gflop_per_s"] = {k: round(FLOP / v.median_ms / 1e6, 1) for k, v in timings.items() if k.startswith("gemm")}
    print(figures["gflop_per_s"])
    figures["floors"] = floors(timings)
    if solo:
        figures["together_over_solo"] = {k: round(timings[k].median_ms / v.median_ms, 3) for k, v in solo.items()}
        print("together over solo:", figures["together_over_solo"])
    path = save("engines", figures, PACKAGES)
    plot(path, {k: v for k, v in timings.items() if not k.startswith("gemm")}, "One image at 224")
    print("saved", path)


if __name__ == "__main__":
    main()
