"""Receive packet steering (``net/core/dev.c``): which CPU does a packet's protocol.

The CPU that gets a packet from a device calls ``netif_rx`` or ``netif_receive_skb``.
``get_rps_cpu`` chooses by the packet's flow: with a map alone (RPS) by the flow's hash,
with two flow tables (RFS) the CPU on which a task last read that flow (``recv``), once
all its earlier packets have left the old CPU's backlog. The packet goes on that CPU's
backlog, and its CPU is told by one IPI until the backlog is empty; a CPU sends the IPIs
of a poll together, when it ends. There the NET_RX softirq delivers. A backlog takes
``max_backlog`` + 1 packets; what finds it full is dropped and counted.

On the host ``cluster.users.rps`` has the settings; on CPUs there are the functions of
this module. A backlog of a CPU that was killed goes to others, and all is accounted
for: in = delivered + dropped + died + queued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.machine.arrays import Arrays
from shmipi.users import net
from shmipi.users.state import state

__all__ = [
    "NET_RX_DROP",
    "NET_RX_SUCCESS",
    "BoundRps",
    "RpsStats",
    "generate",
    "get_rps_cpu",
    "netif_receive_skb",
    "netif_rx",
    "recv",
    "rps_record_sock_flow",
]

NET_RX_SUCCESS: Final = 0
NET_RX_DROP: Final = 1

#: What a machine's flow tables have room for.
FLOWS: Final = 4096
#: The kernel's default of net.core.netdev_max_backlog; a machine's is at most this.
MAX_BACKLOG: Final = 1000
_EINVAL: Final = -22
_SOCK, _DEV, _BACKLOG, _WEIGHT, _BUDGET, _LIMIT_LEN, _LIMIT = range(7)


class RpsStats(NamedTuple):
    """Counts of a CPU (``/proc/net/softnet_stat``), or of all."""

    in_: int  #: packets that this CPU has handed in
    delivered: int  #: here
    dropped: int  #: of those handed in here: the backlog they went to was full
    died: int  #: in its hand when it was killed: may or may not be delivered
    queued: int  #: on its backlog now
    ipis: int  #: that it has sent
    received_rps: int  #: that it has got
    time_squeeze: int  #: polls that ended with packets left
    requeued: int  #: of its backlog, to others, after it was killed or went offline
    flow_limited: int  #: of those handed in here, by the flow limit
    processed: int


class BoundRps:
    """``cluster.users.rps``: settings and counts."""

    def __init__(self, home: Arrays) -> None:
        self._machine: _core.Machine = home.machine
        net.make(home)
        state(home, "rps", self._machine.rps_bytes(MAX_BACKLOG, FLOWS))
        at = self._machine.user_offset("rps")
        done = self._machine.rps_init(at, MAX_BACKLOG, FLOWS)
        if done < 0:
            net.refuse(done, "the machine's softnet_data is damaged")

    def _set(self, what: int, value: int, text: str) -> None:
        done = self._machine.rps_set(what, value) if value >= 0 else _EINVAL
        if done < 0:
            net.refuse(done, text)

    def set_map(self, cpus: MaskLike | Iterable[int]) -> None:
        """Steer to these CPUs, by the hash of the flow (rps_cpus); none: to nobody.

        ``SteeringError`` (ENXIO) where there is no such CPU.
        """
        listed = list(CpuMask(cpus))
        done = self._machine.rps_set_map(*listed)
        if done < 0:
            net.refuse(done, f"rps_cpus {listed}: no such CPU")

    def set_sock_flow_entries(self, entries: int) -> None:
        """Make the table of flows that tasks read (rps_sock_flow_entries).

        Rounded up to a power of two; 0: none, and no RFS. ``SteeringError`` (EINVAL):
        more than 4096, or negative.
        """
        self._set(_SOCK, entries, f"rps_sock_flow_entries {entries}: 0 to {FLOWS}")

    def set_flow_cnt(self, entries: int) -> None:
        """Make the receive queue's table of flows (rps_flow_cnt); as the other."""
        self._set(_DEV, entries, f"rps_flow_cnt {entries}: 0 to {FLOWS}")

    def set_max_backlog(self, packets: int) -> None:
        """net.core.netdev_max_backlog, at most 1000: a backlog takes one more."""
        self._set(
            _BACKLOG, packets, f"netdev_max_backlog {packets}: 0 to {MAX_BACKLOG}"
        )

    def set_weight(self, packets: int) -> None:
        """net.core.dev_weight: packets of a backlog in one poll, 64 at first."""
        self._set(_WEIGHT, packets, f"dev_weight {packets}: at least 1")

    def set_budget(self, packets: int) -> None:
        """net.core.netdev_budget: packets of one softirq, 300 at first."""
        self._set(_BUDGET, packets, f"netdev_budget {packets}: at least 1")

    def set_flow_limit(self, cpus: MaskLike | Iterable[int]) -> None:
        """Limit single flows on backlogs more than half full (flow_limit_cpu_bitmap).

        ``cpus``: those that hand in.
        """
        wanted = CpuMask(cpus)
        for cpu in range(self._machine.ncpus):
            self._set(_LIMIT, cpu << 1 | (cpu in wanted), f"no CPU {cpu}")

    def set_flow_limit_table_len(self, entries: int) -> None:
        """Tell so many flows apart for it. ``SteeringError`` (EINVAL): 0, or no
        power of two, or more than 4096. ``flow_limit_table_len_sysctl``.
        """
        self._set(_LIMIT_LEN, entries, f"flow_limit_table_len {entries}: 1, 2, 4 ...")

    def sockets(self, on: bool = True) -> None:
        """Keep what is delivered for tasks to read by ``recv``, or no longer."""
        net.sockets(on, self._machine)

    def dev_add_pack(self, func: Callable[[list[tuple[int, int]]], object]) -> None:
        """Have ``func`` called with packets where they are delivered, in NET_RX.

        It gets a list of (hash, data), in order, 64 at most: of what one poll of the
        backlog delivers on a CPU, in softirq context there. What it raises goes to
        ``sys.unraisablehook``, and the next packets to ``func`` again. It takes the
        place of ``recv``, and of the one before; as of ``open_softirq``, it is as it
        was when this was called, and goes with the process that has called.
        ``TypeError``: it cannot be called.
        """
        if not callable(func):
            raise TypeError(f"{func!r} is not callable: give a function of packets")

        def action() -> None:
            while packets := net.recv():
                func(packets)

        self._protocol(action)
        self.sockets(True)

    def dev_remove_pack(self) -> None:
        """Take it back: packets are delivered to nobody, and counted as before."""
        self.sockets(False)
        self._protocol(None)

    def _protocol(self, action: Callable[[], None] | None) -> None:
        with self._machine.irq_lock(5.0, True, True):
            self._machine.net_protocol(action)

    def record(self, hash: int, cpu: int) -> None:
        """Say that ``cpu`` is where a task reads this flow (rps_record_sock_flow)."""
        self._machine.rps_record(hash, cpu)

    def get_rps_cpu(self, hash: int) -> int:
        """Return where a packet of this flow would go now, -1: to nobody."""
        return self._machine.rps_cpu(hash)

    def flow(self, hash: int) -> net.Flow:
        """Return what became of a flow's numbered packets."""
        return net.flow(hash, self._machine)

    def stats(self, cpu: int | None = None) -> RpsStats:
        """Return the counts of one CPU, or of all together."""
        machine = self._machine
        if cpu is not None:
            return RpsStats(*machine.rps_counts(cpu))
        rows = [machine.rps_counts(n) for n in range(machine.ncpus)]
        return RpsStats(*map(sum, zip(*rows, strict=True)))


def netif_rx(hash: int, data: int = 0) -> int:
    """Hand in a packet of flow ``hash``: ``NET_RX_SUCCESS`` or ``NET_RX_DROP``.

    Where there is no CPU to steer to, it goes on the backlog of this one.
    ``ArenaFullError`` (ENOBUFS) when all packets of this CPU are on their way.
    """
    done = _core.current_machine().netif_rx(hash, data, 0)
    return done if done >= 0 else net.refuse(done, "netif_rx")


def netif_receive_skb(hash: int, data: int = 0) -> int:
    """As ``netif_rx``; but where there is no CPU to steer to, it is delivered here."""
    done = _core.current_machine().netif_rx(hash, data, 1)
    return done if done >= 0 else net.refuse(done, "netif_receive_skb")


def generate(hash: int, count: int, nflows: int = 1, receive: bool = False) -> int:
    """Hand in ``count`` numbered packets of flows ``hash`` and on, in polls of 64.

    Returns how many: fewer when all packets of this CPU are on their way.
    """
    machine = _core.current_machine()
    return machine.rps_generate(hash, nflows, count, receive)


def get_rps_cpu(hash: int) -> int:
    """Return where a packet of this flow would go now, -1: to nobody."""
    return _core.current_machine().rps_cpu(hash)


def rps_record_sock_flow(hash: int) -> None:
    """Say that a task of this CPU reads this flow."""
    machine = _core.current_machine()
    machine.rps_record(hash, _core.smp_processor_id())


def recv(most: int = 64) -> list[tuple[int, int]]:
    """Return (hash, data) of packets delivered here, and note that they are read here.

    RFS follows: ``inet_recvmsg`` calls ``sock_rps_record_flow``.
    """
    got = net.recv(most)
    for hash in {hash for hash, _ in got}:
        rps_record_sock_flow(hash)
    return got
