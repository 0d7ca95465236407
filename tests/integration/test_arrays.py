"""Arrays in shared memory: the same bytes everywhere, by name, never a copy."""

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import shmipi
from shmipi import ArenaFullError, NoMachineError, SharedArray, smp
from shmipi.machine import arrays as machine_arrays


def test_shared_is_the_same_memory_on_every_cpu(cluster):
    array = cluster.shared("a", "f8", (2, 3))
    assert isinstance(array, SharedArray)
    assert isinstance(array, np.ndarray)
    assert (array.shape, array.dtype) == ((2, 3), np.dtype("f8"))
    assert not array.any()
    array[1, 2] = 4.5

    def f():
        there = shmipi.shared("a")
        there[0, smp.smp_processor_id()] = 1
        return float(there[1, 2])

    assert cluster.run(f) == [4.5] * 3
    assert array[0].tolist() == [1, 1, 1]


def test_percpu_has_a_row_per_cpu_on_cache_lines_of_its_own(cluster):
    array = cluster.percpu("p", np.int16, 3)
    assert array.shape == (3, 3)
    assert array.strides[0] % 64 == 0
    starts = [array[n].__array_interface__["data"][0] for n in range(3)]
    assert all(start % 64 == 0 for start in starts)
    scalar = cluster.percpu("s", "u8")
    assert scalar.shape == (3,)
    assert scalar.strides[0] % 64 == 0

    def f():
        me = smp.smp_processor_id()
        shmipi.percpu("p")[me] = me
        shmipi.percpu("s")[me] = 10 + me

    cluster.run(f)
    assert array.tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert scalar.tolist() == [10, 11, 12]


def test_the_same_name_is_the_same_array(cluster):
    one = cluster.shared("same", "i4", 5)
    one[:] = 3
    assert cluster.shared("same", np.int32, (5,)) is one
    assert shmipi.shared("same") is one  # in the host, of the only open cluster
    assert cluster.percpu("same", "i4", 5) is not one  # percpu has names of its own
    for dtype, shape in (("i8", 5), ("i4", 6), ("i4", (5, 1)), ("i4", ())):
        with pytest.raises(ValueError, match="exists with dtype int32"):
            cluster.shared("same", dtype, shape)


def test_unknown_names(cluster):
    with pytest.raises(KeyError, match=r"cluster\.shared\('nix'"):
        shmipi.shared("nix")
    with pytest.raises(KeyError, match=r"cluster\.percpu\('nix'"):
        shmipi.percpu("nix")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "kind"),
    [
        ("", "i8", 1, ValueError),
        ("x" * 256, "i8", 1, ValueError),
        (3, "i8", 1, ValueError),
        ("ok", object, 1, TypeError),
        ("ok", "no such", 1, TypeError),
        ("ok", "i8", -1, ValueError),
        ("ok", "i8", (2, -2), ValueError),
    ],
)
def test_bad_input(cluster, name, dtype, shape, kind):
    for make in (cluster.shared, cluster.percpu):
        with pytest.raises(kind):
            make(name, dtype, shape)


@pytest.mark.parametrize(
    "dtype",
    ["?", "i1", "u2", "f2", "c16", "S7", "U3", "M8[ns]", [("a", "i4"), ("b", "f8", 2)]],
)
@pytest.mark.parametrize("shape", [(), 0, 3, (2, 0), (2, 2)])
def test_dtypes_and_shapes(cluster, dtype, shape):
    name = f"d{dtype}{shape}"
    for kind in ("shared", "percpu"):
        array = getattr(cluster, kind)(name, dtype, shape)
        assert array.dtype == np.dtype(dtype)

        def look(kind=kind, name=name):
            there = getattr(shmipi, kind)(name)
            return there.dtype.str, there.dtype.descr, there.shape

        assert cluster.call(1, look) == (
            array.dtype.str,
            array.dtype.descr,
            array.shape,
        )


# ---- pickling ------------------------------------------------------------------------


def test_an_argument_is_the_same_memory(cluster):
    array = cluster.shared("arg", "i8", 1_000_000)  # 8 MB: never in the arena

    def add(a, n):
        a[:n] += 1
        return a is shmipi.shared("arg"), type(a).__name__

    assert cluster.call(1, add, array, 5) == (True, "SharedArray")
    assert cluster.call(2, add, array, 3) == (True, "SharedArray")
    assert array[:7].tolist() == [2, 2, 2, 1, 1, 0, 0]
    assert len(pickle.dumps(array)) < 1000


def test_in_a_closure_a_default_a_container_and_a_csd(cluster):
    array = cluster.shared("closure", "i8", 4)
    array[:] = 0
    holder = {"deep": [array]}

    def f(_=None, d=array):
        array[0] += 1
        d[1] += 1
        holder["deep"][0][2] += 1

    cluster.call(1, f)
    cluster.run(f, cpus=[1])
    cluster.smp.smp_call_function_single_async(1, cluster.smp.CallSingleData(f, array))
    cluster.smp.on_each_cpu_mask([1], f)
    cluster.call(1, int)
    cluster.call(1, int)
    # The csd gave its array for `_`, and the rest is as before.
    assert array.tolist() == [4, 4, 4, 0]


def test_slices_and_views_are_the_same_memory(cluster):
    array = cluster.shared("grid", "i8", (4, 6))
    array[:] = np.arange(24).reshape(4, 6)
    views = {
        "row": array[1],
        "column": array[:, 2],
        "step": array[::2, 1::2],
        "reverse": array[::-1, ::-1],
        "transposed": array.T,
        "reshaped": array.reshape(-1)[3:9],
        "bytes": array.view(np.uint8)[0, :8],
        "element": array[2, 3:4],
    }
    for name, view in views.items():
        expected = np.array(view)

        def bump(v):
            before = np.array(v)
            v += 1
            return before

        assert np.array_equal(cluster.call(1, bump, view), expected), name
        assert np.array_equal(view, expected + 1), name


def test_a_part_that_comes_back_is_the_hosts_memory(cluster):
    array = cluster.shared("back", "i8", 8)
    part = cluster.call(1, lambda: shmipi.shared("back")[2:4])
    part[:] = 5
    assert array.tolist() == [0, 0, 5, 5, 0, 0, 0, 0]


def test_results_of_arithmetic_are_private_and_travel_by_value(cluster):
    array = cluster.shared("calc", "f8", 3)
    array[:] = 1
    for made in (array + 1, array.copy(), np.sin(array), copy.deepcopy(array)):
        assert cluster.call(1, lambda a: type(a).__name__, made) == "ndarray"
        back = cluster.call(1, lambda a: a, made)
        back[:] = 9
    assert array.tolist() == [1, 1, 1]
    assert type(array.sum()) is np.float64
    assert type(array + 1) is np.ndarray


def test_percpu_rows_travel(cluster):
    rows = cluster.percpu("rows", "i8", 4)
    rows[:] = 0

    def f(row):
        row += 7

    cluster.call(2, f, rows[1])
    assert rows.tolist() == [[0] * 4, [7] * 4, [0] * 4]


def test_an_array_of_a_machine_that_is_not_here(cluster, boot):
    array = cluster.shared("foreign", "i8", 1)
    other = boot(1, idle="halt")
    with pytest.raises(shmipi.RemoteCallError) as caught:
        other.call(0, id, array)
    assert isinstance(caught.value.__cause__, NoMachineError)


# ---- life ----------------------------------------------------------------------------


def test_arrays_made_after_boot_are_found(cluster):
    for n in range(40):
        array = cluster.shared(f"late{n}", "i8", 2)
        array[0] = n
        assert cluster.call(n % 3, lambda n=n: int(shmipi.shared(f"late{n}")[0])) == n


def test_arrays_made_after_boot_are_found_by_a_cpu_booted_later(boot, eventually):
    cluster = boot(2, idle="halt")
    array = cluster.shared("before", "i8", 1)
    os.kill(cluster.cpus[1].pid, 9)
    eventually(lambda: cluster.cpus[1].state == "dead")
    cluster.online(1)
    array[0] = 8
    assert cluster.call(1, lambda: int(shmipi.shared("before")[0])) == 8


def test_an_array_outlives_its_machine(boot):
    cluster = boot(1, idle="halt")
    array = cluster.shared("kept", "i8", 1000)
    array[:] = 3
    cluster.shutdown()
    assert array.sum() == 3000
    array[0] = 1
    assert array[0] == 1


def test_a_thousand_arrays(boot):
    cluster = boot(1, idle="halt")
    arrays = [cluster.shared(f"n{n}", "u1", 10) for n in range(1000)]
    arrays[999][3] = 1
    assert cluster.call(0, lambda: int(shmipi.shared("n999")[3])) == 1
    # Each CPU of many would describe all of them, to find one.
    assert cluster.call(0, lambda: len(machine_arrays._current._known)) < 10


def test_too_large_for_the_address_space_or_the_disk(cluster):
    for size in (1 << 37, 1 << 50, 1 << 62):
        with pytest.raises((MemoryError, ArenaFullError, ValueError)):
            cluster.shared("huge", "u1", size)
    assert cluster.shared("huge", "u1", 5).shape == (5,)


def test_memory_is_backed_before_it_is_handed_out(boot):
    cluster = boot(1, idle="halt")
    path = Path(f"/dev/shm/shmipi.{os.getuid()}.{cluster.name}")
    before = path.stat().st_blocks * 512
    cluster.shared("backed", "u1", 5 << 20)
    assert path.stat().st_blocks * 512 - before >= 5 << 20
