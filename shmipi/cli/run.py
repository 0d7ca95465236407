"""``shmipi run``: a function of yours, as a task on every CPU of a new machine."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import inspect
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from shmipi.cli import Parser
from shmipi.cli.options import above_zero, add_machine_options, boot
from shmipi.cli.tagged import Tagger
from shmipi.cpumask import CpuMask
from shmipi.errors import (
    CommandError,
    CpuDiedError,
    CpusFailedError,
    ImportBootError,
    IpiTimeoutError,
    ShmipiError,
    TaskInterrupt,
)

if TYPE_CHECKING:
    from shmipi.cluster import Cluster

HELP = """\
Boots a machine and runs a function of yours as a task on every CPU: `main` of a file,
or the one that is named. Each CPU loads the file or module for itself. What follows
`--` are the function's arguments, strings all; sys.argv is what a script would see.
Results that are not None are printed in CPU order. When your code raises, its
traceback is printed once for all CPUs that raised it, and the exit status is 1; what it
gives to sys.exit is the exit status. Ctrl-C and --timeout interrupt it as Ctrl-C does a
program (KeyboardInterrupt); after a --timeout the exit status is 124."""
EXAMPLE = """\
shmipi run --cpus 4 program.py
shmipi run program.py:measure --idle halt -- 1000 fast
shmipi run os:getpid"""

_LATE_STATUS: Final = 124  # as timeout(1)
_JOIN_S: Final = 60.0
_SCRIPT: Final = "__shmipi_script__"  # for a file whose own name is another module's


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.usage = "%(prog)s [OPTIONS] FILE.py[:FUNC] | MODULE:FUNC [OPTIONS] [-- ARGS]"
    # The target and everything behind it, as it is: how argparse reads "--" and "*"
    # differs between versions of Python, and both lose words here.
    parser.add_argument(
        "words",
        nargs=argparse.PARSER,
        metavar="FILE.py[:FUNC] | MODULE:FUNC",
        help="what to run",
    )
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tag",
        action="store_true",
        help="begin each line that a CPU prints with its number; none is torn",
    )
    parser.add_argument(
        "--timeout",
        type=above_zero,
        metavar="TIME",
        help="interrupt it on the CPUs where it has not ended by then",
    )
    add_machine_options(parser)


@dataclass(frozen=True)
class Target:
    """What to run: a file by its ``path``, or a ``module``, and the function's name.

    ``folder`` and ``argv`` are what sys.path begins with and sys.argv is for it.
    """

    path: str | None
    module: str
    func: str
    folder: str
    argv: list[str]


def run(args: argparse.Namespace) -> int:
    """Run it; return 0, 1 when the user's code raised, or what it gave to sys.exit."""
    word, *rest = args.words
    arguments = _arguments(rest, args)
    target = _target(word, arguments)
    if not args.tag:
        return _report(_outcomes(args, target))
    with Tagger() as tagger:
        try:
            # The machine ends first: all that its CPUs printed is in their pipes then.
            outcomes = _outcomes(args, target, tagger)
        except KeyboardInterrupt:
            if tagger.error is None:
                raise
            outcomes = {}
    if tagger.error is not None:
        raise tagger.error
    return _report(outcomes)


def _outcomes(
    args: argparse.Namespace, target: Target, tagger: Tagger | None = None
) -> dict[int, Outcome]:
    with boot(args) as cluster:
        cpus = cluster.online_mask
        if tagger is not None:
            tagger.join(cluster, cpus, _JOIN_S)
        begun, left = time.monotonic(), args.timeout
        outcomes = _each(cluster, _load, target, cpus, left)
        if all(outcome.good for outcome in outcomes.values()):
            if left is not None:
                left = max(0.0, left - (time.monotonic() - begun))
            outcomes = _each(cluster, _call, target, cpus, left)
        return outcomes


# ---- what was asked for --------------------------------------------------------------


def _arguments(rest: list[str], args: argparse.Namespace) -> list[str]:
    """Return what is behind ``--``; parse options between the target and it."""
    cut = rest.index("--") if "--" in rest else len(rest)
    middle, arguments = rest[:cut], rest[cut + 1 :]
    if middle:
        parser = Parser(prog="shmipi run", description=HELP, example=EXAMPLE)
        parser.usage = "%(prog)s [OPTIONS] FILE.py[:FUNC] | MODULE:FUNC [-- ARGS]"
        _add_options(parser)
        _, strays = parser.parse_known_args(middle, args)
        if strays:
            parser.error(
                f"unrecognized arguments: {' '.join(strays)}: the function's own"
                " arguments go behind --"
            )
    return arguments


def _target(text: str, arguments: list[str]) -> Target:
    """Understand ``FILE.py[:FUNC]`` or ``MODULE:FUNC``; the file or module exists."""
    head, _, func = text.rpartition(":")
    if not head:
        head, func = text, ""
    if head.endswith(".py") or "/" in head:
        if not os.path.isfile(head):
            raise CommandError(f"there is no file {head}", status=2)
        path = os.path.abspath(head)
        folder, module = os.path.split(path)
        module = module.removesuffix(".py")
        return Target(path, module, func or "main", folder, [head, *arguments])
    if not func:
        raise CommandError(
            f"{text!r} is neither FILE.py nor FILE.py:FUNC nor MODULE:FUNC", status=2
        )
    origin = _origin(head)
    if origin is None:
        raise CommandError(f"there is no module {head!r}", status=2)
    return Target(None, head, func, os.getcwd(), [origin, *arguments])


def _origin(module: str) -> str | None:
    """Return a module's file, or its name if it has none; None: there is no module."""
    sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent is missing, or no such name can be
        spec = None
    finally:
        del sys.path[0]
    return None if spec is None else spec.origin or module


# ---- on the CPUs ---------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How it ended on a CPU.

    ``kind`` and ``text``: "result" and its repr, "nothing" (a result of None), "raised"
    and the traceback (with an OSError's errno as ``code``), "missing" and what is,
    "boots" and why it may not where it does, "exit" and its message with its ``code``,
    "output" when that cannot be written, with the errno as ``code``, "died" and how the
    CPU did, "late" when it was interrupted by the time-out.
    """

    kind: str
    text: str = ""
    code: int = 0

    @property
    def good(self) -> bool:
        """The user's code returned."""
        return self.kind in ("result", "nothing")


_loaded: ModuleType | None = None  # on a CPU: the user's module


def _load(target: Target) -> Outcome:
    """Task: import the file or module and look for the function."""

    def load() -> None:
        global _loaded
        # Only here, on the CPUs: what lies beside a file, its `random.py` say, must
        # not be taken for a module that the host or the firmware wants.
        sys.path.insert(0, target.folder)
        sys.argv[:] = target.argv
        _loaded = _module(target)
        _function(target)

    return _guarded(load)


def _call(target: Target) -> Outcome:
    """Task: call the function."""

    from shmipi.machine.remote import run_coroutine

    def call() -> str | None:
        result = _function(target)(*target.argv[1:])
        if inspect.iscoroutine(result):
            result = run_coroutine(result)
        return None if result is None else repr(result)

    return _guarded(call)


class _MissingError(Exception):
    """There is no such function."""


def _function(target: Target) -> Any:
    found: Any = _loaded
    where = target.path or target.module
    for name in target.func.split("."):
        if not hasattr(found, name):
            raise _MissingError(f"{where} has no function {target.func!r}")
        found = getattr(found, name)
    if not callable(found):
        raise _MissingError(f"{target.func!r} of {where} is not a function")
    return found


def _module(target: Target) -> ModuleType:
    """Import it; a file under its own name, so that its functions travel by name.

    Unless that name means something else here: a ``random.py`` must not become
    everybody's ``random``.
    """
    if target.path is None or _is_free(target.module, target.path):
        return import_module(target.module)
    loader = SourceFileLoader(_SCRIPT, target.path)
    spec = importlib.util.spec_from_file_location(_SCRIPT, target.path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_SCRIPT] = module
    loader.exec_module(module)
    return module


def _is_free(name: str, path: str) -> bool:
    if not name.isidentifier() or name in sys.modules:
        return False
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    origin = spec.origin if spec is not None else None
    return origin is not None and os.path.realpath(origin) == os.path.realpath(path)


def _guarded(work: Callable[[], str | None]) -> Outcome:
    """Run the user's code; whatever it raises becomes an outcome."""
    try:
        outcome = _outcome(work)
    except TaskInterrupt:  # that is for the host to tell
        _flush(1)
        _flush(2)
        raise
    # Before the host prints the results, which come after it.
    for code in (_flush(1), _flush(2)):
        if code and (outcome.good or (outcome.kind, outcome.code) == ("raised", code)):
            return Outcome("output", os.strerror(code), code)
    return outcome


def _flush(number: int) -> int:
    """Write out what was printed: 0, or the errno; from then on it is thrown away."""
    stream = sys.stdout if number == 1 else sys.stderr
    if stream is None:
        return 0  # it was closed when the host began
    try:
        stream.flush()
        os.write(number, b"")  # an unbuffered stream had nothing left to flush
        poller = select.poll()
        poller.register(number, 0)
        # Of a pipe: its reader is gone.
        code = errno.EPIPE if dict(poller.poll(0)).get(number) == select.POLLERR else 0
    except OSError as error:
        code = error.errno or errno.EIO
    if code:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
    return code


def _outcome(work: Callable[[], str | None]) -> Outcome:
    try:
        text = work()
        return Outcome("nothing") if text is None else Outcome("result", text)
    except TaskInterrupt:
        raise
    except _MissingError as error:
        return Outcome("missing", str(error))
    except ImportBootError as error:
        return Outcome("boots", str(error))
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return Outcome("exit", "", (stop.code or 0) & 0xFF)
        return Outcome("exit", str(stop.code), 1)
    except BaseException as error:
        trace = _users_part(error.__traceback__)
        lines = traceback.format_exception(error.with_traceback(trace))
        code = (error.errno or 0) if isinstance(error, OSError) else 0
        return Outcome("raised", "".join(lines), code)


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames of this file and of the import system in front."""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        ours = file == __file__ or file.startswith("<frozen importlib")
        if not (ours or file == importlib.__file__):
            break
        trace = trace.tb_next
    return trace


# ---- on the host ---------------------------------------------------------------------


def _each(
    cluster: Cluster,
    task: Callable[[Target], Outcome],
    target: Target,
    cpus: CpuMask,
    timeout: float | None,
) -> dict[int, Outcome]:
    """Run a task of ours on all CPUs; a CPU that dies of it is an outcome too."""
    try:
        results = cluster.run(task, target, cpus=cpus, timeout=timeout)
        return dict(zip(cpus, results, strict=True))
    except IpiTimeoutError as error:
        outcomes = dict.fromkeys(cpus, Outcome("late", "", _LATE_STATUS))
        if error.__cause__ is not None:
            outcomes |= _deaths(cluster, error.__cause__)
        return outcomes | dict(error.results or {})
    except (ShmipiError, CpusFailedError) as error:
        outcomes = _deaths(cluster, error) | dict(error.results or {})
        return {cpu: outcomes[cpu] for cpu in cpus}


def _deaths(cluster: Cluster, error: Any) -> dict[int, Outcome]:
    """Return what became of the CPUs that died of it. ``CommandError`` for the rest."""
    failures: tuple[Any, ...] = (error,)
    if isinstance(error, CpusFailedError):
        failures = error.exceptions
    strange = [each for each in failures if not isinstance(each, CpuDiedError)]
    if strange:
        words = sorted({str(each) for each in strange})
        raise CommandError("; ".join(words)) from None
    return {each.cpu: _death(cluster, each) for each in failures}


def _death(cluster: Cluster, error: Any) -> Outcome:
    from shmipi.machine.ending import ending

    return Outcome("died", ending(cluster._machine.ended(error.cpu)) or str(error), 1)


def _report(outcomes: dict[int, Outcome]) -> int:
    """Print results in CPU order, and each different failure once."""
    for cpu, outcome in outcomes.items():
        if outcome.kind == "result":
            print(f"CPU {cpu}: {outcome.text}")
    sys.stdout.flush()
    failures: dict[Outcome, list[int]] = {}
    for cpu, outcome in outcomes.items():
        if not outcome.good:
            failures.setdefault(outcome, []).append(cpu)
    status = 0
    for outcome, cpus in failures.items():
        if outcome.kind == "missing":
            raise CommandError(outcome.text, status=2)
        if outcome.kind == "boots":
            raise CommandError(outcome.text)
        if outcome.kind == "output":
            raise OSError(outcome.code, outcome.text)
        where = f"CPU{'' if len(cpus) == 1 else 's'} {CpuMask(cpus)}"
        if outcome.kind == "raised":
            print(f"{where} raised:\n{outcome.text}", end="", file=sys.stderr)
            status = max(status, 1)
        elif outcome.kind in ("died", "late"):
            words = f"died: {outcome.text}" if outcome.text else "did not end in time"
            print(f"shmipi run: {where} {words}", file=sys.stderr)
            status = max(status, outcome.code)
        else:
            if outcome.text:
                print(outcome.text, file=sys.stderr)
            status = max(status, outcome.code)
    return status
