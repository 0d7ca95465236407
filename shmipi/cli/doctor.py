"""``shmipi doctor``: what on this computer distorts results or limits size."""

from __future__ import annotations

import argparse

from shmipi.cli.options import (
    add_json_option,
    document,
    human_stream,
    integer,
    write_json,
)

HELP = """\
Says what on this computer distorts measurements or limits the size of a machine:
cores, SMT, frequency scaling, virtualisation and stolen time, mitigations, isolation,
cgroup quota and throttling, resource limits, /dev/shm; each with why it matters and
what to do. Changes nothing and boots nothing."""
EXAMPLE = """\
shmipi doctor
shmipi doctor --cpus 1024 --json doctor.json"""

#: As many CPUs as a machine is promised to have on any computer that allows it.
DEFAULT_CPUS = 1024
#: SHI_MAX_CPUS of the core, which is not imported to say what is wrong with it.
MAX_CPUS = 4096


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--cpus",
        type=integer(1, MAX_CPUS),
        default=DEFAULT_CPUS,
        metavar="N",
        help=f"judge the limits for a machine of N CPUs (default: {DEFAULT_CPUS})",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Examine this computer and print the findings. A warning is no error: status 0."""
    from shmipi.machine.facts import gather
    from shmipi.report.doctor import examine, findings_json, render, summary

    facts = gather()
    findings = examine(facts, args.cpus)
    if args.json != "-":
        render(findings, args.cpus, human_stream(args))
    write_json(
        args.json,
        document(
            "doctor",
            ncpus=args.cpus,
            verdict=summary(findings, args.cpus),
            machine=facts.as_dict(),
            findings=findings_json(findings),
        ),
    )
    return 0
