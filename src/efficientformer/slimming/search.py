"""Gradual slimming (paper section 4): cut what costs least accuracy per millisecond saved, until the target is met.

Accuracy per millisecond is for cuts that others follow. Where the best cut by that rule meets the target, the most
accurate of all cuts that meet it is made instead: what the last one saves beyond the target is of no use.

The search knows nothing of torch or engines: a ``Judge`` says the accuracy of a candidate, a ``Device`` its latency.
Every step is written down before the next one begins; a search that is started again repeats the cuts it finds
written, without scoring them again, and goes on to the path an uninterrupted one would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from efficientformer.latency.table import LatencyPrediction
from efficientformer.slimming.importance import Importances
from efficientformer.slimming.moves import Action, propose
from efficientformer.slimming.objective import Cost, Latency, Objective
from efficientformer.slimming.space import Candidate, Space
from efficientformer.spec.arch import ArchSpec, load_json
from efficientformer.spec.count import count
from efficientformer.spec.errors import SpecError, UsageError, reason_of
from efficientformer.spec.fields import as_list, check_int, check_keys, check_number
from efficientformer.spec.text import storable
from efficientformer.weights.files import write_json

EVERY = 1000  # as a breadth: all cuts there are
LEAST_MS = 1e-7  # no network is quicker; latencies are kept rounded to it


class Device(Protocol):
    """What knows how long a network takes: a latency table."""

    def predict(self, spec: ArchSpec) -> LatencyPrediction:
        """Predict the latency of one picture."""


class Judge(Protocol):
    """What knows how good a network is."""

    def accuracy(self, candidate: Candidate) -> float:
        """Return the top-1, in percent, of a candidate reached from where the judge stands."""

    def take(self, candidate: Candidate) -> float:
        """Make a candidate the one further cuts are made from; return its top-1 in percent."""

    def follow(self, candidate: Candidate) -> None:
        """Do what ``take`` does to the weights, without measuring."""


@dataclass(frozen=True, slots=True)
class Considered:
    """A cut that was scored.

    Attributes:
        action: The cut.
        what: The same in words.
        saved_ms: Predicted latency it saves.
        gain: What it gains by the search's objective.
        top1: Accuracy after it, in percent.
        lost: Points of accuracy it loses against the network before it.
    """

    action: Action
    what: str
    saved_ms: float
    gain: float
    top1: float
    lost: float


@dataclass(frozen=True, slots=True)
class Step:
    """One network of the path, and the cut that led to it.

    Attributes:
        number: 0 for the start network.
        what: The cut in words.
        candidate: The network.
        predicted_ms: Its predicted latency.
        error_ms: The prediction's error bar.
        top1: Its accuracy on held-out pictures with inherited weights, in percent.
        considered: Every cut that was scored for this step; the first is the one taken.
    """

    number: int
    what: str
    candidate: Candidate
    predicted_ms: float
    error_ms: float
    top1: float
    considered: tuple[Considered, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``step_from_dict`` gives the equal step back."""
        considered = [{**asdict(each), "action": each.action.to_dict()} for each in self.considered]
        plain = {name: getattr(self, name) for name in ("number", "what", "predicted_ms", "error_ms", "top1")}
        return {**plain, "candidate": self.candidate.to_dict(), "considered": considered}


def step_from_dict(space: Space, data: object) -> Step:
    """Build a step from what ``Step.to_dict`` returned, trusting nothing in it.

    Raises:
        SpecError: If it is no step in this space.
    """
    fields = check_keys("a step of the path", data, Step)
    fields["candidate"] = space.candidate(fields["candidate"])
    considered = []
    for each in as_list("cuts of a step", fields.get("considered", []), 1000):
        values = check_keys("a cut", each, Considered)
        considered.append(Considered(**{**values, "action": Action.from_dict(values["action"])}))
        _check_words("a cut", values["what"])
        for name, most in (("saved_ms", 1e9), ("gain", 1e300), ("top1", 1e9), ("lost", 1e9)):
            check_number(f"{name} of a cut", values[name], -most, most)
    step = Step(**{**fields, "considered": tuple(considered)})
    check_int("number of a step", step.number, 0, 1_000_000)
    _check_words("a step", step.what)
    check_number("predicted_ms of a step", step.predicted_ms, LEAST_MS, 1e9)
    for name in ("error_ms", "top1"):
        check_number(f"{name} of a step", getattr(step, name), 0, 1e9)
    return step


def _check_words(name: str, what: object) -> None:
    if not isinstance(what, str) or storable(what) != what:  # half a surrogate pair is no text
        raise SpecError(f"Illegal words for {name}", expected="a text", found=ascii(what)[:80])


def read_json(path: Path) -> object:
    """Read a file of a run folder.

    Raises:
        UsageError: If it cannot be read, or holds no JSON.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        hint = "Put the file back, or remove what is there, and resume"
        raise UsageError(f"Cannot read {path}", found=reason_of(error), hint=hint) from error
    return load_json(str(path), text)


class PathFile:
    """The path on disk: written whole after every step.

    Args:
        path: A JSON file.
        space: What the networks are cut out of.
        identity: What the path depends on; a file of another search is refused. None to read any.
    """

    def __init__(self, path: Path, space: Space, identity: str | None = None) -> None:
        self._path, self._space, self._identity = path, space, identity

    def read(self) -> list[Step]:
        """Return the steps so far.

        Raises:
            UsageError: If the file is damaged or of another search.
        """
        if not self._path.exists():
            return []
        data = read_json(self._path)
        if not isinstance(data, dict) or self._identity not in (None, data.get("identity")):
            hint = "Start a new run in another folder"
            raise UsageError(f"{self._path} is the path of another search", hint=hint)
        listed = as_list(f"steps in {self._path}", data.get("steps"), 100_000)
        steps = [step_from_dict(self._space, each) for each in listed]
        if [step.number for step in steps] != list(range(len(steps))):
            raise SpecError(f"{self._path} is damaged", expected="steps numbered from 0")
        return steps

    def write(self, steps: Sequence[Step]) -> None:
        """Write the path; the file before it stands until this one is whole."""
        data = {"identity": self._identity, "start": self._space.start.to_dict(), "steps": [s.to_dict() for s in steps]}
        write_json(self._path, data)


@dataclass
class Search:
    """A gradual slimming.

    Attributes:
        space: What is legal.
        importances: Which cuts are worth scoring.
        device: Latencies.
        judge: Accuracies.
        file: Where the path is kept.
        breadth: Cuts of each kind that are scored for a step; 1 as in the paper.
        progress: Told every new step.
        objective: What cuts are made for.
        max_params: Parameters the networks may have; 0 for no limit.
        steps: The path so far.
    """

    space: Space
    importances: Importances
    device: Device
    judge: Judge
    file: PathFile
    breadth: int = 1
    progress: Callable[[Step], None] | None = None
    objective: Objective = field(default_factory=Latency)
    max_params: int = 0
    steps: list[Step] = field(default_factory=list)

    def run(self, target_ms: float) -> list[Step]:
        """Slim until the predicted latency is at most the target, and the parameters are within their limit.

        Returns:
            The whole path from the start network; it may have gone further already.

        Raises:
            UsageError: If the target cannot be reached, or the file holds another search.
        """
        check_targets(self.space, self.device, [target_ms], self.max_params)
        if not self.steps:
            self.steps = self.file.read()
            for step in self.steps:
                self.judge.follow(step.candidate)
        if not self.steps:
            self._add(self._step(0, "start", self.space.largest, self.judge.take(self.space.largest)))
        while not self._meets(cost(self.steps[-1]), target_ms):
            self._add(self._next(self.steps[-1], target_ms))
        return list(self.steps)

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self.file.write(self.steps)
        if self.progress is not None:
            self.progress(step)

    def _next(self, step: Step, target_ms: float) -> Step:
        """Score the cuts that are possible and take the best."""
        scored = [self._score(step, action) for action in self._possible(step)]
        if not scored:
            raise UsageError(
                "Nothing is left to cut",
                expected=f"{target_ms:g} ms",
                found=f"{step.predicted_ms:.3f} ms",
                hint="Choose a target further up",
            )
        scored.sort(key=_cost)
        ending = [cut for cut in scored if self._meets(self._after(step, cut.action), target_ms)]
        taken = max(ending, key=lambda cut: (cut.top1, cut.gain)) if scored[0] in ending else scored[0]
        candidate = taken.action.apply(self.space, step.candidate)
        top1 = self.judge.take(candidate)
        considered = (taken, *(cut for cut in scored if cut is not taken))
        return self._step(step.number + 1, taken.what, candidate, top1, considered)

    def _meets(self, reached: Cost, target_ms: float) -> bool:
        return meets(reached, target_ms, self.max_params)

    def _possible(self, step: Step) -> list[Action]:
        """Return the cuts to score; if none that is proposed gains anything, any cut there is."""
        for breadth in (self.breadth, EVERY):
            actions = propose(self.space, step.candidate, self.importances, breadth)
            if any(self._gain(step, action) > 0 for action in actions):
                return [action for action in actions if self._gain(step, action) > 0]
        return actions

    def _after(self, step: Step, action: Action) -> Cost:
        """Return what the network costs after a cut."""
        spec = action.apply(self.space, step.candidate).spec
        return Cost(self.device.predict(spec).ms, count(spec).params)

    def _gain(self, step: Step, action: Action) -> float:
        return self.objective.gain(cost(step), self._after(step, action))

    def _score(self, step: Step, action: Action) -> Considered:
        top1 = self.judge.accuracy(action.apply(self.space, step.candidate))
        saved = round(step.predicted_ms - self._after(step, action).ms, 7)
        # an efficiency of high weights has any size
        gain, lost = float(f"{self._gain(step, action):.9g}"), round(step.top1 - top1, 6)
        return Considered(action, action.describe(step.candidate), saved, gain, top1, lost)

    def _step(
        self, number: int, what: str, candidate: Candidate, top1: float, considered: tuple[Considered, ...] = ()
    ) -> Step:
        latency = self.device.predict(candidate.spec)
        return Step(number, what, candidate, round(latency.ms, 7), round(latency.error_ms, 7), top1, considered)


def _cost(cut: Considered) -> tuple[float, float]:
    """Rank a cut: accuracy lost per gain; of those that lose nothing, the one that gains most."""
    if cut.gain <= 0:
        return float("inf"), -cut.gain
    return max(0.0, cut.lost) / cut.gain, -cut.gain


def cost(step: Step) -> Cost:
    """Return what a step's network costs."""
    return Cost(step.predicted_ms, count(step.candidate.spec).params)


def meets(reached: Cost, target_ms: float, max_params: int = 0) -> bool:
    """Return whether a network meets a latency, and a limit of its parameters unless that is 0."""
    return reached.ms <= target_ms and not 0 < max_params < reached.params


def check_targets(space: Space, device: Device, targets: Sequence[float], max_params: int = 0) -> None:
    """Raise UsageError, naming the reachable range, if one of the targets (ms) cannot be met by slimming."""
    smallest = count(space.smallest.spec).params
    if 0 < max_params < smallest:
        raise UsageError(f"No network of the space has at most {max_params:,} parameters",
                         expected=f"at least {smallest:,} (all that can be cut is gone)",
                         hint="Raise search.max_params, or choose a smaller start network")  # fmt: skip
    low, high = reachable(space, device)
    too_large = 0 < max_params < count(space.largest.spec).params  # then there is something to cut whatever the target
    for target in targets:
        if low <= target and (target < high or too_large):
            continue
        hint = "Choose a larger start network with --model" if target >= high else "Choose a smaller start network"
        raise UsageError(
            f"A target of {target:g} ms cannot be reached by slimming",
            expected=f"from {math.ceil(low * 1e4) / 1e4:.4f} ms (all that can be cut is gone) "
            f"to below {math.floor(high * 1e4) / 1e4:.4f} ms (the start network)",
            found=f"{target:g} ms",
            hint=hint,
        )


def reachable(space: Space, device: Device) -> tuple[float, float]:
    """Return the predicted latencies (ms) of the smallest and of the largest network of a space."""
    return device.predict(space.smallest.spec).ms, device.predict(space.largest.spec).ms


def first_within(steps: Sequence[Step], target_ms: float, max_params: int = 0) -> Step | None:
    """Return the first network of a path that meets a latency and a limit of its parameters, or None."""
    return next((step for step in steps if meets(cost(step), target_ms, max_params)), None)
