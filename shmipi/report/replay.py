"""The document of ``shmipi replay`` for people."""

from __future__ import annotations

from typing import Any, TextIO

from shmipi.report import bench
from shmipi.report.cells import Table, span
from shmipi.report.table import columns_of, folded

__all__ = ["render", "sides", "table"]

_COUNTS = (
    ("calls queued", "queued"),
    ("  with an IPI (rung)", "rung"),
    ("  behind another (coalesced)", "coalesced"),
    ("  for a CPU that polled (elided)", "elided"),
    ("  run unseen, outside an interrupt", "unseen"),
    ("functions run locally", "entries_local"),
)
_TIMES = ("p50", "p99", "max")


def render(result: dict[str, Any], stream: TextIO) -> None:
    """Print what a replay found: the kernel's trace and the replay side by side."""
    width = columns_of(stream)

    def say(text: str) -> None:
        print(folded(text, width), file=stream)

    say(
        f"{result['file']}: {result['ncpus']} CPUs, {result['duration_s']:.3f} s,"
        f" replayed {_pace(result)} on {result['controller']}, doorbell"
        f" {result['doorbell']}, {result['scheduler']['policy']}"
        + (f" ({result['scheduler']['why']})" if result["scheduler"]["why"] else "")
    )
    for warning in result["warnings"]:
        say(f"warning: {warning}")
    print(file=stream)
    header, rows, notes = table(result)
    bench.table(header, rows, stream)
    print(file=stream)
    for note in notes:
        say(note)


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table: the kernel, the replay, and what else it was."""
    names = [name for name, _ in sides(result)]
    rows = _rows([side for _, side in sides(result)], result, result["what_if"])
    notes = []
    if result["on_time"] is not None:
        late = result["late_us"]
        notes.append(
            f"{result['on_time']:.1%} of sends were on time (within 10 us); late by"
            f" {_us(late['p50'])} (p50), {_us(late['p99'])} (p99), {_us(late['max'])}"
            " (max)"
        )
    if result["what_if"] is not None:
        notes += result["what_if"]["words"]
    notes += [f"not valid: {why}" for why in result["why"]]
    return ["", *names], rows, notes


def sides(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return what stands side by side, with what each is called."""
    found = [("kernel", result["kernel"]), ("replay", result["replay"])]
    changed = result["what_if"]
    return (
        found if changed is None else [*found, (changed["policy"], changed["replay"])]
    )


def _pace(result: dict[str, Any]) -> str:
    if result["pace"] == "timed":
        return (
            "at its speed"
            if result["speed"] == 1
            else f"at {result['speed']:g} x speed"
        )
    if result["pace"] == "causal":
        return "by cause and effect"
    return "as soon as possible"


def _rows(
    sides: list[dict[str, Any]], result: dict[str, Any], changed: dict[str, Any] | None
) -> list[list[str]]:
    rows = [[title, *(str(side[name]) for side in sides)] for title, name in _COUNTS]
    if any("deferred" in side for side in sides):
        rows.append(
            [
                "run later, without an IPI",
                *(str(side.get("deferred", "-")) for side in sides),
            ]
        )
    for name in _TIMES:
        rows.append(
            [
                f"queued to function, {name}",
                *(_us(side["queue_to_function_us"][name]) for side in sides),
            ]
        )
    for vector in sorted({name for side in sides for name in side["ipi"]}):
        found = [side["ipi"].get(vector) for side in sides]
        for title, name in (("sent", "sent"), ("taken", "entered")):
            rows.append(
                [
                    f"{vector} {title}",
                    *(str(each[name]) if each else "-" for each in found),
                ]
            )
        if any(each and each["entries_without_send"] for each in found):
            rows.append(
                [
                    f"{vector} unexplained",
                    *(
                        str(each["entries_without_send"]) if each else "-"
                        for each in found
                    ),
                ]
            )
        for name in _TIMES:
            rows.append(
                [
                    f"{vector} sent to taken, {name}",
                    *(
                        _us(each["send_to_entry_us"][name]) if each else "-"
                        for each in found
                    ),
                ]
            )
    for title, name in (
        ("taken from running CPUs", "victim_us"),
        ("in handlers", "handlers_us"),
    ):
        cells = [title, "-", _us(result[name])]
        if changed is not None:
            cells.append(_us(changed[name]))
        rows.append(cells)
    return rows


def _us(us: float | None) -> str:
    return "-" if us is None else span(us * 1000)
