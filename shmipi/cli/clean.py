"""``shmipi clean``: remove what dead machines left."""

from __future__ import annotations

import argparse

HELP = """\
Removes the shared memory, semaphores and message queues of machines of this user that
are dead: all their processes are gone and nobody was left to tidy up. A live machine
is never touched, whichever container it runs in: file locks tell, not pids. For root,
also the instances of tracefs that a killed `shmipi trace kernel` left."""
EXAMPLE = """\
shmipi clean
shmipi clean --dry-run"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="say what would be removed"
    )


def run(args: argparse.Namespace) -> int:
    """Remove and say what; nothing to remove is no error."""
    from shmipi.machine import inspect, segment
    from shmipi.trace import tracefs

    machines = inspect.leftovers() if args.dry_run else segment.clean()
    instances = tracefs.leftovers() if args.dry_run else tracefs.clean()
    found = [machine.name for machine in machines]
    found += [f"instance {name} of tracefs" for name in instances]
    for what in found:
        print(f"{'would remove' if args.dry_run else 'removed'} {what}")
    if not found:
        print("nothing to remove")
    return 0
