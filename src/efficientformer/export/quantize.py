"""Post-training quantisation with a guard: layers that cost accuracy stay in float until the allowed drop holds."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientformer.export.calibration import Pictures, gather_pictures
from efficientformer.export.deployable import deployable, quantised_target
from efficientformer.export.qdq import Quantiser, store_weights_half, store_weights_int8
from efficientformer.runtime.classifier import check_finite
from efficientformer.runtime.engines import Engine, damaged_engines, installed_engines, open_engine
from efficientformer.runtime.timing import Timing, environment, time_together
from efficientformer.spec.errors import EngineError, ExportError, UsageError, reason_of
from efficientformer.spec.fields import check_choice
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.progress import Progress
from efficientformer.spec.whole import half_written, whole_file
from efficientformer.spec.zoo import name_of
from efficientformer.weights.cache import CacheError, writing_to

WEIGHTS_ONLY = ("", "int8", "fp16")
INT8_FOR = ("all", "openvino")
WEIGHT_BITS = (7, 8)
MODEL_FILE, REPORT_FILE, PAGE_FILE = "model.onnx", "report.json", "report.html"
RANKED_ON = 32  # pictures on which each layer's own error is measured
BATCH = 16
_NO_NUMBERS = 1e9  # the error of a layer that makes NaN or infinity


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How one engine's results compare with single precision on the held-out pictures.

    Attributes:
        engine: The engine, its version and precision.
        agreement: Pictures with single precision's label, in percent.
        top1: Pictures with the right label, in percent; None if the pictures have no labels of the network's.
        drop: Points of top-1 lost against single precision; without labels, points of agreement lost.
        changed: Pictures with another label than single precision's.
        error: Standard error of ``drop`` in points: what another draw of as many pictures would change it by.
    """

    engine: str
    agreement: float
    top1: float | None
    drop: float
    changed: int = 0
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class QuantisationReport:
    """What was made, and what it costs and gains.

    Attributes:
        model: The network.
        path: The file made.
        kind: ``int8``, or ``int8 weights`` or ``fp16 weights`` for smaller files that compute in float.
        calibrated_on: Pictures whose values set the scales.
        held_out: Other pictures, on which accuracy was measured.
        skipped: Pictures that could not be read, with reasons.
        labelled: Whether the held-out pictures have labels of the network's classes.
        top1: Single precision's top-1 in percent; None without labels.
        accuracy: For each engine installed.
        max_drop: The drop that was allowed.
        kept: Layers that stayed in float, the one with the largest error of its own first.
        errors: Error of each layer when it alone is int8, relative to the logits' spread; empty if never needed.
        sizes: Bytes of the float and of the new file.
        timings: One picture, by engine: before and after, in turns of one run.
        environment: Hardware, versions, date.
    """

    model: str
    path: Path
    kind: str
    calibrated_on: int
    held_out: int
    skipped: tuple[tuple[str, str], ...]
    labelled: bool
    top1: float | None
    accuracy: tuple[Accuracy, ...]
    max_drop: float
    kept: tuple[str, ...]
    errors: dict[str, float]
    sizes: tuple[int, int]
    timings: dict[str, Timing]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        data = dataclasses.asdict(self)
        data |= {"path": str(self.path), "sizes": dict(zip(("float", "new"), self.sizes, strict=True))}
        data["timings"] = {name: timing.to_dict() for name, timing in self.timings.items()}
        return data

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def quantize(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    weights_only: str = "",
    engine: str = "all",
    weight_bits: int = 7,
    pictures: int = 300,
    holdout: int = 500,
    max_drop: float = 0.5,
    seed: int = 0,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> QuantisationReport:
    """Make a smaller or faster file of a network, measured on the user's pictures.

    Args:
        model: Zoo name or alias, weights file, or exported file; empty for the network in the package.
        data: Folder with pictures; in folders named after the network's classes they count as labelled. With
            ``train/`` and ``val/`` (or ``test/``) in it, scales are set on the one and figures measured on the other.
        output: Folder for the file, the JSON report and the page; it must not hold another network.
        checkpoint: A weights file to use instead of the zoo's weights.
        weights_only: ``int8`` or ``fp16``: store weights so and compute in float. Empty: compute in int8.
        engine: Whose int8 it is to be: ``all`` runs well in every engine, ``openvino`` faster there and slower in
            ONNX Runtime. The results are right, and measured, in every engine either way.
        weight_bits: Bits of an int8 weight that are used: 7 is right on every processor; 8 is finer, and for
            processors with VNNI, AMX or Arm's dot products alone: on other x86 ones sums overflow. Files of
            ``weights_only`` compute in float and use all 8 either way.
        pictures: How many to calibrate on at most.
        holdout: How many others to measure on at most.
        max_drop: Points of top-1 (without labels: of agreement with single precision) that may be lost in any engine.
        seed: Decides which pictures.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how the work goes.

    Returns:
        The report; the folder then holds ``model.onnx``, ``report.json`` and ``report.html``.

    Raises:
        UsageError: If an argument makes no sense, or the folder holds something else.
        DataError: If there are too few pictures.
        EngineError: If an engine is installed that cannot be imported.
        ExportError: If the allowed drop cannot be held; nothing is written.
        MissingExtraError: If a library of the quantize extra is missing.
    """
    model = name_of(model)
    check_choice("weights_only", weights_only, WEIGHTS_ONLY)
    check_choice("engine", engine, INT8_FOR)
    check_choice("weight_bits", weight_bits, WEIGHT_BITS)
    if not 0 <= max_drop <= 100 or pictures < 1 or holdout < 1 or seed < 0:
        expected = "a drop from 0 to 100, pictures from 1, a seed from 0"
        found = f"max_drop {max_drop}, {pictures} and {holdout} pictures, seed {seed}"
        raise UsageError("Illegal quantisation", expected=expected, found=found)
    if damaged := damaged_engines():
        hint = "Install it anew, or uninstall it: what is quantised is measured in every engine installed"
        raise EngineError("An engine is installed and cannot be imported", found=", ".join(damaged), hint=hint)
    output = _checked_folder(Path(output))
    source = deployable(model, checkpoint=checkpoint, offline=offline)
    kept = None if weights_only else quantised_target(model, checkpoint=checkpoint)
    reference = open_engine(source, "onnxruntime", precision="fp32")
    batches = gather_pictures(data, reference.manifest, pictures, holdout, seed, progress)
    _warn_if_coarse(len(batches.held_out), max_drop)
    with tempfile.TemporaryDirectory() as scratch:
        work = _Work(source, reference, batches, max_drop, Path(scratch) / MODEL_FILE, progress)
        if weights_only:
            work.store_weights(weights_only)
        else:
            work.quantise(signed=engine == "openvino", weight_bits=weight_bits)
        report = work.report(output / MODEL_FILE, f"{weights_only} weights" if weights_only else "int8")
        _put(work.target, report, output)
    if kept is not None:
        _remember(output / MODEL_FILE, kept)
    return report


class _Work:
    """One quantisation: the float network, the pictures, the file in the making."""

    def __init__(
        self,
        source: Path,
        reference: Engine,
        pictures: Pictures,
        max_drop: float,
        target: Path,
        progress: Progress | None,
    ) -> None:
        self.source, self.reference, self.pictures = source, reference, pictures
        self.max_drop, self.target, self.progress = max_drop, target, progress
        self.expected = _logits(reference, pictures.held_out)
        check_finite(self.expected, reference.name)
        self.kept: tuple[str, ...] = ()
        self.errors: dict[str, float] = {}
        self.accuracy: tuple[Accuracy, ...] = ()

    @property
    def manifest(self) -> Manifest:
        return self.reference.manifest

    def quantise(self, *, signed: bool, weight_bits: int) -> None:
        """Write the file with as few layers in float as the allowed drop asks for."""
        calibration = self.pictures.calibration
        quantiser = Quantiser(self.source, calibration, self.progress, signed=signed, weight_bits=weight_bits)
        manifest = dataclasses.replace(self.manifest, metrics={})
        if not self._holds(quantiser, manifest, ()):
            self._keep_layers(quantiser, manifest)
        tops = [each.top1 for each in self.accuracy if each.top1 is not None]
        if tops:
            metrics = {"top1": min(tops), "top1_pictures": len(self.pictures.held_out)}
            manifest = dataclasses.replace(manifest, metrics=metrics)
        quantiser.write(self.target, manifest, keep=self.kept)

    def _keep_layers(self, quantiser: Quantiser, manifest: Manifest) -> None:
        """Find the fewest of the layers with the largest errors that must stay in float."""
        ranked = self._ranked(quantiser, manifest)
        most = len(ranked) - 1  # with all of them nothing would be quantised
        too_few, count = 0, 1
        while count < most and not self._holds(quantiser, manifest, ranked[:count]):
            too_few, count = count, 2 * count
        enough = min(count, most)
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            if self._holds(quantiser, manifest, ranked[:middle]):
                enough = middle
            else:
                too_few = middle
        if not self._holds(quantiser, manifest, ranked[:enough]):
            worst = max(self.accuracy, key=lambda each: each.drop)
            raise ExportError(
                "No choice of layers in float holds the allowed drop",
                expected=f"at most {self.max_drop:g} points",
                found=f"{worst.drop:.2f} points with {worst.engine}, all layers with weights but one in float",
                hint="Nothing was written. Allow more (--max-drop), or give more pictures of the kind it will see",
            )

    def store_weights(self, kind: str) -> None:
        """Write the file with small weights, and check the drop once."""
        store = {"int8": store_weights_int8, "fp16": store_weights_half}[kind]
        provenance = {**self.manifest.provenance, "weights": kind}
        store(self.source, self.target, dataclasses.replace(self.manifest, metrics={}, provenance=provenance))
        self.accuracy = self._measure()
        worst = max(self.accuracy, key=lambda each: each.drop)
        if worst.drop > self.max_drop:
            raise ExportError(
                f"{kind} weights lose more than allowed",
                expected=f"at most {self.max_drop:g} points",
                found=f"{worst.drop:.2f} points with {worst.engine}",
                hint="Nothing was written. Allow more (--max-drop), or store them in fp16",
            )

    def report(self, path: Path, kind: str) -> QuantisationReport:
        """Time the file beside the float one, and put everything together."""
        engines = {}
        for name in installed_engines():
            engines[f"float, {name}"] = open_engine(self.source, name)
            engines[f"{kind}, {name}"] = open_engine(self.target, name)
        picture = self.pictures.held_out[:1]
        named = {f"{key} ({engine.precision})": engine for key, engine in engines.items()}
        timings = time_together({key: partial(engine.run, picture) for key, engine in named.items()}, rounds=30)
        labels = self.pictures.labels
        return QuantisationReport(
            model=self.manifest.provenance.get("model", self.source.name),
            path=path,
            kind=kind,
            calibrated_on=len(self.pictures.calibration),
            held_out=len(self.pictures.held_out),
            skipped=self.pictures.skipped,
            labelled=labels is not None,
            top1=None if labels is None else _percent(self.expected.argmax(1) == labels),
            accuracy=self.accuracy,
            max_drop=self.max_drop,
            kept=self.kept,
            errors=self.errors,
            sizes=(self.source.stat().st_size, self.target.stat().st_size),
            timings=timings,
            environment=environment("efficientformer", "onnxruntime", "openvino", "onnx"),
        )

    def _holds(self, quantiser: Quantiser, manifest: Manifest, keep: Sequence[str]) -> bool:
        """Write the file with these layers in float; whether every engine holds the allowed drop."""
        quantiser.write(self.target, manifest, keep=keep)
        self.kept, self.accuracy = tuple(keep), self._measure()
        if self.progress is not None:
            self.progress(f"{len(keep)} layers in float", len(keep), len(quantiser.layers))
        return max(each.drop for each in self.accuracy) <= self.max_drop

    def _measure(self) -> tuple[Accuracy, ...]:
        labels, expected = self.pictures.labels, self.expected.argmax(1)
        found = []
        for name in installed_engines():
            engine = open_engine(self.target, name)
            logits = _logits(engine, self.pictures.held_out)
            said = np.where(np.isfinite(logits).all(1), logits.argmax(1), -1)  # no numbers are no class
            top1 = None if labels is None else _percent(said == labels)
            right = expected if labels is None else labels
            lost = (expected == right).astype(float) - (said == right)  # of each picture: 1, 0, or -1 if it was won
            found.append(
                Accuracy(
                    engine.name,
                    _percent(said == expected),
                    top1,
                    drop=round(100 * float(lost.mean()), 4),
                    changed=int((said != expected).sum()),
                    error=round(100 * float(lost.std()) / len(lost) ** 0.5, 4),
                )
            )
        return tuple(found)

    def _ranked(self, quantiser: Quantiser, manifest: Manifest) -> tuple[str, ...]:
        """Return the layers, the one that hurts most when it alone is int8 first."""
        batch = self.pictures.calibration[:RANKED_ON]
        expected = _logits(self.reference, batch)
        scale = float(np.linalg.norm(expected - expected.mean(0))) or 1.0
        for index, layer in enumerate(quantiser.layers):
            quantiser.write(self.target, manifest, only=layer)
            found = _logits(open_engine(self.target, "onnxruntime"), batch)
            error = float(np.linalg.norm(found - expected)) / scale
            self.errors[layer] = round(error, 6) if math.isfinite(error) else _NO_NUMBERS
            if self.progress is not None:
                self.progress("ranking layers", index + 1, len(quantiser.layers))
        return tuple(sorted(self.errors, key=lambda layer: -self.errors[layer]))


def _logits(engine: Engine, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return logits (N, num_classes) for preprocessed images (N, C, H, W), a few at a time."""
    return np.concatenate([engine.run(batch[start : start + BATCH]) for start in range(0, len(batch), BATCH)])


def _warn_if_coarse(held_out: int, max_drop: float) -> None:
    if 0 < max_drop < 100 / held_out:
        warnings.warn(
            f"Of {held_out} held-out pictures each is {100 / held_out:.2g} % and the points allowed are {max_drop:g}: "
            f"the guard sees no smaller loss. Give more: {math.ceil(100 / max_drop):,} or more to measure on",
            stacklevel=3,
        )


def _percent(right: npt.NDArray[np.bool_]) -> float:
    return round(100 * float(right.mean()), 4)


def _checked_folder(folder: Path) -> Path:
    """Return an output folder that is new, empty, or holds an earlier quantisation."""
    folder = folder.absolute()
    try:
        if folder.exists() and (others := _others(folder)):
            expected, found = "a new folder, or an earlier quantisation's", ", ".join(others[:5])
            raise UsageError(f"{folder} holds something else", expected=expected, found=found)
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = folder if folder.exists() else folder.parent
        tempfile.TemporaryFile(dir=place).close()  # now, not when the work is done
    except OSError as error:
        raise UsageError(f"Cannot write to {folder}", found=reason_of(error)) from error
    return folder


def _others(folder: Path) -> list[str]:
    """Return what in a folder is neither of a quantisation, nor what one that was killed had half written."""
    if not folder.is_dir():
        return [folder.name]
    entries = [entry for entry in folder.iterdir() if not half_written(entry)]
    return sorted({entry.name for entry in entries} - {MODEL_FILE, REPORT_FILE, PAGE_FILE})


def _put(target: Path, report: QuantisationReport, output: Path) -> None:
    """Write the reports beside the file, then copy all to the output, which may be on another file system."""
    from efficientformer.export.quantize_page import write_page

    folder = target.parent
    (folder / REPORT_FILE).write_text(report.to_json())
    write_page(report, folder / PAGE_FILE)
    try:
        for name in (MODEL_FILE, REPORT_FILE, PAGE_FILE):  # the largest first: a disk that is full has no room for it
            _copy(folder / name, output / name)
    except OSError as error:
        raise ExportError(
            f"Cannot write to {output}", found=reason_of(error), hint="Make room there and try again"
        ) from error


def _remember(path: Path, kept: Path) -> None:
    """Leave a copy in the cache, where ``precision="int8"`` of this network finds it; it does without."""
    try:
        with writing_to(kept.parent):
            _copy(path, kept)
    except CacheError as error:
        warnings.warn(f"--precision int8 will not find the file by the network's name. {error}", stacklevel=3)


def _copy(path: Path, target: Path) -> None:
    """Copy a file; ``target`` appears only once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        shutil.copyfile(path, temporary)
