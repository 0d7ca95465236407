"""Options and parsers that commands share. Imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TextIO

from shmipi.cpumask import CpuMask
from shmipi.errors import (
    CommandError,
    ControllerError,
    DeviceTreeError,
    ShmipiError,
)
from shmipi.names import CONTROLLERS, DOORBELLS, IDLE_POLICIES

if TYPE_CHECKING:
    from pathlib import Path

    from shmipi.cluster import Cluster
    from shmipi.irq.chips import Chip

__all__ = [
    "above_zero",
    "add_attach_option",
    "add_json_option",
    "add_machine_options",
    "attached",
    "boot",
    "controller",
    "core_list",
    "count",
    "cpu_mask",
    "document",
    "duration",
    "human_stream",
    "integer",
    "kick",
    "load_controller",
    "machine_kwargs",
    "output_path",
    "save_json",
    "usage_errors",
    "write_json",
]

_UNITS: Final = {
    "": 1.0,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
}
_SCALES: Final = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
_MAX_SECONDS: Final = 365 * 24 * 3600.0


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a parser (argparse's ``type``) of integers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        # Longer strings of digits are no number that anybody means, and int() has a
        # limit of its own; it also takes what nobody writes, such as "1_0" and " 1".
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number")
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large: at most {most}")
        return value

    return parse


def count(text: str) -> int:
    """Parse a positive number of things: ``20000``, ``20k``, ``1M``."""
    match = re.fullmatch(r"([0-9]{1,12})([kMG]?)", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a count: write 20000, 20k or 1M"
        )
    return int(match[1]) * _SCALES[match[2]]


def duration(text: str) -> float:
    """Parse a time into seconds: ``10s``, ``5m``, ``500ms``, ``2h``, ``10``."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(us|ms|s|min|m|h|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a duration: write 10s, 5m or 500ms"
        )
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds > _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is longer than a year")
    return seconds


def above_zero(text: str) -> float:
    """Parse a time that is not 0, see ``duration``."""
    seconds = duration(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give more than 0")
    return seconds


def kick(text: str) -> bool | int:
    """Parse what interrupts a running CPU: ``off``, ``on``, ``SIGRTMIN+8``, ``42``."""
    if text in ("on", "off"):
        return text == "on"
    named = re.fullmatch(r"(?:SIG)?RT(MIN|MAX)([+-][0-9]{1,2})?", text)
    if named:
        first = signal.SIGRTMIN if named[1] == "MIN" else signal.SIGRTMAX
        number = first + int(named[2] or 0)
    elif re.fullmatch(r"[0-9]{1,3}", text):
        number = int(text)
    else:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no signal: write off, on, SIGRTMIN+8 or a number"
        )
    if not signal.SIGRTMIN <= number <= signal.SIGRTMAX:
        raise argparse.ArgumentTypeError(
            f"{text} is no real-time signal: SIGRTMIN ({int(signal.SIGRTMIN)}) to"
            f" SIGRTMAX ({int(signal.SIGRTMAX)})"
        )
    return number


def controller(text: str) -> str:
    """Parse the name of a controller, or where a class of one's own is."""
    if text in CONTROLLERS or re.fullmatch(r"[^:]+:[A-Za-z_][\w.]*", text):
        return text
    raise argparse.ArgumentTypeError(
        f"{text[:80]!r} is not one of {', '.join(CONTROLLERS)}, and not FILE.py:CLASS"
        " or MODULE:CLASS"
    )


def load_controller(text: str) -> str | type[Chip]:
    """Return what ``Cluster(controller=...)`` takes for what ``controller`` parsed.

    A class of one's own travels to the CPUs by value: they need not find its module.
    Raises ``CommandError`` with status 2 when there is no such class.
    """
    if text in CONTROLLERS:
        return text
    import cloudpickle

    from shmipi.irq.chips import Chip

    where, _, name = text.rpartition(":")
    module = _module_of(where)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Chip)):
        raise CommandError(
            f"--controller {text}: {name} is no class derived from"
            " shmipi.irq.chips.Chip",
            status=2,
        )
    cloudpickle.register_pickle_by_value(module)
    return found


def _module_of(where: str) -> ModuleType:
    """Import a file, or a module that may lie in the working directory."""
    import importlib.util

    is_file = where.endswith(".py") or "/" in where
    if is_file and not os.path.isfile(where):
        raise CommandError(f"--controller: there is no file {where}", status=2)
    folder = os.path.dirname(os.path.abspath(where)) if is_file else os.getcwd()
    sys.path.insert(0, folder)  # as for `python FILE` and for `python -m MODULE`
    try:
        if not is_file:
            return importlib.import_module(where)
        # A name of its own: the file's may be another module's.
        name = "__shmipi_controller__"
        spec = importlib.util.spec_from_file_location(name, where)
        if spec is None or spec.loader is None:
            raise ImportError(f"{where} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        text = traceback.format_exception_only(error)[-1].strip()
        raise CommandError(
            f"--controller {where}: it cannot be loaded: {text}", status=2
        ) from None
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def cpu_mask(text: str) -> CpuMask:
    """Parse a set of CPUs in the kernel's cpulist form: ``0-2,5``."""
    try:
        return CpuMask(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def core_list(text: str) -> str | list[int]:
    """Parse ``auto`` or a list that keeps its order: ``2,0-1`` is [2, 0, 1]."""
    if text == "auto":
        return text
    cores = [core for part in text.split(",") for core in cpu_mask(part)]
    if not cores:
        raise argparse.ArgumentTypeError("an empty list of cores: write 0-3 or auto")
    return cores


def add_machine_options(
    parser: argparse.ArgumentParser, *, cpus: int | None = None
) -> None:
    """Add the options of every command that boots a machine.

    ``cpus`` is the default of ``--cpus``; ``None`` leaves the number to the machine.
    """
    default = "the usable cores, at least 2" if cpus is None else str(cpus)
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--cpus",
        type=integer(1),
        default=cpus,
        metavar="N",
        help=f"how many CPUs; may be far more than the cores (default: {default})",
    )
    group.add_argument(
        "--idle",
        choices=IDLE_POLICIES,
        default="auto",
        help="what an idle CPU does (default: auto, which polls if there is room)",
    )
    group.add_argument(
        "--doorbell",
        choices=DOORBELLS,
        default="futex",
        help="what wakes a halted CPU (default: futex)",
    )
    group.add_argument(
        "--controller",
        type=controller,
        default="apic",
        metavar="C",
        help=f"the interrupt controller: {', '.join(CONTROLLERS)}, or a class of your"
        " own as FILE.py:CLASS or MODULE:CLASS (default: apic)",
    )
    group.add_argument(
        "--kick",
        type=kick,
        default=True,
        metavar="SIGNAL",
        help="the real-time signal that interrupts a running CPU, such as SIGRTMIN+3;"
        " off: CPUs take interrupts when a task ends, waits or calls cond_resched"
        " (default: on, SIGRTMIN+8)",
    )
    group.add_argument(
        "--name",
        metavar="X",
        help="1 to 32 letters, digits, '-' or '_' (default: a random one)",
    )
    group.add_argument(
        "--cores",
        type=core_list,
        default="auto",
        metavar="LIST",
        help="cores for the CPUs, used in turn, such as 0-3 (default: auto)",
    )
    group.add_argument(
        "--nohz-full",
        type=cpu_mask,
        metavar="LIST",
        help="CPUs that are left alone, such as 1-3: what may run anywhere keeps off"
        " them (default: none)",
    )


def add_attach_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--attach NAME``, which stands in the place of the machine's options."""
    parser.add_argument(
        "--attach",
        metavar="NAME",
        help="do not boot a machine: use the running one of this name, as it is",
    )


def attached(args: argparse.Namespace, *but: str) -> Cluster:
    """Attach to the machine that ``--attach`` names; ``but``: options that it allows.

    Raises ``CommandError`` with status 2 for options that only booting can obey, and
    what ``Cluster.attach`` raises.
    """
    from shmipi.cluster import Cluster

    parser = argparse.ArgumentParser()
    add_machine_options(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name, default) != default and name not in but:
            option = f"--{name.replace('_', '-')}"
            raise CommandError(
                f"{option} is for a machine that is booted: --attach takes the one"
                f" named {args.attach} as it is",
                status=2,
            )
    with usage_errors():
        return Cluster.attach(args.attach)


def machine_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``add_machine_options`` parsed as arguments of ``Cluster``.

    Raises ``CommandError`` for a controller that cannot be loaded.
    """
    return {
        "ncpus": args.cpus,
        "idle": args.idle,
        "doorbell": args.doorbell,
        "controller": load_controller(args.controller),
        "kick": args.kick,
        "cores": args.cores,
        "name": args.name,
        "nohz_full": args.nohz_full,
    }


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Let options that make no machine here be wrong usage: status 2.

    Such as a core that cannot be used, or more CPUs than a controller can address.
    """
    try:
        yield
    except (ControllerError, DeviceTreeError) as error:
        raise CommandError(str(error), status=2) from None
    except ShmipiError:
        raise
    except ValueError as error:
        raise CommandError(str(error), status=2) from None


def boot(args: argparse.Namespace, **more: Any) -> Cluster:
    """Boot the machine that the options ask for; ``more`` are arguments of ``Cluster``.

    Raises ``CommandError`` with status 2 for options that make no machine here, such
    as a core that cannot be used, and whatever else ``Cluster`` raises.
    """
    from shmipi.cluster import Cluster

    options = {**machine_kwargs(args), **more}
    with usage_errors():
        return Cluster(**options)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE``, kept in ``args.json`` (``None`` when it is not given)."""
    parser.add_argument(
        "--json",
        type=_json_target,
        metavar="FILE",
        help="write the result as JSON; - is standard output, and then nothing else"
        " is printed there",
    )


def _json_target(text: str) -> str:
    # Said before a run of minutes and not after it.
    if text == "-":
        return text
    folder = os.path.dirname(text) or "."
    if not text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"there is no directory {folder!r}")
    if not os.access(text if os.path.exists(text) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"no permission to write {text!r}")
    return text


def output_path(text: str, *, force: bool) -> Path:
    """Return where a command is to write what it makes: at its end, maybe much later.

    Raises ``CommandError`` with status 2 for what could not be written then, and for a
    file that is there, but for ``force``.
    """
    path = Path(text)
    if path.is_dir() or not path.name:
        raise CommandError(f"{text!r} is not the name of a file", status=2)
    if path.exists() and not force:
        raise CommandError(f"{path} is there already: -f overwrites it", status=2)
    if not path.parent.is_dir():
        raise CommandError(f"there is no directory {str(path.parent)!r}", status=2)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"no permission to write {str(path)!r}", status=2)
    return path


def human_stream(args: argparse.Namespace) -> TextIO:
    """Return where text for people goes: standard error when JSON has the output."""
    return sys.stderr if getattr(args, "json", None) == "-" else sys.stdout


def document(command: str, /, **fields: Any) -> dict[str, Any]:
    """Return the JSON document of a command: its schema first, then ``fields``."""
    return {"schema": f"shmipi.{command}/1", **fields}


def write_json(target: str | None, content: dict[str, Any]) -> None:
    """Write a document to ``target`` as ``--json`` gave it; ``None`` writes nothing.

    numpy numbers and arrays, masks and paths are converted. Raises ``CommandError``
    when the file cannot be written, ``ValueError`` for NaN and infinity, which JSON
    does not have.
    """
    if target is None:
        return
    write_text(target, _as_text(content))


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, default=_plain, allow_nan=False) + "\n"


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a document to a file that is whole at any time: the old one or the new.

    Raises as ``write_json`` does.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_text(str(half), _as_text(content))
        half.replace(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    finally:
        half.unlink(missing_ok=True)


def write_text(target: str, text: str) -> None:
    """Write to a file, or for ``-`` to standard output. ``CommandError``."""
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror}") from None


def _plain(value: object) -> object:
    if isinstance(value, CpuMask | os.PathLike):
        return str(value)
    # numpy's numbers and arrays, without importing numpy to ask.
    convert = getattr(value, "tolist", None)
    if convert is None:
        raise TypeError(f"{type(value).__name__} is not for JSON: {value!r}")
    return convert()
