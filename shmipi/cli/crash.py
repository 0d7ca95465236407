"""``shmipi crash``: read a crash dump."""

from __future__ import annotations

import argparse

from shmipi.cli.options import add_json_option, document, human_stream, write_json

HELP = """\
Reads the crash dump that a machine has made (Cluster(crash=PATH), or
cluster.users.crash.arm(PATH)): why it crashed, who waited for whom, and of every CPU
what it was doing, its stack, its calls and its pending interrupts."""
EXAMPLE = """\
shmipi crash shmipi-crash-lab.json
shmipi crash --json - /tmp/crash.json"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", metavar="FILE", help="the crash dump")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print it. ``CommandError`` for what is no crash dump."""
    from shmipi.report import crash

    found = crash.read(args.file)
    if args.json != "-":
        human_stream(args).write(crash.text(found))
    waits = [
        {"who": who, "cpu": cpu, "function": function}
        for who, cpu, function in crash.waits(found)
    ]
    write_json(args.json, document("crash", dump=found, waits=waits))
    return 0
