"""Placement of CPUs on cores, on computers that are directories of text files."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmipi.cpumask import CpuMask
from shmipi.machine.topology import (
    Core,
    auto_idle,
    cgroup_quota,
    default_ncpus,
    oversubscribed,
    physical_cores,
    place,
    read_cores,
    usable_cores,
)


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def computer(tmp_path: Path) -> Path:
    """Two packages (and nodes) of two cores with two threads: siblings n and n + 4."""
    for core in range(8):
        folder = tmp_path / f"devices/system/cpu/cpu{core}/topology"
        write(folder / "physical_package_id", core % 4 // 2)
        write(folder / "core_id", core % 2)
        write(folder / "core_cpus_list", f"{core % 4},{core % 4 + 4}")
    write(tmp_path / "devices/system/node/node0/cpulist", "0-1,4-5")
    write(tmp_path / "devices/system/node/node1/cpulist", "2-3,6-7")
    return tmp_path


def test_reads_packages_cores_threads_and_nodes(computer: Path) -> None:
    cores = read_cores(range(8), sys=computer)
    assert [core.package for core in cores] == [0, 0, 1, 1] * 2
    assert [core.node for core in cores] == [0, 0, 1, 1] * 2
    assert cores[6] == Core(6, 1, 0, 1, CpuMask("2,6"))
    assert physical_cores(cores) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    # Threads that this process may not use do not make a core less its own.
    assert physical_cores(read_cores([0, 5, 7], sys=computer)) == [[0], [5], [7]]


def test_without_sysfs_cpuinfo_says_which_are_threads(tmp_path: Path) -> None:
    write(
        tmp_path / "cpuinfo",
        "\n\n".join(
            f"processor\t: {core}\nphysical id\t: 1\ncore id\t\t: {core % 2}"
            for core in range(4)
        ),
    )
    cores = read_cores(range(4), sys=tmp_path / "none", proc=tmp_path)
    assert physical_cores(cores) == [[0, 2], [1, 3]]
    assert {core.package for core in cores} == {1}


def test_where_nothing_is_known_each_core_is_its_own(tmp_path: Path) -> None:
    cores = read_cores([3, 5], sys=tmp_path, proc=tmp_path)
    assert physical_cores(cores) == [[3], [5]]
    broken = tmp_path / "devices/system/cpu/cpu3/topology"
    write(broken / "core_id", "-1")
    write(broken / "physical_package_id", "-1")
    write(broken / "core_cpus_list", "garbage")
    assert read_cores([3], sys=tmp_path, proc=tmp_path)[0].siblings == CpuMask("3")


def test_auto_takes_distinct_physical_cores_first(computer: Path) -> None:
    cores = read_cores(range(8), sys=computer)
    assert place(4, topology=cores) == [0, 1, 2, 3]
    assert place(10, topology=cores) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert place(4, topology=read_cores([1, 4, 5, 6], sys=computer)) == [1, 4, 6, 5]


def test_a_given_list_is_used_in_turn_and_in_order(computer: Path) -> None:
    cores = read_cores(range(8), sys=computer)
    assert place(5, [6, 0], topology=cores) == [6, 0, 6, 0, 6]
    assert place(3, "6,0-1", topology=cores) == [6, 0, 1]
    assert place(3, [2, 2, 1], topology=cores) == [2, 2, 1]
    assert place(2, CpuMask("3,1"), topology=cores) == [1, 3]


@pytest.mark.parametrize(
    ("cores", "words"),
    [
        ([], "empty"),
        ("", "empty"),
        ([0, 9], r"core 9 cannot be used.*0-7.*taskset"),
        ("9", r"core 9 cannot be used"),
        ([-1], r"list of core numbers"),
        ([1.5], r"list of core numbers"),
        ([True], r"list of core numbers"),
        ("fast", r"list of core numbers"),
        (3, r"list of core numbers"),
        (None, r"list of core numbers"),
    ],
)
def test_a_list_that_cannot_be_used(computer: Path, cores, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        place(2, cores, topology=read_cores(range(8), sys=computer))


@given(st.integers(1, 40), st.sets(st.integers(0, 9), min_size=1))
def test_cpus_are_spread_evenly(ncpus: int, numbers: set[int]) -> None:
    topology = [Core(n, 0, n // 2, 0, CpuMask([n & ~1, n | 1])) for n in numbers]
    placement = place(ncpus, topology=topology)
    assert len(placement) == ncpus
    uses = [placement.count(number) for number in numbers]
    assert max(uses) - min(uses) <= 1
    physical = {number // 2 for number in numbers}
    assert len({core // 2 for core in placement}) == min(ncpus, len(physical))


def test_on_this_computer() -> None:
    assert usable_cores() == sorted(os.sched_getaffinity(0))
    assert default_ncpus() >= 2
    placement = place(default_ncpus())
    assert set(placement) <= os.sched_getaffinity(0)
    with pytest.raises(ValueError, match="at least 1 CPU"):
        place(0)
    beyond = max(os.sched_getaffinity(0)) + 1
    with pytest.raises(ValueError, match=f"core {beyond} cannot be used"):
        place(2, [beyond])


def test_a_core_for_each_cpu_and_one_for_the_host() -> None:
    assert not oversubscribed([0, 1], usable="0-2")
    assert oversubscribed([0, 1], usable="0-1")
    assert not oversubscribed([0, 1], usable="0-1", host_needs_one=False)
    assert oversubscribed([0, 0], usable="0-3", host_needs_one=False)
    assert oversubscribed([0], usable="0")


@pytest.mark.parametrize(
    ("placement", "usable", "quota", "policy"),
    [
        ([0, 1], "0-2", None, "poll"),
        ([0, 1], "0-2", 3.0, "poll"),
        ([0, 1], "0-2", 2.5, "haltpoll"),
        ([0, 1], "0-1", None, "haltpoll"),
        ([0, 0], "0-3", None, "haltpoll"),
        ([0, 0], "0", None, "haltpoll"),
    ],
)
def test_auto_polls_only_with_room(placement, usable, quota, policy: str) -> None:
    limit = 64.0 if quota is None else quota
    assert auto_idle(placement, usable=usable, quota=limit) == policy


def test_quota_is_the_smallest_on_the_way_up(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a/b")
    write(tmp_path / "sys/fs/cgroup/a/cpu.max", "150000 100000")
    write(tmp_path / "sys/fs/cgroup/a/b/cpu.max", "max 100000")
    assert cgroup_quota(sys=tmp_path / "sys", proc=tmp_path / "proc") == 1.5


def test_quota_of_cgroup_v1_and_of_a_hidden_path(tmp_path: Path) -> None:
    # A container without a cgroup namespace: the path is that of the host.
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/docker/x\n3:pids:/docker/x")
    folder = tmp_path / "sys/fs/cgroup/cpu,cpuacct"
    write(folder / "cpu.cfs_quota_us", "50000")
    write(folder / "cpu.cfs_period_us", "100000")
    assert cgroup_quota(sys=tmp_path / "sys", proc=tmp_path / "proc") == 0.5
    write(folder / "cpu.cfs_quota_us", "-1")
    assert cgroup_quota(sys=tmp_path / "sys", proc=tmp_path / "proc") is None
    assert cgroup_quota(sys=tmp_path / "no", proc=tmp_path / "no") is None
