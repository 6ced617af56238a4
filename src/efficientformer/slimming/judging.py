"""Puts a search together from a run folder: the trained supernet, its pictures, and what judges candidates."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from efficientformer.models.network import EfficientFormer
from efficientformer.slimming.channels import Order, by_chance, by_importance, by_position
from efficientformer.slimming.extract import Pool
from efficientformer.slimming.importance import Importances
from efficientformer.slimming.judge import Pictures, PoolJudge, Recovery
from efficientformer.slimming.plan import IMPORTANCES, LEAST_CALIBRATION, PATH, TABLE, Plan
from efficientformer.slimming.search import EVERY, Device, PathFile, Search, Step
from efficientformer.slimming.space import Space
from efficientformer.slimming.subject import SupernetSubject
from efficientformer.slimming.supernet import Supernet, load_supernet
from efficientformer.spec.errors import UsageError
from efficientformer.spec.manifest import Manifest
from efficientformer.training.processes import mixed_precision
from efficientformer.training.recipe import load_recipe
from efficientformer.training.setup import Prepared, build_task, prepare
from efficientformer.training.state import RunFolder
from efficientformer.training.task import AUTOCAST
from efficientformer.weights.checkpoint import save_native
from efficientformer.weights.files import write_json

WEIGHTS = "supernet/last.safetensors"  # its temperature has fallen; best would be chosen by what scores the cuts


@dataclass
class Bench:
    """Everything a search of one run is made of.

    Attributes:
        folder: The run folder.
        plan: The plan.
        space: The space below the start network.
        supernet: The trained supernet.
        manifest: What it is.
        prepared: Its pictures and batches.
        held_out: What cuts are scored with.
        calibration: What BatchNorm statistics are estimated on.
    """

    folder: Path
    plan: Plan
    space: Space
    supernet: Supernet
    manifest: Manifest
    prepared: Prepared
    held_out: Pictures
    calibration: Pictures
    _searching: PoolJudge | None = None

    @classmethod
    def open(cls, folder: Path, plan: Plan, space: Space, subject: SupernetSubject) -> Bench:
        """Read the supernet of a run folder and the pictures its search needs.

        Raises:
            CheckpointError: If the supernet cannot be read.
            DataError: If the data set is gone or cannot be read.
        """
        supernet, manifest = load_supernet(folder / WEIGHTS)
        recipe = load_recipe(folder / "supernet").with_changes(workers=plan.supernet.workers)
        prepared = prepare(recipe, Path(plan.data), 0, 1, manifest, subject)
        if RunFolder(folder / "supernet").data()["digest"] != prepared.digest:
            raise _other_pictures(plan)
        count = min(plan.options.calibration, len(prepared.source))
        some = np.random.default_rng(recipe.seed).permutation(len(prepared.source))[:count]
        held_out = Pictures.read(prepared.val, np.arange(len(prepared.val)), manifest.preprocess)
        calibration = Pictures.read(prepared.source, some, manifest.preprocess, LEAST_CALIBRATION)
        return cls(folder, plan, space, supernet, manifest, prepared, held_out, calibration)

    @staticmethod
    def write_importances(folder: Path) -> None:
        """Write what a run's supernet has learned about its MetaPaths."""
        supernet, _ = load_supernet(folder / WEIGHTS)
        shares = supernet.probabilities()
        data = {"shares": shares, "paths": Importances.of(shares).paths}
        write_json(folder / IMPORTANCES, data)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._searching is not None:
            self._searching.close()

    def search(self, device: Device, progress: Callable[[Step], None]) -> Search:
        """Return the run's search, which goes on from what its folder holds."""
        options = self.plan.options
        importances = Importances.of(self.supernet.probabilities())
        breadth = EVERY if options.joint else options.breadth
        if options.importances == "shuffled":
            importances = importances.shuffled(self._shuffle_seed)
        path = self.folder / PATH
        path.parent.mkdir(exist_ok=True)
        file = PathFile(path, self.space, self._identity())
        judge = self._searching = self._judge()
        return Search(self.space, importances, device, judge, file, breadth, progress, options.goal,
                      options.max_params)  # fmt: skip

    def save(self, steps: list[Step], number: int, path: Path) -> None:
        """Write the network of a step with the weights it inherits, as an ordinary checkpoint."""
        step = steps[number]
        network = self._network(steps, number)
        provenance = {**self.manifest.provenance, "source": "cut out of a supernet", "slimming_step": str(number)}
        manifest = dataclasses.replace(
            self.manifest,
            spec=step.candidate.spec,
            metrics={"held_out_top1": step.top1},
            provenance=provenance,
        )
        save_native(path, network.state_dict(), manifest)

    def _network(self, steps: list[Step], number: int) -> EfficientFormer:
        """Return the network of a step; if the search has gone further, do it again up to there."""
        assert self._searching is not None
        if self._searching.candidate == steps[number].candidate:
            return self._searching.network()
        judge = self._judge()
        try:
            for each in steps[: number + 1]:
                judge.follow(each.candidate)
            return judge.network()
        finally:
            judge.close()

    def _judge(self) -> PoolJudge:
        options, recipe = self.plan.options, self.prepared.recipe
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = AUTOCAST.get(mixed_precision(recipe, "auto"))
        task = build_task(recipe, self.manifest, self.prepared.source, device, dtype)
        recovery = Recovery(options.recover_steps, options.recover_lr, recipe, task, self.prepared.loader)
        if options.joint:
            order: Order = by_position
        else:
            order = by_importance if options.importances == "learned" else by_chance(self._shuffle_seed)
        pool = Pool.of(self.supernet, mixed=not options.joint)
        return PoolJudge(pool, self.held_out, self.calibration, recovery, device, dtype, order)

    @property
    def _shuffle_seed(self) -> int:
        return self.plan.supernet.seed + self.plan.options.shuffle_seed

    def _identity(self) -> str:
        """Return what the path depends on: supernet, pictures, latency table, options."""
        digest = hashlib.sha256((self.folder / WEIGHTS).read_bytes())
        digest.update((self.folder / TABLE).read_bytes())
        digest.update(json.dumps([dataclasses.asdict(self.plan.options), self.prepared.digest]).encode())
        return digest.hexdigest()


def check_pictures(supernet: Path, plan: Plan) -> None:
    """Raise UsageError if a run's pictures are not those that its supernet learns from, and is measured on.

    Args:
        supernet: The folder of the supernet's training; where there is none yet, the data set is only opened.
        plan: The plan, with the path where the pictures are now.

    Raises:
        DataError: If the data set is missing or of no known layout.
    """
    path, subject = Path(plan.data), SupernetSubject(plan.options, final=plan.final)
    splits = subject.splits(plan.supernet, path)
    if not (supernet / "data.json").exists():
        return
    noted, recipe = RunFolder(supernet).data(), load_recipe(supernet)
    digest = f"{splits.train.digest()}-{splits.val.digest()}"
    if noted["digest"] != digest and recipe.crop == "pad":  # noted without the pictures that could not be decoded
        digest = prepare(recipe, path, 0, 1, Manifest.from_json(noted["manifest"]), subject).digest
    if noted["digest"] != digest:
        raise _other_pictures(plan)


def _other_pictures(plan: Plan) -> UsageError:
    found = f"{plan.data} changed, or was divided by other seeds before ({plan.supernet.seed}, {plan.final.seed})"
    return UsageError("The supernet was trained on other pictures", found=found, hint="Start a new run")
