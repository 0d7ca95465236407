"""A distribution as the benches' documents have it."""

from __future__ import annotations

from typing import Any

from shmipi import _core

__all__ = ["described", "encoded"]

_LOWEST, _HIGHEST, _DIGITS = 1, (1 << 42) - 1, 3  # base/hist.h


def described(hist: _core.Hist) -> dict[str, Any]:
    """Return min, p50, p90, p99, p999, max and mean in ns, ``count`` and ``hist``."""
    return {**hist.stats(), "count": hist.count, "hist": encoded(hist)}


def encoded(hist: _core.Hist) -> str:
    """Return all of it as an HdrHistogram V2, compressed, in base64.

    The buckets are the same, so nothing is lost: lowest value 1 ns, highest 2^42 - 1,
    three significant digits. Any HdrHistogram library reads it, and
    https://hdrhistogram.github.io/HdrHistogram/plotFiles.html draws its percentiles.
    """
    from hdrh.histogram import HdrHistogram

    codec = HdrHistogram(_LOWEST, _HIGHEST, _DIGITS)
    for lowest, _, count in hist.buckets():
        codec.record_value(lowest, count)
    return str(codec.encode().decode("ascii"))
