"""The rows of documents as a report shows them: each a median beside its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from shmipi.report.hist import Counts

__all__ = ["Row", "rows_of"]


@dataclass(frozen=True)
class Row:
    """One row: its median and p99 in ns, and what it stands beside.

    ``group`` is its name without the kind of handler. ``state`` is the target's: it
    says the colour. ``times`` and ``limit_times`` are distributions of the document.
    """

    group: str
    handler: str
    state: str
    ns: float
    p99: float | None = None
    limit: str = ""
    limit_ns: float | None = None
    ratio: float | None = None
    valid: bool = True
    why: tuple[str, ...] = ()
    times: dict[str, Any] | None = None
    limit_times: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """What it is called: its group, its handler, and a dagger where not valid."""
        words = ", ".join(word for word in (self.group, self.handler) if word)
        return words if self.valid else f"{words} \N{DAGGER}"

    def counts(self) -> Counts | None:
        """Return what was counted, if the document has it."""
        return _counts(self.times)

    def limit_counts(self) -> Counts | None:
        """Return what its limit counted, if the document has it."""
        return _counts(self.limit_times)


def _counts(times: dict[str, Any] | None) -> Counts | None:
    return None if times is None or "hist" not in times else Counts.of(times)


def rows_of(document: dict[str, Any]) -> list[Row]:
    """Return the rows of a document that have a time, and something beside it."""
    make = _MAKERS.get(str(document.get("bench")))
    if make is None:
        return []
    limits = document.get("limits") or {}
    return list(make(document, limits))


def _said(row: dict[str, Any]) -> dict[str, Any]:
    return {"valid": row.get("valid", True), "why": tuple(row.get("why", ()))}


def _latency(document: dict[str, Any], limits: dict[str, Any]) -> Iterator[Row]:
    for row in document["rows"]:
        words = (row["target_state"], row["doorbell"], row["sender_wait"])
        limit = limits.get(row["limit"], {})
        yield Row(
            " ".join(word for word in words if word not in ("none", "spin")),
            row["handler"],
            row["target_state"],
            row["rtt_ns"]["p50"],
            row["rtt_ns"]["p99"],
            row["limit"],
            limit.get("p50"),
            row["ratio"],
            times=row["rtt_ns"],
            limit_times=limit if "p50" in limit else None,
            **_said(row),
        )


def _limits(document: dict[str, Any], limits: dict[str, Any]) -> Iterator[Row]:
    del document
    for name, row in limits.items():
        if "p50" in row:
            yield Row(name, "", "", row["p50"], row["p99"], times=row, **_said(row))


def _users(document: dict[str, Any], limits: dict[str, Any]) -> Iterator[Row]:
    del limits
    for row in document["rows"]:
        cpus = f", {row['ncpus']} CPUs" if row["ncpus"] > 2 else ""
        yield Row(
            f"{row['user']}: {row['what']}{cpus}, {row['target_state']}",
            row["flavour"],
            row["target_state"],
            row["typical_ns"],
            row["ns"]["p99"],
            row["raw"],
            row["raw_ns"],
            row["ratio"],
            times=row["ns"],
            **_said(row),
        )


def _irq(document: dict[str, Any], limits: dict[str, Any]) -> Iterator[Row]:
    del limits
    for row in document["rows"]:
        yield Row(
            row["controller"],
            row["handler"],
            row["target_state"],
            row["rtt_ns"]["p50"],
            row["rtt_ns"]["p99"],
            "line raised raw",
            row.get("line_ns"),
            row.get("line_ratio"),
            times=row["rtt_ns"],
            **_said(row),
        )


def _controllers(document: dict[str, Any], limits: dict[str, Any]) -> Iterator[Row]:
    del limits
    fastest = {
        _kind(row): row["ns"]
        for row in document["rows"]
        if row["controller"] == row.get("fastest")
    }
    for row in document["rows"]:
        what = "" if row["what"] == "call" else f", {row['what']}"
        yield Row(
            row["controller"],
            row["handler"],
            row["target_state"] + what,
            row["ns"],
            None,
            "the fastest",
            fastest.get(_kind(row)),
            row["ratio"],
            **_said(row),
        )


def _kind(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["what"], row["target_state"], row["handler"]


def _boot(document: dict[str, Any], limits: dict[str, Any]) -> Iterator[Row]:
    del limits
    for row in document["rows"]:
        for what, took, beside, ratio in (
            ("boot", "boot_s", "fork_s", "ratio"),
            ("end", "shutdown_s", "exit_s", "shutdown_ratio"),
        ):
            yield Row(
                f"{what} of {row['ncpus']} CPUs",
                "",
                "",
                row[took] * 1e9,
                None,
                "raw forks",
                row[beside] * 1e9,
                row[ratio],
                **_said(row),
            )


def _death(document: dict[str, Any], limits: dict[str, Any]) -> Iterator[Row]:
    del limits
    for row in document["rows"]:
        yield Row(
            f"death of one of {row['ncpus']} CPUs",
            "",
            "",
            row["told_s"] * 1e9,
            row["told_max_s"] * 1e9,
            **_said(row),
        )


_Maker = Callable[[dict[str, Any], dict[str, Any]], Iterator[Row]]
_MAKERS: Final[dict[str, _Maker]] = {
    "latency": _latency,
    "limits": _limits,
    "users": _users,
    "irq": _irq,
    "controllers": _controllers,
    "boot": _boot,
    "death": _death,
}
