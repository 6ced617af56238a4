"""Slimming on CIFAR-10 beside hand-made networks of the same latency: same recipe, data, order, number of epochs.

    python benchmarks/slimming_cifar10.py --data cifar10 --epochs 20 --final-epochs 40 --output runs/slimming

The budget is the measured latency of MobileNetV2 x1.4 (timm's, stem stride 1) on the engine; further budgets are shares
of it. Compared with the slimmed network: the start network scaled uniformly, random legal networks, the same search
with importances and channels shuffled (``--shuffles`` times), and networks made by hand: MobileNetV2 x1.4 and
x1.0, one of V1 blocks, and the package's own. Networks without a search are trained from scratch; the slimmed one both
from scratch and from the weights it inherits. Top-1 is of the best epoch, measured on the test pictures; latencies are
measured together, in turns. Writes figures and a plot into benchmarks/results, and the comparisons into the slimming
run's report.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import safetensors.torch
import torch
from common import save
from timm.models import create_model
from torch import nn

from efficientformer import ArchSpec, Recipe, train
from efficientformer.latency.graph import write_network
from efficientformer.latency.int8 import quantise
from efficientformer.latency.measure import time_engines
from efficientformer.latency.table import LatencyTable
from efficientformer.runtime.engines import open_engine
from efficientformer.slimming.baselines import drawn_at, scaled_to
from efficientformer.slimming.device import open_table
from efficientformer.slimming.plan import Plan
from efficientformer.slimming.run import SlimOutcome, slim
from efficientformer.slimming.space import Space
from efficientformer.slimming.start import make_plan, start_network
from efficientformer.spec.manifest import METADATA_KEY, Manifest
from efficientformer.spec.variants import v1_spec
from efficientformer.spec.zoo import EMBEDDED, resolve
from efficientformer.training.setup import PlainNetwork

PEER = "mobilenetv2_140"
PEERS = (PEER, "mobilenetv2_100")
BY_HAND = "V1 by hand"
HAND_MADE = (*PEERS, BY_HAND, EMBEDDED)
BUDGET_RUNS = 5
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "efficientformer")


class Peer(PlainNetwork):
    """A MobileNetV2 of timm's with stem stride 1, trained by the same loop.

    Args:
        name: timm's name.
        manifest: Input size, preprocessing and classes; its architecture stands in for one we have no words for.
    """

    def __init__(self, name: str, manifest: Manifest) -> None:
        super().__init__()
        self.name = name
        self.manifest = dataclasses.replace(manifest, provenance={"model": name, "source": "trained"})

    def build(self, recipe, classes, note):  # noqa: ANN001, ANN201 (as PlainNetwork)
        """Return the network with new weights."""
        return self.rebuild(recipe, self.manifest.spec), dataclasses.replace(self.manifest, labels=classes)

    def rebuild(self, recipe, spec):  # noqa: ANN001, ANN201
        """Return the network with new weights, decided by the seed."""
        torch.manual_seed(recipe.seed)
        return peer(self.name, spec)

    def save(self, path, model, manifest) -> None:  # noqa: ANN001
        """Write the weights."""
        safetensors.torch.save_model(model, str(path), {METADATA_KEY: manifest.to_json()})

    def load(self, path):  # noqa: ANN001, ANN201
        """Read the weights."""
        model = peer(self.name, self.manifest.spec)
        safetensors.torch.load_model(model, str(path))
        return model, self.manifest


def peer(name: str, spec: ArchSpec) -> nn.Module:
    """Return a MobileNetV2 for small pictures."""
    model = create_model(name, num_classes=spec.num_classes)
    model.conv_stem.stride = (1, 1)
    model.spec = spec  # what the optimiser asks for depths
    return model


def manifest_for(spec: ArchSpec) -> Manifest:
    """Return preprocessing and sizes as a manifest."""
    preprocess = resolve(EMBEDDED).card.manifest(None).preprocess.with_input_size(spec.input_size)
    return Manifest(spec, preprocess)


def hand_made(name: str, start: ArchSpec) -> ArchSpec:
    """Return a network by its name: for a peer the start network, whose input it takes.

    The one of V1 blocks takes about as long as the peer: it has half the depth of a start network of that family.
    """
    if name in PEERS:
        return start
    if name == EMBEDDED:
        return dataclasses.replace(resolve(EMBEDDED).card.spec, num_classes=start.num_classes)
    spec = v1_spec(
        (48, 96, 192, 320), (2, 2, 3, 2), (1, 2), input_size=start.input_size, num_classes=start.num_classes,
        distilled=False, stem_stride=2,
    )  # fmt: skip
    return dataclasses.replace(spec, attention=start.attention)


def write_peer(name: str, spec: ArchSpec, path: Path) -> Path:
    """Export a peer as its users would, with a manifest so that our engines open it."""
    picture = (torch.rand(1, spec.in_chans, *spec.input_size),)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        peer(name, spec).eval(), picture, opset_version=20, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    proto = program.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, manifest_for(spec).to_json()
    onnx.save(proto, path)
    return path


def latencies(specs: Sequence[ArchSpec], plan: Plan) -> list[float]:
    """Return the latencies (ms) of the peers, then of each network, measured in turns."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = [write_peer(name, specs[0], root / f"{name}.onnx") for name in PEERS]
        files += [write_network(spec, root / f"{index}.onnx") for index, spec in enumerate(specs)]
        for file in files if plan.precision == "int8" else ():
            quantise(file)
        engines = [open_engine(f, plan.engine, precision=plan.precision, threads=plan.threads) for f in files]
        return [latency.ms for latency in time_engines(engines)]


def peer_latency(start: ArchSpec, plan: Plan, table: LatencyTable) -> float:
    """Return the peer's latency (ms) at the speed the machine had when the table was made.

    Measured in turns with the start network, whose latency the table knows: the ratio of the two does not depend on how
    busy the machine is.
    """
    ratios = [found[0] / found[len(PEERS)] for found in (latencies([start], plan) for _ in range(BUDGET_RUNS))]
    return statistics.median(ratios) * table.predict(start).ms


def trained(recipe: Recipe, data: Path, folder: Path, **options: Any) -> float:  # noqa: ANN401
    """Train in a folder, or go on there; return the best top-1."""
    done = folder / "top1.json"
    if done.exists():
        return float(json.loads(done.read_text()))
    if (folder / "state.pt").exists():
        outcome = train(resume=folder, quiet=False, **options)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        outcome = train(recipe, data, folder, quiet=False, **options)
    assert outcome.evaluation is not None, "interrupted: run the same command again"
    done.write_text(json.dumps(outcome.evaluation.top1))
    return outcome.evaluation.top1


def slimmed(plan: Plan, folder: Path, like: Path | None) -> SlimOutcome:
    """Slim in a folder, or go on there; with the supernet and latency table of another run, if one is given."""
    if not (folder / "slim.json").exists():
        if like is None:
            return finished(slim(plan, folder, quiet=False))
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("table.json", "importances.json"):
            shutil.copy(like / name, folder / name)
        shutil.copytree(like / "supernet", folder / "supernet", dirs_exist_ok=True)
        plan.save(folder)
    return finished(slim(resume=folder, quiet=False))


def finished(outcome: SlimOutcome) -> SlimOutcome:
    """Return a finished run, or leave."""
    if not outcome.finished:
        raise SystemExit("interrupted: run the same command again")
    return outcome


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/slimming_cifar10"))
    parser.add_argument("--model", default="", help="start network: spec in JSON")
    parser.add_argument("--epochs", type=int, default=20, help="of the supernet")
    parser.add_argument("--final-epochs", type=int, default=40, help="of every network")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.8, 0.6], help="budgets over the peer's")
    parser.add_argument("--hand-made", nargs="*", default=HAND_MADE, choices=HAND_MADE)
    parser.add_argument("--random", type=int, default=5, help="random networks")
    parser.add_argument("--shuffles", type=int, default=1, help="searches with shuffled importances")
    parser.add_argument("--searches-only", action="store_true", help="train no networks to compare with")
    parser.add_argument("--like", type=Path, help="output of an earlier run whose supernet, table and budget are used")
    parser.add_argument("--seeds", type=int, default=1, help="final trainings of every network from scratch")
    parser.add_argument("--suffix", default="", help="of the name of the result files")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    return parser.parse_args()


def searched(options: argparse.Namespace) -> tuple[Plan, ArchSpec, SlimOutcome, list[SlimOutcome]]:
    """Slim to shares of the peer's latency, and again to the first of them with what was learned shuffled.

    Returns:
        The plan, the start network, the run, and those with shuffled importances.
    """
    engine = {name: getattr(options, name) for name in ("engine", "precision", "threads")}
    epochs = {"epochs": options.epochs, "final_epochs": options.final_epochs}
    plan = make_plan(options.data, [1.0], model=options.model, settings=options.settings, **epochs, **engine)
    start, folder = start_network(plan), options.output / "slimmed"
    folder.mkdir(parents=True, exist_ok=True)
    budget, like = options.output / "budget.json", None
    if options.like is not None:
        like = options.like / "slimmed"
        shutil.copy(like / "table.json", folder)
        shutil.copy(options.like / budget.name, budget)
    table = open_table(plan, plan.options.space(start), folder, None, quiet=False)
    if not budget.exists():
        budget.write_text(json.dumps(peer_latency(start, plan, table)))
    peer_ms = float(json.loads(budget.read_text()))
    plan = dataclasses.replace(plan, targets=tuple(share * peer_ms for share in options.shares))
    learned = slimmed(plan, folder, like)
    by_chance = []
    for seed in range(options.shuffles):
        chance = dataclasses.replace(plan.options, importances="shuffled", shuffle_seed=seed)
        shuffled = dataclasses.replace(plan, targets=plan.targets[:1], options=chance)
        by_chance.append(slimmed(shuffled, options.output / f"shuffled-{seed}", learned.folder))
    return plan, start, learned, by_chance


def without_search(
    options: argparse.Namespace, start: ArchSpec, space: Space, table: LatencyTable, target_ms: float
) -> dict[str, ArchSpec]:
    """Return the networks to compare with that no search found: scaled or random ones for a latency, hand-made ones."""
    random = drawn_at(space, table, target_ms, options.random, seed=0)
    return {
        "uniformly scaled": scaled_to(space, table, target_ms).spec,
        **{name: hand_made(name, start) for name in options.hand_made},
        **{f"random {number + 1}": candidate.spec for number, candidate in enumerate(random)},
    }


def train_others(options: argparse.Namespace, plan: Plan, specs: dict[str, ArchSpec]) -> dict[str, dict[str, Any]]:
    """Train networks from scratch, each with every seed; return their rows."""
    recipe = plan.final.with_changes(pretrained=False, teacher="")
    rows: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        rows[name] = {"top1": [], "spec": None if name in PEERS else spec.to_dict()}
        for seed in range(options.seeds):
            folder = options.output / "trained" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            subject = Peer(name, manifest_for(spec)) if name in PEERS else PlainNetwork()
            seeded = recipe.with_changes(spec=spec.to_dict(), seed=recipe.seed + seed)
            rows[name]["top1"].append(trained(seeded, options.data, folder, subject=subject))
            print(name, rows[name]["top1"], flush=True)
    return rows


def main() -> None:
    """Slim, train the others, measure, print, save."""
    options = parse()
    plan, start, learned, by_chance = searched(options)
    space, table = plan.options.space(start), LatencyTable.load(learned.folder / "table.json")
    target = plan.targets[0]
    others: dict[str, ArchSpec] = {}
    if not options.searches_only:
        others["slimmed, from scratch"] = learned.networks[0].step.candidate.spec
        others |= without_search(options, start, space, table, target)
    found = {
        **{f"slimmed to {each.target_ms:g} ms": each for each in learned.networks},
        **{f"slimmed, shuffle {seed + 1}": run.networks[0] for seed, run in enumerate(by_chance)},
    }
    rows: dict[str, dict[str, Any]] = {
        name: {
            "top1": [each.top1],
            "held_out_top1": each.step.top1,  # before the final training
            "spec": each.step.candidate.spec.to_dict(),
        }
        for name, each in found.items()
    }
    rows |= train_others(options, plan, others)
    ours = [name for name in rows if name not in PEERS]
    *measured, start_ms = latencies([*(ArchSpec.from_dict(rows[name]["spec"]) for name in ours), start], plan)
    for name, ms in zip((*PEERS, *ours), measured, strict=True):
        if name in rows:
            rows[name]["latency_ms"] = ms
    path_ms = json.loads((learned.folder / "path.json").read_text())[0]["quiet_ms"]
    now = start_ms / path_ms  # the machine's speed against that at which the path in the report was measured
    comparisons = [
        {"name": name, "latency_ms": row["latency_ms"] / now, "top1": statistics.mean(row["top1"])}
        for name, row in rows.items()
        if not name.startswith("slimmed to")
    ]
    (learned.folder / "comparisons.json").write_text(json.dumps(comparisons, indent=1) + "\n")
    slim(resume=learned.folder)  # draws them into its report
    engine = {"engine": table.engine, "precision": table.precision, "threads": table.threads}
    figures = {"recipe": plan.final.to_dict(), "options": dataclasses.asdict(plan.options), "engine": engine,
               "supernet_epochs": options.epochs, "start_ms": start_ms, "networks": rows}  # fmt: skip
    path = save(f"slimming_cifar10{options.suffix}", figures, PACKAGES)
    shutil.copy(learned.folder / "accuracy_latency.png", path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
