"""A subject of a benchmark in a process of its own, which waits for its turn.

Engines keep threads that spin after a run and fight over cores: in one process, torch's threads made ONNX Runtime's
runs more than twice as slow. In processes of their own, subjects share nothing; one that waits for its turn is blocked
on a pipe and costs nothing. The protocol is one line of JSON each way, so a subject may live in another environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from efficientformer.runtime.timing import time_turn
from efficientformer.spec.errors import EfficientFormerError, EngineError

WARMUP = 5

Runs = Mapping[str, Callable[[], object]]
"""What a subject can be asked to do, by name; each call does all its work before it returns."""


class RefusedError(EngineError):
    """A subject cannot take part: its engine is missing, or has not what was asked for; the message is the reason."""


class Subject:
    """Starts a subject and gives it turns. A context manager: leaving it ends the process.

    Args:
        command: Program and arguments; it must call ``serve``.
        environment: Variables to set for it.

    Attributes:
        facts: What the subject says about itself.

    Raises:
        RefusedError: If the subject says that it cannot take part.
        EngineError: If it ends without saying why.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            answer = self._answer()
            if "refused" in answer:
                raise RefusedError(answer["refused"])
        except BaseException:
            self.close()
            raise
        self.facts: dict[str, Any] = answer["facts"]

    def turn(self, run: str, count: int, *, wake: bool = True) -> list[float]:
        """Let the subject pause, run once untimed (unless not to ``wake``) and then ``count`` times.

        Returns:
            The durations of the timed runs in seconds.
        """
        return [float(value) for value in self.ask(run=run, count=count, wake=wake)["seconds"]]

    def ask(self, **question: object) -> dict[str, Any]:
        """Send one question and wait for the answer.

        Raises:
            EngineError: If the process has ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says why
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        found = lines[-1][:300] if lines else "no message"
        raise EngineError(f"A benchmarked process ended with code {code}", expected="durations", found=found)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # the end of its questions is the end of its work
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def serve(prepare: Callable[[], tuple[dict[str, Any], Runs]], *, warmup: int = WARMUP) -> None:
    """Prepare a subject, warm it up, and run it whenever the parent says; the child's side of ``Subject``.

    Args:
        prepare: Returns what the subject says about itself, and what it can run. An ``EfficientFormerError`` or an
            ``ImportError`` in it means that the subject cannot take part.
        warmup: Runs of each before it says that it is ready.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        facts, runs = prepare()
        for run in runs.values():
            for _ in range(warmup):
                run()
    except (EfficientFormerError, ImportError) as error:
        answer(refused=str(error))
        return
    answer(facts={**facts, "runs": list(runs)})
    for line in sys.stdin:
        question = json.loads(line)
        seconds = time_turn(runs[question["run"]], question["count"], wake=question.get("wake", True))
        answer(seconds=seconds)
