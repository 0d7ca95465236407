"""What it costs to replace a function that other CPUs run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmipi import _core, smp
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.users.icache import Text

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_NAME = "bench.icache"


class Poke(UserRow):
    """text_poke() of a native function: every CPU drops what it has fetched."""

    raw = "broadcast"

    def __init__(self, ncpus: int) -> None:
        self.ncpus = ncpus
        self.what = "text_poke of a native function"
        if ncpus > 2:
            self.share = 0.1

    def prepare(self, rig: Rig) -> None:
        """Make the table, and the function if no other row has."""
        icache = rig.cluster.users.icache
        try:
            self.text = icache.text(_NAME)
        except KeyError:
            self.text = icache.define(_NAME, smp.NativeHandler("noop"))

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Replace it again and again."""
        took: _core.Hist = rig.run(0, pokes, self.text, calls, warmup, gap_ns)
        return took


def pokes(text: Text, calls: int, warmup: int, gap_ns: int) -> _core.Hist:
    """Task: clock each replacement."""
    took, clock = _core.Hist(), time.perf_counter_ns
    functions = smp.NativeHandler("noop"), smp.NativeHandler("count")
    for number in range(-warmup, calls):
        _core.bench_await(1, _core.HALTED, gap_ns)
        function = functions[number & 1]
        begun = clock()
        text.text_poke(function)
        if number >= 0:
            took.record(clock() - begun)
    return took


def rows() -> list[UserRow]:
    """Return the rows."""
    return [Poke(2), Poke(64)]
