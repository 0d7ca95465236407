"""``shmipi doctor``: what on this computer distorts results or limits size."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TextIO

from shmipi.cli.options import (
    add_json_option,
    document,
    human_stream,
    integer,
    write_json,
)

if TYPE_CHECKING:
    from shmipi.machine.facts import Facts
    from shmipi.report.doctor import Finding

HELP = """\
Says what on this computer distorts measurements or limits the size of a machine:
cores, SMT, frequency scaling, virtualisation and stolen time, mitigations, isolation,
cgroup quota and throttling, resource limits, /dev/shm; each with why it matters and
what to do. Changes nothing and, without --measure and --agree, boots nothing.

With --measure it boots a small machine and says of each finding how large its effect is
here, where that can be measured. With --agree it checks the instrument: the raw limits
beside a ping-pong that was written independently (in a checkout of the sources, with a
C compiler) and beside perf bench sched pipe where that is installed, in turns in one
run, within 10 % above 1 us and 15 % below; and a fake target with a delay of 1, 10 and
100 us, which has to be measured within 2 %. Exit status 1 when two do not agree."""
EXAMPLE = """\
shmipi doctor
shmipi doctor --measure
shmipi doctor --agree
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
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also measure how large the effect of each finding is here, some seconds",
    )
    parser.add_argument(
        "--agree",
        action="store_true",
        help="check what is measured against others and against known delays, a minute",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Examine this computer and print the findings. A warning is no error: status 0.

    1 where ``--agree`` found that two do not.
    """
    from shmipi.machine.facts import gather
    from shmipi.report.doctor import examine, render

    facts = gather()
    findings = examine(facts, args.cpus)
    found: dict[str, Any] = {}
    if args.measure or args.agree:
        findings, found = _measured(findings, args.agree)
    if args.json != "-":
        stream = human_stream(args)
        render(findings, args.cpus, stream)
        if found:
            _show(found, stream)
    more = {"agree": found} if found else {}
    write_json(args.json, {**as_document(facts, findings, args.cpus), **more})
    return 0 if all(row["agrees"] for row in found.get("rows", [])) else 1


def as_document(
    facts: Facts, findings: list[Finding], cpus: int = DEFAULT_CPUS
) -> dict[str, Any]:
    """Return what was found as JSON has it."""
    from shmipi.report.doctor import findings_json, summary

    return document(
        "doctor",
        ncpus=cpus,
        verdict=summary(findings, cpus),
        machine=facts.as_dict(),
        findings=findings_json(findings),
    )


def _measured(
    findings: list[Finding], agree: bool
) -> tuple[list[Finding], dict[str, Any]]:
    """Measure effects, and what is to agree."""
    from shmipi.bench import agree as agreement
    from shmipi.bench import effects
    from shmipi.bench.runner import Progress
    from shmipi.report.doctor import with_effects

    progress = Progress("doctor")
    try:
        findings = with_effects(findings, effects.measure(progress))
        found = agreement.run(agreement.Options(), progress) if agree else {}
    finally:
        progress.clear()
    return findings, found


def _show(found: dict[str, Any], stream: TextIO) -> None:
    from shmipi.bench import agree as agreement
    from shmipi.report.bench import table
    from shmipi.report.table import columns_of, folded

    header, rows, notes = agreement.table(found)
    print(file=stream)
    table(header, rows, stream)
    for note in notes:
        print(folded(note, columns_of(stream)), file=stream)
