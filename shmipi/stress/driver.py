"""The host's side of a stress run: invokers, hotplug, kills, and the final account."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from shmipi.cluster import Cluster
from shmipi.errors import (
    CpuDiedError,
    CpuOfflineError,
    IpiTimeoutError,
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
from shmipi.stress.tasks import Tasks
from shmipi.stress.unrest import driver_word, facts, taken

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


class _Driver(Tasks):
    noun = "invoker"

    def __init__(
        self,
        options: Options,
        cluster: Cluster,
        line: Callable[[str], None] | None,
        progress: Callable[[float], None] | None,
    ) -> None:
        super().__init__(cluster, options, options.seed, line, progress, options.kills)
        self.options = options
        ncpus = cluster.ncpus
        self.senders = options.senders(ncpus)
        self.weights = selection(options.weights, ncpus)
        # Rows for every CPU, so that a later run on this machine finds the same arrays.
        self.book = Book(cluster.shared, ncpus, ncpus)
        self.book.reset()
        self.book.control[K_LONGWAIT] = round(options.longwait * 1e3)
        self.book.control[K_SALT] = self.seed & 0xFFFFFFFF
        self.book.control[K_DRIVER] = driver_word(cluster)
        self.more: dict[str, int] = {}
        self.complaints: list[str] = []

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

    def task_of(self, incarnation: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return invoke, (self.seed, incarnation, self.weights, self.options.handler)

    def start(self, cpu: int) -> None:
        """Post an invoker to ``cpu``, if it is to have one."""
        if cpu < self.senders:
            super().start(cpu)

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
                    self.collect(cpu, call, killed=False)
                    del self.calls[cpu]
                    self.ended(cpu)
                    self.book.control[K_READY] += 1
            time.sleep(0.002)

    def answer_s(self) -> float:
        return STALL_S

    def by_itself(self, cpu: int, error: CpuDiedError) -> None:
        self.error("died", f"CPU {cpu} died by itself")

    def failed(self, cpu: int, error: RemoteCallError) -> None:
        self.error("raised", f"the invoker of CPU {cpu} failed: {error}")

    def error(self, kind: str, text: str) -> None:
        """Count an error that the driver found, and keep its text."""
        with self.lock:
            self.more[kind] = self.more.get(kind, 0) + 1
            if len(self.complaints) < _COMPLAINTS:
                self.complaints.append(text)
        self.line(f"shmipi-stress: !!! {text}")

    def beat(self, cpu: int) -> int:
        return int(self.book.head_words[cpu, H_BEAT])

    def unplugged(self, cpu: int) -> bool:
        """Is its plug word odd: may it be anything but online?"""
        return bool(self.book.plug[cpu] & np.uint64(1))

    def excused(self, cpu: int) -> bool:
        return self.unplugged(cpu)

    def ended(self, cpu: int) -> None:
        """If its CPU is dead: let those who wait for it know, as for a killed one."""
        if self.state(cpu) == "dead" and not self.unplugged(cpu):
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

    # ---- what is done to CPUs, as told by Unrest ----------------------------------

    def leaving(self, cpu: int) -> None:
        """The CPU may not be online from now on (its plug word becomes odd)."""
        if not self.unplugged(cpu):
            self.book.plug[cpu] += np.uint64(1)

    def back(self, cpu: int) -> None:
        """The CPU is online again, and stays so (its plug word becomes even)."""
        # A killed one is back when its kills word is even, too: that one first.
        if self.book.kills[cpu] & np.uint64(1):
            self.book.kills[cpu] += np.uint64(1)
        if self.unplugged(cpu):
            self.book.plug[cpu] += np.uint64(1)

    def dying(self, cpu: int) -> None:
        """It is killed next: its kills word is odd before it dies (see book.py)."""
        self.book.kills[cpu] += np.uint64(1)

    # ---- the end ---------------------------------------------------------------------

    def finish(self) -> None:
        """End the invokers, flush every queue, and judge what is left."""
        control = self.book.control
        control[K_PAUSE] = 0
        control[K_STOP] = 1
        left = self.end_all(2.0 * self.patience())
        self.flush()
        self.settle_rest(left)

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
