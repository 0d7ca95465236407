"""The results of ``shmipi bench`` for people: a table, on a terminal or as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TextIO, TypeAlias

from shmipi.report.table import Listing, columns_of, folded, write

__all__ = ["render", "table"]

_Cells: TypeAlias = list[str]
_Rows: TypeAlias = list[_Cells]


def render(result: dict[str, Any], stream: TextIO) -> None:
    """Print the document of a ``bench`` command."""
    machine = result["machine"]
    width = columns_of(stream)

    def say(text: str) -> None:
        print(folded(text, width), file=stream)

    say(
        f"{machine['cpu_model']}, {machine['cores']} usable,"
        f" {machine['kernel']}, {machine['python']}"
    )
    if "timer_ns" in result:
        gap = f"; pause {result['gap_us']:g} us" if "gap_us" in result else ""
        say(
            f"a stamp ({result['clock']}) costs {result['timer_ns']:.0f} ns, which is"
            f" not subtracted{gap}; gc is off on the CPUs"
        )
    print(file=stream)
    header, rows, notes = _TABLES[result["bench"]](result)
    table(header, rows, stream)
    for note in notes:
        say(note)


def table(header: Sequence[str], rows: Sequence[_Cells], stream: TextIO) -> None:
    """Print rows under a header: numbers to the right, words to the left."""
    numeric = [
        all(_is_number(row[column]) for row in rows) for column in range(len(header))
    ]
    listing = Listing(
        header,
        right=[name for name, right in zip(header, numeric, strict=True) if right],
        keys=max(1, numeric.index(True)) if any(numeric) else 1,
    )
    for row in rows:
        listing.add_row(*row, style="yellow" if row[-1].startswith("no") else "")
    write(listing.lines(columns_of(stream)), stream)


def _is_number(text: str) -> bool:
    return not text or text == "-" or text[0].isdigit()


def _time(ns: float | None) -> str:
    """Return a time in the unit that suits it, three digits or so."""
    if ns is None:
        return "-"
    for limit, unit, scale in ((1e3, "ns", 1), (1e6, "us", 1e3), (1e9, "ms", 1e6)):
        if ns < limit:
            value = ns / scale
            return f"{value:.0f} {unit}" if unit == "ns" else f"{value:.3g} {unit}"
    return f"{ns / 1e9:.3g} s"


def _percentiles(stats: dict[str, float]) -> _Cells:
    return [_time(stats[key]) for key in ("p50", "p90", "p99", "p999", "max")]


def _valid(row: dict[str, Any], notes: list[str], name: str) -> str:
    if row.get("valid", True):
        return "yes"
    why = "; ".join(dict.fromkeys(row["why"]))
    notes.append(f"[{len(notes) + 1}] {name} is not valid: {why}")
    return f"no [{len(notes)}]"


def _valid_for(row: dict[str, Any], notes: list[str]) -> str:
    """The same where many rows have one reason: it is noted once."""
    if row.get("valid", True):
        return "yes"
    why = f"not valid: {'; '.join(dict.fromkeys(row['why']))}"
    for number, note in enumerate(notes, start=1):
        if note == f"[{number}] {why}":
            return f"no [{number}]"
    notes.append(f"[{len(notes) + 1}] {why}")
    return f"no [{len(notes)}]"


_PERCENTILES: Final = ["p50", "p90", "p99", "p99.9", "max"]


def _limits(result: dict[str, Any]) -> tuple[_Cells, list[_Cells], list[str]]:
    from shmipi.bench.limits import ABOUT

    rows: _Rows = []
    notes: list[str] = []
    missing = []
    for name, limit in result["limits"].items():
        if "unavailable" in limit:
            missing.append(f"{name} is unavailable: {limit['unavailable']}")
            continue
        batch = _time(limit["batch_ns"]) if "batch_ns" in limit else "-"
        rows.append([name, batch, *_percentiles(limit), _valid(limit, notes, name)])
    about = ["", "each a round trip between two pinned processes:"]
    about += [f"  {name:14} {text}" for name, text in ABOUT.items()]
    return ["limit", "batched", *_PERCENTILES, "valid"], rows, notes + missing + about


def _row_name(row: dict[str, Any]) -> str:
    words = [row["target_state"], row["doorbell"], row["sender_wait"]]
    return " ".join(word for word in words if word not in ("none", "spin"))


def _latency(result: dict[str, Any]) -> tuple[_Cells, list[_Cells], list[str]]:
    rows: _Rows = []
    notes: list[str] = []
    more = []
    for row in result["rows"]:
        name = _row_name(row)
        limit = result["limits"][row["limit"]]
        beside = limit.get("batch_ns", limit.get("p50"))
        ratio = "-"
        if row["ratio"] is not None:
            low, high = row["ratio_spread"]
            ratio = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
        rows.append(
            [
                name,
                row["handler"],
                _time(row.get("batch_ns", row["rtt_ns"]["p50"])),
                *_percentiles(row["rtt_ns"]),
                _time(row["one_way_ns"]["p50"]),
                row["limit"],
                _time(beside),
                ratio,
                _valid(row, notes, f"{name} {row['handler']}"),
            ]
        )
        if "times_faster_than_pipe" in row:
            more.append(
                f"{name} {row['handler']}: {row['times_faster_than_pipe']:.0f} times"
                " faster than a multiprocessing.Pipe round trip between the same two"
                f" processes ({_time(row['pipe_rtt_ns']['p50'])})"
            )
    header = ["target", "handler", "typical", *_PERCENTILES, "one way"]
    header += ["limit", "typical", "ratio (spread)", "valid"]
    more.append(
        "typical: the median; of polling rows and cacheline over batches without a"
        " clock inside"
    )
    more += [f"{name}: {why}" for name, why in result.get("unavailable", {}).items()]
    return header, rows, notes + more


def _controllers(result: dict[str, Any]) -> tuple[_Cells, list[_Cells], list[str]]:
    rows: _Rows = []
    notes: list[str] = []
    for row in result["rows"]:
        name = f"{row['what']} {row['target_state']} {row['handler']}"
        low, high = row["ratio_spread"]
        at_most, of_limit = row["at_most"], row.get("limit_ratio")
        rows.append(
            [
                name,
                row["controller"],
                _time(row["ns"]),
                f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})",
                "-" if at_most is None else f"{at_most:.1f}",
                {None: "-", True: "met", False: "missed"}[row["met"]],
                "-" if of_limit is None else f"{of_limit:.2f}",
                _valid_for(row, notes),
            ]
        )
    header = ["what, target, handler", "controller", "typical"]
    header += ["of the fastest (spread)", "at most", "verdict", "of cacheline", "valid"]
    more = [
        f"cacheline: {_time(result['limits']['cacheline'].get('batch_ns'))}",
        "call: smp_call_function_single(), waiting; line: a free line of the chip,"
        " raised, until its handler has counted",
        "typical: the median over blocks; of polling rows over batches without a clock"
        " inside",
    ]
    base = result["foundation"]
    if base is not None:
        low, high = base["ratio_spread"]
        more.append(
            f"the fastest, {base['controller']}, takes {base['ratio']:.2f}"
            f" ({low:.2f}-{high:.2f}) times cacheline, at most {base['at_most']}:"
            f" {'met' if base['met'] else 'missed'}"
        )
    return header, rows, notes + more


def _throughput(result: dict[str, Any]) -> tuple[_Cells, list[_Cells], list[str]]:
    rows: _Rows = []
    notes: list[str] = []
    for row in result["rows"]:
        name = f"{row['pattern']} {row['target_state']}"
        low, high = row["calls_per_s_spread"]
        rows.append(
            [
                name,
                row["handler"],
                str(row["senders"]),
                f"{row['calls_per_s'] / 1e6:.2f} M",
                f"{low / 1e6:.2f}-{high / 1e6:.2f} M",
                f"{row['ns_per_call']:.0f} ns",
                f"{row['doorbells_per_call']:.4f}",
                _valid(row, notes, f"{name} {row['handler']}"),
            ]
        )
    header = ["pattern, target", "handler", "senders", "calls/s", "spread"]
    return [*header, "per call", "doorbells/call", "valid"], rows, notes


def _boot(result: dict[str, Any]) -> tuple[_Cells, list[_Cells], list[str]]:
    rows = []
    for row in result["rows"]:
        private = row["private_kib_per_cpu"]
        rows.append(
            [
                str(row["ncpus"]),
                f"{row['boot_s']:.3f} s",
                f"{row['shutdown_s']:.3f} s",
                "-" if private is None else f"{private / 1024:.2f} MiB",
                "-"
                if row["shared_kib"] is None
                else f"{row['shared_kib'] / 1024:.2f} MiB",
            ]
        )
    return ["CPUs", "boot", "shutdown", "private per CPU", "shared"], rows, []


def _broadcast(result: dict[str, Any]) -> tuple[_Cells, list[_Cells], list[str]]:
    rows: _Rows = []
    notes: list[str] = []
    for row in result["rows"]:
        low, high = row["ns_per_cpu_spread"]
        rows.append(
            [
                str(row["ncpus"]),
                _time(row["ns_per_cpu"]),
                f"{_time(low)} - {_time(high)}",
                _time(row["total_ns"]),
                f"{row['shared_kib']} KiB",
                _valid(row, notes, f"{row['ncpus']} CPUs"),
            ]
        )
    header = ["halted CPUs", "per CPU", "spread", "broadcast", "shared", "valid"]
    return header, rows, notes


_Table: TypeAlias = Callable[[dict[str, Any]], tuple[_Cells, list[_Cells], list[str]]]
_TABLES: Final[dict[str, _Table]] = {
    "limits": _limits,
    "latency": _latency,
    "controllers": _controllers,
    "throughput": _throughput,
    "boot": _boot,
    "broadcast": _broadcast,
}
