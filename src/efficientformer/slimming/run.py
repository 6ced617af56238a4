"""Slimming from a data set and a target latency to trained networks, in a folder that survives a kill at any moment.

slim.json              the plan: data, targets, engine, recipes; table.json: the latency table
supernet/              the run folder of the supernet's training; importances.json: what it learned
search/path.json       every step of the search; search/measured.json: latencies measured on this machine's engine
targets/2ms/           choice.json: which step; sliced-2ms.safetensors: with inherited
                       weights; train/: the final training
slimmed-2ms.safetensors  the network: an ordinary checkpoint
path.csv, path.json, accuracy_latency.png, report.html
run.lock               while a process is at work here: which one
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from efficientformer.latency.table import HERE, LatencyTable
from efficientformer.models.network import EfficientFormer
from efficientformer.slimming import device
from efficientformer.slimming.check import check_run
from efficientformer.slimming.device import Measured
from efficientformer.slimming.extract import frozen_parts
from efficientformer.slimming.judging import Bench, check_pictures
from efficientformer.slimming.kept import is_whole, read_choice, read_latencies, read_result, write
from efficientformer.slimming.moved import point_at_teacher
from efficientformer.slimming.plan import IMPORTANCES, PATH, PLAN, SUPERNET, TABLE, Plan, make_folder
from efficientformer.slimming.report import Finished, write_report
from efficientformer.slimming.search import PathFile, Search, Step, check_targets, first_within, reachable
from efficientformer.slimming.space import Space
from efficientformer.slimming.start import decide, start_network
from efficientformer.slimming.subject import SupernetSubject
from efficientformer.slimming.watch import SearchWatch
from efficientformer.spec.errors import EfficientFormerError, TrainingError, UsageError, reason_of
from efficientformer.spec.whole import half_written
from efficientformer.training.allocator import freed_memory_kept
from efficientformer.training.lock import LOCK, alone_in
from efficientformer.training.memory import memory_named
from efficientformer.training.recipe import Recipe
from efficientformer.training.run import Outcome, train
from efficientformer.training.setup import PlainNetwork
from efficientformer.training.state import STATE, RunFolder
from efficientformer.training.subject import Subject
from efficientformer.weights.checkpoint import load_checkpoint, save_native

MEASURED, CHOICE = "search/measured.json", "choice.json"
TEACHER = "search/start.safetensors"  # the start network as the search began with it
TOGETHER = 10  # networks whose latencies are measured, and then kept, at once: a killed run goes on after them
REPEATS = 0.01  # share of a budget left for what a latency may differ by when it is measured again


@dataclass(frozen=True)
class SlimOutcome:
    """How a slimming run ended.

    Attributes:
        folder: The run folder.
        finished: Whether every target's network is trained; else ``slim(resume=folder)`` goes on.
        networks: The networks, of the largest target first.
        device: Hardware and date of the latency table; empty until the run is finished.
    """

    folder: Path
    finished: bool
    networks: tuple[Finished, ...]
    device: str = ""


def slim(
    plan: Plan | None = None,
    output: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    targets: Iterable[float] = (),
    data: str | Path | None = None,
    table: str | Path | None = None,
    workers: int | None = None,
    quiet: bool = True,
) -> SlimOutcome:
    """Slim a network until it meets latencies on a device, and train what is left.

    Args:
        plan: What to do.
        output: The run folder.
        resume: A run folder to go on with, by its own plan.
        targets: Further targets, in milliseconds, for a resumed run.
        data: Where a resumed run's pictures are now.
        table: A latency table measured elsewhere; by default one is measured on this machine's engine.
        workers: Worker processes from now on, for a resumed run; they change no result.
        quiet: Say nothing on the terminal.

    Returns:
        The run folder and, of a finished run, the networks.

    Raises:
        SpecError: If ``workers`` is no legal number.
        UsageError: If the arguments do not go together, a target cannot be reached (the range is named), or another
            process is at work in the folder.
        DataError: If the data set is missing or does not fit.
        TrainingError: If training cannot go on; the last good checkpoint stands.
        EngineError: If the engine cannot be used here.
        MissingExtraError: If a library is missing.
    """
    mixed = (output or table) if plan is None else (targets or data or workers is not None)
    if (plan is None) == (resume is None) or mixed:
        hint = "Give a plan, an output and perhaps a table; or resume, and perhaps targets, data and workers"
        raise UsageError("A run is either new or resumed", hint=hint)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = "Slim in one process; its sliced network can be trained by many: torchrun ... train --model FILE"
        raise UsageError("Slimming is no job for torchrun", hint=hint)
    with ExitStack() as held:
        if resume is not None:
            run = _resumed(Path(resume), targets, data, workers, held, quiet=quiet)
        else:
            assert plan is not None
            if output is None:
                raise UsageError("Where to?", hint="Name a run folder: --output FOLDER")
            run = _begun(plan, Path(output), None if table is None else Path(table), held, quiet=quiet)
        return run.go()


@dataclass
class _SlimRun:
    """One slimming run on its way."""

    folder: Path
    plan: Plan
    space: Space
    table: LatencyTable
    quiet: bool

    def go(self) -> SlimOutcome:
        """Do what is not done yet."""
        if not self._train_supernet():
            return SlimOutcome(self.folder, False, ())
        if not all((self._target(target) / CHOICE).exists() for target in self.plan.targets):
            with memory_named("for the search", self._command):
                self._search()
        steps = PathFile(self.folder / PATH, self.space).read()
        if not steps:
            raise UsageError(f"{self.folder / PATH} is gone", hint="Remove the folder targets, too, to search anew")
        networks: list[Finished] = []
        for target in self.plan.targets:
            network = self._finish(steps, target)
            if network is None:
                return SlimOutcome(self.folder, False, tuple(networks))
            networks.append(network)
        write_report(self.folder, self.plan, self.table, steps, self._measure(steps), networks)
        return SlimOutcome(self.folder, True, tuple(networks), self.table.device)

    def _search(self) -> None:
        """Find the networks of those targets that have none."""
        bench = Bench.open(self.folder, self.plan, self.space, self._subject())
        start_ms = reachable(self.space, self.table)[1]
        shown = SearchWatch(self.folder, start_ms, min(self.plan.targets), quiet=self.quiet)
        with freed_memory_kept(), bench, shown as watch:
            search = bench.search(self.table, watch.step)
            for target in self.plan.targets:
                if not (self._target(target) / CHOICE).exists():
                    self._choose(search, bench, target)

    @property
    def _command(self) -> str:
        return f"efficientformer slim --resume {shlex.quote(str(self.folder))}"

    def _subject(self) -> SupernetSubject:
        return SupernetSubject(self.plan.options, self.plan.supernet.seed, self.plan.final, self._command)

    def _train_supernet(self) -> bool:
        """Train the supernet if it is not trained; return whether it is."""
        if (self.folder / IMPORTANCES).exists():
            return True
        outcome = self._train(self.plan.supernet, self.folder / "supernet", self._subject())
        if outcome.finished:
            Bench.write_importances(self.folder)
        return outcome.finished

    def _train(self, recipe: Recipe, folder: Path, subject: Subject) -> Outcome:
        """Train in a folder of this run, or go on there."""
        options: dict[str, Any] = {"quiet": self.quiet, "subject": subject}
        if (folder / STATE).exists():
            if recipe.teacher == self._teacher:
                point_at_teacher(folder, self._teacher)  # this folder may have been moved
            workers = None if recipe.workers < 0 else recipe.workers  # a resumed run of ours may have new ones
            return train(data=self.plan.data, resume=folder, workers=workers, **options)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its first checkpoint
        return train(recipe, self.plan.data, folder, **options)

    @property
    def _teacher(self) -> str:
        return str((self.folder / TEACHER).absolute())

    def _target(self, target: float) -> Path:
        return self.folder / "targets" / f"{target:g}ms"

    def _choose(self, search: Search, bench: Bench, target: float) -> None:
        """Find a target's network on the path, and keep it with the weights it inherits.

        The first step whose prediction is within the target is taken if its measured latency is, too, and will be when
        it is measured again after the final training; else the search goes on, at last to the smallest network there
        is. Where the machine is a little busy just now, that counts for nothing (see ``Measured``).
        """
        folder, bound, most = self._target(target), target, target * (1 - REPEATS)
        low, _ = reachable(self.space, self.table)
        low = max(low, round(low, 7))  # as the steps of a path are rounded
        tried = list[Step]()
        while True:
            step = first_within(search.run(bound), bound, self.plan.options.max_params)
            assert step is not None
            found = self._measure([step])[0]
            if found is None or found.quiet_ms <= most:
                break
            tried.append(step)
            if step.predicted_ms <= low:
                last = f"{found.ms:.3f} ms at a predicted {step.predicted_ms:.3f} ms, with all gone that can be cut"
                raise self._missed(target, tried, last)
            bound = max(low, step.predicted_ms * min(0.999, most / found.quiet_ms))
        folder.mkdir(parents=True, exist_ok=True)
        bench.save(search.steps, step.number, folder / f"sliced-{target:g}ms.safetensors")
        if self.plan.final.teacher == SUPERNET and not (teacher := self.folder / TEACHER).exists():
            bench.save(search.steps, 0, teacher)  # once: all targets have the same, though no computation repeats it
        write(folder / CHOICE, {"step": step.number, "predicted_ms": step.predicted_ms})

    def _missed(self, target: float, tried: list[Step], last: str) -> TrainingError:
        """Forget what was measured for a target that nothing met, so that it can be tried again; return the error."""
        forgotten, file = {_digest(step) for step in tried}, self.folder / MEASURED
        write(file, {key: each for key, each in read_latencies(file).items() if key not in forgotten})
        hint = "Is the machine busy? Resume when it is not; else start a new run, with a table measured then"
        if rest := [each for each in self.plan.targets if each != target]:
            dataclasses.replace(self.plan, targets=tuple(rest)).save(self.folder)
            hint = (f"Is the machine busy? Try again when it is not: {self._command} --target-latency {target:g}ms; "
                    "without it, --resume goes on with the other targets")  # fmt: skip
        return TrainingError(f"No network of the path is measured within {target:g} ms", found=last, hint=hint)

    def _measure(self, wanted: list[Step]) -> list[Measured | None]:
        """Return the measured latencies of some steps; each network is measured once, and its latency kept.

        None stands for one that was not measured where the table's engine was, and cannot be here.
        """
        known = read_latencies(self.folder / MEASURED)
        specs = {digest: step.candidate.spec for step in wanted if (digest := _digest(step)) not in known}
        for first in range(0, len(specs), TOGETHER):
            chunk = dict(islice(specs.items(), first, first + TOGETHER))
            found = device.measured(self.table, list(chunk.values()), self.space.start)
            if found is None:
                break
            known |= {digest: vars(each) for digest, each in zip(chunk, found, strict=True)}
            write(self.folder / MEASURED, known)
        return [Measured(**known[digest]) if (digest := _digest(step)) in known else None for step in wanted]

    def _finish(self, steps: list[Step], target: float) -> Finished | None:
        """Train a target's network if it is not trained; return it, or None if somebody stopped the training."""
        folder = self._target(target)
        step = read_choice(folder / CHOICE, steps)
        result = folder / "result.json"
        weights = self.folder / f"slimmed-{target:g}ms.safetensors"
        if not (result.exists() and is_whole(weights)):
            recipe = self._final_recipe(folder / f"sliced-{target:g}ms.safetensors", step)
            outcome = self._train(recipe, folder / "train", PlainNetwork(self._command))
            if not outcome.finished:
                return None
            self._deliver(folder / "train" / "best.safetensors", weights, step, target)
        elif Finished(target, step, weights, *read_result(result)).holds is False and self.table.origin == HERE:
            self._deliver(weights, weights, step, target)  # measured again: the machine may have been busy
        return Finished(target, step, weights, *read_result(result))

    def _final_recipe(self, sliced: Path, step: Step) -> Recipe:
        """Return the final recipe for a network: from its inherited weights, unless it asks for new ones."""
        recipe, changes = self.plan.final, dict[str, Any]()
        if recipe.teacher == SUPERNET:
            changes["teacher"] = self._teacher
        changes["freeze"] = frozen_parts(recipe.freeze, step.candidate, EfficientFormer(step.candidate.spec))
        if recipe.pretrained:
            return recipe.with_changes(model=str(sliced.absolute()), spec=None, input_size=0, **changes)
        return recipe.with_changes(model="auto", spec=step.candidate.spec.to_dict(), input_size=0, **changes)

    def _deliver(self, trained: Path, weights: Path, step: Step, target: float) -> None:
        """Write the trained network beside the report, with what was promised and what it keeps."""
        checkpoint = load_checkpoint(trained)
        manifest = checkpoint.manifest
        assert manifest is not None
        found = device.measured(self.table, [checkpoint.spec], self.space.start)
        figures = {"predicted_ms": step.predicted_ms}
        if found is not None:
            figures |= {"measured_ms": found[0].ms, "quiet_ms": found[0].quiet_ms}
        where = {"engine": f"{self.table.engine} {self.table.precision}", "target_latency": f"{target:g} ms"}
        name = {"model": f"slimmed to {target:g} ms", "source": "slimmed", "slimming_step": str(step.number)}
        manifest = dataclasses.replace(
            manifest,
            metrics={**manifest.metrics, **figures},
            provenance={**manifest.provenance, **name, **where},
        )
        save_native(weights, checkpoint.state, manifest)
        measured = {name: figures.get(name) for name in ("measured_ms", "quiet_ms")}
        write(self._target(target) / "result.json", {"top1": float(manifest.metrics["top1"]), **measured})


def _begun(plan: Plan, folder: Path, table: Path | None, held: ExitStack, *, quiet: bool) -> _SlimRun:
    """Start a run: everything that can be refused is refused before anything is trained."""
    if os.path.isfile(folder / PLAN):  # noqa: PTH113 (no error for a folder that is closed to us: that comes next)
        hint = f"Go on with: efficientformer slim --resume {shlex.quote(str(folder))}; or choose another --output"
        raise UsageError(f"{folder} holds a run already", hint=hint)
    kept = folder / TABLE  # of a run that was refused after it had measured one
    _check_empty(folder, but={LOCK, kept.name} if table is None else {LOCK})
    plan.check()
    plan = decide(dataclasses.replace(plan, data=str(Path(plan.data).absolute())))
    start = start_network(plan)
    plan, space = dataclasses.replace(plan, start=start), plan.options.space(start)
    check_run(plan, space)
    make_folder(folder)
    held.enter_context(alone_in(folder))
    RunFolder(folder).tidy()
    found = device.keeps_table_for(plan, space, kept)
    # not a run, if it is refused: the folder can be used again, and its own table too
    with _removing_if_refused(folder / PLAN, *(() if table is None else (kept,))):
        if table is None:
            if not found:
                kept.unlink(
                    missing_ok=True
                )  # not what this run asks for; resumed before it has its own, it would take it
            plan.save(folder)  # a run that is killed while it measures can be resumed; a given table is quickly kept
        latencies = device.open_table(plan, space, folder, table, quiet=quiet, anew=not found)
        plan.save(folder)
        device.check_table(plan, space, latencies)
        check_targets(space, latencies, plan.targets, plan.options.max_params)
    if found and not quiet:
        sys.stderr.write(f"The latency table is the one found in {folder}, {latencies.origin}\n")
    return _SlimRun(folder, plan, space, latencies, quiet)


def _check_empty(folder: Path, but: set[str]) -> None:
    try:
        others = sorted(path.name for path in folder.iterdir() if path.name not in but and not half_written(path))
    except FileNotFoundError:
        return
    except OSError as error:
        hint = "Choose another --output"
        raise UsageError(f"{folder} is no folder for a run", found=reason_of(error), hint=hint) from error
    if others:
        hint = "Choose another --output: nothing is overwritten"
        raise UsageError(f"{folder} is not empty", found=", ".join(others[:5]), hint=hint)


def _resumed(
    folder: Path,
    targets: Iterable[float],
    data: str | Path | None,
    workers: int | None,
    held: ExitStack,
    *,
    quiet: bool,
) -> _SlimRun:
    """Go on with a run; one that was killed while its table was measured is refused as a new one is."""
    plan = Plan.load(folder)
    held.enter_context(alone_in(folder))
    RunFolder(folder).tidy()
    if data is not None:
        plan = dataclasses.replace(plan, data=str(Path(data).absolute()))
    wanted = plan.with_targets(targets)
    if workers is not None:
        wanted = wanted.with_workers(workers)
    space = wanted.options.space(start_network(wanted))
    new = not any((folder / name).exists() for name in ("supernet", IMPORTANCES, PATH))
    if data is not None or not _all_trained(folder, wanted):
        check_pictures(folder / "supernet", wanted)
    if not new and not (folder / TABLE).exists():  # never measured here instead: it may be another device's
        raise UsageError(f"{folder / TABLE} is gone, and the run rests on it", hint="Put it back, or start a new run")
    doomed = (folder / PLAN,) if new and wanted.targets == plan.targets else ()
    with _removing_if_refused(*doomed, refusal=UsageError):  # what is missing on this machine can be installed
        table = device.open_table(wanted, space, folder, None, quiet=quiet)
        if new:
            device.check_table(wanted, space, table)
        check_targets(space, table, wanted.targets, wanted.options.max_params)
    wanted.save(folder)
    return _SlimRun(folder, wanted, space, table, quiet)


def _all_trained(folder: Path, plan: Plan) -> bool:
    """Whether no picture is needed any more."""
    return all(is_whole(folder / f"slimmed-{target:g}ms.safetensors") for target in plan.targets)


@contextmanager
def _removing_if_refused(*paths: Path, refusal: type[Exception] = EfficientFormerError) -> Iterator[None]:
    try:
        yield
    except refusal:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def _digest(step: Step) -> str:
    """Return what tells a step's network from all others: the number of a step may come to mean another one."""
    return hashlib.sha256(step.candidate.spec.to_json().encode()).hexdigest()[:16]
