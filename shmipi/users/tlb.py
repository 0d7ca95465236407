"""TLB shootdown: address spaces that CPUs share, and what each has cached of them.

Physical pages, page tables of four levels and the address spaces (``Mm``) lie in the
machine's shared memory; each CPU's process has a TLB of its own. A load or store goes
through it, so a CPU sees what it has cached until somebody has it dropped: who unmaps
pages, or takes rights away, interrupts every CPU that may have them, waits, and only
then returns, and only then may a page be used again. The rules are those of
arch/x86/mm/tlb.c: generations, ranges of up to 33 pages, lazy TLB mode of CPUs whose
task sleeps or has ended, batches.

On the host ``cluster.users.tlb`` makes the memory at its first use; on a CPU the
functions here act on the CPU's machine::

    mm = cluster.users.tlb.mm("shop")
    at = mm.mmap(8192)


    def task():  # on a CPU
        tlb.use_mm(tlb.mm("shop"))
        tlb.store(at, 7)
        return tlb.load(at)

Loads and stores are for tasks. A dead process's half-done change is finished by the
next one to change the same address space; ``memory_state()`` counts that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from shmipi import _core
from shmipi._core import mm_load as load
from shmipi._core import mm_load_bytes as load_bytes
from shmipi._core import mm_store as store
from shmipi._core import mm_store_bytes as store_bytes
from shmipi.errors import AddressSpaceError, ClusterStateError
from shmipi.machine import arrays
from shmipi.machine.arrays import Arrays
from shmipi.users.state import state

__all__ = [
    "PAGE_SIZE",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "SEGV_ACCERR",
    "SEGV_MAPERR",
    "TLB_FLUSH_ALL",
    "BoundTlb",
    "Mm",
    "current_mm",
    "flush_tlb_kernel_range",
    "init_mm",
    "load",
    "load_bytes",
    "memory_state",
    "mm",
    "reclaim",
    "store",
    "store_bytes",
    "tlb_remove_table_sync_one",
    "tlb_state",
    "try_to_unmap_flush",
    "unuse_mm",
    "use_mm",
    "using",
]

PAGE_SIZE: Final = 4096
PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
#: ``si_code`` of a PageFaultError: nothing is mapped there; or not for this access.
SEGV_MAPERR: Final = 1
SEGV_ACCERR: Final = 2
TLB_FLUSH_ALL: Final = 0xFFFF_FFFF

#: Physical pages that a machine has unless it is told otherwise: 4 MiB.
PAGES: Final = 1024
_NAME_MAX: Final = 47


class Mm:
    """An address space (``struct mm_struct``); the same on every CPU and on the host.

    Who changes it is a task with interrupts enabled, or a host: each change waits for
    other CPUs. Errors are ``AddressSpaceError`` with the system call's errno; nothing
    is left half done. Ctrl-C in a flush ends the call before others have dropped their
    entries: then the pages are not used again before a later flush has.
    """

    def __init__(self, machine: _core.Machine, handle: int) -> None:
        self._machine = machine
        self._handle = handle

    def __reduce__(self) -> Any:
        return _attach, (self._machine.name, self._handle)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mm)
            and other._machine.name == self._machine.name
            and other._handle == self._handle
        )

    def __hash__(self) -> int:
        return hash((self._machine.name, self._handle))

    def __repr__(self) -> str:
        try:
            name = self.state()["name"]
        except (AddressSpaceError, ClusterStateError):
            return "<Mm, gone>"
        return f"<Mm {name!r}>"

    def mmap(
        self,
        length: int,
        prot: int = PROT_READ | PROT_WRITE,
        *,
        address: int | None = None,
    ) -> int:
        """Map zeroed pages; return their address.

        ``address`` is taken as MAP_FIXED_NOREPLACE does. EINVAL: it is no multiple of
        the page size, or the length is 0; EEXIST: part of it is mapped; ENOMEM.
        """
        if address == 0:
            raise AddressSpaceError("nothing is mapped at address 0 (mmap_min_addr)")
        return self._machine.mm_mmap(
            self._handle, address or 0, _size(length), _size(prot)
        )

    def munmap(self, address: int, length: int) -> None:
        """Unmap the pages: when it returns, no CPU has them. Gaps are passed over.

        EINVAL: not a multiple of the page size, empty, or outside the address space.
        """
        self._machine.mm_munmap(self._handle, _size(address), _size(length))

    def mprotect(self, address: int, length: int, prot: int) -> None:
        """Change the rights; when it returns, no CPU uses what was taken away.

        EINVAL as ``munmap``; ENOMEM: part of it is not mapped, and nothing was changed.
        """
        self._machine.mm_mprotect(
            self._handle, _size(address), _size(length), _size(prot)
        )

    def try_to_unmap(self, address: int, length: int) -> int:
        """Take pages away as reclaim does; return how many: the flush is put off.

        CPUs may use them until this CPU's ``try_to_unmap_flush()``, or until a change
        of this address space that has to know (flush_tlb_batched_pending).
        """
        return self._machine.mm_try_to_unmap(
            self._handle, _size(address), _size(length)
        )

    def flush_tlb_range(
        self, start: int, pages: int, *, freed_tables: bool = False
    ) -> None:
        """Have every CPU that may have them drop these entries: flush_tlb_mm_range().

        ``freed_tables``: lazy CPUs are interrupted, too. More than the ceiling: all.
        """
        self._machine.mm_flush(self._handle, _size(start), _size(pages), freed_tables)

    def flush_tlb_page(self, address: int) -> None:
        """Flush one page."""
        self.flush_tlb_range(address & ~(PAGE_SIZE - 1), 1)

    def flush_tlb(self) -> None:
        """Flush all of this address space: flush_tlb_mm()."""
        self.flush_tlb_range(0, TLB_FLUSH_ALL)

    def read(self, address: int, n: int) -> bytes:
        """Return ``n`` bytes by the page tables: access_process_vm(). PageFaultError.

        For the host, which has no TLB, and for debuggers: rights are not asked for.
        """
        return self._machine.mm_access(self._handle, _size(address), _size(n))

    def write(self, address: int, data: bytes) -> None:
        """Write bytes the same way."""
        self._machine.mm_access(self._handle, _size(address), bytes(data))

    def exit_mmap(self) -> None:
        """End it: all its pages are free. EBUSY while a CPU's task uses it."""
        self._machine.mm_end(self._handle)

    def state(self) -> dict[str, Any]:
        """Return name, ctx_id, tlb_gen, cpumask (who may have entries), and so on."""
        return self._machine.mm_state(self._handle)


class BoundTlb:
    """``shmipi.users.tlb`` for the host of one machine: ``cluster.users.tlb``."""

    def __init__(self, home: Arrays, pages: int | None = None) -> None:
        self._home, self._machine = home, home.machine
        self._make(PAGES if pages is None else pages)

    def __repr__(self) -> str:
        return f"<tlb of Cluster {self._machine.name!r}>"

    def _make(self, pages: int) -> None:
        if not 16 <= pages < 1 << 20:
            raise ValueError(f"pages is {pages}: give 16 to {(1 << 20) - 1}")
        if not self._machine.user_offset("tlb"):
            state(self._home, "tlb", self._machine.vm_bytes(pages + 1))
        self._machine.vm_init(pages + 1)

    def mm(self, name: str) -> Mm:
        """Return address space ``name``, made if it is new.

        ENOMEM: there are 63, or no pages are left for its page tables.
        """
        return _mm(self._machine, name, make=True)

    @property
    def init_mm(self) -> Mm:
        """The kernel's own, which every CPU has: ``mmap`` there is vmalloc()."""
        return _mm(self._machine, "init_mm", make=False)

    @property
    def single_page_flush_ceiling(self) -> int:
        """Flushes of more pages than that are of all (33 at first)."""
        return self._machine.mm_ceiling(-1)

    @single_page_flush_ceiling.setter
    def single_page_flush_ceiling(self, pages: int) -> None:
        if pages < 0:
            raise AddressSpaceError(f"tlb_single_page_flush_ceiling is {pages}")
        self._machine.mm_ceiling(pages)

    def flush_tlb_kernel_range(self, start: int, pages: int) -> None:
        """Have all CPUs drop these entries of the kernel's half."""
        self._machine.mm_flush(self.init_mm._handle, _size(start), _size(pages), False)

    def try_to_unmap_flush(self) -> int:
        """Flush for all that ``try_to_unmap`` here has taken, and free the pages."""
        return self._machine.mm_try_to_unmap_flush()

    def tlb_remove_table_sync_one(self) -> None:
        """Interrupt all CPUs: who walked page tables without a lock has ended."""
        self._machine.tlb_remove_table_sync_one()

    def reclaim(self) -> int:
        """Free page tables that wait for that, and what the batches of dead CPUs held.

        Returns how many pages.
        """
        return self._machine.mm_reclaim()

    def tlb_state(self, cpu: int) -> dict[str, int]:
        """Return what a CPU has loaded (cpu_tlbstate), and what it has counted."""
        if not 0 <= cpu < self._machine.ncpus:
            raise ValueError(f"cpu is {cpu}: there are {self._machine.ncpus}")
        return self._machine.tlb_state(cpu)

    def memory_state(self) -> dict[str, int]:
        """Count the pages: free, in use, as page tables, waiting for flushes.

        ``torn_found``: changes that a dead process had left half done and another has
        finished; ``frames_found``: pages that were nobody's because of deaths.
        """
        return self._machine.vm_state()


def _size(value: int) -> int:
    if not 0 <= value < 1 << 64:
        raise AddressSpaceError(f"{value} is no address, length or protection")
    return value


def _mm(machine: _core.Machine, name: str, *, make: bool) -> Mm:
    if not 0 < len(name.encode()) <= _NAME_MAX:
        raise ValueError(f"name is {name!r}: give 1 to {_NAME_MAX} bytes")
    handle = machine.mm_find(name)
    if not handle:
        if not make:
            raise KeyError(
                f"machine {machine.name} has no address space {name!r}:"
                f" make it with cluster.users.tlb.mm({name!r})"
            )
        handle = machine.mm_make(name)
    return Mm(machine, handle)


def _attach(machine: str, handle: int) -> Mm:
    return Mm(arrays.machine_named(machine), handle)


def _here() -> BoundTlb:
    home = arrays.here()
    home.machine.vm_state()  # ClusterStateError where the host has made nothing
    return BoundTlb(home)


def mm(name: str) -> Mm:
    """Return the machine's address space made by ``cluster.users.tlb.mm(name)``.

    ``KeyError`` when there is none, ``NoMachineError`` outside a machine.
    """
    return _mm(arrays.here().machine, name, make=False)


def init_mm() -> Mm:
    """Return the kernel's own address space."""
    return mm("init_mm")


def use_mm(mm: Mm) -> None:
    """Let this CPU's task use ``mm`` (kthread_use_mm, switch_mm) until it ends."""
    _core.mm_use(mm._handle)


def unuse_mm() -> None:
    """Go back to none: the CPU is in lazy TLB mode, its entries wait for their use."""
    _core.mm_use(0)


@contextlib.contextmanager
def using(mm: Mm) -> Iterator[None]:
    """Use ``mm`` inside the block, and what was used before afterwards."""
    before = _core.mm_current()
    _core.mm_use(mm._handle)
    try:
        yield
    finally:
        _core.mm_use(before)


def current_mm() -> Mm | None:
    """Return what this CPU's task uses."""
    handle = _core.mm_current()
    return Mm(arrays.here().machine, handle) if handle else None


def flush_tlb_kernel_range(start: int, pages: int) -> None:
    """Have all CPUs drop these entries of the kernel's half."""
    _here().flush_tlb_kernel_range(start, pages)


def try_to_unmap_flush() -> int:
    """Flush for all that ``Mm.try_to_unmap`` on this CPU has taken, free the pages."""
    return _here().try_to_unmap_flush()


def tlb_remove_table_sync_one() -> None:
    """Interrupt all CPUs: who walked page tables without a lock has ended."""
    _here().tlb_remove_table_sync_one()


def reclaim() -> int:
    """Free what waits; see ``BoundTlb.reclaim``."""
    return _here().reclaim()


def tlb_state(cpu: int) -> dict[str, int]:
    """Return what a CPU has loaded, and what it has counted."""
    return _here().tlb_state(cpu)


def memory_state() -> dict[str, int]:
    """Count the pages; see ``BoundTlb.memory_state``."""
    return _here().memory_state()
