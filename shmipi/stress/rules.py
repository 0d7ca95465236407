"""The rules that a stress run can break: one of a user each, by name ``user.rule``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shmipi import _core

__all__ = ["Rule", "chosen", "mask", "rules", "users_of"]


@dataclass(frozen=True)
class Rule:
    """A rule of the core's ``SHI_RULES``.

    ``function`` of the kernel is what it stands for; ``what`` happens without it.
    """

    user: str
    rule: str
    function: str
    what: str
    bit: int

    @property
    def name(self) -> str:
        """How it is chosen."""
        return f"{self.user}.{self.rule}"


def rules() -> dict[str, Rule]:
    """Return all rules by name, those of a user beside each other."""
    found = [Rule(*texts, 1 << bit) for bit, texts in enumerate(_core.RULES)]
    return {rule.name: rule for rule in sorted(found, key=lambda rule: rule.user)}


def chosen(names: Iterable[str]) -> list[Rule]:
    """Return the rules of these names. ``ValueError``: there is no such rule."""
    known, found = rules(), []
    for name in names:
        if name not in known:
            raise ValueError(
                f"there is no rule {name[:60]!r}: `shmipi stress --break help` lists"
                " them"
            )
        found.append(known[name])
    return found


def users_of(broken: Iterable[Rule]) -> tuple[str, ...]:
    """Return the users whose rules these are, each once."""
    return tuple(dict.fromkeys(rule.user for rule in broken))


def mask(broken: Iterable[Rule]) -> int:
    """Return what ``Machine.set_broken`` takes to switch these off."""
    bits = 0
    for rule in broken:
        bits |= rule.bit
    return bits
