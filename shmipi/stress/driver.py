"""The host's side of a stress run: invokers, hotplug, kills, and the final account."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from shmipi.cluster import Cluster
from shmipi.errors import (
    CpuDiedError,
    CpuOfflineError,
    IpiTimeoutError,
    MachineDiedError,
    RemoteCallError,
)
from shmipi.stress.book import (
    BASE,
    COUNT,
    FREE,
    H_BEAT,
    H_DOING,
    H_TARGET,
    K_DRIVER,
    K_GO,
    K_LONGWAIT,
    K_PAUSE,
    K_READY,
    K_SALT,
    K_STOP,
    M_BASE,
    M_COUNT,
    M_STATE,
    STALL_S,
    STATE,
    Book,
    Ledger,
)
from shmipi.stress.invoker import invoke, on_flush
from shmipi.stress.options import PRIMITIVES, Options, selection
from shmipi.stress.report import Report, error_counts, made, statistics
from shmipi.stress.unrest import Unrest, driver_word, facts, taken

__all__ = ["torture"]

_LOOK_S: Final = 0.01
_WATCH_S: Final = 0.5
_COMPLAINTS: Final = 20  # kept; a machine that is broken has thousands
#: Counters of the machine that must not move, and the error that they are.
_CLEAN: Final = {"corrupt": "corrupt", "unraisable": "raised"}


def torture(
    options: Options,
    cluster: Cluster | None,
    line: Callable[[str], None] | None,
    progress: Callable[[float], None] | None,
) -> Report:
    """See ``shmipi.stress.run``."""
    with taken(cluster, options.machine, 1.5 * STALL_S) as machine:
        return _Driver(options, machine, line, progress).run()


class _Driver:
    def __init__(
        self,
        options: Options,
        cluster: Cluster,
        line: Callable[[str], None] | None,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.options = options
        self.cluster = cluster
        self.machine = cluster._machine
        self.line = line or (lambda text: None)
        self.progress = progress or (lambda seconds: None)
        ncpus = cluster.ncpus
        self.senders = options.senders(ncpus)
        self.weights = selection(options.weights, ncpus)
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        # Rows for every CPU, so that a later run on this machine finds the same arrays.
        self.book = Book(cluster.shared, ncpus, ncpus)
        self.book.reset()
        self.book.control[K_LONGWAIT] = round(options.longwait * 1e3)
        self.book.control[K_SALT] = self.seed & 0xFFFFFFFF
        self.book.control[K_DRIVER] = driver_word(cluster)
        self.unrest = Unrest(cluster, self, options, self.seed, options.kills)
        self.more: dict[str, int] = {}
        self.complaints: list[str] = []
        self.lock = threading.Lock()  # of everything below
        self.calls: dict[int, int] = {}  # CPU -> the call that is its invoker
        self.incarnation = [0] * ncpus
        self.beats: dict[int, tuple[int, float]] = {}

    # ---- the run ---------------------------------------------------------------------

    def run(self) -> Report:
        before = self.cluster.counters()
        begun = time.monotonic()
        self.line(f"shmipi-stress: --- Start of test: {self.parameters()}")
        for text in self.selection_dump():
            self.line(text)
        interrupted = False
        try:
            for cpu in range(self.senders):
                self.start(cpu)
            self.await_ready()
            begun = time.monotonic()
            self.book.control[K_GO] = 1
            self.unrest.start()
            self.serve(begun)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.unrest.end()
        if self.unrest.failure is not None:
            raise self.unrest.failure
        ended = time.monotonic()
        self.finish()
        self.compare(before)
        totals = self.book.totals()
        errors = error_counts(totals, self.more)
        report = Report(
            calls=sum(made(totals).values()),
            by_primitive=made(totals),
            offline={
                name: totals[f"{name}_ofl"]
                for name in ("single", "single_wait", "single_rpc")
            },
            executions=totals["executions"],
            lost=totals["lost"],
            duplicated=totals["duplicated"],
            in_flight_at_death=totals["in_flight"],
            error_counts=errors,
            hotplug=self.unrest.hotplug,
            seed=self.seed,
            duration_s=round(ended - begun, 3),
            parameters=self.parameters(),
            machine=facts(self.cluster),
            interrupted=interrupted,
            complaints=self.complaints,
        )
        self.line(statistics(totals, errors, self.unrest.hotplug, done=True))
        self.line(report.end())
        return report

    def parameters(self) -> str:
        """Return the run's parameters, as scftorture ends with them."""
        options, cluster = self.options, self.cluster
        words = [
            f"cpus={cluster.ncpus}",
            f"idle={cluster.idle}",
            f"doorbell={cluster.doorbell}",
            f"controller={cluster.controller}",
            f"nthreads={self.senders}",
            f"duration={options.duration:g}",
            f"longwait={options.longwait:g}",
            f"stutter={options.stutter:g}",
            f"stat_interval={options.stat_interval:g}",
            f"onoff_interval={options.onoff_interval:g}",
            f"kill_interval={options.kill_interval:g}",
            f"stall_interval={options.stall_interval:g}",
            f"handler={options.handler}",
            f"seed={self.seed}",
        ]
        words += [
            f"weight_{name}={options.weights.get(name, -1)}" for name in PRIMITIVES
        ]
        return " ".join(words)

    def selection_dump(self) -> Iterator[str]:
        """Yield scftorture's ``scf_sel_dump`` lines: the share of each primitive."""
        total = sum(self.weights)
        for name, weight in zip(PRIMITIVES, self.weights, strict=True):
            if weight:
                share = 100_000 * weight // total
                yield (
                    f"shmipi-stress: scf_sel_dump: {share // 1000:3}.{share % 1000:03}"
                    f" {name}"
                )

    def serve(self, begun: float) -> None:
        """Stutter, watch and print until the time is over."""
        options, control = self.options, self.book.control
        deadline = begun + options.duration
        next_line = begun + options.stat_interval
        next_watch = begun + _WATCH_S
        nap = min(_LOOK_S, options.stutter / 2) if options.stutter else 0.05
        while (now := time.monotonic()) < deadline and not self.unrest.killed.is_set():
            if self.unrest.failure is not None:
                return
            if options.stutter:
                control[K_PAUSE] = int((now - begun) / options.stutter) & 1
            if now >= next_watch:
                next_watch = now + _WATCH_S
                self.watch(now)
                self.progress(now - begun)
            if now >= next_line:
                next_line += options.stat_interval
                totals = self.book.totals()
                errors = error_counts(totals, self.more)
                self.line(statistics(totals, errors, self.unrest.hotplug, done=False))
            time.sleep(max(0.0, min(nap, deadline - now)))
        self.progress(min(time.monotonic() - begun, options.duration))

    # ---- invokers --------------------------------------------------------------------

    def start(self, cpu: int) -> None:
        """Post an invoker to ``cpu``; nobody waits for it."""
        if cpu >= self.senders:
            return
        self.incarnation[cpu] += 1
        args = (self.seed, self.incarnation[cpu], self.weights, self.options.handler)
        call = self.machine.post(cpu, invoke, args, None, True)
        with self.lock:
            self.calls[cpu] = call
            self.beats.pop(cpu, None)

    def await_ready(self) -> None:
        """Wait until every invoker has started, as scftorture does."""
        deadline = time.monotonic() + self.patience() + 0.3 * self.senders
        while self.book.control[K_READY] < self.senders:
            self.cluster._check()
            if time.monotonic() > deadline:
                self.error("stalled", "the invokers have not all started")
                return
            for cpu, call in list(self.calls.items()):
                if self.machine.done(call):  # it failed, or its CPU died
                    self.collect(cpu, call, may_die=False)
                    del self.calls[cpu]
                    self.bury(cpu)
                    self.book.control[K_READY] += 1
            time.sleep(0.002)

    def take(self, cpu: int) -> int | None:
        """Return the call of a CPU's invoker; it is the caller's to collect now."""
        with self.lock:
            return self.calls.pop(cpu, None)

    def collect(self, cpu: int, call: int, *, may_die: bool) -> None:
        """Take the end of an invoker: all but a return or its murder is an error."""
        try:
            self.machine.collect(call, cpu, STALL_S)
        except CpuDiedError:
            if not may_die:
                self.error("died", f"CPU {cpu} died by itself")
        except MachineDiedError:
            raise
        except IpiTimeoutError:
            self.error("stalled", f"CPU {cpu} died and its invoker's call is not done")
        except RemoteCallError as error:
            self.error("raised", f"the invoker of CPU {cpu} failed: {error}")

    def error(self, kind: str, text: str) -> None:
        """Count an error that the driver found, and keep its text."""
        with self.lock:
            self.more[kind] = self.more.get(kind, 0) + 1
            if len(self.complaints) < _COMPLAINTS:
                self.complaints.append(text)
        self.line(f"shmipi-stress: !!! {text}")

    def watch(self, now: float) -> None:
        """Look for invokers that ended early, and for those that do not get on."""
        self.cluster._check()  # the machine may have died
        with self.lock:
            running = dict(self.calls)
        for cpu, call in running.items():
            if self.machine.done(call):
                with self.lock:
                    # Its killer may have taken it since.
                    if self.unrest.has(cpu) or self.calls.get(cpu) != call:
                        continue
                    del self.calls[cpu]
                self.collect(cpu, call, may_die=False)
                self.bury(cpu)
                continue
            beat = int(self.book.head_words[cpu, H_BEAT])
            seen, since = self.beats.get(cpu, (-1, now))
            if beat != seen or self.book.plug[cpu] & np.uint64(1):
                self.beats[cpu] = beat, now
            elif now - since > self.patience():
                self.beats[cpu] = beat, now
                self.error(
                    "stalled", f"no progress in {now - since:.0f} s: {self.who(cpu)}"
                )

    def bury(self, cpu: int) -> None:
        """A CPU died by itself: let those who wait for it know, as for a killed one."""
        if self.state(cpu) == "dead" and not self.book.plug[cpu] & np.uint64(1):
            self.book.plug[cpu] += np.uint64(1)
            self.book.kills[cpu] += np.uint64(1)

    def patience(self) -> float:
        """Seconds without a sign of life that are too many: more than a ledger's."""
        return 1.5 * STALL_S + 4.0 * self.options.longwait + 0.1 * self.cluster.ncpus

    def who(self, cpu: int) -> str:
        """Say what a CPU's invoker does, and whom it waits for."""
        head = self.book.head_words[cpu]
        name = PRIMITIVES[int(head[H_DOING]) % len(PRIMITIVES)]
        target = int(head[H_TARGET]) - 1
        whom = (
            f"CPU {target} ({self.state(target)})"
            if 0 <= target < self.cluster.ncpus
            else "several CPUs"
        )
        return f"CPU {cpu} ({self.state(cpu)}) is in {name} to {whom}"

    def state(self, cpu: int) -> str:
        return self.cluster._cpu(cpu).state

    # ---- what is done to CPUs, as told by Unrest ----------------------------------

    def leaving(self, cpu: int) -> None:
        """The CPU may not be online from now on (its plug word becomes odd)."""
        if not self.book.plug[cpu] & np.uint64(1):
            self.book.plug[cpu] += np.uint64(1)

    def back(self, cpu: int) -> None:
        """The CPU is online again, and stays so (its plug word becomes even)."""
        # A killed one is back when its kills word is even, too: that one first.
        if self.book.kills[cpu] & np.uint64(1):
            self.book.kills[cpu] += np.uint64(1)
        if self.book.plug[cpu] & np.uint64(1):
            self.book.plug[cpu] += np.uint64(1)

    def dying(self, cpu: int) -> None:
        """It is killed next: its kills word is odd before it dies (see book.py)."""
        self.book.kills[cpu] += np.uint64(1)

    def died(self, cpu: int) -> None:
        """Take what has become of its invoker."""
        call = self.take(cpu)
        if call is not None:
            self.collect(cpu, call, may_die=True)

    def booted(self, cpu: int) -> None:
        """It gets a new invoker."""
        self.start(cpu)

    # ---- the end ---------------------------------------------------------------------

    def finish(self) -> None:
        """End the invokers, flush every queue, and judge what is left."""
        control = self.book.control
        control[K_PAUSE] = 0
        control[K_STOP] = 1
        self.unrest.all_online()  # a frozen invoker goes on, sees the word, ends
        deadline = time.monotonic() + 2.0 * self.patience()
        with self.lock:
            left, self.calls = self.calls, {}
        while left:
            seen = self.machine.event
            for cpu, call in list(left.items()):
                if self.machine.done(call):
                    del left[cpu]
                    self.collect(cpu, call, may_die=False)
                    self.bury(cpu)
            if not left or time.monotonic() > deadline:
                break
            self.cluster._check()
            self.machine.wait_event(seen, 0.1)
        for cpu, call in left.items():
            self.error("stalled", f"an invoker does not end: {self.who(cpu)}")
            self.machine.abandon(call)
        self.flush()
        self.settle_rest(set(left))

    def flush(self) -> None:
        """Two waiting calls to every CPU: after that nothing sent before can run."""
        for _ in range(2):
            for cpu in self.cluster.online_mask:
                try:
                    self.cluster.call(cpu, on_flush, None, timeout=self.patience())
                except IpiTimeoutError:
                    self.error("stalled", f"CPU {cpu} does not take the last flush")
                except CpuDiedError:
                    self.error("died", f"CPU {cpu} died by itself")
                except CpuOfflineError:
                    continue

    def settle_rest(self, running: set[int]) -> None:
        """Judge the calls of invokers that died, and look for late executions."""
        book = self.book
        for row in range(self.senders):
            if row not in running:
                Ledger(book, row, lambda cpus: None, lambda turn: None).inherit(
                    proven=True
                )
        single, many = book.single_words, book.many_words
        free = single[..., STATE] == FREE
        extra = int((single[..., COUNT] - single[..., BASE])[free].sum())
        free = many[..., M_STATE] == FREE
        extra += int((many[..., M_COUNT] - many[..., M_BASE])[free].sum())
        extra += int((book.cells[:, :, 0] - book.cells[:, :, 1])[free].sum())
        if extra:
            Ledger(book, 0, lambda cpus: None, lambda turn: None).count(
                "duplicated", extra
            )
            self.line(f"shmipi-stress: !!! {extra} executions of calls already settled")

    def compare(self, before: dict[str, Any]) -> None:
        """Look at the machine's own counters of what must not happen."""
        after = self.cluster.counters()
        for name, kind in _CLEAN.items():
            grown = int((after[name] - before[name]).sum())
            if grown:
                self.more[kind] = self.more.get(kind, 0) + grown
                self.complaints.append(f"the machine's counter {name} grew by {grown}")
