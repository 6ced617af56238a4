"""Too little memory, however torch or numpy put it, as one error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from efficientformer.spec.errors import EngineError, TrainingError

# What a GPU, a processor, numpy, C++ and NVIDIA's libraries say; torch raises most of it as a plain RuntimeError.
_WORDS = ("out of memory", "can't allocate memory", "Unable to allocate", "bad_alloc", "ALLOC_FAILED")


@contextmanager
def memory_named(purpose: str, command: str = "") -> Iterator[None]:
    """Turn what a device or a machine that is too small raises into an error that says what to do.

    Args:
        purpose: What the memory is for.
        command: The command that goes on with the run; empty where nothing was begun.

    Raises:
        TrainingError: If there is not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError, EngineError) as error:
        lines = (error.found if isinstance(error, EngineError) else str(error)).splitlines()
        said = next((line for line in lines if any(word in line for word in _WORDS)), "")
        if not said and not isinstance(error, MemoryError):
            raise
        hint = ("Is something else using it? If not, start a new run with a smaller batch_size or input_size, with "
                "accumulate raised, which cuts a batch into parts, or with grad_checkpointing")  # fmt: skip
        later = f"; if so, go on when it is done: {command}" if command else ""
        raise TrainingError(
            f"The device has not enough memory {purpose}", found=said[:200], hint=hint + later
        ) from error
