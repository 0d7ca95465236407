"""Where a user of IPIs has its state, and rules that are switched off."""

import pytest

from shmipi import _core
from shmipi.machine import arrays
from shmipi.users.state import state


def mark(value):
    memory = arrays.find("user", "blk")
    memory[0] = value
    return int(arrays.home_of(memory).machine.user_offset("blk"))


def test_the_state_of_a_user_is_one_for_all(cluster):
    home = cluster._arrays
    assert home.machine.user_offset("blk") == 0
    memory = state(home, "blk", 256)
    at = home.machine.user_offset("blk")
    assert at == home.offset_of(memory)
    assert at % 128 == 0
    assert cluster.call(1, mark, 7) == at
    assert memory[0] == 7
    assert state(home, "blk", 256) is memory
    with pytest.raises(ValueError, match="exists"):
        state(home, "blk", 512)
    with pytest.raises(ValueError, match="no user of IPIs"):
        home.machine.user_offset("nobody")


def test_rules_are_on_until_they_are_broken(cluster):
    machine = cluster._machine
    assert machine.broken() == 0
    machine.set_broken(5)
    assert machine.broken() == 5
    machine.set_broken(0)
    assert len(_core.RULES) <= 64
    for user, rule, function, what in _core.RULES:
        assert all((user, rule, function, what))
