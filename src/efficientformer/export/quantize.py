"""Post-training quantisation: a network's file in int8, calibrated on pictures and measured on others."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficientformer.export.calibration import Chosen, Pictures, choose_pictures
from efficientformer.export.deployable import deployable, is_cached, quantised_beside
from efficientformer.export.guard import Kept, Score, effect, hold, logits_of, score
from efficientformer.export.int8 import Quantiser, bytes_with_manifest, load_float, store_weights_int8
from efficientformer.runtime.engines import Engine, installed_engines, open_engine
from efficientformer.runtime.timing import Timing, environment, time_together
from efficientformer.spec.errors import ExportError, UsageError
from efficientformer.spec.fields import check_choice
from efficientformer.spec.manifest import METADATA_KEY, Manifest
from efficientformer.spec.zoo import FILE_SUFFIXES, resolve
from efficientformer.weights.cache import Progress as DownloadProgress
from efficientformer.weights.cache import sha256_of, writing_to

WEIGHTS_ONLY = ("int8", "fp16")
RANKING_PICTURES = 50  # held-out pictures a layer's effect is measured on
ROUNDS = 50

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Quantisation:
    """What quantising gave.

    Attributes:
        path: The file.
        manifest: What the file says about itself.
        scores: Each engine's agreement and top-1 on the held-out pictures, the float network's first.
        timings: Latency of one picture for each file and engine.
        sizes: Bytes of the float file and of the new one.
        kept: Layers that stay in float, by effect.
        layers: Layers there are.
        calibration: Pictures it was calibrated on.
        held_out: Pictures it was measured on.
        skipped: Name and reason of each picture that could not be read.
        note: What a reader must know of the figures; may be empty.
    """

    path: Path
    manifest: Manifest
    scores: list[Score]
    timings: dict[str, Timing]
    sizes: tuple[int, int]
    kept: list[Kept]
    layers: int
    calibration: int
    held_out: int
    skipped: list[tuple[str, str]]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "file": self.path.name,
            "provenance": dict(self.manifest.provenance),
            "bytes": {"float": self.sizes[0], "quantised": self.sizes[1]},
            "scores": [dataclasses.asdict(each) for each in self.scores],
            "latency": {name: timing.to_dict() for name, timing in self.timings.items()},
            "layers": self.layers,
            "kept_in_float": [dataclasses.asdict(each) for each in self.kept],
            "pictures": {"calibration": self.calibration, "held_out": self.held_out},
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "note": self.note,
            "environment": environment("efficientformer", "onnxruntime", "openvino", "onnx"),
        }


def quantize(
    model: str,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_drop: float = 0.5,
    pictures: int = 300,
    holdout: int = 500,
    weights_only: str = "",
    seed: int = 0,
    offline: bool | None = None,
    progress: Progress | None = None,
    download_progress: DownloadProgress | None = None,
) -> Quantisation:
    """Quantise a network, measure what it costs, and write the file with a report if it costs no more than allowed.

    The layers that hurt most stay in float until the allowed drop holds on every engine installed. A network named by
    its zoo name or checkpoint is left in the cache too, where ``precision="int8"`` finds it.

    Args:
        model: A zoo name or alias, a weights file of any layout, or an exported file.
        data: Pictures: a data set of any layout or a plain folder. Top-1 counts if its classes are the network's, else
            agreement with the float network.
        output: Folder to write NAME-int8.onnx, report.json and report.html to.
        max_drop: Points that may be lost.
        pictures: How many to calibrate on.
        holdout: How many others to measure on.
        weights_only: ``int8`` or ``fp16`` stores the weights smaller and computes in float.
        seed: Which pictures.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told what is being done.
        download_progress: Told how a download goes.

    Raises:
        UsageError: If an option is illegal, or the output cannot be written.
        DataError: If there are too few readable pictures.
        MissingExtraError: If onnx, jinja2 or what builds the float file is not installed.
        ExportError: If the drop cannot be held. Then nothing is written.
    """
    _check_options(max_drop, pictures, holdout, weights_only)
    tell = progress or (lambda _: None)
    from efficientformer.export.quantize_report import require_libraries, write_reports

    require_libraries()
    tell("preparing the float network")
    source = deployable(model, offline=offline, progress=download_progress)
    reference = open_engine(source, "onnxruntime")
    _refuse_quantised(source, reference.manifest)
    proto = load_float(source)
    tell("decoding pictures")
    chosen = choose_pictures(data, reference.manifest, pictures=pictures, holdout=holdout, seed=seed)
    job = _Job(source, reference, proto, chosen, weights_only, seed, tell)
    folder = _output_folder(output)
    target = folder / f"{_name(model, source)}-{f'weights-{weights_only}' if weights_only else 'int8'}.onnx"
    with _temporary(folder, target.name) as temporary:
        kept = job.run(temporary, max_drop)
        result = job.result(target, temporary, kept)
        write_reports(result, folder)
        temporary.chmod(0o644)  # mkstemp's files are for their owner only
        temporary.replace(target)
    if is_cached(source) and not weights_only:
        _leave_in_cache(target, quantised_beside(source))
    return result


class _Job:
    """One quantisation: the float network, the pictures, and what was measured last."""

    def __init__(
        self,
        source: Path,
        reference: Engine,
        proto: Any,  # noqa: ANN401 (an onnx.ModelProto)
        chosen: Chosen,
        weights_only: str,
        seed: int,
        tell: Progress,
    ) -> None:
        self.source, self.reference, self.proto, self.chosen = source, reference, proto, chosen
        self.weights_only, self.seed, self.tell = weights_only, seed, tell
        tell("running the float network")
        self.expected = logits_of(reference, chosen.held_out)
        self.scores: list[Score] = []
        self.layers = 0

    def run(self, temporary: Path, max_drop: float) -> list[Kept]:
        """Write the quantised file; return the layers kept in float."""
        if self.weights_only:
            self.layers = 0
            if self.weights_only == "int8":
                store_weights_int8(self.proto)
            else:
                from efficientformer.export.halves import store_half

                store_half(self.proto)
            scores = self._measure(self.proto, temporary)
            if not max(each.drop for each in scores) <= max_drop:
                raise ExportError(
                    "Storing the weights smaller costs too much",
                    expected=f"at most {max_drop:g} points lost",
                    found=f"{max(each.drop for each in scores):.2f}",
                    hint="Store them in fp16, or allow more with --max-drop",
                )
            self.scores = scores
            return []
        self.tell("calibrating")
        quantiser = Quantiser(self.proto, self.chosen.calibration.batches())
        self.layers = len(quantiser.layers)

        def attempt(in_float: Sequence[str]) -> list[Score]:
            self.tell(f"measuring with {len(in_float)} of {self.layers} layers in float")
            return self._measure(quantiser.build(in_float), temporary)

        self.scores, kept = hold(attempt, lambda: self._rank(quantiser, temporary), max_drop)
        return kept

    def result(self, target: Path, temporary: Path, kept: list[Kept]) -> Quantisation:
        """Put the measured top-1 into the file, time it, and sum up."""
        top1 = [each.top1 for each in self.scores if each.top1 is not None]
        manifest = self._manifest({"top1": round(min(top1), 2)} if top1 else {})
        import onnx

        proto = onnx.load(temporary)
        temporary.write_bytes(bytes_with_manifest(proto, METADATA_KEY, manifest.to_json()))
        self.tell("timing")
        return Quantisation(
            path=target,
            manifest=manifest,
            scores=[score(self.reference, self.chosen.held_out, self.expected), *self.scores],
            timings=self._times(temporary),
            sizes=(self.source.stat().st_size, temporary.stat().st_size),
            kept=kept,
            layers=self.layers,
            calibration=0 if self.weights_only else len(self.chosen.calibration),
            held_out=len(self.chosen.held_out),
            skipped=self.chosen.skipped,
            note=self.chosen.note,
        )

    def _measure(self, proto: Any, path: Path) -> list[Score]:  # noqa: ANN401
        path.write_bytes(bytes_with_manifest(proto, METADATA_KEY, self._manifest({}).to_json()))
        engines = [open_engine(path, name) for name in installed_engines()]
        return [score(engine, self.chosen.held_out, self.expected) for engine in engines]

    def _rank(self, quantiser: Quantiser, path: Path) -> list[Kept]:
        """Return every layer with the effect of quantising it alone, the largest first."""
        few = Pictures(self.chosen.held_out.preprocess, self.chosen.held_out.images[:RANKING_PICTURES])
        expected = self.expected[: len(few)]
        effects = []
        for index, layer in enumerate(quantiser.layers):
            self.tell(f"measuring the effect of layer {index + 1} of {self.layers}")
            proto = quantiser.build([other for other in quantiser.layers if other != layer])
            path.write_bytes(bytes_with_manifest(proto, METADATA_KEY, self._manifest({}).to_json()))
            effects.append(Kept(layer, effect(logits_of(open_engine(path, "onnxruntime"), few), expected)))
        return sorted(effects, key=lambda each: -each.effect)

    def _manifest(self, metrics: dict[str, float]) -> Manifest:
        made = {"quantised_from": sha256_of(self.source)}
        if self.weights_only:
            made["weights"] = self.weights_only
        else:
            made["precision"] = "int8"
            made["calibration"] = f"{len(self.chosen.calibration)} pictures, seed {self.seed}"
        provenance = {**self.reference.manifest.provenance, **made}
        return dataclasses.replace(self.reference.manifest, metrics=metrics, provenance=provenance)

    def _times(self, path: Path) -> dict[str, Timing]:
        picture = next(self.chosen.held_out.batches(1))
        subjects = {}
        for kind, file in (("float", self.source), ("quantised", path)):
            for name in installed_engines():
                engine = open_engine(file, name)
                subjects[f"{kind}: {engine.name}"] = lambda engine=engine: engine.run(picture)
        return time_together(subjects, rounds=ROUNDS)


def _check_options(max_drop: float, pictures: int, holdout: int, weights_only: str) -> None:
    if not np.isfinite(max_drop) or not 0 <= max_drop <= 100:
        raise UsageError("Illegal max_drop", expected="points from 0 to 100", found=repr(max_drop))
    for name, value in (("pictures", pictures), ("holdout", holdout)):
        if value < 1:
            raise UsageError(f"Illegal {name}", expected="a whole number from 1", found=repr(value))
    if weights_only:
        check_choice("weights_only", weights_only, WEIGHTS_ONLY)


def _refuse_quantised(path: Path, manifest: Manifest) -> None:
    found = manifest.provenance.get("precision") or manifest.provenance.get("weights")
    if found:
        hint = "Give the float network it was made from"
        raise UsageError(f"{path} is quantised already", expected="a float network", found=found, hint=hint)


def _output_folder(output: str | os.PathLike[str]) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot write to {folder}", expected="a folder", found=str(error)) from error
    return folder


def _name(model: str, source: Path) -> str:
    """Return what the new file is called after: the zoo's name, or that of the file."""
    if Path(model).is_file() or model.endswith(FILE_SUFFIXES):
        return Path(model).stem
    return resolve(model).card.name if model else source.stem


@contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """Give a file in a folder that is gone afterwards unless it has been renamed."""
    try:
        handle, path = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
    except OSError as error:
        raise UsageError(f"Cannot write to {folder}", found=str(error)) from error
    os.close(handle)
    try:
        yield Path(path)
    finally:
        Path(path).unlink(missing_ok=True)


def _leave_in_cache(file: Path, target: Path) -> None:
    with writing_to(target.parent), _temporary(target.parent, target.name) as temporary:
        temporary.write_bytes(file.read_bytes())
        temporary.chmod(0o644)
        temporary.replace(target)
