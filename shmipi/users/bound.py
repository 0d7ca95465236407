"""The users of IPIs bound to one machine: ``cluster.users``."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from shmipi.machine.arrays import Arrays
from shmipi.users.backtrace import Backtrace
from shmipi.users.crash import Crash
from shmipi.users.stop import Stop

if TYPE_CHECKING:
    from shmipi.users.blk import BoundBlk
    from shmipi.users.cpumap import BoundCpumap
    from shmipi.users.icache import BoundIcache
    from shmipi.users.nohz import BoundNohz
    from shmipi.users.rcu import BoundRcu
    from shmipi.users.rps import BoundRps
    from shmipi.users.scheduler import Scheduler
    from shmipi.users.tick import BoundTick
    from shmipi.users.tlb import BoundTlb

__all__ = ["BoundUsers"]


class BoundUsers:
    """``shmipi.users`` for the host of one machine: each is made at its first use."""

    def __init__(self, home: Arrays) -> None:
        self._home = home

    @cached_property
    def backtrace(self) -> Backtrace:
        """``shmipi.users.backtrace``: where every CPU is."""
        return Backtrace(self._home)

    @cached_property
    def stop(self) -> Stop:
        """``shmipi.users.stop``: ``smp_send_stop``."""
        return Stop(self._home)

    @cached_property
    def crash(self) -> Crash:
        """``shmipi.users.crash``: crash dumps, and ``panic``."""
        return Crash(self._home)

    def __repr__(self) -> str:
        return f"<users of Cluster {self._home.machine.name!r}>"

    @cached_property
    def nohz(self) -> BoundNohz:
        """CPUs that are left alone: nohz_full."""
        from shmipi.users.nohz import BoundNohz

        return BoundNohz(self._home)

    @cached_property
    def rcu(self) -> BoundRcu:
        """Read-copy update."""
        from shmipi.users.rcu import BoundRcu

        return BoundRcu(self._home)

    @cached_property
    def tick(self) -> BoundTick:
        """Timers and tick broadcast."""
        from shmipi.users.tick import BoundTick

        return BoundTick(self._home)

    @cached_property
    def tlb(self) -> BoundTlb:
        """Address spaces and TLB shootdown; see ``shmipi.users.tlb``."""
        from shmipi.users.tlb import BoundTlb

        return BoundTlb(self._home)

    @cached_property
    def cpumap(self) -> BoundCpumap:
        """Packets through bounded rings: ``shmipi.users.cpumap``."""
        from shmipi.users.cpumap import BoundCpumap

        return BoundCpumap(self._home)

    @cached_property
    def rps(self) -> BoundRps:
        """Receive packet steering: ``shmipi.users.rps``."""
        from shmipi.users.rps import BoundRps

        return BoundRps(self._home)

    @cached_property
    def blk(self) -> BoundBlk:
        """Completion of block requests: ``shmipi.users.blk``."""
        from shmipi.users.blk import BoundBlk

        return BoundBlk(self._home)

    @cached_property
    def scheduler(self) -> Scheduler:
        """``shmipi.users.scheduler`` of this machine: tasks, run queues, wake-ups."""
        from shmipi.users.scheduler import Scheduler, learn_caches

        learn_caches(self._home.machine)
        return Scheduler(self._home.machine)

    @cached_property
    def icache(self) -> BoundIcache:
        """Functions that are replaced while CPUs run them; ``shmipi.users.icache``."""
        from shmipi.users.icache import BoundIcache

        return BoundIcache(self._home)
