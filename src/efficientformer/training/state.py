"""The run folder, and the state a run goes on from: written whole or not at all, read without running anything.

recipe.json            the resolved recipe; data.json: the data set and its classes
state.pt               network, averaged network, optimiser, step: what --resume needs
best.safetensors       the best weights so far by validation top-1; last.safetensors: the newest
metrics.jsonl          one line per epoch and per 50 steps; tensorboard/, train.log, curves.png
report.html, README.md the report and the model card, at the end
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficientformer.spec.errors import CheckpointError, TrainingError, UsageError
from efficientformer.spec.manifest import Manifest
from efficientformer.training.recipe import Recipe, load_recipe
from efficientformer.weights.checkpoint import save_native
from efficientformer.weights.files import atomic_write

STATE = "state.pt"


@dataclass
class Progress:
    """Where a run stands, in plain values.

    Attributes:
        step: Steps done.
        seconds: Training time so far, in every part of the run.
        best_top1: Best validation top-1 so far, in percent; -1 before the first.
        best_epoch: Its epoch.
        evaluations_since_best: Evaluations since then.
    """

    step: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = -1
    evaluations_since_best: int = 0


@dataclass
class RunFolder:
    """A folder that holds one run.

    Args:
        path: The folder.
    """

    path: Path
    _metrics: list[dict[str, Any]] = field(default_factory=list)

    def create(self, recipe: Recipe, data: Mapping[str, Any]) -> None:
        """Make the folder and note what the run is.

        Raises:
            UsageError: If there is a run in it already, or it cannot be made.
        """
        if (self.path / STATE).exists():
            hint = f"Go on with --resume {self.path}, or choose another --output"
            raise UsageError(f"{self.path} holds a run already", hint=hint)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "metrics.jsonl").write_text("")
            (self.path / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")
            (self.path / "data.json").write_text(json.dumps(data, indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"Cannot write the run folder {self.path}", found=error.strerror or str(error)) from error

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
            raise UsageError(f"{self.path} is no run folder", found=str(error)) from error
        if not isinstance(data, dict) or not isinstance(data.get("path"), str):
            raise UsageError(f"{self.path}/data.json is damaged")
        return data

    def save_state(self, parts: Mapping[str, Any], progress: Progress) -> None:
        """Write everything a run needs to go on from here.

        Raises:
            TrainingError: If it cannot be written; the state before it stands.
        """
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        with self._naming(progress.step), atomic_write(self.path / STATE) as file:
            torch.save({"parts": states, "progress": vars(progress)}, file)

    def load_state(self, parts: Mapping[str, Any]) -> Progress:
        """Bring every part to where the run stood.

        Raises:
            TrainingError: If there is no state, or it is damaged or of another run.
        """
        path = self.path / STATE
        if not path.exists():
            return Progress()
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                if part is not None:
                    part.load_state_dict(data["parts"][name])
            return Progress(**data["progress"])
        except Exception as error:  # whatever a damaged file makes torch raise
            found = f"{type(error).__name__}: {str(error)[:300]}"
            raise TrainingError(f"{path} cannot be resumed from", found=found, hint="Start a new run") from error

    def save_weights(self, name: str, network: nn.Module, manifest: Manifest, step: int) -> None:
        """Write a network as a checkpoint of ours.

        Raises:
            TrainingError: If it cannot be written; the file before it stands.
        """
        with self._naming(step):
            save_native(self.path / f"{name}.safetensors", network.state_dict(), manifest)

    @contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise TrainingError(
                f"The checkpoint of step {step} could not be written",
                found=error.found or str(error),
                hint=f"The one before it stands. Make room, then: efficientformer train --resume {self.path}",
            ) from error

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """Add one line to the metrics."""
        self._metrics.append(dict(values))
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise TrainingError(
                f"The metrics of step {values.get('step')} could not be written", found=str(error)
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return every line of the metrics so far."""
        return list(self._metrics)

    def rewind_metrics(self, step: int) -> None:
        """Read the metrics back and drop what was written after ``step``: those steps are done again."""
        path, lines = self.path / "metrics.jsonl", []
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:  # a line that a kill cut short
                continue
            if isinstance(values, dict) and values.get("step", 0) <= step:
                lines.append(values)
        self._metrics = lines
        with atomic_write(path) as file:
            file.write("".join(json.dumps(values) + "\n" for values in lines).encode())
