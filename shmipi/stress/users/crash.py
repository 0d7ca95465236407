"""Crash dumps: the file is there in time, and complete but for the dead.

A machine that has crashed has no CPUs: so small ones beside this one crash, one after
the other, each in another way. Of three CPUs one keeps interrupts off, one waits for
it, and one dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from shmipi import smp
from shmipi.errors import ShmipiError
from shmipi.stress.users.base import Beside, Outcome, UserCheck, Worker

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = ["Check"]

_FILE_S = 10.0
_SPIN_S = 60.0
_PAUSE_S = 0.1
_WAYS = ("SIGKILL", "SIGSEGV", "panic")


class Check(UserCheck):
    """The check of ``crash``."""

    name: ClassVar[str] = "crash"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8")
        self.dumps = self.saved = 0
        self.slowest_ms = 0
        self._random = Random(seed)
        self._others = Beside(self._crash_others)

    def work(self) -> Worker:
        """Nothing of this happens here but time."""
        return partial(worker, self.tally)

    def host(self) -> None:
        """Begin with the others."""
        if self._others.ident is None:
            self._others.start()
        self._others.look()

    def finish(self) -> None:
        """Let the last of them end."""
        self._others.end()
        self._others.look()

    def close(self) -> None:
        """Let the last of them end, whatever has become of this machine."""
        self._others.end()

    def outcome(self) -> Outcome:
        """Return what was dumped."""
        return Outcome(
            {"crashes": self.dumps, "slowest_ms": self.slowest_ms},
            {"cpus_saved": self.saved},
        )

    def _crash_others(self, ends: threading.Event) -> None:
        missed = 0
        with tempfile.TemporaryDirectory(prefix="shmipi-stress-") as folder:
            while not ends.is_set():
                file = Path(folder, f"dump-{self.dumps}.json")
                wrong = self._crash(file, self._random.choice(_WAYS))
                self.dumps += 1
                # Who is starved of its core for a second may be missing, once.
                missed = missed + 1 if "missing" in wrong else 0
                if wrong and missed != 1:
                    self.violations.report(wrong)
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()
                ends.wait(_PAUSE_S)

    def _crash(self, file: Path, way: str) -> str:
        from shmipi.cluster import Cluster

        controller = self.cluster.controller
        with Cluster(3, idle="halt", controller=controller, crash=file) as cluster:
            cluster._machine.set_broken(self.cluster._machine.broken())
            has_no_nmi = cluster._machine.has_no_nmi()
            cluster.start(never_again, _SPIN_S, cpus=[1])
            _until_task(cluster, 1)
            cluster.start(wait_for, 1, cpus=[2])
            while not cluster.smp.cpus_peek_for_pending_ipi("1"):
                time.sleep(0.001)  # it waits when its call is there
            begun = time.monotonic()
            try:
                if way == "panic":
                    cluster.users.crash.panic("stress")
                elif way == "SIGKILL":
                    os.kill(cluster.cpus[0].pid, signal.SIGKILL)
                else:
                    segv: Any = smp.NativeHandler("count")  # of what lies at 8
                    cluster.call(0, segv, 8)
            except ShmipiError:
                pass
            while not file.exists():
                if time.monotonic() > begun + _FILE_S:
                    return f"{way} of CPU 0 made no crash dump in {_FILE_S} s"
                time.sleep(0.002)
            took = time.monotonic() - begun
            _end(cluster, 1)  # if nothing has stopped it, nor does an orderly end
        self.slowest_ms = max(self.slowest_ms, round(took * 1000))
        return self._look(json.loads(file.read_text()), way, has_no_nmi)

    def _look(self, found: dict[str, Any], way: str, has_no_nmi: bool) -> str:
        """Say what is wrong with a crash dump."""
        first, masked, waits = found["cpus"]
        if found["missing"] and not has_no_nmi:
            return f"after {way} of CPU 0, {found['missing']} is missing: it lives"
        expected = [waits] if has_no_nmi else [masked, waits]
        if way != "SIGKILL":
            expected.append(first)
        for cpu in expected:
            if not cpu["saved"] or not cpu["stack"]:
                return (
                    f"after {way} of CPU 0, CPU {cpu['cpu']} says that it has stopped"
                    " and has saved nothing"
                )
            self.saved += 1
        callers = [call["from"] for call in masked["queue"] if call["type"] == "sync"]
        if callers != ["CPU 2"]:
            return f"after {way} of CPU 0, CPU 1 is waited for by {callers}, not CPU 2"
        return ""


def _end(cluster: Cluster, cpu: int) -> None:
    seen = cluster.cpus[cpu]
    if seen.state not in ("offline", "dead"):
        os.kill(seen.pid, signal.SIGKILL)


def _until_task(cluster: Cluster, cpu: int) -> None:
    while not cluster.cpus[cpu].task:
        time.sleep(0.001)


def never_again(seconds: float) -> None:
    """Task: keep interrupts off until this CPU is stopped."""
    smp.local_irq_disable()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    smp.local_irq_enable()


def noop(info: object) -> None:
    """What is waited for."""


def wait_for(cpu: int) -> None:
    """Task: call that CPU."""
    smp.smp_call_function_single(cpu, noop, None, True)


def worker(tally: SharedArray, cpu: int, seed: int) -> Iterator[None]:
    """Let the machine go on."""
    while True:
        tally[cpu] += 1
        yield
