"""shmipi.atomic: every operation on every integer type, and at the same time."""

import numpy as np
import pytest

import shmipi
from shmipi import atomic, smp

TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_operation(cluster, dtype):
    a = cluster.shared(f"every_{dtype}", dtype, 3)
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    assert atomic.store(a, 1, 5) is None
    assert atomic.load(a, 1) == 5
    assert atomic.fetch_add(a, 1, 3) == 5
    assert atomic.fetch_or(a, 1, 0x11) == 8
    assert atomic.fetch_and(a, 1, 0x18) == 0x19
    assert atomic.exchange(a, 1, high) == 0x18
    assert atomic.fetch_add(a, 1, 1) == high  # wraps
    assert atomic.compare_exchange(a, 1, low, 7) == low
    assert atomic.compare_exchange(a, 1, low, 9) == 7  # fails: the value found
    assert a.tolist() == [0, 7, 0]
    assert type(atomic.load(a, 1)) is int
    assert atomic.exchange(a, 1, 6) == 7
    assert atomic.fetch_xor(a, 1, 0x0C) == 6
    assert atomic.fetch_sub(a, 1, 9) == 10
    assert atomic.fetch_sub(a, 1, 1) == 1
    assert atomic.fetch_sub(a, 1, 1) == 0  # wraps
    assert atomic.load(a, 1) == (-1 if low < 0 else high)
    assert smp.smp_store_release(a, 1, high) is None
    assert smp.smp_load_acquire(a, 1) == high
    if low < 0:
        assert atomic.exchange(a, -1, low) == 0
        assert atomic.load(a, 2) == low
        assert atomic.fetch_add(a, 2, -1) == low
        assert atomic.load(a, 2) == high


@pytest.mark.parametrize("dtype", TYPES)
def test_values_that_do_not_fit(cluster, dtype):
    a = cluster.shared(f"fit_{dtype}", dtype, 1)
    info = np.iinfo(dtype)
    for value in (int(info.min) - 1, int(info.max) + 1, 10**30, -(10**30)):
        for operation in (atomic.store, atomic.fetch_add, atomic.exchange):
            with pytest.raises(OverflowError):
                operation(a, 0, value)
        with pytest.raises(OverflowError):
            atomic.compare_exchange(a, 0, value, 0)
        with pytest.raises(OverflowError):
            atomic.compare_exchange(a, 0, 0, value)
    assert a[0] == 0


def test_indices(cluster):
    a = cluster.shared("grid", "i8", (3, 4))
    a[:] = np.arange(12).reshape(3, 4)
    assert atomic.load(a, (1, 2)) == 6
    assert atomic.load(a, (-1, -1)) == 11
    assert atomic.load(a[1], 2) == 6
    assert atomic.load(a[:, 1], 2) == 9
    assert atomic.load(a.T, (2, 1)) == 6
    assert atomic.load(a, (np.int64(2), np.uint8(3))) == 11
    for index in ((3, 0), (0, 4), (-4, 0), 0, (0, 0, 0), (2**70, 0)):
        with pytest.raises(IndexError):
            atomic.load(a, index)
    with pytest.raises(IndexError):
        atomic.load(cluster.shared("scalar", "i8"), 0)
    for index in ("0", 1.0, None):
        with pytest.raises(TypeError):
            atomic.load(a[0], index)


@pytest.mark.parametrize("dtype", ["f8", "?", "c16", "S4", [("a", "i4")], ">i4"])
def test_only_integers(cluster, dtype):
    a = cluster.shared(f"no_{dtype}", dtype, 2)
    with pytest.raises(TypeError, match="integer"):
        atomic.load(a, 0)
    with pytest.raises(TypeError):
        atomic.store(cluster.shared("n", "i8", 2), 0, 1.5)


def test_what_is_no_array_or_is_read_only(cluster):
    with pytest.raises(TypeError):
        atomic.load([1, 2], 0)
    with pytest.raises((TypeError, BufferError, ValueError)):
        atomic.store(b"abcd", 0, 1)
    frozen = cluster.shared("frozen", "i8", 1)[:]
    frozen.flags.writeable = False
    with pytest.raises((TypeError, BufferError, ValueError)):
        atomic.store(frozen, 0, 1)


def test_unaligned_elements_are_refused(cluster):
    raw = cluster.shared("raw", "u1", 64)
    with pytest.raises(ValueError, match="aligned"):
        atomic.load(raw[1:9].view("i8"), 0)


def test_the_number_of_arguments(cluster):
    a = cluster.shared("args", "i8", 1)
    for wrong in (lambda: atomic.load(a), lambda: atomic.store(a, 0)):
        with pytest.raises(TypeError, match="arguments"):
            wrong()


@pytest.mark.parametrize("dtype", ["u1", "u4", "i8"])
def test_concurrent_additions_are_not_lost(cluster, background, dtype):
    a = cluster.shared(f"sum_{dtype}", dtype, 1)

    def add(times):
        there = shmipi.shared(f"sum_{dtype}")
        for _ in range(times):
            atomic.fetch_add(there, 0, 1)

    def host():
        for _ in range(20_000):
            atomic.fetch_add(a, 0, 1)

    thread = background(host)
    cluster.run(add, 20_000)
    thread.end()
    assert int(a[0]) == 80_000 % 2 ** (8 * a.itemsize)


def test_every_bit_is_set_by_one(cluster):
    bits = cluster.shared("bits", "u8", 1)

    def claim():
        mine = 0
        for bit in range(64):
            mine += not atomic.fetch_or(bits, 0, 1 << bit) >> bit & 1
        return mine

    assert sum(cluster.run(claim)) == 64
    assert int(bits[0]) == 2**64 - 1

    def release():
        return sum(
            atomic.fetch_and(bits, 0, 2**64 - 1 - (1 << bit)) >> bit & 1
            for bit in range(64)
        )

    assert sum(cluster.run(release)) == 64
    assert bits[0] == 0


def test_compare_exchange_as_a_lock(cluster):
    lock = cluster.shared("lock", "i4", 1)
    plain = cluster.shared("plain", "i8", 1)

    def f():
        for _ in range(2_000):
            while atomic.compare_exchange(lock, 0, 0, 1) != 0:
                pass
            plain[0] = plain[0] + 1
            atomic.exchange(lock, 0, 0)

    cluster.run(f, cpus=[0, 1])
    assert plain[0] == 4_000


def test_a_number_is_handed_out_once(cluster):
    ticket = cluster.shared("ticket", "i8", 1)

    def draw():
        return [atomic.fetch_add(ticket, 0, 1) for _ in range(5_000)]

    drawn = [number for part in cluster.run(draw) for number in part]
    assert sorted(drawn) == list(range(15_000))


def test_what_was_stored_before_a_release_is_seen_after_an_acquire(cluster):
    """A message behind a flag, there and back; the barriers do the same for two."""
    data = cluster.shared("message", "i8", (2, 64))
    flag = cluster.shared("message_flag", "i8", 64)  # [0] and [32]: a line each

    def talk(rounds):
        me = smp.smp_processor_id()
        wrong = 0
        for turn in range(1, rounds + 1):
            if me == 0:
                data[0, :] = turn
                smp.smp_store_release(flag, 0, turn)
                while smp.smp_load_acquire(flag, 32) != turn:
                    pass
                smp.smp_rmb()
                wrong += int((data[1] != turn).any())
            else:
                while smp.smp_load_acquire(flag, 0) != turn:
                    pass
                wrong += int((data[0] != turn).any())
                data[1, :] = turn
                smp.smp_wmb()
                atomic.store(flag, 32, turn)
        return wrong

    assert cluster.run(talk, 200, cpus=[0, 1]) == [0, 0]


def test_a_full_barrier_orders_a_store_before_a_load(cluster):
    """Dekker's: of two who store and then look, one at least sees the other."""
    here = cluster.shared("dekker", "i8", (2, 16))
    gate = cluster.shared("dekker_gate", "i8", 1)

    def enter(rounds):
        me = smp.smp_processor_id()
        seen = []
        for turn in range(1, rounds + 1):
            atomic.fetch_add(gate, 0, 1)
            while atomic.load(gate, 0) < 2 * turn:
                pass
            here[me, 0] = turn
            smp.smp_mb()
            seen.append(int(here[1 - me, 0]) >= turn)
        return seen

    pairs = zip(*cluster.run(enter, 300, cpus=[0, 1]), strict=True)
    assert all(a or b for a, b in pairs)
