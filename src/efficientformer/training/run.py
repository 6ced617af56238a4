"""Training from a recipe and a data set to a run folder with weights, figures and a report."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from efficientformer.data.listing import counted
from efficientformer.data.sources import LAYOUTS
from efficientformer.evaluation.distributed import Team
from efficientformer.evaluation.result import Evaluation
from efficientformer.evaluation.torch_predictor import use_threads
from efficientformer.reporting.page import require_libraries
from efficientformer.spec.errors import (
    EfficientFormerError,
    TrainingError,
    UsageError,
    reason_of,
)
from efficientformer.spec.manifest import Manifest
from efficientformer.training.allocator import freed_memory_kept
from efficientformer.training.lock import alone_in
from efficientformer.training.loop import OnMetrics, Run, Shell
from efficientformer.training.measure import evaluate_epoch, measure_best
from efficientformer.training.memory import memory_named
from efficientformer.training.norms import synchronise_norms
from efficientformer.training.optim import build_optimizer, hold_still
from efficientformer.training.processes import launch_of, make_accelerator, process_group, signals, threads_kept
from efficientformer.training.recipe import Recipe
from efficientformer.training.report import write_report
from efficientformer.training.setup import PlainNetwork, Prepared, build_task, prepare
from efficientformer.training.state import Launch, RunFolder
from efficientformer.training.subject import Subject
from efficientformer.training.task import AUTOCAST
from efficientformer.training.teacher import with_given
from efficientformer.training.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    teacher: nn.Module | None = None,
    workers: int | None = None,
    on_metrics: OnMetrics | None = None,
    device: str = "auto",
    quiet: bool = True,
    subject: Subject | None = None,
) -> Outcome:
    """Train a network, on one device or, under torchrun, on many.

    Args:
        recipe: How to train; the default one fine-tunes a published network.
        data: The data set: class folders, ImageNet, shards, MNIST, CIFAR, CSV.
        output: The run folder; by default a new one in ``runs/``.
        resume: A run folder to go on with, by its own recipe; ``data`` may say where its pictures are now.
        teacher: A network to learn from, in place of one that the recipe names: the student's pictures (B, C, h, w), as
            they are normalised for it, to logits (B, K) of its classes in their order. A copy is asked; a resumed run
            needs the same one again.
        workers: Worker processes instead of the recipe's; a resumed run keeps the new number. They change no result.
        on_metrics: Told each line of ``metrics.jsonl`` as it is written, in the first process. If it returns True the
            run saves and ends as after Ctrl-C.
        device: ``auto`` or ``cpu``.
        quiet: Say nothing on the terminal.
        subject: What is trained; by default the recipe's own network.

    Returns:
        The run folder and, of a finished run, its evaluation.

    Raises:
        UsageError: If the arguments do not go together, or the folder holds another run.
        SpecError: If ``workers`` is no legal number.
        DataError: If the data set is missing or does not fit.
        TrainingError: If training cannot go on; the message names the step, and the last good checkpoint stands.
        MissingExtraError: If a library of the train extra is missing.
    """
    require_libraries()
    _check_call(recipe, data, output, resume, teacher, device)
    subject = subject or PlainNetwork()
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    with process_group(), signals() as stop, freed_memory_kept() if on_cpu else nullcontext(), threads_kept():
        return _go(recipe, data, output, resume, teacher, workers, on_metrics, device, quiet, subject, stop)


def _go(
    recipe: Recipe | None,
    data: str | Path | None,
    output: str | Path | None,
    resume: str | Path | None,
    teacher: nn.Module | None,
    workers: int | None,
    on_metrics: OnMetrics | None,
    device: str,
    quiet: bool,
    subject: Subject,
    stop: threading.Event,
) -> Outcome:
    """Train; when this returns, nothing of the run holds the process group any more."""
    resumed = None if resume is None else RunFolder(Path(resume), subject.resume_command)
    if resumed is not None:
        note = resumed.data()
        recipe, path = resumed.recipe(), Path(note["path"] if data is None else data).absolute()
    else:
        note, recipe, path = {}, recipe or Recipe(), Path(str(data)).absolute()
        recipe = recipe if teacher is None else with_given(recipe, teacher)
    if workers is not None:
        recipe = recipe.with_changes(workers=workers)
    accelerator = make_accelerator(recipe, device)
    if accelerator.device.type == "cpu":
        use_threads(None)
    # noted: a resumed run goes on in the precision it began in, whatever the hardware it goes on with
    recipe = recipe.with_changes(precision=accelerator.mixed_precision.replace("no", "fp32"))
    manifest = None if resumed is None or resumed.fresh else Manifest.from_json(note["manifest"])
    rank, world = accelerator.process_index, accelerator.num_processes
    with memory_named("for the network and the pictures"):
        prepared = prepare(recipe, path, rank, world, manifest, subject)
        Team(rank, world).check_same(lambda: prepared.digest)
        if resumed is not None and note["digest"] != prepared.digest:
            raise UsageError(f"{path} holds other pictures than when this run began", hint="Start a new run")
        folder = resumed or _new_folder(output, prepared, path, accelerator)
        with _given_back(folder.path) if resumed is None and output is None else nullcontext():
            run = _assemble(prepared, folder, accelerator, stop, teacher)
        run.on_metrics = on_metrics
    with _taken_up(run, prepared, path, launch_of(accelerator, device), new=resumed is None, quiet=quiet), _named(run):
        return _train(run, prepared, path)


def _check_call(
    recipe: Recipe | None,
    data: str | Path | None,
    output: str | Path | None,
    resume: str | Path | None,
    teacher: nn.Module | None,
    device: str,
) -> None:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        hint = 'Put it below: if __name__ == "__main__":'
        raise UsageError("train() is called again while a worker process imports your script", hint=hint)
    _check_kinds(recipe, data, teacher)
    if device not in ("auto", "cpu"):
        hint = "auto takes the GPUs there are; CUDA_VISIBLE_DEVICES=0 chooses among them, torchrun spreads over several"
        raise UsageError("Illegal device", expected="auto or cpu", found=repr(device), hint=hint)
    if resume is None and data is None:
        raise UsageError("Nothing to train on", hint="Name a data set: --data DIR")
    if resume is not None and (recipe is not None or output is not None):
        hint = "Give resume alone, or with data that moved or another number of workers"
        raise UsageError("A resumed run keeps its recipe and folder", hint=hint)


def _check_kinds(recipe: object, data: object, teacher: object) -> None:
    """Raise UsageError for what other libraries' functions take first: a network's name, a data set in memory."""
    if not isinstance(recipe, Recipe | None):
        hint = f"Recipe(model={str(recipe)!r}) makes one of a network, load_recipe(FILE) reads one"
        if not isinstance(recipe, str | os.PathLike):
            hint = "Recipe(model=NAME) makes one, with whatever else is to be other than usual"
        raise UsageError("This is no recipe", expected="a Recipe", found=_kind(recipe), hint=hint)
    if not isinstance(data, str | os.PathLike | None):
        expected, hint = f"the path of a folder with {LAYOUTS}", "Give the folder that it reads"
        raise UsageError("This is no data set", expected=expected, found=_kind(data), hint=hint)
    if not isinstance(teacher, nn.Module | None):
        hint = "A teacher that has a name, or lies in a file, is the recipe's: recipe.with_changes(teacher=NAME)"
        raise UsageError("This is no teacher", expected="a torch module", found=_kind(teacher), hint=hint)


def _kind(value: object) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def _train(run: Run, prepared: Prepared, path: Path) -> Outcome:
    recipe, folder = run.recipe, run.folder.path
    processes = counted(run.accelerator.num_processes, "process", "processes")
    steps = f"{counted(recipe.epochs, 'epoch')} of {counted(run.steps_per_epoch, 'step')} of {recipe.batch_size}"
    run.watch.note(
        f"{prepared.manifest.provenance['model']}: {sum(p.numel() for p in run.model.parameters()):,} parameters; "
        f"{len(prepared.source):,} pictures for training, {len(prepared.val):,} for validation; {steps}; "
        f"{run.accelerator.device}, {recipe.precision}, {processes}, into {folder}"
    )
    if run.progress.step:
        total = recipe.epochs * run.steps_per_epoch
        left = "nothing is left to train" if run.progress.step >= total else f"of {total:,}"
        run.watch.note(f"Going on after step {run.progress.step:,}: {left}")
    finished = run.train()
    if not finished:
        run.watch.note(f"Stopped after step {run.progress.step}. Go on: {run.folder.resume_command}")
        return Outcome(folder, False, run.progress.step, None)
    evaluation = measure_best(run, prepared, path)
    if not run.accelerator.is_main_process:
        return Outcome(folder, True, run.progress.step, None)
    try:
        write_report(run.folder, recipe, evaluation, run.progress)
    except OSError as error:
        hint = f"The weights are complete. Once that is mended: {run.folder.resume_command}"
        raise TrainingError(
            f"The report of {folder} could not be written", found=reason_of(error), hint=hint
        ) from error
    run.watch.note(
        f"Best epoch {run.progress.best_epoch}: top-1 {evaluation.top1:.2f} %, loss {evaluation.loss:.4f}. "
        f"Report: {folder / 'report.html'}"
    )
    return Outcome(folder, True, run.progress.step, evaluation)


def _assemble(
    prepared: Prepared,
    folder: RunFolder,
    accelerator: Accelerator,
    stop: threading.Event,
    teacher: nn.Module | None = None,
) -> Run:
    """Put the parts of a run together."""
    from timm.utils.model_ema import ModelEmaV3

    recipe, model, device = prepared.recipe, prepared.model, accelerator.device
    if recipe.norm == "sync" and accelerator.num_processes > 1:
        synchronise_norms(model, device)
    still = hold_still(model, recipe)
    model.set_grad_checkpointing(recipe.grad_checkpointing)
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, recipe)
    average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    inner: Any = torch.compile(model) if recipe.compile else model
    shell, stepper = accelerator.prepare(Shell(inner), optimizer)
    dtype = AUTOCAST.get(accelerator.mixed_precision)
    task = build_task(recipe, prepared.manifest, prepared.source, device, dtype, teacher)
    task = prepared.subject.task(model, task, recipe.epochs * prepared.loader.plan.steps_per_epoch)
    return Run(recipe, model, shell, stepper, average, prepared.loader, task, accelerator, still, folder, stop)


@contextmanager
def _named(run: Run) -> Iterator[None]:
    """Turn what torch raises for want of memory, or of another process, into an error that says what to do.

    Raises:
        TrainingError: If there is not enough memory, or another process of the run no longer answers.
    """
    height, width = run.model.spec.input_size
    purpose = f"to train on {run.at_once} pictures of {width} x {height} pixels at once"
    try:
        with memory_named(purpose, run.folder.resume_command):
            yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):  # its source files
            raise
        hint = f"What it said last, above or in torchrun's --log-dir, tells why. {run.folder.way_on}"
        found = str(error).partition("\n")[0].partition(". ")[0]
        raise TrainingError("Another process of this run no longer answers", found=found, hint=hint) from error


@contextmanager
def _taken_up(run: Run, prepared: Prepared, path: Path, launch: Launch, *, new: bool, quiet: bool) -> Iterator[None]:
    """Keep other processes out of a run's folder, made if it is new, and bring the run to the step it stands at."""
    folder, is_main = run.folder.path, run.accelerator.is_main_process
    there = folder.is_dir()
    with ExitStack() as held:
        if is_main and there:
            held.enter_context(alone_in(folder))
        _take_up(run, prepared, path, launch, new=new, quiet=quiet)
        if is_main and not there:
            held.enter_context(alone_in(folder))
        held.callback(run.watch.close)
        try:
            yield
        except EfficientFormerError as error:  # the log may be all that is left to be seen
            run.watch.log(f"error: {error}")
            raise


def _take_up(run: Run, prepared: Prepared, path: Path, launch: Launch, *, new: bool, quiet: bool) -> None:
    """Bring a run to the step it stands at, make its folder if it is new, and open what tells how it goes."""
    accelerator, folder = run.accelerator, run.folder
    is_main = accelerator.is_main_process
    problem = [""]
    if is_main:
        try:
            if new:
                folder.create(run.recipe, {**prepared.describe_data(path), "launch": vars(launch)})
            else:  # an older version did not note the launch
                folder.tidy()
                folder.note(path=str(path), launch=folder.data().get("launch", vars(launch)))
                folder.note_workers(run.recipe.workers)
        except EfficientFormerError as error:
            problem = [str(error)]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(problem, 0)
    if problem[0]:
        raise UsageError(problem[0])
    if not new:
        run.progress = folder.load_state(run.parts)
        if is_main:
            folder.rewind_metrics(run.progress.step)
    total, first = run.recipe.epochs * run.steps_per_epoch, run.progress.step
    run.watch = Watch(folder.path if is_main else None, total, first, run.recipe.batch_size, quiet=quiet)
    run.evaluate = lambda network: evaluate_epoch(run, network, prepared)
    if not new and folder.fresh:
        run.watch.note("There is no checkpoint yet: the run begins again")
    if not new and folder.launch != launch:
        differ = "what the processes draw and BatchNorm's statistics may differ, and the memory it needs"
        run.watch.note(f"warning: begun as {folder.launch}, the run goes on as {launch}: {differ}")
    for note in prepared.notes if new else ():
        run.watch.note(note)


def _new_folder(output: str | Path | None, prepared: Prepared, data: Path, accelerator: Accelerator) -> RunFolder:
    """Return the folder that was asked for, or a new one in ``runs/``, named by the network and the data set.

    The new one is made at once: runs that begin at the same time get one each.
    """
    if output is not None:
        return RunFolder(Path(output), prepared.subject.resume_command)
    name = f"{Path(prepared.manifest.provenance['model']).stem}-{data.name}"
    chosen = [_made(Path("runs"), name) if accelerator.is_main_process else ""]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(chosen, 0)
    return RunFolder(Path(chosen[0]), prepared.subject.resume_command)


def _made(parent: Path, name: str) -> str:
    """Make the first folder that there is not yet of ``name``, ``name-2``, ``name-3`` ...; return it.

    If it cannot be made it is returned all the same: whoever writes into it says why.
    """
    for count in itertools.count(1):
        folder = parent / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
        except OSError:
            if os.path.lexists(folder):
                continue
        break
    return str(folder)


@contextmanager
def _given_back(folder: Path) -> Iterator[None]:
    """Remove a folder that is empty still if the block fails: the next run can have its name."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it holds something, or is not there yet
            folder.rmdir()
        raise
