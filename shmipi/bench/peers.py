"""The same work by what else there is: a process wakes another, and is answered."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil

from shmipi import _core
from shmipi.bench import option, tasks
from shmipi.bench.hist import described
from shmipi.bench.peering import PEERS
from shmipi.bench.runner import (
    Disturbance,
    Rig,
    Seen,
    Steps,
    Watch,
    choose_cores,
    machine_facts,
    median,
    split,
    spread,
)
from shmipi.report.cells import Cells, Table, percentiles, ratio, valid_for

__all__ = ["EXAMPLE", "HELP", "OURS", "Options", "run", "table"]

HELP = """\
A round trip between two pinned processes (threads where it says so) by each
of the ways that Python has to wake another one, in turns with our own waiting
call of a Python function on the same two cores, and how many times as long
each takes. Peers that are not installed are named with the reason: pip install
'shmipi[peers]' installs them; mpi4py needs mpiexec too."""
EXAMPLE = """\
shmipi bench peers
shmipi bench peers --peer Pipe,os.eventfd --calls 2k --json peers.json"""

#: Our own rows: what the target does when it is called, and for how long the sender
#: spins for the answer before it sleeps (None: as the machine does). The first is what
#: the others are compared with: its target sleeps too.
OURS: Final[dict[str, tuple[str, int | None]]] = {
    "shmipi halted": ("halt", None),
    "shmipi both asleep": ("halt", 0),
    "shmipi polling": ("poll", None),
}
_WHAT: Final = {
    "shmipi halted": "smp_call_function_single(wait=True) of a Python function to a CPU"
    " that has halted; the sender spins for a while before it sleeps",
    "shmipi both asleep": "the same, and the sender sleeps at once, as peers do",
    "shmipi polling": "the same to a CPU that polls",
}
#: A peer that says nothing for so long is given up.
_PATIENCE_S: Final = 20.0


@dataclass(frozen=True)
class Options:
    """What to measure: ``calls`` round trips by each, in ``blocks``."""

    calls: int = option.calls(1000, "round trips of each")
    warmup: int = option.warmup()
    peers: Sequence[str] = option.several(
        "peer", tuple(PEERS), f"only these: {', '.join(PEERS)}"
    )
    gap_us: float = option.gap_of_calls()
    blocks: int = option.blocks(5)
    cores: str | Sequence[int] = option.pair_of_cores()
    doorbell: str = option.doorbell()

    @property
    def gap_ns(self) -> int:
        """The pause before each round trip, in ns."""
        return round(self.gap_us * 1000)


class PeerError(Exception):
    """A peer cannot be measured: why."""


class _Process:
    """A program that measures one peer: started, asked a block at a time, ended."""

    def __init__(self, name: str, cores: Sequence[int]) -> None:
        self._name = name
        command = [sys.executable, "-m", "shmipi.bench.peering", name]
        command += [str(core) for core in cores]
        if name == "mpi4py":
            command = [*_mpiexec(), *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._waits = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._waits.register(self._process.stdout, selectors.EVENT_READ)
        self._text = b""

    def answer(self, patience_s: float) -> dict[str, Any]:
        """Return the next line of JSON that it says. ``PeerError``."""
        assert self._process.stdout is not None
        while b"\n" not in self._text:
            if not self._waits.select(patience_s):
                raise PeerError(f"it said nothing for {patience_s:.0f} s")
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                raise PeerError(f"it ended with status {self._process.wait()}")
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"it said {line[:60]!r}") from None
        if "unavailable" in found:
            raise PeerError(found["unavailable"])
        return found

    def block(self, calls: int, warmup: int, gap_ns: int, seen: Seen) -> _core.Hist:
        """Measure so many round trips, and add to ``seen`` what disturbed them."""
        assert self._process.stdin is not None
        self.stop(False)
        try:
            self._process.stdin.write(f"{calls} {warmup} {gap_ns}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(f"it is gone: {error.strerror}") from None
        found = self.answer(_PATIENCE_S + (calls + warmup) * (gap_ns / 1e9 + 0.005))
        took = _core.Hist()
        for ns in found["ns"]:
            took.record(ns)
        self.stop(True)
        seen.collections += found["collections"]
        seen.moved |= found["moved"]
        return took

    def stop(self, stops: bool) -> None:
        """Stop one that polls, or let it go on: between its blocks others are measured.

        When it returns they have stopped. ``PeerError``: it is gone, or does not.
        """
        if not PEERS[self._name].polls:
            return
        try:
            first = psutil.Process(self._process.pid)
            every = [first, *first.children(recursive=True)]
            for process in every:
                if stops:
                    process.suspend()
                else:
                    process.resume()
            end = time.monotonic() + _PATIENCE_S
            while stops and any(
                process.status() != psutil.STATUS_STOPPED for process in every
            ):
                if time.monotonic() > end:
                    raise PeerError("it polls, and cannot be stopped")
                time.sleep(0.001)
        except psutil.Error as error:
            raise PeerError(f"it is gone: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        with suppress(PeerError):
            self.stop(False)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._waits.close()


def _mpiexec() -> list[str]:
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise PeerError("there is no mpiexec")
    return [found, "-n", "2"]


@dataclass
class Row:
    """What was measured of one peer, or of our own."""

    peer: str
    what: str
    version: str | None = None
    rtt: _core.Hist = field(default_factory=_core.Hist)
    blocks: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    trips: int = 0
    #: Its sender sleeps for the answer, and is interrupted too.
    both: bool = False

    def add(self, took: _core.Hist, trips: int) -> None:
        """Add a block."""
        self.rtt.merge(took)
        self.blocks.append(float(took.quantile(0.5)))
        self.trips += trips

    def as_json(self, ours: Row) -> dict[str, Any]:
        """Return the row of a document, beside our own."""
        ratios = [
            its / mine for its, mine in zip(self.blocks, ours.blocks, strict=True)
        ]
        row: dict[str, Any] = {
            "bench": "peers",
            "peer": self.peer,
            "what": self.what,
            "calls": self.rtt.count,
            "rtt_ns": described(self.rtt),
            "ratio": median(ratios),
            "ratio_spread": spread(ratios),
            "ratio_blocks": ratios,
            **self.seen.ending(self.trips, self.seen.why(None), both=self.both),
        }
        if self.version is not None:
            row["version"] = self.version
        return row


class _Run:
    """A run: our rig, the peers that there are, and why others are not."""

    def __init__(self, options: Options, rig: Rig, stack: ExitStack) -> None:
        self.options, self.rig = options, rig
        self.ours = {
            name: Row(name, _WHAT[name], both=spin_ns == 0)
            for name, (_, spin_ns) in OURS.items()
        }
        self.peers: dict[str, tuple[Row, _Process]] = {}
        self.unavailable: dict[str, str] = {}
        for name in options.peers:
            try:
                process = stack.enter_context(_Process(name, rig.cores))
                told = process.answer(_PATIENCE_S)
                process.stop(True)
            except PeerError as error:
                self.unavailable[name] = str(error)
            else:
                row = Row(name, PEERS[name].what, told["version"])
                self.peers[name] = row, process

    def block(self, calls: int, steps: Steps) -> None:
        """Measure a block of all, our own first."""
        warmup, gap_ns = self.options.warmup, self.options.gap_ns
        for name, row in self.ours.items():
            steps(name)
            idle, spin_ns = OURS[name]
            self.rig.idle(1, idle)
            polls = idle == "poll"
            state = _core.POLLING if polls else _core.HALTED
            how = (calls, warmup, 0 if polls else gap_ns, state, spin_ns)
            try:
                with Disturbance(self.rig, 1, row.seen):
                    took, *_ = self.rig.run(0, tasks.python_calls, 1, *how)
            finally:
                self.rig.idle(1, "halt")
            row.add(took, calls + warmup)
        for name, (row, process) in list(self.peers.items()):
            steps(name)
            try:
                with Watch(self.rig.cores, row.seen):
                    took = process.block(calls, warmup, gap_ns, row.seen)
            except PeerError as error:
                self.unavailable[name] = str(error)
                del self.peers[name]
                continue
            row.add(took, calls + warmup)


def run(
    options: Options, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Measure and return the document of ``bench peers``, without its schema.

    ``ratio`` is the median over blocks of (a peer's median / that of ours to a halted
    CPU in that block). Real IPIs of a peer are those that both cores took.

    Raises ``CommandError`` for cores that cannot be used, and what a boot raises; peers
    that cannot be had here are listed under ``unavailable``.
    """
    cores = choose_cores(options.cores)
    with ExitStack() as stack:
        rig = stack.enter_context(Rig(cores, doorbell=options.doorbell))
        if progress is not None:
            progress("starting the peers")
        state = _Run(options, rig, stack)
        kinds = len(state.ours) + len(state.peers)
        steps = Steps(progress, kinds * options.blocks)
        for part in split(options.calls, options.blocks):
            state.block(part, steps)
        ours = state.ours["shmipi halted"]
        rows = [*state.ours.values(), *(row for row, _ in state.peers.values())]
        result = {
            "bench": "peers",
            "machine": machine_facts(sender_core=cores[0], target_core=cores[1]),
            "timer_ns": rig.timer_ns,
            "clock": rig.clock,
            "gap_us": options.gap_us,
            "calls": options.calls,
            "blocks": options.blocks,
            "gc": False,
            "rows": [row.as_json(ours) for row in rows],
        }
    if state.unavailable:
        result["unavailable"] = state.unavailable
    return result


def table(result: dict[str, Any]) -> Table:
    """Return the document as a table for people."""
    rows: list[Cells] = []
    notes: list[str] = []
    for row in sorted(result["rows"], key=lambda row: row["ratio"]):
        real = row["real_ipis_per_call"]
        version = f" {row['version']}" if row.get("version") else ""
        rows.append(
            [
                f"{row['peer']}{version}",
                *percentiles(row["rtt_ns"]),
                ratio(row, "ratio"),
                "-" if real is None else f"{real:.2f}",
                valid_for(row, notes),
            ]
        )
    notes.append("times: as long as shmipi halted in the same block (spread of these)")
    notes += [f"{row['peer']}: {row['what']}" for row in result["rows"]]
    notes += [
        f"{name} is not here: {why}"
        for name, why in result.get("unavailable", {}).items()
    ]
    header = ["peer", "p50", "p90", "p99", "p99.9", "max", "times (spread)"]
    return [*header, "real IPIs", "valid"], rows, notes
