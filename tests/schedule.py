"""Who runs which test when several processes share a run (pytest-xdist, ``-n``).

Most tests wait: for a boot, for a sleep, for a program. They run beside each other, in
pieces of their files. Those marked ``alone`` measure, boot so many CPUs that others
would not get to run for seconds, or remove what dead machines left (another test may
just have killed one): they run at the end, one by one, when all the rest has ended.
"""

from collections.abc import Callable
from typing import Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

#: So many tests of a file go to one worker at a time: they share the module's machines.
_PIECE = 20
_ALONE = "alone"


class Schedule(LoadScopeScheduling):
    """Pieces to whoever is free; then one worker runs what wants to be alone."""

    def __init__(
        self, config: pytest.Config, log: Any, alone: Callable[[], list[str]]
    ) -> None:
        super().__init__(config, log)
        self._alone = alone
        self._piece_of: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        return self._piece_of[nodeid]

    def schedule(self) -> None:
        """Deal out; the first time cut the collection into pieces."""
        if self.collection is None:
            self._cut(next(iter(self.registered_collections.values())))
        super().schedule()

    def _cut(self, nodeids: list[str]) -> None:
        alone = set(self._alone())
        counts: dict[str, int] = {}
        for nodeid in nodeids:
            if nodeid in alone:
                self._piece_of[nodeid] = _ALONE
                continue
            file = nodeid.partition("::")[0]
            self._piece_of[nodeid] = f"{file} {counts.get(file, 0) // _PIECE}"
            counts[file] = counts.get(file, 0) + 1

    def _assign_work_unit(self, node: Any) -> None:
        # What measures stays for the end, however early it was collected.
        if next(iter(self.workqueue)) == _ALONE:
            self.workqueue.move_to_end(_ALONE)
        if list(self.workqueue) != [_ALONE] or not self._others_pend(node):
            super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        if list(self.workqueue) != [_ALONE]:
            super()._reschedule(node)
            return
        # A worker begins its last test when it is told of the next or of the end. All
        # are told to end but one, which goes on when the others have ended theirs.
        staying = [other for other in self.nodes if not other.shutting_down]
        for other in staying[1:]:
            other.shutdown()
        if staying and not self._others_pend(staying[0]):
            super()._reschedule(staying[0])

    def _others_pend(self, node: Any) -> bool:
        units = [units for other, units in self.assigned_work.items() if other != node]
        return any(self._pending_of(of_one) for of_one in units)
