"""What the ``Options`` of a bench are made of: fields that know their ``--option``.

A field made by one of these functions is an option of ``shmipi bench`` too; a field
with a plain default is for callers of ``run()`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from shmipi import names

__all__ = [
    "HANDLERS",
    "MAX_CPUS",
    "Option",
    "blocks",
    "calls",
    "choice",
    "controller",
    "cores",
    "cpus",
    "doorbell",
    "gap",
    "gap_of_calls",
    "handlers",
    "microseconds",
    "most_cpus",
    "number",
    "numbers",
    "options_of",
    "pair_of_cores",
    "seconds",
    "several",
    "sizes",
    "warmup",
]

HANDLERS: Final = ("native", "python")
#: SHI_MAX_CPUS of the core, which is not imported to parse options.
MAX_CPUS: Final = 4096
#: Fewer blocks have no spread that means anything.
LEAST_BLOCKS: Final = 5

_KEY: Final = "shmipi.option"


@dataclass(frozen=True)
class Option:
    """How a field is given on a command line; its default is the field's.

    ``kind`` says what the text is: ``"count"`` and ``"integer"`` (from ``least`` to
    ``most``), ``"microseconds"``, ``"cores"``, ``"controller"``, ``"choice"`` (one of
    ``choices``), ``"several"`` (a list of them) and ``"sizes"`` (a list of integers).
    """

    flag: str
    kind: str
    help: str
    metavar: str | None = None
    least: int = 1
    most: int = 0
    choices: Sequence[str] = ()


def _field(default: Any, flag: str, kind: str, text: str, **more: Any) -> Any:
    option = Option(f"--{flag}", kind, text, **more)
    return field(default=default, metadata={_KEY: option})


def options_of(options: type[Any]) -> dict[str, tuple[Option, Any]]:
    """Return the fields of an ``Options`` that are options: each with its default."""
    return {
        each.name: (each.metadata[_KEY], each.default)
        for each in fields(options)
        if _KEY in each.metadata
    }


def calls(
    default: int,
    what: str,
    *,
    like: str = ", such as 2000 or 20k",
    shown: str = "",
    most: int = 100_000_000,
) -> Any:
    """``--calls N``: ``what`` they are, and what N may be written ``like``."""
    text = f"{what}{like} (default: {shown or default})"
    return _field(default, "calls", "count", text, metavar="N", most=most)


def warmup() -> Any:
    """``--warmup N``."""
    return _field(
        50,
        "warmup",
        "integer",
        "calls before each block that are not counted (default: 50)",
        metavar="N",
        most=1_000_000,
    )


def gap(default: float, what: str) -> Any:
    """``--gap US``: ``what`` says what it is a pause before."""
    return _field(
        default,
        "gap",
        "microseconds",
        f"{what} (default: {default:g})",
        metavar="US",
    )


def microseconds(flag: str, default: float, what: str) -> Any:
    """``--FLAG US``."""
    return _field(default, flag, "microseconds", what, metavar="US")


def gap_of_calls() -> Any:
    """``--gap US`` of benches whose targets sleep between two calls."""
    return gap(
        30.0,
        "pause before each call in microseconds: a core wakes more slowly the longer it"
        " slept",
    )


def blocks(default: int = 10) -> Any:
    """``--blocks N``."""
    return _field(
        default,
        "blocks",
        "integer",
        f"parts that limits and rows are cut into and take turns in, at least"
        f" {LEAST_BLOCKS} (default: {default})",
        metavar="N",
        least=LEAST_BLOCKS,
        most=1000,
    )


def cores(what: str = "cores for the CPUs, used in turn") -> Any:
    """``--cores LIST``."""
    return _field(
        "auto", "cores", "cores", f"{what}, such as 0,1 (default: auto)", metavar="LIST"
    )


def cpus(flag: str, what: str) -> Any:
    """``--FLAG LIST``: CPUs of the machine."""
    return _field("auto", flag, "cores", f"{what} (default: auto)", metavar="LIST")


def pair_of_cores() -> Any:
    """``--cores LIST`` of benches with one sender and one target."""
    return cores("the sender's core and the target's")


def several(flag: str, choices: Sequence[str], what: str, *, shown: str = "all") -> Any:
    """``--FLAG a,b``, by default all of ``choices``."""
    return _field(
        tuple(choices),
        flag,
        "several",
        f"{what} (default: {shown})",
        metavar="LIST",
        choices=tuple(choices),
    )


def handlers() -> Any:
    """``--handler LIST``."""
    return several(
        "handler",
        HANDLERS,
        "only handlers of this kind: native or python",
        shown="both",
    )


def seconds(default: int, what: str) -> Any:
    """``--seconds N``: ``what`` is done in that time."""
    return number("seconds", default, what, most=86_400)


def number(flag: str, default: int, what: str, *, most: int, least: int = 1) -> Any:
    """``--FLAG N``."""
    return _field(
        default,
        flag,
        "integer",
        f"{what} (default: {default})",
        metavar="N",
        least=least,
        most=most,
    )


def numbers(flag: str, default: Sequence[int], what: str, *, most: int) -> Any:
    """``--FLAG 1,2``: a list of integers."""
    shown = ",".join(map(str, default))
    return _field(
        tuple(default),
        flag,
        "sizes",
        f"{what} (default: {shown})",
        metavar="LIST",
        most=most,
    )


def choice(flag: str, choices: Sequence[str], default: str, what: str) -> Any:
    """``--FLAG x``, one of ``choices``."""
    text = f"{what} (default: {default})"
    return _field(default, flag, "choice", text, choices=tuple(choices))


def doorbell() -> Any:
    """``--doorbell x``."""
    return choice("doorbell", names.DOORBELLS, "futex", "what wakes a halted CPU")


def controller() -> Any:
    """``--controller C``."""
    return _field(
        "apic",
        "controller",
        "controller",
        f"the interrupt controller: {', '.join(names.CONTROLLERS)}, or a class of your"
        " own as FILE.py:CLASS or MODULE:CLASS (default: apic)",
        metavar="C",
    )


def most_cpus(default: int) -> Any:
    """``--most-cpus N``."""
    return _field(
        default,
        "most-cpus",
        "integer",
        f"no machine of more CPUs (default: {default})",
        metavar="N",
        least=2,
        most=MAX_CPUS,
    )


def sizes(default: Sequence[int], *, most: int = MAX_CPUS) -> Any:
    """``--cpus LIST``: a machine for each."""
    what = "one machine for each of these numbers of CPUs"
    return numbers("cpus", default, what, most=most)
