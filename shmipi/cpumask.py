"""Sets of CPU numbers, written as the kernel writes them: ``0-2,5``."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Set
from typing import Final, SupportsIndex, TypeAlias

from shmipi.errors import UnknownCpuError

__all__ = ["CpuMask", "MaskLike"]

_PART: Final = re.compile(r"(\d+|N)(?:-(\d+|N)(?::(\d{1,9})/(\d{1,9}))?)?", re.ASCII)
#: Where no limit is given: a CPU number travels in 16 bits.
_NO_LIMIT: Final = 1 << 16


class CpuMask(Set[int]):
    """An immutable set of CPU numbers, with the operators of ``frozenset``.

    ``CpuMask("0-2,5")`` parses the kernel's cpulist form, ``str(mask)`` prints it:
    numbers and ranges separated by commas, ``start-end:used/group`` for the first
    ``used`` CPUs of every ``group``, the empty string for no CPU at all. With
    ``ncpus``, ``all`` and ``N`` (the last CPU) are understood as well, and a CPU of
    ``ncpus`` or above is an error. An iterable of integers (also numpy's) does too.

    Iteration is in ascending order. Raises ``ValueError`` for a negative or too large
    number (naming the CPU and the limit) and for a string that is no cpulist,
    ``TypeError`` for anything else; ``True`` and ``False`` are no CPU numbers.
    """

    __slots__ = ("_bits",)
    _bits: int

    def __init__(self, cpus: MaskLike = (), ncpus: int | None = None) -> None:
        if isinstance(cpus, CpuMask):
            bits = cpus._bits
            if ncpus is not None and bits >> ncpus:
                raise _beyond(bits.bit_length() - 1, ncpus)
        elif isinstance(cpus, str):
            bits = _parse(cpus, ncpus)
        elif isinstance(cpus, Iterable) and not isinstance(cpus, bytes | bytearray):
            bits = 0
            for cpu in cpus:
                bits |= 1 << _check(cpu, ncpus)
        else:
            raise TypeError(
                "a CPU mask is a CpuMask, a cpulist such as '0-2,5' or an iterable of"
                f" CPU numbers, not {cpus!r}"
            )
        self._bits = bits

    @classmethod
    def of(cls, cpus: MaskLike, ncpus: int | None = None) -> CpuMask:
        """Return ``cpus`` as a CpuMask of a machine with CPUs 0 to ``ncpus`` - 1.

        A CpuMask within the limit is returned as it is. Raises as the class does.
        """
        if type(cpus) is cls and (ncpus is None or not cpus._bits >> ncpus):
            return cpus
        return cls(cpus, ncpus)

    @classmethod
    def of_any(cls, cpus: MaskLike, ncpus: int) -> CpuMask:
        """Return ``cpus`` as a mask that may also name CPUs from ``ncpus`` on.

        "all" and "N" are of a machine of ``ncpus`` CPUs. For callers who refuse CPUs
        that do not exist with an error of their own. Raises as the class does for what
        is no mask.
        """
        try:
            return cls.of(cpus, ncpus)
        except ValueError:
            return cls.of(cpus)

    @classmethod
    def from_bits(cls, bits: int) -> CpuMask:
        """Make a mask from an integer in which bit ``n`` stands for CPU ``n``.

        Raises ``ValueError`` if ``bits`` is negative.
        """
        bits = operator.index(bits)
        if bits < 0:
            raise ValueError(f"a CPU bitmask is not negative: {bits}")
        if bits.bit_length() > _NO_LIMIT:
            raise _beyond(bits.bit_length() - 1, None)
        return cls._raw(bits)

    @classmethod
    def full(cls, ncpus: int) -> CpuMask:
        """Make the mask of CPUs 0 to ``ncpus`` - 1."""
        return cls.from_bits((1 << ncpus) - 1)

    @classmethod
    def _raw(cls, bits: int) -> CpuMask:
        mask = cls.__new__(cls)
        mask._bits = bits
        return mask

    @property
    def bits(self) -> int:
        """The mask as an integer: bit ``n`` is CPU ``n``."""
        return self._bits

    @property
    def weight(self) -> int:
        """How many CPUs are in the mask (the kernel's ``cpumask_weight``)."""
        return self._bits.bit_count()

    @property
    def first(self) -> int | None:
        """The lowest CPU number, or ``None`` for an empty mask."""
        return (self._bits & -self._bits).bit_length() - 1 if self._bits else None

    @property
    def last(self) -> int | None:
        """The highest CPU number, or ``None`` for an empty mask."""
        return self._bits.bit_length() - 1 if self._bits else None

    def __int__(self) -> int:
        return self._bits

    def __len__(self) -> int:
        return self._bits.bit_count()

    def __bool__(self) -> bool:
        return self._bits != 0

    def __contains__(self, cpu: object) -> bool:
        if isinstance(cpu, bool):
            return False
        try:
            number = operator.index(cpu)  # type: ignore[arg-type]
        except TypeError:
            return False
        return number >= 0 and bool(self._bits >> number & 1)

    def __iter__(self) -> Iterator[int]:
        bits = self._bits
        while bits:
            lowest = bits & -bits
            yield lowest.bit_length() - 1
            bits ^= lowest

    # The operators take masks and other sets of integers, and always return a CpuMask.

    def __and__(self, other: Set[object]) -> CpuMask:
        if isinstance(other, CpuMask):
            return self._raw(self._bits & other._bits)
        if not isinstance(other, Set):
            return NotImplemented
        return self._raw(sum(1 << cpu for cpu in self if cpu in other))

    __rand__ = __and__

    # A set of other things would make a set of other things: only masks and sets of
    # CPU numbers are taken.
    def __or__(self, other: Set[int]) -> CpuMask:  # type: ignore[override]
        bits = _operand(other)
        return NotImplemented if bits is None else self._raw(self._bits | bits)

    __ror__ = __or__

    def __xor__(self, other: Set[int]) -> CpuMask:  # type: ignore[override]
        bits = _operand(other)
        return NotImplemented if bits is None else self._raw(self._bits ^ bits)

    __rxor__ = __xor__

    def __sub__(self, other: Set[object]) -> CpuMask:
        if isinstance(other, CpuMask):
            return self._raw(self._bits & ~other._bits)
        if not isinstance(other, Set):
            return NotImplemented
        return self._raw(sum(1 << cpu for cpu in self if cpu not in other))

    def __rsub__(self, other: Set[int]) -> CpuMask:
        bits = _operand(other)
        return NotImplemented if bits is None else self._raw(bits & ~self._bits)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, CpuMask):
            return self._bits == other._bits
        return super().__eq__(other)

    def __hash__(self) -> int:
        # A mask equals the frozenset of its numbers, so their hashes are equal too.
        return hash(frozenset(self))

    def __str__(self) -> str:
        """The kernel's cpulist form, the empty string for an empty mask."""
        return ",".join(
            str(first) if first == last else f"{first}-{last}"
            for first, last in self._ranges()
        )

    def __repr__(self) -> str:
        return f'{type(self).__name__}("{self}")'

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __reduce__(self) -> tuple[object, ...]:
        return CpuMask.from_bits, (self._bits,)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        bits, base = self._bits, 0
        while bits:
            gap = (bits & -bits).bit_length() - 1
            bits >>= gap
            # The lowest zero bit of `bits` ends the run of ones that starts at bit 0.
            run = (~bits & (bits + 1)).bit_length() - 1
            yield base + gap, base + gap + run - 1
            bits >>= run
            base += gap + run


MaskLike: TypeAlias = CpuMask | str | Iterable[SupportsIndex]


def _beyond(cpu: int, ncpus: int | None) -> ValueError:
    if ncpus is None:
        return ValueError(f"CPU {cpu} is beyond the limit of {_NO_LIMIT} CPUs")
    if ncpus == 0:
        return ValueError(f"CPU {cpu} does not exist: the machine has no CPUs")
    span = "only CPU 0" if ncpus == 1 else f"CPUs 0-{ncpus - 1}"
    return UnknownCpuError(
        f"CPU {cpu} does not exist: this machine has {span}", cpu=cpu
    )


def _check(cpu: object, ncpus: int | None) -> int:
    """Return ``cpu`` as an int within the limit, or raise ValueError or TypeError."""
    # By name, so that numpy's (`bool_` before numpy 2) needs no import of numpy.
    if type(cpu).__name__ in ("bool", "bool_"):
        raise ValueError(f"{cpu!r} is a truth value, not a CPU number")
    try:
        number = operator.index(cpu)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"a CPU number is an integer, not {cpu!r}") from None
    if number < 0 and not ncpus:
        raise ValueError(f"CPU {number} does not exist: CPUs are numbered from 0")
    if number < 0:
        raise _beyond(number, ncpus)
    if number >= (_NO_LIMIT if ncpus is None else ncpus):
        raise _beyond(number, ncpus)
    return number


def _operand(other: object) -> int | None:
    """Return a set operand as bits, or None where an operator is not defined."""
    if isinstance(other, CpuMask):
        return other._bits
    if isinstance(other, Set):
        return CpuMask(other)._bits
    return None


def _parse(text: str, ncpus: int | None) -> int:
    if not text.strip():
        return 0
    bits = 0
    for raw in text.split(","):
        part = raw.strip()
        if part == "all":
            if ncpus is None:
                raise ValueError("'all' needs to know how many CPUs there are")
            if ncpus == 0:
                continue
            part = "0-N"
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{text!r} is not a CPU list: write numbers and ranges such as '0-2,5'"
            )
        first = _number(match[1], ncpus)
        last = first if match[2] is None else _number(match[2], ncpus)
        if last < first:
            raise ValueError(f"the range {part!r} of {text!r} runs backwards")
        run = (1 << (last - first + 1)) - 1
        if match[3] is not None:
            used, group = int(match[3]), int(match[4])
            if not 0 < used <= group:
                raise ValueError(
                    f"{part!r} of {text!r}: 'used/group' needs 1 <= used <= group"
                )
            span = last - first + 1
            pattern = (1 << min(used, span)) - 1
            repeated = 0
            for start in range(0, span, group):
                repeated |= pattern << start
            run &= repeated
        bits |= run << first
    return bits


def _number(digits: str, ncpus: int | None) -> int:
    if digits == "N":
        if not ncpus:
            raise ValueError("'N', the last CPU, needs to know how many CPUs there are")
        return ncpus - 1
    # Long strings of digits are refused before they are converted (int() has a limit
    # of its own, with an error that speaks of something else).
    if len(digits.lstrip("0")) > 9:
        raise ValueError(f"CPU {digits[:12]}... is beyond the limit of any machine")
    return _check(int(digits.lstrip("0") or "0"), ncpus)
