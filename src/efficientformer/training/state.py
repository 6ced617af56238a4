"""The run folder, and the state a run goes on from: written whole or not at all, read without running anything.

recipe.json            the resolved recipe; data.json: the data set and its classes, and how the run was started
state.pt               network, averaged network, optimiser, step: what --resume needs
best.safetensors       the best weights so far by validation top-1; last.safetensors: the newest
metrics.jsonl          one line per epoch and per 50 steps; tensorboard/, train.log, curves.png
report.html, README.md the report and the model card, at the end
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from efficientformer.spec.errors import CheckpointError, TrainingError, UsageError, reason_of
from efficientformer.spec.fields import check_choice, check_count, check_int, check_keys
from efficientformer.spec.whole import half_written
from efficientformer.training.lock import LOCK
from efficientformer.training.recipe import Recipe, load_recipe
from efficientformer.weights.files import atomic_write, write_json

STATE = "state.pt"
BEFORE_FIRST_STEP = {
    LOCK,
    "recipe.json",
    "data.json",
    "metrics.jsonl",
    "train.log",
    "tensorboard",
}  # of a run that never began


@dataclass
class Progress:
    """Where a run stands, in plain values.

    Attributes:
        step: Steps done.
        seconds: Training time so far, in every part of the run.
        best_top1: Best validation top-1 so far, in percent; -1 before the first.
        best_loss: The validation loss there, which decides between equal ones.
        best_epoch: Its epoch.
        evaluations_since_best: Evaluations since then.
        loss_sum: Losses of the current epoch's steps, added up.
        hit_sum: Pictures of the current epoch that were classified right in training.
    """

    step: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_loss: float = math.inf
    best_epoch: int = -1
    evaluations_since_best: int = 0
    loss_sum: float = 0.0
    hit_sum: float = 0.0


@dataclass(frozen=True)
class Launch:
    """How a run is started; another way may need more memory, and computes other numbers.

    Attributes:
        processes: Processes that train together.
        nodes: Machines they are on.
        device: ``auto`` or ``cpu``.
    """

    processes: int = 1
    nodes: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        check_count("processes of the launch", self.processes)
        check_int("nodes of the launch", self.nodes, 1, self.processes)
        check_choice("device of the launch", self.device, ("auto", "cpu"))

    def __str__(self) -> str:
        return f"{self.processes} process(es) on {self.nodes} machine(s), device {self.device}"

    def command(self, arguments: str) -> str:
        """Return the command that starts ``efficientformer`` with some arguments this way."""
        cpu = " --device cpu" if self.device == "cpu" else ""
        if self.processes == 1:
            return f"efficientformer {arguments}{cpu}"
        meet = f"--nnodes {self.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if self.nodes > 1 else ""
        each = self.processes // self.nodes
        return f"torchrun {meet}--nproc-per-node {each} -m efficientformer {arguments}{cpu}"


@dataclass
class RunFolder:
    """A folder that holds one run.

    Args:
        path: The folder.
        command: What goes on with the run; by default ``efficientformer train --resume``, started as the run was.
    """

    path: Path
    command: str = ""
    _metrics: list[dict[str, Any]] = field(default_factory=list)

    def create(self, recipe: Recipe, data: Mapping[str, Any]) -> None:
        """Make the folder and note what the run is.

        Raises:
            UsageError: If there is a run in it already, or it cannot be made.
        """
        if (self.path / STATE).exists():
            hint = f"Go on with: {self.resume_command}; or choose another --output"
            raise UsageError(f"{self.path} holds a run already", hint=hint)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            others = {path.name for path in self.path.iterdir() if not half_written(path)} - BEFORE_FIRST_STEP
            if others:
                hint = "Choose another --output: nothing is overwritten"
                raise UsageError(f"{self.path} is not empty", found=", ".join(sorted(others)[:5]), hint=hint)
            self.tidy()
            (self.path / "metrics.jsonl").write_text("")
            (self.path / "recipe.json").write_text(recipe.to_json() + "\n")
            (self.path / "data.json").write_text(json.dumps(data, indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"Cannot write the run folder {self.path}", found=reason_of(error)) from error

    def tidy(self) -> None:
        """Remove what a run that was killed had half written."""
        for path in self.path.iterdir():
            if half_written(path):
                with suppress(OSError):  # it is in nobody's way
                    path.unlink()

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        return self.command or self.launch.command(f"train --resume {shlex.quote(str(self.path))}")

    @property
    def launch(self) -> Launch:
        """How the run was started first; a single process if that was not noted."""
        try:
            return Launch(**self.data().get("launch", {}))
        except UsageError:  # whoever needs the data set says so
            return Launch()

    @property
    def fresh(self) -> bool:
        """Whether no checkpoint was written yet: the run begins again from the weights of its recipe."""
        return not (self.path / STATE).exists() and not self.weights("last").exists()

    @property
    def way_on(self) -> str:
        """What there is of a run that broke off, and how to go on."""
        if self.fresh:
            return f"There is no checkpoint yet, so this begins again: {self.resume_command}"
        return f"The last checkpoint stands: {self.resume_command}" if (self.path / STATE).exists() else self._new_run

    @property
    def is_part(self) -> bool:
        """Whether this run is a part of a larger one, which begins it again if its folder is gone."""
        return bool(self.command)

    @property
    def _new_run(self) -> str:
        if self.is_part:
            return f"Remove {self.path}, and it begins again: {self.command}"
        return f"Start a new run, from its weights with --model {shlex.quote(str(self.weights('last')))}"

    def recipe(self) -> Recipe:
        """Return the recipe the run began with."""
        return load_recipe(self.path)

    def data(self) -> dict[str, Any]:
        """Return what ``create`` noted of the data set.

        Raises:
            UsageError: If this is no run folder.
        """
        try:
            data = json.loads((self.path / "data.json").read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path} is no run folder", found=reason_of(error)) from error
        wanted = {"path": str, "digest": str, "manifest": str, "train": int, "notes": list}
        if not isinstance(data, dict) or not all(isinstance(data.get(key), kind) for key, kind in wanted.items()):
            raise UsageError(f"{self.path / 'data.json'} is damaged", expected=f"an object with {', '.join(wanted)}")
        Launch(**check_keys(f"launch of {self.path / 'data.json'}", data.get("launch", {}), Launch))
        return data

    def note(self, **changes: object) -> None:
        """Change what ``create`` noted."""
        before = self.data()
        after = {**before, **changes}
        if after == before:
            return
        write_json(self.path / "data.json", after, indent=2)

    def note_workers(self, workers: int) -> None:
        """Change the number of worker processes in the recipe, which no result depends on."""
        recipe = self.recipe()
        if recipe.workers != workers:
            write_json(self.path / "recipe.json", recipe.with_changes(workers=workers).to_dict(), indent=2)

    def save_state(self, parts: Mapping[str, Any], progress: Progress) -> None:
        """Write everything a run needs to go on from here.

        Raises:
            TrainingError: If it cannot be written; the state before it stands.
        """
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        with self.naming(progress.step), atomic_write(self.path / STATE) as file:
            torch.save({"parts": states, "progress": vars(progress), "recipe": self.recipe().to_json()}, file)

    def load_state(self, parts: Mapping[str, Any]) -> Progress:
        """Bring every part to where the run stood; a run without a checkpoint stands at its beginning.

        Raises:
            TrainingError: If the state is missing, damaged or of another recipe.
        """
        if self.fresh:
            return Progress()
        path, hint = self.path / STATE, self._new_run
        if not path.exists():
            raise TrainingError(f"{path} is missing: there is nothing to go on from", hint=hint)
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            recipe, progress = Recipe.from_dict(json.loads(data["recipe"])), Progress(**data["progress"])
            now = self.recipe()  # not its text: a newer version knows settings that an older one did not
            same = recipe.with_changes(workers=now.workers) == now
            for name, part in parts.items():
                if part is not None and same:
                    part.load_state_dict(data["parts"][name])
        except Exception as error:  # whatever a damaged file makes torch raise; its advice is about trusted files
            found = f"{path.stat().st_size:,} bytes that are no complete state ({type(error).__name__})"
            raise TrainingError(f"{path} cannot be resumed from", found=found, hint=hint) from error
        if not same:
            raise TrainingError(f"{self.path / 'recipe.json'} is not the recipe this run began with", hint=hint)
        if progress.best_epoch >= 0 and not (self.path / "best.safetensors").exists():
            raise TrainingError(f"{self.path / 'best.safetensors'} is missing: the best weights so far", hint=hint)
        return progress

    def weights(self, name: str) -> Path:
        """Return the file of the ``best`` or the ``last`` weights."""
        return self.path / f"{name}.safetensors"

    @contextmanager
    def naming(self, step: int) -> Iterator[None]:
        """Turn what goes wrong while a checkpoint is written into a TrainingError that names the step."""
        try:
            yield
        except CheckpointError as error:
            raise TrainingError(
                f"The checkpoint of step {step} could not be written",
                found=error.found or str(error),
                hint=f"Mend that first. {self.way_on}",
            ) from error

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """Add one line to the metrics."""
        self._metrics.append(dict(values))
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise TrainingError(
                f"The metrics of step {values.get('step')} could not be written", found=reason_of(error)
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return every line of the metrics so far."""
        return list(self._metrics)

    def rewind_metrics(self, step: int) -> None:
        """Read the metrics back and drop what was written after ``step``: those steps are done again."""
        path, lines = self.path / "metrics.jsonl", []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:  # a line that a kill cut short
                continue
            if isinstance(values, dict) and isinstance(values.get("step"), int) and values["step"] <= step:
                lines.append(values)
        self._metrics = lines
        with atomic_write(path) as file:
            file.write("".join(json.dumps(values) + "\n" for values in lines).encode())
