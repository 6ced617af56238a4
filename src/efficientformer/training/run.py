"""Training from a recipe and a data set to a run folder with weights, figures and a report."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from efficientformer.evaluation.distributed import Team
from efficientformer.evaluation.evaluate import evaluate
from efficientformer.evaluation.report import require_libraries
from efficientformer.evaluation.result import Evaluation
from efficientformer.evaluation.torch_predictor import TorchPredictor
from efficientformer.spec.errors import UsageError, missing_extra
from efficientformer.spec.manifest import Manifest
from efficientformer.training.loop import Run, Shell
from efficientformer.training.norms import synchronise_norms
from efficientformer.training.optim import build_optimizer, freeze
from efficientformer.training.recipe import Recipe
from efficientformer.training.report import write_report
from efficientformer.training.setup import Prepared, build_task, prepare
from efficientformer.training.state import RunFolder
from efficientformer.training.watch import Watch
from efficientformer.weights.checkpoint import load_checkpoint
from efficientformer.weights.pretrained import build

if TYPE_CHECKING:
    from accelerate import Accelerator

EVAL_BATCH = 256


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: The run folder.
        finished: Whether it was trained to the end; else ``train(resume=folder)`` goes on.
        step: Steps done.
        evaluation: The best weights measured on the validation pictures, in single precision; None if interrupted,
            and in all processes but the first.
    """

    folder: Path
    finished: bool
    step: int
    evaluation: Evaluation | None


def train(
    recipe: Recipe | None = None,
    data: str | Path | None = None,
    output: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    device: str = "auto",
    quiet: bool = True,
) -> Outcome:
    """Train a network, on one device or, under torchrun, on many.

    Args:
        recipe: How to train; the default one fine-tunes a published network. Ignored with ``resume``.
        data: The data set: class folders, ImageNet, tar shards, idx files.
        output: The run folder; by default a new one in ``runs/``.
        resume: A run folder to go on with.
        device: ``auto`` or ``cpu``.
        quiet: Say nothing on the terminal.

    Returns:
        The run folder and, of a finished run, its evaluation.

    Raises:
        UsageError: If the arguments do not go together, or the folder holds another run.
        DataError: If the data set is missing or does not fit.
        TrainingError: If training cannot go on; the message names the step, and the last good checkpoint stands.
        MissingExtraError: If a library of the train extra is missing.
    """
    require_libraries()
    if resume is None and data is None:
        raise UsageError("Nothing to train on", hint="Name a data set: --data DIR")
    with _process_group(), _signals() as stop:
        if resume is not None:
            folder = RunFolder(Path(resume))
            recipe, path = folder.recipe(), Path(folder.data()["path"] if data is None else data)
        else:
            recipe, path = recipe or Recipe(), Path(str(data)).absolute()
        accelerator = _accelerator(recipe, device)
        prepared = prepare(recipe, path, accelerator.process_index, accelerator.num_processes)
        if resume is None:
            folder = RunFolder(Path(output) if output is not None else _free_folder(prepared, path))
            _create(folder, prepared, path, accelerator)
        elif folder.data().get("digest") != prepared.digest:
            raise UsageError(f"{path} holds other pictures than when this run began", hint="Start a new run")
        run = _assemble(prepared, folder, accelerator, stop, quiet=quiet, resuming=resume is not None)
        try:
            return _train(run, prepared, path)
        finally:
            run.watch.close()


def _create(folder: RunFolder, prepared: Prepared, path: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        folder.create(prepared.recipe, prepared.describe_data(path))
    accelerator.wait_for_everyone()


def _train(run: Run, prepared: Prepared, path: Path) -> Outcome:
    recipe, folder = run.recipe, run.folder.path
    if run.progress.step == 0:
        for note in prepared.notes:
            run.watch.note(note)
    run.watch.note(
        f"{prepared.manifest.provenance['model']}: {sum(p.numel() for p in run.model.parameters()):,} parameters; "
        f"{len(prepared.source):,} pictures for training, {len(prepared.val):,} for validation; {recipe.epochs} epochs "
        f"of {run.steps_per_epoch} steps of {recipe.batch_size}; {run.accelerator.device}, "
        f"{run.accelerator.mixed_precision.replace('no', 'fp32')}, {run.accelerator.num_processes} process(es), into "
        f"{folder}"
    )
    finished = run.train()
    for name, reason in run.loader.skipped.items():
        run.watch.note(f"left out {name}: {reason}")
    evaluation = None
    if not finished:
        run.watch.note(f"Stopped after step {run.progress.step}. Go on: efficientformer train --resume {folder}")
    elif run.accelerator.is_main_process:
        evaluation = _measure_best(run, prepared, path)
        write_report(run.folder, recipe, evaluation, run.progress)
        run.watch.note(
            f"Best epoch {run.progress.best_epoch}: top-1 {evaluation.top1:.2f} %, loss {evaluation.loss:.4f}. "
            f"Report: {folder / 'report.html'}"
        )
    return Outcome(folder, finished, run.progress.step, evaluation)


def _assemble(
    prepared: Prepared,
    folder: RunFolder,
    accelerator: Accelerator,
    stop: Callable[[], bool],
    *,
    quiet: bool,
    resuming: bool,
) -> Run:
    """Put the parts of a run together, at the step it stands at."""
    from timm.utils.model_ema import ModelEmaV3

    recipe, model, device = prepared.recipe, prepared.model, accelerator.device
    still = freeze(model, recipe.freeze)
    if recipe.norm == "frozen":
        still = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    elif recipe.norm == "sync" and accelerator.num_processes > 1:
        synchronise_norms(model, device)
    model.set_grad_checkpointing(recipe.grad_checkpointing)
    model.to(device, memory_format=torch.channels_last if recipe.channels_last else torch.preserve_format)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, recipe)
    average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    inner: Any = torch.compile(model) if recipe.compile else model
    shell, stepper = accelerator.prepare(Shell(inner), optimizer)
    task = build_task(recipe, prepared.manifest, prepared.source, device)
    run = Run(recipe, model, shell, stepper, average, prepared.loader, task, accelerator, still, folder, stop)
    if resuming:
        run.progress = folder.load_state(run.parts)
        if accelerator.is_main_process:
            folder.rewind_metrics(run.progress.step)
    total, first = recipe.epochs * run.steps_per_epoch, run.progress.step
    run.watch = Watch(
        folder.path if accelerator.is_main_process else None, total, first, recipe.batch_size, quiet=quiet
    )
    run.evaluate = lambda network: _evaluate(run, network, prepared)
    return run


def _evaluate(run: Run, network: nn.Module, prepared: Prepared) -> dict[str, float | None]:
    """Measure a network on the validation pictures, all processes together; keep it if it is the best so far."""
    accelerator, progress = run.accelerator, run.progress
    if accelerator.num_processes > 1:
        for buffer in network.buffers():  # each process has its own BatchNorm statistics; the first one's are saved
            torch.distributed.broadcast(buffer, 0)
    predictor = TorchPredictor(network, prepared.manifest, str(accelerator.device))
    team = Team(accelerator.process_index, accelerator.num_processes)
    share = evaluate(predictor, prepared.val, batch_size=EVAL_BATCH, rank=team.rank, world=team.world, keep_worst=0)
    merged = team.merged(share)
    epoch = progress.step // run.steps_per_epoch
    figures = {"val_top1": merged.top1, "val_top5": merged.top5, "val_loss": merged.loss}
    better = merged.top1 > progress.best_top1
    if better:
        progress.best_top1, progress.best_epoch, progress.evaluations_since_best = merged.top1, epoch, 0
    else:
        progress.evaluations_since_best += 1
    if accelerator.is_main_process:
        manifest = _measured_manifest(prepared.manifest, merged, epoch)
        for name in ("last", "best") if better else ("last",):
            run.folder.save_weights(name, network, manifest, progress.step)
    return figures


def _measured_manifest(manifest: Manifest, evaluation: Evaluation, epoch: int) -> Manifest:
    metrics = {"top1": evaluation.top1, "top5": evaluation.top5, "loss": evaluation.loss, "epoch": float(epoch)}
    return dataclasses.replace(manifest, metrics={k: round(v, 4) for k, v in metrics.items() if v is not None})


def _measure_best(run: Run, prepared: Prepared, path: Path) -> Evaluation:
    """Read the best weights back from their file and measure them, with the worst mistakes for the report."""
    file = run.folder.path / "best.safetensors"
    checkpoint = load_checkpoint(file)
    assert checkpoint.manifest is not None
    predictor = TorchPredictor(build(checkpoint.spec, checkpoint), checkpoint.manifest, str(run.accelerator.device))
    return evaluate(predictor, prepared.val, batch_size=EVAL_BATCH, model=str(file), data=str(path))


def _free_folder(prepared: Prepared, data: Path) -> Path:
    """Return a name in ``runs/`` that nothing has yet: the network and the data set."""
    name = f"{Path(prepared.manifest.provenance['model']).stem}-{data.name}"
    count = 1
    while (folder := Path("runs") / (name if count == 1 else f"{name}-{count}")).exists():
        count += 1
    return folder


def _accelerator(recipe: Recipe, device: str) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise missing_extra("train", "Training", error) from error
    # Accelerate keeps device and precision for the life of the process; this run may want others than the one before
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=_precision(recipe, device), cpu=device == "cpu")


def _precision(recipe: Recipe, device: str) -> str:
    """Return Accelerate's name of the recipe's precision; bf16 by itself only where the hardware computes in it."""
    if recipe.precision != "auto":
        return "no" if recipe.precision == "fp32" else recipe.precision
    if torch.cuda.is_available() and device != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"


@contextmanager
def _process_group() -> Iterator[None]:
    """Leave the process group that Accelerate makes under torchrun (nccl on GPUs, gloo on CPUs), if it made one."""
    before = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if torch.distributed.is_initialized() and not before:
            torch.distributed.destroy_process_group()


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a wish that is looked at between steps; a second Ctrl-C ends at once."""
    asked = threading.Event()

    def ask(number: int, _: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
