"""``shmipi call``: a function of yours as an interrupt of a running machine's CPU."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import os
import sys
import time
from types import ModuleType
from typing import Any

from shmipi.cli.options import count, duration, integer
from shmipi.errors import CommandError, RemoteCallError, ShmipiError

HELP = """\
Attaches to a running machine (`shmipi launch` keeps one up), interrupts one of its CPUs
with a function of yours, and prints the repr of what it returned, unless that is None.
The function of a FILE.py travels with its code; that of a MODULE is imported on the
CPU, which must find it. Arguments are Python literals ('(1, 2)', 3.5, None) where they
can be, else strings. What the function prints comes out where the machine was booted.
Exit status 1 when the function raised, with its traceback, or when the machine or CPU
is gone; 2 when there is no such function."""
EXAMPLE = """\
shmipi call lab 1 os:getpid
shmipi call lab 0 program.py:measure 1000 fast
shmipi call --repeat 10k lab 1 builtins:int
shmipi call --json --timeout 2s lab 1 platform:uname"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.usage = "%(prog)s [OPTIONS] NAME CPU FILE.py:FUNC | MODULE:FUNC [ARG ...]"
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, None too"
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        metavar="TIME",
        help="give up after TIME (default: wait for as long as it takes)",
    )
    parser.add_argument(
        "--repeat",
        type=count,
        metavar="N",
        help="call it N times; print the last result and what a round trip took",
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument(
        "cpu", type=integer(0, (1 << 31) - 1), metavar="CPU", help="its number"
    )
    parser.add_argument(
        "words",
        nargs=argparse.PARSER,
        metavar="FILE.py:FUNC | MODULE:FUNC [ARG ...]",
        help="what to call; everything behind it are its arguments",
    )


def run(args: argparse.Namespace) -> int:
    """Call it and print the result. ``CommandError``, or what ``Cluster`` raises."""
    from shmipi.cluster import Cluster

    target, *words = args.words
    function = _function(target)
    arguments = [_argument(word) for word in words]
    took: list[int] = []  # ns
    try:
        with Cluster.attach(args.name) as cluster:
            for _ in range(args.repeat or 1):
                start = time.perf_counter_ns()
                result = cluster.call(
                    args.cpu, function, *arguments, timeout=args.timeout
                )
                took.append(time.perf_counter_ns() - start)
    except RemoteCallError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            hint = (
                "the CPU imports modules as the machine's owner would; FILE.py travels"
            )
            raise CommandError(f"{error}\n{hint}") from None
        raise
    except ValueError as error:
        if isinstance(error, ShmipiError):
            raise
        raise CommandError(str(error), status=2) from None  # no name of a machine
    except ShmipiError:
        raise
    except Exception as error:  # it cannot be pickled, or not unpickled here
        raise CommandError(f"{type(error).__name__}: {error}") from None
    if args.json:
        try:
            shown = result if args.repeat is None else _timed(result, took)
            print(json.dumps(shown, allow_nan=False))  # NaN is no JSON
        except (TypeError, ValueError, RecursionError) as error:
            raise CommandError(f"the result is not for JSON: {error}") from None
    elif result is not None:
        try:
            text = repr(result)
        except Exception as error:  # the user's
            why = f"{type(error).__name__}: {error}"
            raise CommandError(f"the result has no repr: {why}") from None
        print(text)
    if args.repeat is not None and not args.json:
        print(_account(took))
    return 0


def _quantile(took: list[int], share: float) -> int:
    return sorted(took)[min(len(took) - 1, int(share * len(took)))]


def _timed(result: object, took: list[int]) -> dict[str, Any]:
    quantiles = {"min": 0.0, "p50": 0.5, "p99": 0.99, "max": 1.0}
    times = {name: _quantile(took, share) for name, share in quantiles.items()}
    return {"result": result, "calls": len(took), "rtt_ns": times}


def _account(took: list[int]) -> str:
    least, half, most_of, most = (
        f"{_quantile(took, share) / 1000:.1f}" for share in (0, 0.5, 0.99, 1)
    )
    return (
        f"{len(took)} calls, round trips in us: least {least}, median {half}, 99 % up"
        f" to {most_of}, most {most}"
    )


def _argument(word: str) -> object:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word


def _function(target: str) -> Any:
    """Return the function of ``FILE.py:FUNC`` or ``MODULE:FUNC``."""
    head, _, name = target.rpartition(":")
    if not head or not name:
        raise CommandError(
            f"{target!r} is neither FILE.py:FUNC nor MODULE:FUNC", status=2
        )
    found: Any = _file(head) if head.endswith(".py") or "/" in head else _module(head)
    for part in name.split("."):
        if not hasattr(found, part):
            raise CommandError(f"{head} has no function {name!r}", status=2)
        found = getattr(found, part)
    if not callable(found):
        raise CommandError(f"{name!r} of {head} is not a function", status=2)
    return found


def _module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # as for `python -m`
    if name.startswith("."):
        raise CommandError(f"{name!r} is no name of a module", status=2)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _broken(name, error) from None
        raise CommandError(f"there is no module {name!r}", status=2) from None
    except ValueError:
        raise CommandError(f"{name!r} is no name of a module", status=2) from None
    except (Exception, SystemExit) as error:
        raise _broken(name, error) from None


def _file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        raise CommandError(f"there is no file {path}", status=2)
    # Under a name that no CPU can import: so its functions travel by value.
    name = "__shmipi_call__"
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} is no Python file", status=2)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _broken(path, error) from None
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)
    return module


def _broken(what: str, error: BaseException) -> CommandError:
    return CommandError(f"{what} cannot be imported: {type(error).__name__}: {error}")
