"""What a report says of each document: a finding, pictures, and its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from shmipi.report import replay
from shmipi.report.page.plot import Picture
from shmipi.report.page.rows import Row, rows_of
from shmipi.report.page.times import times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Plate", "Section", "sections"]


@dataclass(frozen=True)
class Plate:
    """A picture with its title, and what has to be said to read it."""

    title: str
    text: str
    picture: Picture


@dataclass(frozen=True)
class Section:
    """What a report says of a document. ``finding`` marks its figures by ``**``."""

    document: dict[str, Any]
    finding: str
    plates: list[Plate] = field(default_factory=list)

    @property
    def bench(self) -> str:
        """The name of the bench; of what `shmipi replay` wrote that of the command."""
        return str(self.document.get("bench"))

    @property
    def command(self) -> str:
        """What has written it."""
        return "replay" if self.bench == "replay" else f"bench {self.bench}"

    @property
    def heading(self) -> str:
        """What stands above it."""
        title = self.bench.capitalize()
        return f"{title}: {self.document['file']}" if self.bench == "replay" else title

    def numbered(self, number: int) -> Section:
        """Return it as the second, third ... of its kind: no picture has two names."""
        if number == 1:
            return self
        plates = [
            replace(
                plate,
                picture=replace(plate.picture, name=f"{plate.picture.name}-{number}"),
            )
            for plate in self.plates
        ]
        return replace(self, plates=plates)


def sections(documents: Sequence[dict[str, Any]]) -> list[Section]:
    """Return a section for each document, the one that says most first."""
    seen: Counter[str] = Counter()
    found = []
    for document in documents:
        one = _section(document)
        seen[one.bench] += 1
        found.append(one.numbered(seen[one.bench]))
    order = list(_MAKERS)
    known = [one for one in found if one.bench in order]
    known.sort(key=lambda one: order.index(one.bench))
    return known + [one for one in found if one.bench not in order]


def _section(document: dict[str, Any]) -> Section:
    make = _MAKERS.get(str(document.get("bench")))
    if make is None:
        return Section(document, "")
    finding, plates = make(document)
    return Section(document, finding, plates)


_Made = tuple[str, list[Plate]]


def _plate(
    document: dict[str, Any],
    name: str,
    title: str,
    text: str,
    draw: Callable[[], Figure],
) -> Plate:
    about = f"{title}. {text}"
    return Plate(title, text, Picture(f"{document['bench']}-{name}", about, draw))


# ---- latency, limits -----------------------------------------------------------------


def _latency(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = rows_of(document)
    native = [row for row in rows if row.handler == "native"] or rows
    polling = next((row for row in native if row.state == "polling"), None)
    halted = [row for row in native if row.state == "halted"]
    woken = next((row for row in halted if "park" not in row.group), None)
    said = []
    if polling is not None:
        said.append(f"A call to a CPU that polls takes **{times(polling.ns)}**")
    if woken is not None:
        what = f"waking one that is halted takes **{times(woken.ns)}**"
        if polling is None:
            what = f"Waking a CPU that is halted takes **{times(woken.ns)}**"
        else:
            what += f", {woken.ns / polling.ns:.3g} times as long"
        if woken.ratio is not None:
            what += (
                f"{', and' if polling else ':'} {woken.ratio:.2f} times what its bare"
                " system call takes"
            )
        said.append(what)
    elif polling is not None and polling.ratio is not None:
        said.append(f"that is {polling.ratio:.2f} times its limit")
    if not said and rows:
        said.append(f"{rows[0].name} takes **{times(rows[0].ns)}**")
    few = _few(native)
    plates = [
        _plate(
            document,
            "rows",
            "Each call beside its limit",
            "Medians of round trips. Filled: a C handler, hollow: a Python one; the bar"
            " is the same system call with nothing of shmipi; the whisker ends at p99;"
            " at the right, times the limit.",
            lambda: pictures.beside_limits(rows),
        ),
        _plate(
            document,
            "percentiles",
            "Where the tail is",
            "Each step to the right is ten times rarer. Above 99 % it is this"
            " computer's other work, not the mechanism.",
            lambda: pictures.percentiles(few),
        ),
        _plate(
            document,
            "distribution",
            "Distribution",
            "C handler in colour; its limit in grey.",
            lambda: pictures.distribution(few),
        ),
    ]
    return f"{'; '.join(said)}." if said else "", plates if rows else []


def _few(rows: Sequence[Row]) -> list[Row]:
    """Return those that differ most: of each state the first, and both asleep."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.times is not None and "hist" in row.times:
            found.setdefault(row.state + " park" * ("park" in row.group), row)
    return list(found.values())


def _limits(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = rows_of(document)
    by_name = {row.group: row for row in rows}
    said = []
    if "floor" in by_name:
        said.append(
            "A cache line goes to another core and back in"
            f" **{times(by_name['floor'].ns)}**"
        )
    if "futex" in by_name:
        said.append(
            "a process that sleeps is woken and answers in"
            f" **{times(by_name['futex'].ns)}**"
        )
    if not rows:
        return "", []
    plate = _plate(
        document,
        "rows",
        "What this computer can do at best",
        "Raw round trips between two pinned processes: the median, a whisker to p99.",
        lambda: pictures.beside_limits(rows),
    )
    return (_upper("; ".join(said)) + "." if said else ""), [plate]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---- core to core, and what the mechanisms cost --------------------------------------


def _matrix(document: dict[str, Any]) -> _Made:
    rows = document["rows"]
    said, plates = [], []
    for state in dict.fromkeys(str(row["target_state"]) for row in rows):
        own = [row for row in rows if row["target_state"] == state]
        values = sorted(row["rtt_ns"]["p50"] for row in own)
        far = max(own, key=lambda row: float(row["rtt_ns"]["p50"]))
        spread = f"**{times(values[0])}** to **{times(values[-1])}**"
        if times(values[0]) == times(values[-1]):
            spread = f"**{times(values[0])}**"
        what = "polls" if state == "polling" else f"is {state}"
        said.append(
            f"to a core that {what} {spread}"
            + (
                f" (from {far['sender_core']} to {far['target_core']})"
                if len(own) > 2
                else ""
            )
        )
        text = f"Row calls column, median of round trips in µs, target {state}."
        if document.get("sampled"):
            text += f" {document['pairs']} of {document['pairs_of']} pairs."
        plates.append(
            _plate(
                document,
                f"heat-{state}",
                f"Core to core, {state}",
                text,
                _heat(document, own),
            )
        )
    return f"A call takes, {'; '.join(said)}." if said else "", plates


def _heat(document: dict[str, Any], own: list[dict[str, Any]]) -> Callable[[], Figure]:
    from shmipi.report.page import pictures

    found = {
        (row["sender_core"], row["target_core"]): float(row["rtt_ns"]["p50"])
        for row in own
    }
    asked = document.get("cores")
    cores: list[int] = sorted({core for pair in found for core in pair})
    if isinstance(asked, list) and set(asked) >= set(cores):
        cores = asked
    grid = [[found.get((one, other)) for other in cores] for one in cores]
    names = [f"core {core}" for core in cores]
    return lambda: pictures.heat(grid, cores, names)


def _gap(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["idle"], row["doorbell"]), []).append(row)
    for curve in curves.values():
        curve.sort(key=lambda row: float(row["gap_us"]))
    halted = [(key, curve) for key, curve in curves.items() if key[0] == "halt"]
    if not rows:
        return "", []
    key, curve = next(
        (one for one in halted if one[0][1] == "futex"),
        (halted or list(curves.items()))[0],
    )
    first, last = curve[0], curve[-1]
    finding = (
        f"After {times(first['gap_us'] * 1e3)} of idleness a call ({_curve(*key)})"
        f" takes **{times(first['rtt_ns']['p50'])}**, after"
        f" {times(last['gap_us'] * 1e3)} **{times(last['rtt_ns']['p50'])}**."
    )

    def drawn(keys: list[tuple[str, str]]) -> list[pictures.Line]:
        return [
            pictures.Line(
                _curve(*one),
                [(row["gap_us"] * 1e3, row["rtt_ns"]["p50"]) for row in curves[one]],
            )
            for one in keys
        ]

    bell = key[1]
    policies = [one for one in curves if one[1] in (bell, "none")]
    bells = [one for one in curves if one[0] == "halt"]
    plates = [
        _plate(
            document,
            "idle",
            "What idleness costs",
            f"Median round trip by how long the target was idle, {bell}.",
            lambda: pictures.lines(
                drawn(policies), across="idle before the call", time_across=True
            ),
        )
    ]
    if len(bells) > 1:
        plates.append(
            _plate(
                document,
                "doorbells",
                "By doorbell",
                "The same of CPUs that halt at once.",
                lambda: pictures.lines(
                    drawn(bells), across="idle before the call", time_across=True
                ),
            )
        )
    return finding, plates


def _curve(idle: str, doorbell: str) -> str:
    return idle if doorbell == "none" else f"{idle}, {doorbell}"


def _scale(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    if not rows:
        return "", []
    last = max(rows, key=lambda row: (row["what"] == "broadcast", int(row["ncpus"])))
    finding = (
        f"A {last['what'].replace('_', ' ')} over **{last['ncpus']:,}** halted CPUs"
        f" takes **{times(last['ns_per_cpu'])}** for each"
    )
    if last.get("ratio") is not None:
        finding += (
            f", {last['ratio']:.2f} times the raw wake-up of as many plain processes"
        )
    words = {"broadcast": "broadcast", "all_to_all": "all to all"}

    def drawn(figure: str, raw: str) -> list[pictures.Line]:
        found = []
        for what in dict.fromkeys(str(row["what"]) for row in rows):
            own = [row for row in rows if row["what"] == what]
            for name, key, grey in (
                (words.get(what, what), figure, False),
                (f"raw, {words.get(what, what)}", raw, True),
            ):
                points = [
                    (row["ncpus"], row[key]) for row in own if row.get(key) is not None
                ]
                found.append(pictures.Line(name, points, grey=grey))
        return [line for line in found if any(y > 0 for _, y in line.points)]

    plates = [
        _plate(
            document,
            "times",
            "With the number of CPUs",
            "Time for each CPU; dashed: as many plain processes, woken raw.",
            lambda: pictures.lines(
                drawn("ns_per_cpu", "raw_ns_per_cpu"), across="CPUs"
            ),
        )
    ]
    if drawn("switches_per_cpu", "raw_switches_per_cpu"):
        plates.append(
            _plate(
                document,
                "switches",
                "Context switches",
                "Of each CPU in one round; dashed: of the plain processes.",
                lambda: pictures.lines(
                    drawn("switches_per_cpu", "raw_switches_per_cpu"),
                    across="CPUs",
                    time_up=False,
                ),
            )
        )
    return finding + ".", plates


def _victim(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    if not rows:
        return "", []

    def name(row: dict[str, Any]) -> str:
        if row["source"] != "shmipi":
            return str(row["source"])
        return f"{row['doorbell']}, {row['handler']}"

    rate = max(int(row["rate"]) for row in rows)
    own = [row for row in rows if row["rate"] == rate and row["source"] == "shmipi"]
    kernel = [row for row in rows if row["rate"] == rate and row["source"] != "shmipi"]
    said = []
    if own:
        best = min(own, key=lambda row: float(row["lost_share"]))
        said.append(
            f"A busy CPU loses **{best['lost_share']:.1%}** of its work to {rate:,}"
            f" IPIs a second asked for ({name(best)}; {best['achieved']:,.0f} came)"
        )
    if kernel:
        said.append(
            f"{kernel[0]['source']}, the kernel's own, takes"
            f" **{kernel[0]['lost_share']:.1%}**"
        )
    found = [
        pictures.Line(
            one,
            [
                (row["rate"], 100 * row["lost_share"])
                for row in rows
                if name(row) == one and row["lost_share"] > 0
            ],
            grey=one == "membarrier",
        )
        for one in dict.fromkeys(map(name, rows))
    ]
    found = [line for line in found if line.points]
    plate = _plate(
        document,
        "lines",
        "What interrupts take from a busy CPU",
        "Share of its work that is lost, %, by IPIs a second. What is below what can be"
        " measured is left out.",
        lambda: pictures.lines(
            found, across="IPIs a second", up="% of work lost", time_up=False
        ),
    )
    return "; ".join(said) + ".", [plate] if found else []


def _peers(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = sorted(document["rows"], key=lambda row: float(row["rtt_ns"]["p50"]))
    if not rows:
        return "", []
    ours = next((row for row in rows if row["peer"] == "shmipi halted"), None)
    others = [row for row in rows if not row["peer"].startswith("shmipi")]
    finding = ""
    if ours is not None and others:
        near, far = others[0], others[-1]
        finding = (
            f"A call that wakes a halted CPU takes **{times(ours['rtt_ns']['p50'])}**;"
            f" {near['peer']} takes {near['ratio']:.2f} times that, {far['peer']}"
            f" **{far['ratio']:.3g} times**."
        )
    shown = [
        Row(
            row["peer"],
            "",
            "halted" if row["peer"].startswith("shmipi") else "polling",
            row["rtt_ns"]["p50"],
            row["rtt_ns"]["p99"],
            "shmipi halted",
            ours["rtt_ns"]["p50"] if ours is not None else None,
            row.get("ratio"),
            row.get("valid", True),
        )
        for row in rows
    ]
    return finding, [
        _plate(
            document,
            "rows",
            "The same work through others",
            "Median round trips, a whisker to p99; the bar is a shmipi call to a halted"
            " CPU; at the right, times that.",
            lambda: pictures.beside_limits(shown),
        )
    ]


def _storm(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    if not rows:
        return "", []
    best = max(rows, key=lambda row: float(row["calls_per_s"]))
    finding = (
        f"In a storm of {best['ncpus']} CPUs ({best['pattern'].replace('_', ' ')})"
        f" **{best['calls_per_s'] / 1e6:.3g} million** calls a second arrive,"
        f" **{best['coalesced_per_call']:.1%}** of them without a doorbell of their"
        " own."
    )
    shown = [
        Row(
            f"{row['pattern'].replace('_', ' ')}, {row['ncpus']} CPUs",
            "native" if row["wait"] == "wait" else "python",
            "running",
            1e9 / row["calls_per_s"],
            valid=row.get("valid", True),
        )
        for row in rows
        if row["calls_per_s"] > 0
    ]
    return finding, [
        _plate(
            document,
            "rows",
            "Storms",
            "Time for each call, of all CPUs together. Filled: waited for, hollow:"
            " not.",
            lambda: pictures.beside_limits(shown),
        )
    ]


def _kernel(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    if not rows:
        return "", []
    said = [
        f"{_KERNEL.get(row['what'], row['what'])} takes"
        f" **{times(row['rtt_ns']['p50'])}**"
        for row in rows[:2]
    ]
    shown = [
        Row(
            " ".join(str(row[key]) for key in ("what", "vector") if row.get(key)),
            "",
            "running",
            row["rtt_ns"]["p50"],
            row["rtt_ns"]["p99"],
            valid=row.get("valid", True),
        )
        for row in rows
    ]
    return f"The kernel's own: {', '.join(said)}.", [
        _plate(
            document,
            "rows",
            "What the kernel's own IPIs cost here",
            "The median, a whisker to p99.",
            lambda: pictures.beside_limits(shown),
        )
    ]


_KERNEL: Final = {
    "membarrier": "membarrier on a busy core",
    "mprotect": "a TLB shootdown by mprotect",
}


def _norov(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    if not rows:
        return "", []
    normal = next((row for row in rows if row["what"] == "normal IPI"), rows[0])
    finding = f"A {normal['what']} takes **{times(normal['typical_ns'])}**"
    if normal.get("times_dry"):
        finding += f", {normal['times_dry']:.3g} times the dry run"
    shown = [
        Row(
            row["what"],
            row["flavour"],
            "halted",
            row["typical_ns"],
            row["ns"]["p99"],
            valid=row.get("valid", True),
        )
        for row in rows
    ]
    return finding + ".", [
        _plate(
            document,
            "rows",
            "As the kernel's IPI benchmark has it",
            "Filled: C, hollow: Python. A self-IPI sends none: the function is called.",
            lambda: pictures.beside_limits(shown),
        )
    ]


# ---- users, controllers, irq ---------------------------------------------------------


def _users(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = rows_of(document)
    promised = [row for row in document["rows"] if row.get("at_most") is not None]
    met = sum(bool(row["met"]) for row in promised)
    finding = (
        f"**{met} of {len(promised)}** uses of IPIs cost no more than is promised of"
        " the raw calls that they are made of."
        if promised
        else ""
    )
    plate = _plate(
        document,
        "rows",
        "What IPIs are for, beside the raw calls",
        "Medians. Filled: C, hollow: Python; the bar is the raw call of the same run;"
        " at the right, times that call.",
        lambda: pictures.beside_limits(rows),
    )
    return finding, [plate] if rows else []


def _controllers(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = rows_of(document)
    return _span_of(rows, "Through {n} controllers a call to a CPU that polls takes"), [
        _plate(
            document,
            "rows",
            "Through each controller",
            "Medians. Filled: a C handler, hollow: a Python one; by the target's"
            " state.",
            lambda: pictures.dots(rows),
        )
    ] if rows else []


def _irq(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = rows_of(document)
    return _span_of(
        rows,
        "An IPI of a domain is handled by a CPU that polls, through {n} controllers,"
        " after",
    ), [
        _plate(
            document,
            "rows",
            "IPIs of a domain",
            "Until the handler of the requested irq has counted: medians. Filled: C,"
            " hollow: Python; by the target's state.",
            lambda: pictures.dots(rows),
        )
    ] if rows else []


def _span_of(rows: Sequence[Row], words: str) -> str:
    chosen = [row for row in rows if row.state == "polling"]
    chosen = [row for row in chosen if row.handler == "native"] or chosen
    if not chosen:
        return ""
    low, high = min(row.ns for row in chosen), max(row.ns for row in chosen)
    said = words.format(n=len({row.group for row in chosen}))
    if times(low) == times(high):
        return f"{said} **{times(low)}**."
    return f"{said} **{times(low)}** to **{times(high)}**."


# ---- over many CPUs ------------------------------------------------------------------


def _throughput(document: dict[str, Any]) -> _Made:
    rows = document["rows"]
    if not rows:
        return "", []
    best = max(rows, key=lambda row: float(row["calls_per_s"]))
    finding = (
        f"**{best['calls_per_s'] / 1e6:.3g} million** calls a second that nobody waits"
        f" for reach one CPU ({best['handler']}, {best['target_state']})"
    )
    if best.get("ratio") is not None:
        finding += f", {best['ratio']:.2f} times what a bare queue passes"
    shown = [
        Row(
            f"{row['pattern'].replace('_', ' ')}, {row['target_state']}",
            row["handler"],
            row["target_state"],
            row["ns_per_call"],
            None,
            "queue",
            1e9 / row["limit_per_s"] if row.get("limit_per_s") else None,
            row["ns_per_call"] * row["limit_per_s"] / 1e9
            if row.get("limit_per_s")
            else None,
            valid=row.get("valid", True),
        )
        for row in rows
    ]
    from shmipi.report.page import pictures

    return finding + ".", [
        _plate(
            document,
            "rows",
            "Calls that nobody waits for",
            "Time for each. Filled: C, hollow: Python; the bar is a bare queue; at the"
            " right, times the queue's.",
            lambda: pictures.beside_limits(shown),
        )
    ]


def _broadcast(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    if not rows:
        return "", []
    last = max(rows, key=lambda row: int(row["ncpus"]))
    finding = (
        f"A call of all **{last['ncpus']:,}** halted CPUs at once takes"
        f" **{times(last['ns_per_cpu'])}** for each, {times(last['total_ns'])} in all."
    )
    found = [
        pictures.Line(
            "median", [(row["ncpus"], row["ns_per_cpu"]) for row in rows], "halted"
        ),
        pictures.Line(
            "the very first",
            [(row["ncpus"], row["first_ns_per_cpu"]) for row in rows],
            grey=True,
        ),
    ]
    return finding, [
        _plate(
            document,
            "lines",
            "A call of all CPUs",
            "Time for each CPU that was halted; they share the cores.",
            lambda: pictures.lines(found, across="CPUs called"),
        )
    ]


def _boot(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    if not rows:
        return "", []
    last = max(rows, key=lambda row: int(row["ncpus"]))
    finding = (
        f"A machine of **{last['ncpus']:,} CPUs** boots in"
        f" **{times(last['boot_s'] * 1e9)}**, {last['ratio']:.3g} times what as many"
        " raw forks take."
    )
    found = [
        pictures.Line("boot", [(r["ncpus"], r["boot_s"] * 1e9) for r in rows]),
        pictures.Line("raw forks", [(r["ncpus"], r["fork_s"] * 1e9) for r in rows]),
        pictures.Line("end", [(r["ncpus"], r["shutdown_s"] * 1e9) for r in rows]),
    ]
    return finding, [
        _plate(
            document,
            "lines",
            "Boot and end",
            "Until every CPU is online; until every process is gone.",
            lambda: pictures.lines(found, across="CPUs"),
        )
    ]


def _death(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    rows = document["rows"]
    if not rows:
        return "", []
    worst = max(row["told_s"] for row in rows)
    found = [
        pictures.Line("median", [(r["ncpus"], r["told_s"] * 1e9) for r in rows]),
        pictures.Line("longest", [(r["ncpus"], r["told_max_s"] * 1e9) for r in rows]),
    ]
    return (
        f"Who waits for a CPU that dies is told after **{times(worst * 1e9)}**.",
        [
            _plate(
                document,
                "lines",
                "The death of a CPU",
                "From the signal that killed it until who waited for it was told.",
                lambda: pictures.lines(found, across="CPUs of the machine"),
            )
        ],
    )


# ---- a kernel's trace ----------------------------------------------------------------


def _replay(document: dict[str, Any]) -> _Made:
    from shmipi.report.page import pictures

    kernel, changed = document["kernel"], document["what_if"]
    finding = (
        f"Of {kernel['queued']:,} calls the kernel's CPUs rang for {kernel['rung']:,},"
        f" the replay's for **{document['replay']['rung']:,}**"
    )
    where = kernel["queue_to_function_us"]["p50"]
    here = document["replay"]["queue_to_function_us"]["p50"]
    if where is not None and here is not None:
        finding += (
            f"; a call's function began after {times(where * 1e3)} there and"
            f" **{times(here * 1e3)}** here"
        )
    if document["on_time"] is not None:
        finding += f"; {document['on_time']:.1%} of sends were on time"
    if changed is not None:
        finding += f". {_upper(changed['words'][0])}"
    rows = list(_replayed(document))
    counts = list(_replay_counts(document))
    names = [name for name, _ in replay.sides(document)]
    hollow = f", hollow: the replay with {names[2]}" if changed is not None else ""
    plates = []
    if rows:
        plates.append(
            _plate(
                document,
                "rows",
                "How long it took",
                f"Medians, a whisker to p99. Filled: the replay{hollow}; the bar is the"
                " kernel in its trace; at the right, times that.",
                lambda: pictures.beside_limits(rows),
            )
        )
    plates.append(
        _plate(
            document,
            "counts",
            "How many",
            f"From above: {', '.join(names)}.",
            lambda: pictures.bars(counts),
        )
    )
    return f"{finding}.", plates


def _replayed(document: dict[str, Any]) -> Iterator[Row]:
    """Yield what took how long: calls, then each vector."""
    kernel, *others = (side for _, side in replay.sides(document))
    vectors = sorted({name for side in others for name in side["ipi"]})
    for vector in ("", *vectors):
        what = f"{_spaced(vector)}, sent to taken" if vector else "queued to function"
        there = _quantiles(kernel, vector)
        for number, side in enumerate(others):
            here = _quantiles(side, vector)
            if not here or not here["p50"]:
                continue
            base = there["p50"] * 1e3 if there and there["p50"] else None
            ns = here["p50"] * 1e3
            yield Row(
                what,
                "python" if number else "native",
                "running",
                ns,
                here["p99"] * 1e3,
                "the kernel",
                base,
                ns / base if base else None,
                valid=document["valid"],
            )


def _quantiles(side: dict[str, Any], vector: str) -> dict[str, Any] | None:
    if not vector:
        found: dict[str, Any] | None = side["queue_to_function_us"]
    else:
        found = side["ipi"].get(vector, {}).get("send_to_entry_us")
    return found


def _replay_counts(document: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Yield what was counted, on each side: none where all are 0."""
    sides = [side for _, side in replay.sides(document)]
    for name in ("queued", "rung", "coalesced", "elided", "unseen", "entries_local"):
        values = [int(side[name]) for side in sides]
        if any(values):
            yield _COUNTED[name], values
    for vector in sorted({name for side in sides for name in side["ipi"]}):
        values = [side["ipi"].get(vector, {}).get("sent", 0) for side in sides]
        if any(values):
            yield f"{_spaced(vector)} sent", values


_COUNTED: Final = {
    "queued": "calls queued",
    "rung": "with an IPI",
    "coalesced": "coalesced",
    "elided": "elided",
    "unseen": "run unseen",
    "entries_local": "run locally",
}


def _spaced(vector: str) -> str:
    return vector.replace("_", " ")


_Maker = Callable[[dict[str, Any]], _Made]
_MAKERS: Final[dict[str, _Maker]] = {
    "latency": _latency,
    "replay": _replay,
    "matrix": _matrix,
    "gap": _gap,
    "scale": _scale,
    "victim": _victim,
    "peers": _peers,
    "storm": _storm,
    "kernel": _kernel,
    "norov": _norov,
    "limits": _limits,
    "users": _users,
    "irq": _irq,
    "controllers": _controllers,
    "throughput": _throughput,
    "broadcast": _broadcast,
    "boot": _boot,
    "death": _death,
}
