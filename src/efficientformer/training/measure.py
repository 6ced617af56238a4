"""Measuring the network of a run: after an epoch, and the best one at the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from efficientformer.data.source import ImageSource
from efficientformer.evaluation.distributed import Team
from efficientformer.evaluation.evaluate import evaluate
from efficientformer.evaluation.result import Evaluation
from efficientformer.evaluation.torch_predictor import TorchPredictor
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import EngineError, TrainingError
from efficientformer.spec.manifest import Manifest
from efficientformer.training.loop import Run
from efficientformer.training.memory import memory_named
from efficientformer.training.setup import Prepared

EVAL_BATCH = 256  # at most


def evaluate_epoch(run: Run, network: EfficientFormer, prepared: Prepared) -> dict[str, float | None]:
    """Measure a network on the validation pictures, all processes together; keep it if it is the best so far."""
    accelerator, progress = run.accelerator, run.progress
    if accelerator.num_processes > 1:
        for buffer in network.buffers():  # each process has its own BatchNorm statistics; the first one's are saved
            torch.distributed.broadcast(buffer, 0)
    predictor = TorchPredictor(network, prepared.manifest, str(accelerator.device))
    try:
        merged = _measure(run, predictor, prepared.val, keep_worst=0)
    except EngineError as error:
        what = "answers with no numbers" if error.__cause__ is None else "cannot be measured"
        raise TrainingError(
            f"The network {what} after step {progress.step - 1}", found=error.found, hint=run.advice
        ) from error
    if progress.best_epoch < 0:
        run.watch.left_out("validation", [(each.name, each.reason) for each in merged.skipped])
    epoch = progress.step // run.steps_per_epoch
    figures = {"val_top1": merged.top1, "val_top5": merged.top5, "val_loss": merged.loss}
    better = (merged.top1, -merged.loss) > (progress.best_top1, -progress.best_loss)
    if better:
        progress.best_top1, progress.best_loss = merged.top1, merged.loss
        progress.best_epoch, progress.evaluations_since_best = epoch, 0
    else:
        progress.evaluations_since_best += 1
    if accelerator.is_main_process:
        manifest = _measured_manifest(prepared.manifest, merged, epoch)
        for name in ("last", "best") if better else ("last",):
            with run.folder.naming(progress.step):
                prepared.subject.save(run.folder.weights(name), network, manifest)
    return figures


def _measured_manifest(manifest: Manifest, evaluation: Evaluation, epoch: int) -> Manifest:
    metrics = {"top1": evaluation.top1, "top5": evaluation.top5, "loss": evaluation.loss, "epoch": float(epoch)}
    return dataclasses.replace(manifest, metrics={k: round(v, 4) for k, v in metrics.items() if v is not None})


def measure_best(run: Run, prepared: Prepared, path: Path) -> Evaluation:
    """Read the best weights back from their file and measure them, with the worst mistakes for the report."""
    file = run.folder.weights("best")
    network, manifest = prepared.subject.load(file)
    network.to(memory_format=torch.channels_last)
    predictor = TorchPredictor(network, manifest, str(run.accelerator.device))
    return _measure(run, predictor, prepared.val, model=str(file), data=str(path))


def _measure(run: Run, predictor: TorchPredictor, source: ImageSource, **options: Any) -> Evaluation:  # noqa: ANN401
    """Measure a network, all processes together, on as many pictures at once as fit where a training step does."""
    team = Team(run.accelerator.process_index, run.accelerator.num_processes)
    batch = min(EVAL_BATCH, 4 * run.at_once)  # a step keeps every layer's results, measuring only the last ones
    with memory_named("to measure the network", run.folder.resume_command):
        share = evaluate(predictor, source, batch_size=batch, rank=team.rank, world=team.world, **options)
    return team.merged(share)
