"""``shmipi trace kernel``: the IPIs of the kernel that runs, while a command does."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from shmipi.cli.options import integer, output_path
from shmipi.cli.program import Program
from shmipi.errors import CommandError

if TYPE_CHECKING:
    from shmipi.cli import Parser
    from shmipi.trace.tracefs import Instance, Saved

__all__ = ["add_action", "run"]

_DEFAULT: Final = "kernel.ftrace.xz"
_BUFFER_KIB: Final = 4096
_HELP = """\
Runs COMMAND and records meanwhile what this kernel does on all CPUs: calls, IPIs, their
entries and exits, wake-ups, switches of tasks, idle states. `shmipi trace import` and
`shmipi replay` take the file. It takes root. Events are switched on in an instance of
tracefs of its own, in a mount of its own where none is: nothing global is written.
Ctrl-C is the command's; its exit status is this one's."""
_EXAMPLE = """\
shmipi trace kernel -- hackbench -l 100
shmipi trace kernel -o gcc.ftrace.xz -- gcc -O2 -c hello.c"""

#: Beside the IPIs: who runs, who is woken, who is idle, and was woken by a store alone.
_BESIDE: Final = (
    *("irq_vectors/irq_work_entry", "irq_vectors/irq_work_exit"),
    *("sched/sched_waking", "sched/sched_wakeup", "sched/sched_switch"),
    "sched/sched_wake_idle_without_ipi",
    "power/cpu_idle",
)
#: Linux 6.4 has them; without them there is nothing to say about IPIs.
_NEEDED: Final = "ipi/ipi_send_cpu"


def add_action(actions: Any) -> None:
    """Add the subcommand."""
    parser = cast(
        "Parser",
        actions.add_parser("kernel", help="record this kernel's IPIs (root)"),
    )
    parser.describe(_HELP, _EXAMPLE)
    parser.usage = "%(prog)s [OPTIONS] -- COMMAND ..."
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run"
    )
    parser.add_argument(
        "-o",
        "--output",
        default=_DEFAULT,
        metavar="FILE",
        help="the file, compressed if its name ends in .xz or .gz (default"
        f" {_DEFAULT})",
    )
    parser.add_argument(
        "-f", "--force", action="store_true", help="overwrite a file that is there"
    )
    parser.add_argument(
        "--buffer-kib",
        type=integer(16, 1 << 20),
        default=_BUFFER_KIB,
        metavar="N",
        help=f"of memory for each CPU (default {_BUFFER_KIB}); what does not fit"
        " overwrites what is oldest, and is counted",
    )


def run(args: argparse.Namespace) -> int:
    """Record, say what, and return the command's status."""
    from shmipi.trace.tracefs import Instance

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise CommandError("give -- and a command, such as -- sleep 5", status=2)
    target = output_path(args.output, force=args.force)
    with (
        Program() as program,
        contextlib.closing(Instance(buffer_kib=args.buffer_kib)) as instance,
    ):
        found = instance.enable(_asked())
        if _NEEDED not in found:
            raise CommandError(
                f"this kernel has no event {_NEEDED}: Linux 6.4 and newer have it"
            )
        with instance:
            status = program.run(words)
        saved = _save(instance, target)
    _say(target, saved, found)
    return status


def _save(instance: Instance, target: Path) -> Saved:
    try:
        return instance.save(target)
    except BaseException as error:
        if target.is_file():
            target.unlink()  # half of a trace
        if isinstance(error, OSError):
            raise CommandError(f"cannot write {target}: {error.strerror}") from None
        raise


def _say(target: Path, saved: Saved, found: list[str]) -> None:
    lost = f", {saved.lost} lost: give more --buffer-kib" if saved.lost else ""
    print(f"{target}: {saved.events} events{lost}", file=sys.stderr)
    # One architecture has these, others those.
    vectors = any(event.startswith("irq_vectors/") for event in found)
    others = ("ipi/ipi_entry", "ipi/ipi_exit") if vectors else ("irq_vectors/",)
    for event in _asked():
        if event not in found and not event.startswith(others):
            print(f"warning: this kernel has no event {event}", file=sys.stderr)


def _asked() -> list[str]:
    from shmipi.trace.tracefs import IPI_EVENTS

    return [*IPI_EVENTS, *_BESIDE]
