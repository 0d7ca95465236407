"""``shmipi bench``: latency, throughput, boot time, and the limits beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from shmipi.cli.options import (
    CONTROLLERS,
    DOORBELLS,
    IDLE_POLICIES,
    add_json_option,
    controller,
    core_list,
    count,
    document,
    human_stream,
    integer,
    load_controller,
    write_json,
)
from shmipi.errors import CommandError, RemoteCallError

HELP = """\
Measures a machine's interrupts in wall-clock time, and beside each figure the physical
limit of this computer: the same round trip in C with nothing of shmipi in between.
Without a subcommand nothing is measured."""
EXAMPLE = """\
shmipi bench latency
shmipi bench latency --doorbell futex,sem --calls 20k --json latency.json
shmipi bench boot --cpus 2,256"""

_Progress: TypeAlias = Callable[[str], None]
_Run: TypeAlias = Callable[[argparse.Namespace, _Progress], dict[str, Any]]

#: SHI_MAX_CPUS of the core, which is not imported to parse options.
_MAX_CPUS: Final = 4096
_CHOICES: Final = ("none", *DOORBELLS)
_HANDLERS: Final = ("native", "python")
#: Fewer blocks have no spread that means anything.
_LEAST_BLOCKS: Final = 5


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their arguments."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (add, text, about, example) in _COMMANDS.items():
        add(
            commands.add_parser(
                name, help=text, description=f"{text}.\n\n{about}", example=example
            )
        )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Rows that are not valid are marked; the status is 0."""
    from shmipi.bench.runner import Progress
    from shmipi.report.bench import render

    progress = Progress(f"bench {args.what}")
    try:
        result = _RUNS[args.what](args, progress)
    except RemoteCallError as error:
        raise CommandError(
            f"measuring on CPU {error.cpu} failed: {error.remote_repr}"
        ) from None
    except ValueError as error:
        raise CommandError(str(error), status=2) from None
    finally:
        progress.clear()
    if args.json != "-":
        render(result, human_stream(args))
    write_json(args.json, document("bench", **result))
    return 0


# --- limits


def _add_limits(parser: argparse.ArgumentParser) -> None:
    _add_calls(parser, 2_000, "round trips of each limit")
    _add_pair(parser)
    add_json_option(parser)


def _limits(args: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    from shmipi.bench import limits

    return limits.run(
        calls=args.calls,
        warmup=args.warmup,
        cores=args.cores,
        gap_us=args.gap,
        blocks=args.blocks,
        progress=progress,
    )


# --- latency


def _add_latency(parser: argparse.ArgumentParser) -> None:
    _add_calls(parser, 10_000, "clocked calls of each row")
    parser.add_argument(
        "--doorbell",
        type=_several(_CHOICES),
        default=_CHOICES,
        metavar="LIST",
        help=f"only these rows: {', '.join(_CHOICES)}; none is the polling target"
        " (default: all)",
    )
    _add_handler(parser)
    _add_pair(parser)
    _add_controller(parser)
    add_json_option(parser)


def _latency(args: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    from shmipi.bench import latency

    options = latency.Options(
        calls=args.calls,
        warmup=args.warmup,
        doorbells=args.doorbell,
        handlers=args.handler,
        cores=args.cores,
        gap_us=args.gap,
        blocks=args.blocks,
        controller=load_controller(args.controller),
    )
    return latency.run(options, progress)


# --- controllers


def _add_controllers(parser: argparse.ArgumentParser) -> None:
    _add_calls(parser, 20_000, "calls of each row of each controller")
    parser.add_argument(
        "--controllers",
        type=_several(CONTROLLERS),
        default=CONTROLLERS,
        metavar="LIST",
        help=f"only these: {', '.join(CONTROLLERS)} (default: all)",
    )
    _add_handler(parser)
    _add_pair(parser)
    add_json_option(parser)


def _controllers(args: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    from shmipi.bench import controllers

    options = controllers.Options(
        calls=args.calls,
        warmup=args.warmup,
        controllers=args.controllers,
        handlers=args.handler,
        cores=args.cores,
        gap_us=args.gap,
        blocks=args.blocks,
    )
    return controllers.run(options, progress)


# --- throughput


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calls",
        type=_at_most(count, 1_000_000_000),
        default=500_000,
        metavar="N",
        help="calls of each row, all senders together, such as 20000 or 1M"
        " (default: 500k)",
    )
    _add_handler(parser)
    _add_cores(parser, "the sender's core and the target's")
    _add_blocks(parser, _LEAST_BLOCKS)
    _add_doorbell(parser)
    _add_controller(parser)
    add_json_option(parser)


def _throughput(args: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    from shmipi.bench import throughput

    return throughput.run(
        calls=args.calls,
        cores=args.cores,
        handlers=args.handler,
        doorbell=args.doorbell,
        controller=load_controller(args.controller),
        blocks=args.blocks,
        progress=progress,
    )


# --- boot


def _add_boot(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, (2, 16, 256, 1024), _MAX_CPUS)
    parser.add_argument(
        "--idle",
        choices=IDLE_POLICIES,
        default="halt",
        help="what an idle CPU does (default: halt)",
    )
    _add_doorbell(parser)
    _add_cores(parser, "cores for the CPUs, used in turn")
    _add_controller(parser)
    add_json_option(parser)


def _boot(args: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    from shmipi.bench import boot

    return boot.run(
        sizes=args.cpus,
        idle=args.idle,
        doorbell=args.doorbell,
        controller=load_controller(args.controller),
        cores=args.cores,
        progress=progress,
    )


# --- broadcast


def _add_broadcast(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, (16, 64, 128, 256, 512), _MAX_CPUS - 1)
    parser.add_argument(
        "--calls",
        type=_at_most(count, 100_000),
        default=30,
        metavar="N",
        help="broadcasts over each machine (default: 30)",
    )
    parser.add_argument(
        "--gap",
        type=_microseconds,
        default=1000.0,
        metavar="US",
        help="pause before each, in microseconds (default: 1000)",
    )
    _add_doorbell(parser)
    _add_cores(parser, "cores for the CPUs, used in turn")
    _add_controller(parser)
    add_json_option(parser)


def _broadcast(args: argparse.Namespace, progress: _Progress) -> dict[str, Any]:
    from shmipi.bench import broadcast

    return broadcast.run(
        sizes=args.cpus,
        calls=args.calls,
        gap_us=args.gap,
        doorbell=args.doorbell,
        controller=load_controller(args.controller),
        cores=args.cores,
        progress=progress,
    )


# --- options


def _add_calls(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument(
        "--calls",
        type=_at_most(count, 100_000_000),
        default=default,
        metavar="N",
        help=f"{what}, such as 2000 or 20k (default: {default})",
    )
    parser.add_argument(
        "--warmup",
        type=integer(1, 1_000_000),
        default=50,
        metavar="N",
        help="calls before each block that are not counted (default: 50)",
    )


def _add_pair(parser: argparse.ArgumentParser) -> None:
    _add_cores(parser, "the sender's core and the target's")
    parser.add_argument(
        "--gap",
        type=_microseconds,
        default=30.0,
        metavar="US",
        help="pause before each call in microseconds: a core wakes more slowly the"
        " longer it slept (default: 30)",
    )
    _add_blocks(parser, 10)


def _add_blocks(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--blocks",
        type=integer(_LEAST_BLOCKS, 1000),
        default=default,
        metavar="N",
        help=f"parts that limits and rows are cut into and take turns in, at least"
        f" {_LEAST_BLOCKS} (default: {default})",
    )


def _add_cores(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--cores",
        type=core_list,
        default="auto",
        metavar="LIST",
        help=f"{what}, such as 0,1 (default: auto)",
    )


def _add_handler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--handler",
        type=_several(_HANDLERS),
        default=_HANDLERS,
        metavar="LIST",
        help="only handlers of this kind: native or python (default: both)",
    )


def _add_doorbell(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--doorbell",
        choices=DOORBELLS,
        default="futex",
        help="what wakes a halted CPU (default: futex)",
    )


def _add_controller(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--controller",
        type=controller,
        default="apic",
        metavar="C",
        help=f"the interrupt controller: {', '.join(CONTROLLERS)}, or a class of your"
        " own as FILE.py:CLASS or MODULE:CLASS (default: apic)",
    )


def _add_sizes(
    parser: argparse.ArgumentParser, default: Sequence[int], most: int
) -> None:
    parser.add_argument(
        "--cpus",
        type=_sizes(most),
        default=tuple(default),
        metavar="LIST",
        help="one machine for each of these numbers of CPUs"
        f" (default: {','.join(map(str, default))})",
    )


def _several(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of ``a,b``: each one of ``choices``, in their order."""

    def parse(text: str) -> tuple[str, ...]:
        words = text.split(",")
        for word in words:
            if word not in choices:
                raise argparse.ArgumentTypeError(
                    f"{word[:40]!r} is not one of {', '.join(choices)}"
                )
        return tuple(choice for choice in choices if choice in words)

    return parse


def _sizes(most: int) -> Callable[[str], tuple[int, ...]]:
    number = integer(1, most)

    def parse(text: str) -> tuple[int, ...]:
        return tuple(number(word) for word in text.split(","))

    return parse


def _at_most(parse: Callable[[str], int], most: int) -> Callable[[str], int]:
    def limited(text: str) -> int:
        value = parse(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large: at most {most}")
        return value

    return limited


def _microseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100_000:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no pause: give microseconds, 0 to 100000"
        )
    return value


_RUNS: Final[dict[str, _Run]] = {
    "limits": _limits,
    "latency": _latency,
    "controllers": _controllers,
    "throughput": _throughput,
    "boot": _boot,
    "broadcast": _broadcast,
}
_COMMANDS: Final = {
    "limits": (
        _add_limits,
        "round trips between two processes with nothing of shmipi in between",
        "What this computer and its kernel can do at best: the figures that every row\n"
        "of the other measurements stands beside.",
        "shmipi bench limits\nshmipi bench limits --gap 1000 --json -",
    ),
    "latency": (
        _add_latency,
        "waiting calls from one CPU to another, beside their limits",
        "One row for each state of the target (polling, halted, running), doorbell\n"
        "and kind of handler. A native row is a C no-op called by a C loop; a python\n"
        "row is smp_call_function_single() of a Python function, called and timed in\n"
        "Python. Limits and rows take turns in blocks, and a ratio is the median over\n"
        "these.",
        "shmipi bench latency\nshmipi bench latency --doorbell none --handler native",
    ),
    "controllers": (
        _add_controllers,
        "the same calls through each interrupt controller",
        "Polling and running targets, native and python handlers, and a line of\n"
        "the chip raised raw, which nothing elides. The machines of all controllers\n"
        "are up at once and take turns in blocks; a ratio is the median over these,\n"
        "to the fastest. For native calls to a polling target there is a verdict:\n"
        "how much slower than the fastest a controller may be.",
        "shmipi bench controllers\n"
        "shmipi bench controllers --controllers apic,xive --handler native",
    ),
    "throughput": (
        _add_throughput,
        "calls per second that nobody waits for",
        "The clock stops when the last handler has returned.",
        "shmipi bench throughput\nshmipi bench throughput --calls 5M --handler native",
    ),
    "boot": (
        _add_boot,
        "boot and shutdown time, and memory per CPU",
        "Each machine is booted once, measured and shut down.",
        "shmipi bench boot\nshmipi bench boot --cpus 4,64",
    ),
    "broadcast": (
        _add_broadcast,
        "on_each_cpu(wait=True) over many halted CPUs",
        "CPU 0 calls a native no-op on every other CPU, all of which have halted.",
        "shmipi bench broadcast\nshmipi bench broadcast --cpus 16,512",
    ),
}
