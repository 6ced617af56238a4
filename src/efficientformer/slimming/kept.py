"""What a slimming run keeps of its targets and latencies; all of it is checked when it is read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from efficientformer.slimming.device import Measured
from efficientformer.slimming.search import LEAST_MS, read_json
from efficientformer.spec.errors import UsageError
from efficientformer.spec.fields import check_int, check_keys, check_number
from efficientformer.weights.files import write_json


@dataclass(frozen=True)
class _Choice:
    step: int
    predicted_ms: float


@dataclass(frozen=True)
class _Result:
    top1: float
    measured_ms: float | None
    quiet_ms: float | None


def read_choice(path: Path, steps: int) -> int:
    """Return the step that was chosen for a target, of a path of so many steps.

    Raises:
        SpecError, UsageError: If the file is damaged.
    """
    number: int = check_keys(f"{path}", _read(path), _Choice)["step"]
    check_int(f"step in {path}", number, 0, steps - 1)
    return number


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
