"""A damaged segment: errors are allowed; a crash of the host, a hang or a stray is not.

Random bytes go over the mailboxes of a scratch machine while calls go on: over the
call_single_data of every slot, the queue heads, function tables and arenas, the pending
lines, and what the CPUs' interrupt controllers have in common with the descriptors.
"""

import pickle
import random
import struct
import time

import pytest

from shmipi import ShmipiError, _core, smp

# What the layout says of a slot's region, from the segment's own header.
HEADER = struct.Struct("<8sII64s 10Q 2I")

DAMAGE = ["csds", "heads", "functions", "arenas", "lines", "irqs", "all"]


class Layout:
    """Where the parts of the segment are that calls go through."""

    def __init__(self, machine):
        self.memory = memoryview(machine)
        (
            _,
            _,
            _,
            _,
            total,
            slots,
            irqs,
            regions,
            region,
            funcs,
            arena,
            _,
            _,
            _,
            ncpus,
            _,
        ) = HEADER.unpack_from(self.memory, 0)
        assert total == len(self.memory)
        assert ncpus == machine.ncpus
        assert slots == machine.slot_offset
        assert irqs == machine.irq_offset
        self.irqs = range(irqs, irqs + _core.IRQDESC_OFFSET + 8 * _core.IRQDESC_BYTES)
        self.slots = [slots + n * _core.SLOT_BYTES for n in range(machine.nslots)]
        self.regions = [regions + n * region for n in range(machine.nslots)]
        self.funcs, self.arena = funcs, arena

    def hit(self, kind, rng):
        """One piece of damage."""
        if kind == "all":
            kind = rng.choice(DAMAGE[:-1])
        base = rng.choice(self.regions)
        if kind == "csds":
            # The first 4 KiB are the requests that are really in use.
            at, size = base + rng.randrange(4096), rng.choice([1, 8, 64])
        elif kind == "heads":
            at, size = rng.choice(self.slots) + 4, 4  # the upper half: the queue's head
        elif kind == "lines":
            at, size = rng.choice(self.slots) + 8 + rng.randrange(32), 1  # IRR
        elif kind == "irqs":
            at, size = rng.choice(self.irqs), rng.choice([1, 4, 32])
        elif kind == "functions":
            at, size = base + self.funcs + rng.randrange(1024), rng.choice([1, 8, 32])
        else:
            at, size = (
                base + self.arena + rng.randrange(65_536),
                rng.choice([1, 64, 999]),
            )
        if kind == "heads" and rng.random() < 0.5:
            data = struct.pack("<I", rng.randrange(60_000))  # indices that exist
        else:
            data = rng.randbytes(size)
        # Only what is backed: writing elsewhere would allocate, not damage.
        self.memory[at : at + len(data)] = data

    def close(self):
        self.memory.release()


class Stray:
    """Its unpickling says that bytes were believed which nobody sent."""

    def __reduce__(self):
        return _believed, ()


def _believed():
    import shmipi

    shmipi.shared("believed")[0] += 1


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", DAMAGE)
def test_random_bytes_over_the_mailboxes(boot, background, eventually, kind, seed):
    cluster = boot(3, idle="halt", arena_bytes=1 << 20)
    believed = cluster.shared("believed", "i8", 1)
    layout = Layout(cluster._machine)
    rng = random.Random(seed)
    stop = []
    outcomes: dict[str, int] = {}

    def caller(number):
        mine = random.Random(seed * 10 + number)
        while not stop:
            cpu = mine.randrange(3)
            what = mine.randrange(5)
            size = mine.choice([1, 100, 3_000, 20_000])
            try:
                if what == 0:
                    cluster.call(cpu, lambda x: x, bytes(size), timeout=0.2)
                elif what == 1:
                    cluster.call(cpu, abs, -size, timeout=0.2)
                elif what == 2:
                    cluster.call(cpu, bytes, size, timeout=0.2)
                elif what == 3:
                    cluster.call(cpu, lambda n=size: n, timeout=0.2)
                else:
                    cluster.call(cpu, smp.NativeHandler("noop"), timeout=0.2)
                name = "ok"
            except (ShmipiError, OSError) as error:
                name = type(error).__name__
            except (pickle.UnpicklingError, EOFError) as error:  # pragma: no cover
                name = f"stray: {error!r}"
            outcomes[name] = outcomes.get(name, 0) + 1

    threads = [background(caller, n) for n in range(3)]
    eventually(lambda: outcomes.get("ok"))  # else nothing may come through any more
    end = time.monotonic() + 0.7  # hundreds of pieces at least
    while time.monotonic() < end:
        layout.hit(kind, rng)
        time.sleep(0.0005)
        # A CPU may die of it (a native handler got a wild pointer): not the host.
        for cpu in cluster.cpus:
            if cpu.state == "dead":
                cluster.online(cpu.id)
    stop.append(True)
    for thread in threads:
        thread.end(10)  # nobody hangs
    print(outcomes)
    assert outcomes.get("ok", 0) > 0
    assert not [name for name in outcomes if name.startswith("stray")]
    assert believed[0] == 0
    layout.close()
    start = time.monotonic()
    cluster.shutdown()
    assert time.monotonic() - start < 10


def test_a_pickle_that_nobody_sent_is_not_loaded(boot, eventually):
    """A payload overwritten with a well-formed pickle is refused by its checksum."""
    cluster = boot(2, idle="halt", arena_bytes=1 << 20)
    believed = cluster.shared("believed", "i8", 1)
    gate = cluster.shared("gate", "i8", 2)
    layout = Layout(cluster._machine)
    host = layout.regions[2] + layout.arena

    def hold():
        gate[1] = 1
        while not gate[0]:
            time.sleep(0.001)

    holder = cluster.submit(1, hold)
    eventually(lambda: gate[1])
    marker = b"marker-of-the-payload" * 20
    future = cluster.submit(1, len, marker)
    at = bytes(layout.memory[host : host + (1 << 20)]).find(marker)
    assert at > 0
    from cloudpickle import dumps

    evil = dumps(((Stray(),), None))
    start = host + at // 256 * 256
    layout.memory[start : start + len(evil)] = evil
    gate[0] = 1
    error = future.exception(5)
    holder.result(5)
    assert error is not None
    assert "damaged" in str(error)
    assert believed[0] == 0
    assert cluster.call(1, len, marker, timeout=5) == len(marker)
    layout.close()


def test_a_damaged_header_is_refused(boot):
    import os

    from shmipi import LayoutError, _core

    cluster = boot(1, idle="halt")
    path = f"/dev/shm/shmipi.{os.getuid()}.{cluster.name}"
    with open(path, "rb") as file:
        head = file.read(64 * 1024)
    rng = random.Random(3)
    name = f"/dev/shm/not-shmipi-{os.getpid()}"
    try:
        refused = 0
        for turn in range(300):
            data = bytearray(head)
            at = rng.randrange(8, 250)
            data[at : at + 4] = rng.randbytes(4)
            with open(name, "wb") as file:
                file.write(data)
                file.truncate(os.path.getsize(path))
            with open(name, "r+b") as file:
                try:
                    _core.Machine(file.fileno(), turn % 5)
                except (LayoutError, OSError, MemoryError):
                    refused += 1
        assert refused > 50
        for wrong in (b"", b"shmipi\n\x1a", b"x" * 65536, head[:200]):
            with open(name, "wb") as file:
                file.write(wrong)
            with open(name, "r+b") as file, pytest.raises((LayoutError, OSError)):
                _core.Machine(file.fileno(), 0)
    finally:
        os.unlink(name)


def test_an_unused_request_that_is_damaged_costs_only_itself(boot):
    """A flipped bit says "locked" of requests that nobody uses: they are left out."""
    cluster = boot(2, idle="halt")

    def ways():
        cluster.call(1, int)
        assert cluster.submit(1, len, "ab").result(5) == 2
        assert cluster.run(abs, -3, cpus=[1]) == [3]
        cluster.smp.smp_call_function_single(1, int, 1)
        cluster.smp.smp_call_function_single(1, int, 1, False)
        cluster.smp.on_each_cpu(int, 1)
        cluster.smp.smp_call_function_single_async(1, cluster.smp.CallSingleData(int))

    for _ in range(70):  # also of the 64 for calls that nobody waits for
        ways()
    layout = Layout(cluster._machine)
    csds = range(layout.regions[2], layout.regions[2] + 64 * 200, 64)  # the host's
    for bit in (0, 1, 2, 3, 4, 20, 40, 63):
        for at in csds:
            (lock,) = struct.unpack_from("<Q", layout.memory, at)
            if not lock & 1:
                struct.pack_into("<Q", layout.memory, at, lock ^ 1 << bit)
        for _ in range(3):
            ways()
    assert 0 < cluster.host_counters()["corrupt"] <= len(csds)
    layout.close()


def test_where_arrays_lie_is_bounded_by_the_file(script):
    """Damage in the number of their bytes or in their directory: never a SIGBUS."""
    done = script(
        """
        import struct
        from shmipi import Cluster, LayoutError, _core

        with Cluster(2, idle="halt") as cluster:
            one = cluster.shared("one", "i8", 4)
            one[:] = 7
            machine = cluster._machine
            memory = memoryview(machine)
            head = bytes(memory[: _core.HEADER_BYTES])
            used = machine.array_end - machine.array_offset
            at, = [
                i for i in range(256, _core.HEADER_BYTES - 16, 8)
                if struct.unpack_from("<QI", head, i) == (used, 1)
            ]
            for bit in (3, 12, 20, 30, 35, 41, 63):
                damaged = (used ^ 1 << bit) % 2**64
                for what in ("directory", "used", "both"):
                    if what != "directory":
                        struct.pack_into("<Q", memory, at, damaged)
                    if what != "used":
                        offset = (machine.array_offset + (1 << bit - 1)) % 2**64
                        struct.pack_into("<I", memory, at + 8, 2)
                        struct.pack_into("<Q", memory, at + 24, offset)
                    try:
                        cluster.shared("two", "i8", 4)[:] = 1
                        print("made", bit, what)
                    except LayoutError as error:
                        assert "damaged" in str(error)
                    assert one.tolist() == [7] * 4
                    assert cluster.call(1, abs, -1) == 1
                    struct.pack_into("<QI", memory, at, used, 1)
            two = cluster.shared("two", "i8", 4)
            two[:] = 2
            assert one.tolist() == [7] * 4
            memory.release()
        print("alive")
        """
    )
    assert done.text == "alive\n"
