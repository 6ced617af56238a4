"""The command line: one file per verb; each verb imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import threading
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from efficientformer.cli.benchmark import benchmark
from efficientformer.cli.convert import convert
from efficientformer.cli.data import data_app
from efficientformer.cli.download import download
from efficientformer.cli.info import info
from efficientformer.cli.latency_table import latency_table
from efficientformer.cli.listing import list_
from efficientformer.cli.predict import predict
from efficientformer.cli.profile import profile
from efficientformer.cli.quantize import quantize
from efficientformer.cli.slim import slim
from efficientformer.cli.test import test
from efficientformer.cli.train import train
from efficientformer.spec.errors import EfficientFormerError, UsageError

INTERRUPTED = 130  # what typer makes of Ctrl-C
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says of a disk or a file that takes no more


class _Verbs(TyperGroup):
    """The verbs; other libraries' words for them lead to ours."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 (of the click that typer carries)
        """Find a verb.

        Raises:
            UsageError: If it is another library's word for one.
        """
        if args[0] not in self.commands:
            from efficientformer.spec.habits import COMMANDS, pointer

            if hint := pointer(COMMANDS, args[0]):
                raise UsageError(f"There is no command {args[0]!r}", hint=hint)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="efficientformer",
    cls=_Verbs,
    help="EfficientFormer: vision transformers at MobileNet speed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from efficientformer import __version__

        typer.echo(f"efficientformer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for _name, _verb in (
    ("predict", predict),
    ("test", test),
    ("benchmark", benchmark),
    ("list", list_),
    ("info", info),
    ("convert", convert),
    ("quantize", quantize),
    ("train", train),
    ("slim", slim),
    ("download", download),
    ("profile", profile),
    ("latency-table", latency_table),
):
    app.command(_name)(_verb)
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line; what a user can cause ends with one message and an exit code, not with a traceback."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text in any encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            if sys.stdout:  # None where it was closed
                sys.stdout.flush()  # here a full disk can still be told of
    except EfficientFormerError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _leave_at_once()
        raise
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _drop_output()
        sys.exit(1)
    except OSError as error:
        refused = isinstance(error, PermissionError) and error.filename is not None
        if not refused and error.errno not in FULL:
            raise
        _drop_output()
        what = "access" if refused else "write"
        _print_error(f"Cannot {what} {error.filename or 'the output'}: {error.strerror}")
        sys.exit(1)


def _print_error(text: str) -> None:
    _tell(f"error: {text}", "red")


def _tell(text: str, colour: str) -> None:
    """Print lines on standard error; what they quote from files and servers moves no cursor."""
    from efficientformer.spec.text import printable

    typer.secho("\n".join(map(printable, text.split("\n"))), fg=colour, err=True)


def _drop_output() -> None:
    """Send what is not yet written nowhere: the interpreter writes it again as it ends, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_at_once() -> None:
    """Exit after Ctrl-C if threads wait for pictures: an ordinary exit waits for them, however slow a server is."""
    from efficientformer.runtime.pipeline import THREADS

    if any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(INTERRUPTED)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _tell(f"warning: {message}", "yellow")


if __name__ == "__main__":
    main()
