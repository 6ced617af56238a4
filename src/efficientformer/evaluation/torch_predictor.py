"""A torch network as a predictor: arrays in, arrays out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from efficientformer.runtime.engines import failed_run, settle_precision
from efficientformer.runtime.processor import available_cores, computes_in
from efficientformer.spec.errors import UsageError
from efficientformer.spec.fields import check_choice
from efficientformer.spec.manifest import Manifest

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class TorchPredictor:
    """Runs a network in evaluation mode and leaves it in the mode it was in.

    Args:
        model: The network: images (B, C, H, W) to logits (B, num_classes). It is moved to the device.
        manifest: What the network is.
        device: ``auto`` takes a GPU if there is one (under torchrun, the process's own), else the CPU; or a torch
            device such as ``cpu`` or ``cuda:1``.
        precision: ``fp32`` or ``auto`` (in full: no TF32), or autocast to ``bf16`` or ``fp16``, on a CPU only where it
            computes in it: torch would emulate it for minutes.
        compiled: Compile the network when it first runs, for each batch size (tens of seconds); on a GPU its kernels
            are also recorded as a CUDA graph.

    Raises:
        UsageError: If there is no such precision or device.
        PrecisionError: If this processor does not compute in that precision.
    """

    key = "torch"
    streams = 1  # torch's threads, or the GPU, serve one caller at a time

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        device: str = "auto",
        precision: str = "fp32",
        *,
        compiled: bool = False,
    ) -> None:
        check_choice("precision", precision, PRECISIONS)
        self.manifest = manifest
        self.device = _device(device)
        try:
            self._model = model.to(self.device)  # its memory layout stays: a network in training is not ours to change
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA is asked for it
            found = str(error).strip().splitlines()[0]
            raise UsageError(f"Cannot use the device {device!r}", expected="a device torch has", found=found) from error
        halves = (each for each in ("bf16", "fp16") if self.device.type != "cpu" or computes_in(each))
        self.precision = settle_precision(precision, manifest, ("fp32", *halves), "torch")
        self._compiled = compiled
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self._model
        if compiled:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._forward = torch.compile(self._model, mode=mode)
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.name = f"torch {torch.__version__} ({self.device}, {self.precision}{', compiled' if compiled else ''})"

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits (N, num_classes) in float32 for preprocessed images (N, C, H, W).

        Raises:
            EngineError: If torch fails.
        """
        try:
            return self._run(batch)
        except RuntimeError as error:
            said = str(error).partition("\n\n")[0][:300]  # the rest is for who debugs torch
            raise failed_run(self.name, batch.shape, said, self._hint(said)) from error

    def _hint(self, said: str) -> str:
        if "memory" in said:
            return "Lower the batch size"
        return "Compiling needs a C++ compiler, on a GPU also Triton; --engine torch does not" if self._compiled else ""

    def _run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self._model))
            stack.enter_context(torch.inference_mode())
            if self._dtype is not None:
                stack.enter_context(torch.autocast(self.device.type, self._dtype))
            elif self.device.type == "cuda":
                stack.enter_context(_full_precision())
            images = torch.from_numpy(batch).to(self.device, memory_format=torch.channels_last)
            logits: npt.NDArray[np.float32] = self._forward(images).float().cpu().numpy()
            return logits

    def for_many(self) -> TorchPredictor:
        """Return itself."""
        return self


def use_threads(threads: int | None) -> None:
    """Have torch compute on so many threads; None leaves it its own, as far as this process may use them.

    Torch does not know a container's quota, and more threads than it allows slow each other down.
    """
    torch.set_num_threads(threads or min(torch.get_num_threads(), available_cores()))


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(f"Unknown device {wanted!r}", expected="auto, cpu, cuda, cuda:1, ...") from error
    shared = wanted == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available()
    return _device("auto") if shared else device  # each of several processes has its own


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and afterwards each back into its own: parts may have been frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep matrix products and convolutions from TF32, which torch allows in convolutions unless told otherwise."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]  # set at run time
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
