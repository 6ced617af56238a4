"""Several processes, started by torchrun, share one evaluation; a single process needs no torch for that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

from efficientformer.evaluation.result import Evaluation
from efficientformer.spec.errors import DataError, UsageError, missing_extra

_NO_STEP = 0xFFFFFFF0  # Slurm numbers from here on what is no step of srun's: a batch script, an interactive shell


@dataclass(frozen=True)
class Team:
    """The processes of one run.

    Attributes:
        rank: Which of them this is.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks."""
        return self.rank == 0

    def merged(self, share: Evaluation) -> Evaluation:
        """Return the evaluation of all processes together, in every one of them."""
        if self.world == 1:
            return share
        from torch import distributed

        shares: list[Evaluation | None] = [None] * self.world
        distributed.all_gather_object(shares, share)
        return reduce(Evaluation.merge, [each for each in shares if each is not None])

    def check_same(self, digest: Callable[[], str]) -> None:
        """Check that all processes have the same pictures: each takes its share of them by number.

        Args:
            digest: Returns that of this process's pictures; not asked of a single one.

        Raises:
            DataError: If they have not, in every one of them.
        """
        if self.world == 1:
            return
        from torch import distributed

        digests: list[str | None] = [None] * self.world
        distributed.all_gather_object(digests, digest())
        if len(set(digests)) > 1:
            others = [str(rank) for rank, each in enumerate(digests) if each != digests[0]]
            raise DataError(
                "The processes have different pictures, or labels, under the name of this data set",
                expected="the same in each",
                found=f"others than in process 0 in {', '.join(others[:8])}",
                hint="Give every machine a whole copy, or all of them one folder",
            )

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process through before the others: what it downloads or builds is there for them."""
        if self.world > 1 and not self.first:
            self._meet()
        yield
        if self.world > 1 and self.first:
            self._meet()

    def _meet(self) -> None:
        from torch import distributed

        distributed.barrier()


@contextmanager
def join() -> Iterator[Team]:
    """Give the processes this one works with: what torchrun's environment says, or just itself.

    A process group that exists is used and kept; else one over gloo is made for the time being.

    Raises:
        UsageError: If the environment's numbers make no sense, or this is one of several processes that know nothing of
            each other.
        MissingExtraError: If there are several processes and torch is not installed.
    """
    rank, world = _number("RANK", 0), world_size()
    if not 0 <= rank < world:
        raise UsageError("RANK and WORLD_SIZE disagree", expected="0 <= RANK < WORLD_SIZE", found=f"{rank} of {world}")
    if world == 1:
        yield Team()
        return
    try:
        from torch import distributed
    except ImportError as error:
        raise missing_extra("torch", "Sharing the work among processes", error) from error
    if distributed.is_initialized():
        yield Team(distributed.get_rank(), distributed.get_world_size())
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        hint = "Start the processes with torchrun, or unset WORLD_SIZE"
        raise UsageError("The processes cannot find each other", found=f"no {' and no '.join(missing)}", hint=hint)
    distributed.init_process_group("gloo")
    try:
        yield Team(rank, world)
    finally:
        distributed.destroy_process_group()


def world_size() -> int:
    """Return how many processes work together, as torchrun's environment says; a single one without it.

    Raises:
        UsageError: If it is no number, or this is one of several processes that know nothing of each other.
    """
    if "WORLD_SIZE" in os.environ:
        return _number("WORLD_SIZE", 1)
    step = os.environ.get("SLURM_STEP_ID", "")
    in_step = step.isdecimal() and int(step) < _NO_STEP  # elsewhere in a job the tasks are yet to be started
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", *(["SLURM_NTASKS"] if in_step else [])):
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UsageError(
                f"Each of {count} processes would do all the work on its own: none knows of the others",
                found=f"{name}={count}, and no WORLD_SIZE",
                hint="Start them with torchrun, under Slurm one for each node: srun --ntasks-per-node 1 torchrun "
                f"--nproc-per-node N -m efficientformer ...; if it is meant so, unset {name}",
            )
    return 1


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise UsageError(f"Illegal {variable} in the environment", expected="a whole number", found=repr(text))
    return int(text) if text else default
