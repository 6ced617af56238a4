"""Too little memory, in the words of torch, numpy and C++."""

import pytest
import torch

from efficientformer.spec.errors import EngineError, TrainingError
from efficientformer.training.memory import memory_named


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 GiB"),
        RuntimeError("Caught in a worker\n  File x\nArrayMemoryError: Unable to allocate 9 GiB for an array"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED (9 GiB)"),
        MemoryError("9 GiB"),
        EngineError("torch cannot run a batch", found="CUDA out of memory (9 GiB)"),
    ],
)
def test_every_lack_of_memory_says_what_to_do(error):
    with pytest.raises(TrainingError) as caught, memory_named("for the test", "go on"):
        raise error
    assert caught.value.problem == "The device has not enough memory for the test"
    assert ("9 GiB" in caught.value.found) == (type(error) is not MemoryError)
    assert "\n" not in caught.value.found
    assert caught.value.hint.endswith(": go on")


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), EngineError("answers with no numbers")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, memory_named("for the test"):
        raise error
    assert caught.value is error
