"""``shmipi clean``: remove what dead machines left."""

from __future__ import annotations

import argparse

HELP = """\
Removes the shared memory, semaphores and message queues of machines of this user that
are dead: all their processes are gone and nobody was left to tidy up. A live machine
is never touched, whichever container it runs in: file locks tell, not pids."""
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

    found = inspect.leftovers() if args.dry_run else segment.clean()
    for machine in found:
        print(f"{'would remove' if args.dry_run else 'removed'} {machine.name}")
    if not found:
        print("nothing to remove")
    return 0
