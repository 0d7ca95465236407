"""``shmipi backtrace``: where the CPUs of a running machine are."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shmipi.cli.options import (
    add_json_option,
    cpu_mask,
    document,
    human_stream,
    write_json,
)
from shmipi.errors import CommandError, ShmipiError

if TYPE_CHECKING:
    from shmipi.cpumask import CpuMask

HELP = """\
Attaches to a running machine and sends its CPUs an NMI, in which each says where it is:
its Python stack and the C function it is in, also with interrupts disabled. Idle CPUs
are skipped. Where the controller has no NMI, an interrupt that can be masked stands in
for it. Exit status 1 when somebody else does the same just now."""
EXAMPLE = """\
shmipi backtrace lab
shmipi backtrace lab --cpus 0-3 --json -"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "name", metavar="NAME", help="the machine, as `shmipi ps` lists it"
    )
    parser.add_argument(
        "--cpus", type=cpu_mask, metavar="LIST", help="only these CPUs, such as 0-3,8"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the stacks. ``CommandError``, or what ``Cluster.attach`` raises."""
    from shmipi.cluster import Cluster

    mask: CpuMask | None = args.cpus
    try:
        with Cluster.attach(args.name) as cluster:
            if mask is not None and (not mask or max(mask) >= cluster.ncpus):
                raise CommandError(
                    f"--cpus is {str(mask) or 'empty'}: machine {args.name} has CPUs"
                    f" 0-{cluster.ncpus - 1}",
                    status=2,
                )
            texts = cluster.users.backtrace.backtraces(mask)
    except ValueError as error:
        if isinstance(error, ShmipiError):
            raise
        raise CommandError(str(error), status=2) from None  # no name of a machine
    if texts is None:
        raise CommandError(f"somebody else has machine {args.name} make backtraces")
    if args.json != "-":
        human_stream(args).write("".join(texts.values()))
    stacks = [{"cpu": cpu, "text": text} for cpu, text in texts.items()]
    write_json(args.json, document("backtrace", machine=args.name, cpus=stacks))
    return 0
