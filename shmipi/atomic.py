"""Real atomic operations on elements of integer arrays in shared memory.

``index`` is an int, or a tuple for arrays of several dimensions. All are sequentially
consistent; ``smp.smp_load_acquire`` and ``smp.smp_store_release`` are the weaker ones.
They raise ``TypeError`` for arrays that do not hold integers,
``IndexError`` for an index out of range and ``OverflowError`` for a value that does not
fit.
"""

from shmipi._core import atomic_compare_exchange as compare_exchange
from shmipi._core import atomic_exchange as exchange
from shmipi._core import atomic_fetch_add as fetch_add
from shmipi._core import atomic_fetch_and as fetch_and
from shmipi._core import atomic_fetch_or as fetch_or
from shmipi._core import atomic_fetch_sub as fetch_sub
from shmipi._core import atomic_fetch_xor as fetch_xor
from shmipi._core import atomic_load as load
from shmipi._core import atomic_store as store

__all__ = [
    "compare_exchange",
    "exchange",
    "fetch_add",
    "fetch_and",
    "fetch_or",
    "fetch_sub",
    "fetch_xor",
    "load",
    "store",
]
