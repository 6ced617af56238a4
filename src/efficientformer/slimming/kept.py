"""What a slimming run keeps of its targets and latencies; all of it is checked when it is read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from efficientformer.slimming.device import Measured
from efficientformer.slimming.search import LEAST_MS, Step, read_json
from efficientformer.spec.errors import UsageError
from efficientformer.spec.fields import check_int, check_keys, check_number
from efficientformer.weights.files import write_json

_SAME_MS = 1e-6  # steps keep 7 digits


@dataclass(frozen=True)
class _Choice:
    step: int
    predicted_ms: float


@dataclass(frozen=True)
class _Result:
    top1: float
    measured_ms: float | None
    quiet_ms: float | None


def read_choice(path: Path, steps: Sequence[Step]) -> Step:
    """Return the step of a path that was chosen for a target.

    Raises:
        SpecError: If the file is damaged.
        UsageError: If the file is damaged, or of another path.
    """
    chosen = check_keys(f"{path}", _read(path), _Choice)
    check_int(f"step in {path}", chosen["step"], 0, 1_000_000)
    check_number(f"predicted_ms in {path}", chosen["predicted_ms"], LEAST_MS, 1e9)
    step: Step | None = steps[chosen["step"]] if chosen["step"] < len(steps) else None
    if step is None or abs(step.predicted_ms - chosen["predicted_ms"]) > _SAME_MS:
        raise UsageError(
            f"{path} is of another path",
            expected=f"step {chosen['step']} to take {chosen['predicted_ms']:g} ms",
            found="no such step" if step is None else f"one of {step.predicted_ms:g} ms",
            hint=f"Remove the folder {path.parent}: its network is chosen and trained anew",
        )
    return step


def read_latencies(path: Path) -> dict[str, Any]:
    """Return the fields of ``Measured`` by the digest of a network; none where nothing was measured yet.

    Raises:
        SpecError, UsageError: If the file is damaged.
    """
    known = _read(path) if path.exists() else {}
    for key, each in known.items():
        values = check_keys(f"{path}: network {key!r}", each, Measured)
        for name, value in values.items():
            check_number(f"{name} of network {key!r} in {path}", value, LEAST_MS, 1e9)
    return known


def read_result(path: Path) -> tuple[float, Measured | None]:
    """Return what a target's network reached: its top-1, and its latency if it was measured.

    Raises:
        SpecError, UsageError: If the file is damaged.
    """
    found = _Result(**check_keys(f"{path}", _read(path), _Result))
    check_number(f"top1 in {path}", found.top1, 0, 100)
    if found.measured_ms is None or found.quiet_ms is None:
        return found.top1, None
    for name in ("measured_ms", "quiet_ms"):
        check_number(f"{name} in {path}", getattr(found, name), LEAST_MS, 1e9)
    return found.top1, Measured(found.measured_ms, found.quiet_ms)


def is_whole(path: Path) -> bool:
    """Whether there is a weights file whose header fits it: one that was cut off or overwritten is made again."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path} is damaged", expected="a JSON object", hint="Remove it and resume")
    return data


def write(path: Path, data: object) -> None:
    """Write JSON, whole or not at all, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, data)
