"""Who runs which test when several processes share a run (pytest-xdist, ``-n``).

Most tests wait: for a boot, for a sleep, for a program. They run beside each other, in
pieces of their files. Those marked ``long`` begin first, each a piece of its own, so
that none is still at it when there is nothing left beside it. Those marked ``alone``
measure, boot so many CPUs that others would not get to run for seconds, or remove what
dead machines left (another test may just have killed one): they run at the end, one by
one, when all the rest has ended.
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
        self,
        config: pytest.Config,
        log: Any,
        marked: Callable[[], dict[str, list[str]]],
    ) -> None:
        super().__init__(config, log)
        self._marked = marked
        self._piece_of: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        return self._piece_of[nodeid]

    def schedule(self) -> None:
        """Deal out; the first time cut the collection into pieces."""
        if self.collection is None:
            if not self._check_nodes_have_same_collection():
                return
            self.collection = list(next(iter(self.registered_collections.values())))
            self._cut(self.collection)
        self._deal()

    def _cut(self, nodeids: list[str]) -> None:
        marked = self._marked()
        alone, long = set(marked["alone"]), set(marked["long"])
        counts: dict[str, int] = {}
        for nodeid in nodeids:
            file = nodeid.partition("::")[0]
            if nodeid in alone:
                piece = _ALONE
            elif nodeid in long:
                piece = nodeid
            else:
                piece = f"{file} {counts.get(file, 0) // _PIECE}"
                counts[file] = counts.get(file, 0) + 1
            self._piece_of[nodeid] = piece
            self.workqueue.setdefault(piece, {})[nodeid] = False
        for nodeid in reversed(nodeids):
            if self._piece_of[nodeid] == nodeid:
                self.workqueue.move_to_end(nodeid, last=False)

    def remove_node(self, node: Any) -> str | None:
        """A worker has ended; the test that ended it, or None if it did all it had to.

        That test has failed and is not tried again: it would end whoever got it. The
        others of its pieces go to whoever is free.
        """
        pieces = self.assigned_work.pop(node)
        left = [n for piece in pieces.values() for n, done in piece.items() if not done]
        if not left:
            return None
        for nodeid in left[1:]:
            self.workqueue.setdefault(self._piece_of[nodeid], {})[nodeid] = False
        self._deal()
        return left[0]

    def _reschedule(self, node: Any) -> None:
        self._deal()

    def _deal(self) -> None:
        # One that stands in for a dead one has to collect first.
        ready = [
            node
            for node in self.assigned_work
            if node in self.registered_collections and not node.shutting_down
        ]
        if _ALONE in self.workqueue:  # however early it was collected
            self.workqueue.move_to_end(_ALONE)
        for node in ready:
            # A worker begins its last test when it is told of the next, or of the end:
            # it always has one more than it can do, until it is told to end.
            while self._pending(node) <= 2 and self.workqueue:
                if next(iter(self.workqueue)) == _ALONE:
                    break
                self._assign_work_unit(node)
        if not self.workqueue:
            for node in ready:
                node.shutdown()
        elif list(self.workqueue) == [_ALONE]:
            # All end but one, which goes on when the others have ended theirs.
            for node in ready[1:]:
                node.shutdown()
            others = [node for node in self.assigned_work if node not in ready[:1]]
            if ready and not any(map(self._pending, others)):
                self._assign_work_unit(ready[0])
                ready[0].shutdown()

    def _pending(self, node: Any) -> int:
        return self._pending_of(self.assigned_work[node])
