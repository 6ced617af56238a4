"""The devices and processes of a run, and the signals that ask it to end."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from efficientformer.evaluation.distributed import world_size
from efficientformer.spec.errors import UsageError, missing_extra
from efficientformer.training.recipe import Recipe
from efficientformer.training.state import Launch

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(recipe: Recipe, device: str) -> Accelerator:
    """Return Accelerate's hold on the devices, in the recipe's precision.

    Raises:
        UsageError: If the processes of a run do not find each other, or know nothing of each other.
        MissingExtraError: If accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise missing_extra("train", "Training", error) from error
    # Accelerate keeps device and precision for the life of the process; this run may want others than the one before
    AcceleratorState._reset_state(reset_partial_state=True)
    world = world_size()
    on_cpu = device == "cpu" or (world > 1 and not torch.cuda.is_available())  # else each would train on its own
    accelerator = Accelerator(mixed_precision=mixed_precision(recipe, device), cpu=on_cpu)
    if accelerator.num_processes != world:
        raise UsageError(
            "The processes do not find each other",
            expected=f"{world}, as WORLD_SIZE says",
            found=f"{accelerator.num_processes}",
            hint="Start them with torchrun, also under Slurm: srun ... torchrun ...",
        )
    return accelerator


def launch_of(accelerator: Accelerator, device: str) -> Launch:
    """Return how the processes were started, for the command that goes on with the run."""
    world = accelerator.num_processes
    return Launch(world, max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world))), device)


def mixed_precision(recipe: Recipe, device: str) -> str:
    """Return Accelerate's name of the recipe's precision; bf16 by itself only where the hardware computes in it."""
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if recipe.precision == "fp16" and not on_gpu:
        raise UsageError("fp16 is for GPUs", hint="Set precision to bf16 or fp32")
    if recipe.precision != "auto":
        return "no" if recipe.precision == "fp32" else recipe.precision
    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, name, lambda: False)() for name in names) else "no"


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the process group that Accelerate makes under torchrun (nccl on GPUs, gloo on CPUs), if it made one."""
    before = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if torch.distributed.is_initialized() and not before:
            gc.collect()  # a group that is still held keeps its threads, which can abort the process as Python ends
            torch.distributed.destroy_process_group()


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into a wish that is looked at between steps; a second Ctrl-C ends at once."""
    asked = threading.Event()

    def ask(number: int, _: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        sys.stderr.write("\nStopping after this step; Ctrl-C once more ends at once\n")

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            if handler is not None:  # as it is where a host that embeds Python set its own
                signal.signal(number, handler)


@contextmanager
def threads_kept() -> Iterator[None]:
    """Give torch as many threads afterwards as it had before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
