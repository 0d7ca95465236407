"""CpuMask against frozenset, and against what the kernel's cpulist files mean."""

import itertools
import operator
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmipi.cpumask import CpuMask

sets = st.frozensets(st.integers(0, 300), max_size=60)


@given(sets)
def test_prints_what_it_parses(cpus: frozenset[int]) -> None:
    mask = CpuMask(cpus)
    assert CpuMask(str(mask)) == mask
    assert eval(repr(mask), {"CpuMask": CpuMask}) == mask
    assert CpuMask.from_bits(int(mask)) == mask
    assert pickle.loads(pickle.dumps(mask)) == mask


@given(sets)
def test_text_is_the_shortest_list(cpus: frozenset[int]) -> None:
    parts = [part.split("-") for part in str(CpuMask(cpus)).split(",") if part]
    bounds = [(int(part[0]), int(part[-1])) for part in parts]
    assert {cpu for low, high in bounds for cpu in range(low, high + 1)} == cpus
    for (_, high), (low, _) in itertools.pairwise(bounds):
        assert low > high + 1  # ascending, and neighbours were joined


@given(sets)
def test_is_a_set_of_numbers(cpus: frozenset[int]) -> None:
    mask = CpuMask(cpus)
    assert list(mask) == sorted(cpus)
    assert mask.weight == len(mask) == len(cpus)
    assert bool(mask) == bool(cpus)
    assert mask.first == min(cpus, default=None)
    assert mask.last == max(cpus, default=None)
    assert [cpu for cpu in range(301) if cpu in mask] == sorted(cpus)
    assert mask == cpus
    assert cpus == mask
    assert hash(mask) == hash(cpus)
    assert mask.bits == sum(1 << cpu for cpu in cpus)


@pytest.mark.parametrize(
    "operation",
    [operator.and_, operator.or_, operator.xor, operator.sub, operator.le, operator.lt],
)
@given(sets, sets)
def test_operators_are_those_of_frozenset(operation, left, right) -> None:
    expected = operation(left, right)
    for result in (
        operation(CpuMask(left), CpuMask(right)),
        operation(CpuMask(left), right),
        operation(left, CpuMask(right)),
    ):
        assert result == expected
    mixed = operation(CpuMask(left), right)
    assert isinstance(mixed, bool | CpuMask)
    assert CpuMask(left).isdisjoint(CpuMask(right)) == left.isdisjoint(right)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("", []),
        ("\n", []),
        ("0", [0]),
        ("0-2,5", [0, 1, 2, 5]),
        ("5,0-2\n", [0, 1, 2, 5]),
        (" 1 , 3-4 ", [1, 3, 4]),
        ("0-3,2-5", [0, 1, 2, 3, 4, 5]),
        ("007", [7]),
        # Documentation/admin-guide/kernel-parameters.rst, "cpu lists"
        ("0-7:2/4", [0, 1, 4, 5]),
        ("100-200:2/25", [100, 101, 125, 126, 150, 151, 175, 176, 200]),
        ("0-5:1/2,7", [0, 2, 4, 7]),
        ("3-4:5/9", [3, 4]),
    ],
)
def test_parses_the_kernels_form(text: str, cpus: list[int]) -> None:
    assert list(CpuMask(text)) == cpus


def test_last_and_all_need_the_number_of_cpus() -> None:
    assert CpuMask("all", 4) == CpuMask("0-3")
    assert CpuMask("0,2-N", 5) == CpuMask("0,2-4")
    assert CpuMask("N", 1) == CpuMask("0")
    assert not CpuMask("all", 0)
    for text in ("all", "N", "0-N"):
        with pytest.raises(ValueError, match="how many CPUs"):
            CpuMask(text)


@pytest.mark.parametrize(
    "text",
    [
        *("x", "-1", "0-", "-", "1,,2", "1,", "3-1", "1.5", "0x3", "1 2", "1-2-3"),
        *("0-7:0/4", "0-7:5/4", "0-7:1/0", "0-7:1", "3:1/2", "\u0663", "ALL"),
    ],
)
def test_refuses_what_is_no_list(text: str) -> None:
    with pytest.raises(ValueError, match=r"CPU list|backwards|used/group"):
        CpuMask(text, 16)


@given(st.text(alphabet="0123456789-,:/Nal \n", max_size=30))
def test_any_text_is_a_mask_or_a_value_error(text: str) -> None:
    try:
        mask = CpuMask(text, 64)
    except ValueError:
        return
    assert mask <= CpuMask.full(64)


@pytest.mark.parametrize("cpus", ["4", "0-4", [4], [np.uint8(4)], CpuMask("1,4")])
def test_too_large_names_the_cpu_and_the_limit(cpus) -> None:
    with pytest.raises(ValueError, match=r"CPU 4 does not exist.*CPUs 0-3"):
        CpuMask.of(cpus, 4)
    assert 4 in CpuMask.of(cpus, 5)


def test_numbers_that_are_no_cpus() -> None:
    with pytest.raises(ValueError, match=r"CPU -1 does not exist.*0-7"):
        CpuMask([0, -1], 8)
    for value in (True, np.True_):
        with pytest.raises(ValueError, match="truth value"):
            CpuMask([value], 8)
    for value in (1.0, "1", None, np.float64(1)):
        with pytest.raises(TypeError, match="integer"):
            CpuMask([value], 8)
    for whole in (5, None, b"01"):
        with pytest.raises(TypeError, match="cpulist"):
            CpuMask(whole, 8)
    for huge in ("99999999999999999999", [1 << 40], "9" * 5000):
        with pytest.raises(ValueError, match="beyond the limit"):
            CpuMask(huge)
    for bits in (-1, 1 << (1 << 20)):
        with pytest.raises(ValueError, match=r"not negative|beyond"):
            CpuMask.from_bits(bits)
    assert True not in CpuMask("1")
    assert "1" not in CpuMask("1")
    assert -1 not in CpuMask("1")


def test_takes_numpy_and_returns_masks_as_they_are() -> None:
    mask = CpuMask.of(np.array([5, 0, 1, 5], dtype=np.int16), 8)
    assert str(mask) == "0-1,5"
    assert all(type(cpu) is int for cpu in mask)
    assert CpuMask.of(mask, 8) is mask
    assert CpuMask.of("0-1,5", 8) == mask
    assert f"{mask:>8}" == "   0-1,5"
    assert np.int64(5) in mask


def test_cannot_be_changed() -> None:
    mask = before = CpuMask("0-1")
    with pytest.raises(AttributeError):
        mask.bits = 7
    with pytest.raises(AttributeError):
        mask.other = 7
    mask |= {4}
    assert (str(before), str(mask)) == ("0-1", "0-1,4")
