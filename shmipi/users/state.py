"""Where a user of IPIs keeps what its CPUs share."""

from __future__ import annotations

from shmipi.machine.arrays import Arrays, SharedArray

__all__ = ["state"]


def state(home: Arrays, name: str, nbytes: int) -> SharedArray:
    """Return the ``nbytes`` of user ``name``, made and zeroed if they are new.

    ``name`` is one of the core's ``SHI_USERS``; its C code finds the bytes, aligned to
    two cache lines, by ``shi_user()``. Raises what ``Arrays.make`` raises:
    ``ValueError`` when they exist with another size.
    """
    memory = home.make("user", name, "u1", nbytes)
    if not home.machine.user_offset(name):
        offset = home.offset_of(memory)
        assert offset is not None
        home.machine.publish_user(name, offset)
    return memory
