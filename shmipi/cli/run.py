"""``shmipi run``: a function of yours, as a task on every CPU of a new machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any, Final

from shmipi.cli import Parser
from shmipi.cli.options import add_machine_options, boot
from shmipi.cpumask import CpuMask
from shmipi.errors import CommandError, ShmipiError

HELP = """\
Boots a machine and runs a function of yours as a task on every CPU: `main` of a file, or
the one that is named. Each CPU loads the file or module for itself; what follows `--` are
the function's arguments, strings all, and sys.argv is what a script would see. Results
that are not None are printed in CPU order. Exit status 1: your code raised (or said so
with sys.exit); its traceback is printed once for all CPUs that raised it."""
EXAMPLE = """\
shmipi run --cpus 4 program.py
shmipi run program.py:measure --idle halt -- 1000 fast
shmipi run os:getpid"""

_SCRIPT: Final = "__shmipi_script__"  # for a file whose own name is another module's


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.usage = "%(prog)s [OPTIONS] FILE.py[:FUNC] | MODULE:FUNC [OPTIONS] [-- ARGS]"
    parser.add_argument(
        "target", metavar="FILE.py[:FUNC] | MODULE:FUNC", help="what to run"
    )
    # Not "*": argparse lets that match nothing when an option follows the target.
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    add_machine_options(parser)


@dataclass(frozen=True)
class Target:
    """What to run: ``path`` of a file or the name of a ``module``, and a function's."""

    text: str
    path: str | None
    module: str
    func: str


def run(args: argparse.Namespace) -> int:
    """Run it; return 0, or 1 (or what sys.exit was given) when the user's code failed."""
    arguments = _split(args)
    target = _target(args.target)
    sys.argv[:] = [target.path or _origin(target.module), *arguments]
    with boot(args) as cluster:
        cpus = cluster.online_mask
        outcomes = _each(cluster, _load, target, cpus)
        if all(outcome.kind == "result" for outcome in outcomes.values()):
            outcomes = _each(cluster, _call, target, cpus, *arguments)
    return _report(outcomes)


# ---- what was asked for ------------------------------------------------------------------


def _split(args: argparse.Namespace) -> list[str]:
    """Return the function's arguments; parse options between the target and ``--``."""
    rest: list[str] = args.rest
    middle, arguments = rest, []
    if "--" in rest:
        cut = rest.index("--")
        middle, arguments = rest[:cut], rest[cut + 1 :]
    if middle:
        parser = Parser(prog="shmipi run", description=HELP, example=EXAMPLE)
        parser.usage = "%(prog)s [OPTIONS] FILE.py[:FUNC] | MODULE:FUNC [-- ARGS]"
        add_machine_options(parser)
        _, strays = parser.parse_known_args(middle, args)
        if strays:
            parser.error(
                f"unrecognized arguments: {' '.join(strays)}: the function's own"
                " arguments go behind --"
            )
    return arguments


def _target(text: str) -> Target:
    """Understand ``FILE.py[:FUNC]`` or ``MODULE:FUNC``; make it importable on CPUs."""
    head, _, func = text.rpartition(":")
    if not head:
        head, func = text, ""
    if head.endswith(".py") or "/" in head:
        path = os.path.abspath(head)
        if not os.path.isfile(path):
            raise CommandError(f"there is no file {head}", status=2)
        # As for a script: what lies beside it can be imported.
        sys.path.insert(0, os.path.dirname(path))
        name = os.path.basename(path).removesuffix(".py")
        return Target(text, path, _module_name(name, path), func or "main")
    if not func:
        raise CommandError(
            f"{text!r} is neither FILE.py nor FILE.py:FUNC nor MODULE:FUNC", status=2
        )
    sys.path.insert(0, os.getcwd())
    if _origin(head) is None:
        raise CommandError(f"there is no module {head!r}", status=2)
    return Target(text, None, head, func)


def _module_name(name: str, path: str) -> str:
    """Return the name under which CPUs import a file.

    Its own, so that its functions travel between CPUs by name, unless that name means
    something else here: a ``random.py`` must not become everybody's ``random``.
    """
    if name.isidentifier() and name not in sys.modules:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is not None and spec.origin and os.path.samefile(spec.origin, path):
            return name
    return _SCRIPT


def _origin(module: str) -> Any:
    """Return the file of a module, its name if it has none, None if it does not exist."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent is missing, or no such name can be
        return None
    return None if spec is None else spec.origin or module


# ---- on the CPUs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How it ended on a CPU: result (repr), raised (traceback), missing, exit (code)."""

    kind: str
    text: str = ""
    code: int = 0


def _load(target: Target) -> Outcome:
    """Task: import the file or module and look for the function."""
    return _guarded(lambda: _find(target))


def _find(target: Target) -> None:
    found: Any = _module(target)
    for name in target.func.split("."):
        found = getattr(found, name, _missing)
    if found is _missing:
        raise _Missing(f"{target.path or target.module} has no function {target.func!r}")
    if not callable(found):
        raise _Missing(f"{target.func!r} of {target.path or target.module} is no function")


def _call(target: Target, *arguments: str) -> Outcome:
    """Task: call the function."""

    def call() -> str | None:
        function: Any = sys.modules[target.module]
        for name in target.func.split("."):
            function = getattr(function, name)
        result = function(*arguments)
        return None if result is None else repr(result)

    return _guarded(call)


class _Missing(Exception):
    """There is no such function."""


_missing: Final = object()


def _module(target: Target) -> ModuleType:
    if target.path is None or target.module != _SCRIPT:
        return import_module(target.module)
    spec = importlib.util.spec_from_file_location(_SCRIPT, target.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_SCRIPT] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_SCRIPT]
        raise
    return module


def _guarded(work: Callable[[], str | None]) -> Outcome:
    """Run the user's code; whatever it raises becomes an outcome."""
    try:
        text = work()
        return Outcome("result", "" if text is None else text, text is not None)
    except _Missing as error:
        return Outcome("missing", str(error))
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return Outcome("exit", "", (stop.code or 0) & 0xFF)
        return Outcome("exit", str(stop.code), 1)
    except BaseException as error:
        trace = _users_part(error.__traceback__)
        return Outcome(
            "raised", "".join(traceback.format_exception(error.with_traceback(trace)))
        )
    finally:
        # Before the host prints the results, which come after it.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames of this file and of the import system in front."""
    while trace is not None and trace.tb_next is not None:
        file = trace.tb_frame.f_code.co_filename
        ours = file == __file__ or file.startswith("<frozen importlib")
        if not (ours or file == importlib.__file__):
            break
        trace = trace.tb_next
    return trace


# ---- on the host -------------------------------------------------------------------------


def _each(
    cluster: Any, task: Callable[..., Outcome], target: Target, cpus: CpuMask, *args: str
) -> dict[int, Outcome]:
    """Run a task of ours on all CPUs; a CPU that dies of it is an outcome too."""
    try:
        results = cluster.run(task, target, *args, cpus=cpus)
    except* ShmipiError as group:
        raise CommandError("; ".join(sorted(set(_messages(group))))) from None
    return dict(zip(cpus, results, strict=True))


def _messages(group: BaseExceptionGroup[Any]) -> Iterable[str]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _messages(error)
        else:
            yield str(error)


def _report(outcomes: dict[int, Outcome]) -> int:
    """Print results in CPU order, and each different failure once."""
    for cpu, outcome in outcomes.items():
        if outcome.kind == "result" and outcome.code:
            print(f"CPU {cpu}: {outcome.text}")
    sys.stdout.flush()
    failures: dict[Outcome, list[int]] = {}
    for cpu, outcome in outcomes.items():
        if outcome.kind != "result":
            failures.setdefault(outcome, []).append(cpu)
    status = 0
    for outcome, cpus in failures.items():
        if outcome.kind == "missing":
            raise CommandError(outcome.text, status=2)
        where = f"CPU{'' if len(cpus) == 1 else 's'} {CpuMask(cpus)}"
        if outcome.kind == "raised":
            print(f"{where} raised:\n{outcome.text}", end="", file=sys.stderr)
            status = max(status, 1)
        else:
            if outcome.text:
                print(outcome.text, file=sys.stderr)
            status = max(status, outcome.code)
    return status
