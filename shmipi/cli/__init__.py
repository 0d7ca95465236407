"""The ``shmipi`` command: finds the subcommand, runs it, reports what went wrong.

Each subcommand is a module of this package (see ``Command``) that is imported only when
it is asked for, so that ``shmipi --help`` costs an import of argparse and no more.
Exit statuses: 0 good, 1 the run found errors, 2 wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, cast

from shmipi.errors import CommandError, ShmipiError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["COMMANDS", "Command", "Parser", "main"]

#: Every subcommand with the line that stands for it in ``shmipi --help``.
COMMANDS: Final = {
    "demo": "boot a machine, make each kind of call, print its latencies",
    "launch": "boot a machine and keep it up until Ctrl-C",
    "ps": "list the machines on this computer and their CPUs",
    "clean": "remove what dead machines left behind, never a live one",
    "top": "show, live, what each CPU of a machine does, and its interrupts a second",
    "interrupts": "show a machine's interrupt counts as /proc/interrupts does",
    "backtrace": "show the stack of every CPU of a running machine",
    "crash": "read a crash dump: who waited for whom when a CPU died",
    "explain": "make one call and show the functions it passed, and their times",
    "trace": "record a machine's IPIs, or this kernel's, and follow each",
    "replay": "play a kernel's recorded IPIs on a machine of as many CPUs",
    "run": "run a function of yours on every CPU of a new machine",
    "call": "interrupt a CPU of a running machine with a function of yours",
    "stress": "torture a machine with calls of every kind and account for each",
    "bench": "measure latency, throughput, boot time, and the limits beside them",
    "compare": "say what changed between two runs of a bench, and whether by chance",
    "check": "say why a run of a bench is not to be trusted",
    "report": "make one page of what benches found, with pictures, to read or print",
    "doctor": "say what on this computer distorts results or limits size",
}

_SIGINT_STATUS: Final = 130
_SIGPIPE_STATUS: Final = 141  # what a shell shows for a program that SIGPIPE ended


class Command(Protocol):
    """What the module of a subcommand has."""

    #: What the command does, a sentence or a few.
    HELP: str
    #: One or more command lines that work as they stand.
    EXAMPLE: str

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to its parser."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit status."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, examples, and no abbreviations.

    ``add_subparsers().add_parser(name, help=..., example=...)`` makes others like it.
    """

    def __init__(
        self, *, description: str = "", example: str = "", **kwargs: Any
    ) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )
        self.describe(description, example)

    def describe(self, description: str, example: str) -> None:
        """Say what stands above and below the options in ``--help``."""
        lines = [f"  {line.strip()}" for line in example.strip().splitlines()]
        title = "examples" if len(lines) > 1 else "example"
        self.description = description or None
        self.epilog = "\n".join([f"{title}:", *lines]) if lines else None

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print it; unlike argparse, say so when that is not possible."""
        (sys.stdout if file is None else file).write(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        one_line = " ".join(message.split())
        self.exit(2, f"{self.prog}: {one_line} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    prog = f"shmipi {name}".rstrip()
    _open_standard_files()
    try:
        status = _run(name, arguments)
        _flush()
    except KeyboardInterrupt:
        # One that comes while a dataclass is made, text that is executed, would end
        # `python -m shmipi` by SIGINT at its exit, though it is caught; but for this
        # (CPython: unhandled_keyboard_interrupt in run_eval_code_obj and Py_RunMain).
        exec("")
        _complain(prog, "interrupted")
        status = _SIGINT_STATUS
    except BrokenPipeError:
        status = _SIGPIPE_STATUS
    except CommandError as error:
        _complain(prog, str(error))
        status = error.status
    except ShmipiError as error:
        _complain(prog, str(error) or type(error).__name__)
        status = 1
    except OSError as error:
        _complain(prog, _os_error(error))
        status = 1
    _forget_what_cannot_be_written()
    return status


def _run(name: str, arguments: list[str]) -> int:
    try:
        return _command(name, arguments)
    except SystemExit as stop:  # argparse, after --help or a usage error
        return _status(stop)


def _command(name: str, arguments: list[str]) -> int:
    if not name:
        return _without_command(arguments)
    command = _load(name)
    parser = Parser(
        prog=f"shmipi {name}", description=command.HELP, example=command.EXAMPLE
    )
    command.prepare_parser(parser)
    return command.run(parser.parse_args(arguments[1:]))


def _load(name: str) -> Command:
    try:
        return cast(Command, import_module(f"shmipi.cli.{name}"))
    except ModuleNotFoundError as error:
        if error.name != "shmipi._core":
            raise
        raise CommandError(
            "its C core is not built for this Python: run `pip install .` in the"
            " source directory, or scripts/run"
        ) from None


def _without_command(arguments: list[str]) -> int:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {line}" for name, line in COMMANDS.items())
    parser = Parser(
        prog="shmipi",
        description="A machine made of processes: emulated CPUs that interrupt each"
        f" other\nthrough shared memory.\n\ncommands:\n{listing}",
        usage="shmipi [--help] [--version] COMMAND [ARGUMENTS]",
        example="shmipi demo\nshmipi bench latency --help",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args(arguments)
    if args.version:
        from shmipi import __version__

        print(f"shmipi {__version__}")
        return 0
    if args.command is None and not arguments:
        parser.print_help()
        return 0
    if args.command in COMMANDS or args.command is None:
        stray = next(word for word in arguments if word != args.command)
        parser.error(f"unrecognized option: {stray}")
    parser.error(f"there is no command {args.command!r}{_suggest(args.command)}")


def _suggest(word: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, COMMANDS, n=1)
    if near:
        return f": did you mean {near[0]!r}?"
    return f"; it is one of {', '.join(COMMANDS)}"


def _status(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _os_error(error: OSError) -> str:
    text = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {text}" if error.filename is not None else text


def _complain(prog: str, message: str) -> None:
    """Print a message for a person; standard error may be closed too."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{prog}: {message}", file=sys.stderr, flush=True)


def _open_standard_files() -> None:
    """Give /dev/null to standard files that the caller closed.

    Else the next file that is opened, perhaps a machine's memory, is "standard output",
    and what a CPU prints goes there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _flush() -> None:
    """Write out what was printed, while an error can still be reported."""
    sys.stdout.flush()


def _forget_what_cannot_be_written() -> None:
    """Give the interpreter's last flush somewhere to go, or it complains at exit."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)
