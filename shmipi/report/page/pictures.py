"""The pictures of a report. Lines say what they are beside themselves: no legends."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shmipi.report.page.plot import (
    FONT,
    GREY,
    INK,
    WIDTH,
    colour,
    figure,
    log_axis,
    plain,
    time_axis,
)
from shmipi.report.page.rows import Row
from shmipi.report.page.times import times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "MOST_NUMBERS",
    "Line",
    "bars",
    "beside_limits",
    "distribution",
    "dots",
    "heat",
    "lines",
    "percentiles",
]

_STEP: Final = 1.15  # from one name of a line to the next, of a letter's height
_LINE: Final = 1.45 * FONT  # from one line of text to the next
_LETTER: Final = 0.58 * FONT  # about the width of a letter
_LETTERS: Final = 56  # of a line of a name that stands above
_HALF_TICK: Final = 26.0  # what a number under the end of an axis needs beside it
_SHORT: Final = 20  # a name of more letters stands above its row, not beside it
#: A heat map of more CPUs has colours only: numbers would run into each other.
MOST_NUMBERS: Final = 12
#: Values of a heat map that differ by less have no colours of their own.
_WIDE: Final = 1.2


# ---- each row beside its limit -------------------------------------------------------


def beside_limits(rows: Sequence[Row]) -> Figure:
    """Draw a dot for each median, a bar for its limit, a whisker to its p99.

    Filled dots are native handlers, hollow ones Python. At the right: times the limit.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    short = max(map(len, groups)) <= _SHORT
    names = {group: [] if short else textwrap.wrap(group, _LETTERS) for group in groups}
    height = sum(
        _LINE * (len(own) + len(names[group])) + 0.35 * _LINE
        for group, own in groups.items()
    )
    foot = 2.2 * _LINE
    fig = figure(height + foot)
    left = (max(map(len, groups)) * _LETTER + 26) if short else _HALF_TICK
    right = 58.0 if any(row.ratio is not None for row in rows) else 28.0
    whole = height + foot
    axes = fig.add_axes(
        (left / WIDTH, foot / whole, (WIDTH - left - right) / WIDTH, height / whole)
    )
    low, high = _bounds(rows)
    axes.set_xlim(low, high)
    axes.set_ylim(height, 0)
    time_axis(axes.xaxis, low, high)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    plain(axes, y=False)
    at = 0.15 * _LINE
    for group, own in groups.items():
        if short:
            _label(axes, group, own, at + _LINE * len(own) / 2, -8.0, "right")
        for number, line in enumerate(names[group], start=1):
            last = own if number == len(names[group]) else ()
            _label(axes, line, last, at + _LINE / 2, 6.0 - _HALF_TICK, "left")
            at += _LINE
        for row in own:
            _row(axes, row, at + _LINE / 2)
            at += _LINE
        at += 0.35 * _LINE
    return fig


def _bounds(rows: Sequence[Row]) -> tuple[float, float]:
    values = [row.ns for row in rows]
    values += [row.p99 for row in rows if row.p99]
    values += [row.limit_ns for row in rows if row.limit_ns]
    values = [value for value in values if value > 0]
    return min(values) / 1.6, max(values) * 1.6


def _label(
    axes: Axes, group: str, own: Sequence[Row], at: float, offset: float, side: str
) -> None:
    mark = "" if all(row.valid for row in own) else " \N{DAGGER}"
    axes.annotate(
        group + mark,
        (0, at),
        (offset, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha=side,
        va="center",
    )


def _row(axes: Axes, row: Row, at: float) -> None:
    tone = colour(row.state)
    if row.p99 is not None and row.p99 > row.ns:
        whisker: dict[str, Any] = {"lw": 1, "alpha": 0.6, "clip_on": False}
        axes.plot([row.ns, row.p99], [at, at], color=tone, **whisker)
        axes.plot([row.p99] * 2, [at - 3, at + 3], color=tone, **whisker)
    if row.limit_ns:
        bar = [row.limit_ns] * 2
        axes.plot(bar, [at - 6.5, at + 6.5], color=INK, lw=2.4, clip_on=False)
    hollow = row.handler == "python"
    axes.plot(
        [row.ns],
        [at],
        marker="o",
        ms=6.5,
        color=tone,
        mfc="white" if hollow else tone,
        mew=1.4,
        ls="none",
        clip_on=False,
    )
    if row.ratio is not None:
        axes.annotate(
            f"{_ratio(row.ratio)}\N{MULTIPLICATION SIGN}",
            (1, at),
            (54, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center",
        )


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def dots(rows: Sequence[Row]) -> Figure:
    """Draw a line for each group with the medians of all its rows, states in colour."""
    groups = list(dict.fromkeys(row.group for row in rows))
    states = list(dict.fromkeys(row.state for row in rows))
    top, foot = 2.3 * _LINE, 2.2 * _LINE
    height = _LINE * 1.15 * len(groups)
    whole = height + top + foot
    left = max(map(len, groups)) * _LETTER + 16
    fig = figure(whole)
    axes = fig.add_axes(
        (left / WIDTH, foot / whole, (WIDTH - left - 8) / WIDTH, height / whole)
    )
    low, high = _bounds(rows)
    axes.set_xlim(low, high)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    time_axis(axes.xaxis, low, high)
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    plain(axes)
    for row in rows:
        tone = colour(row.state, states.index(row.state) + 3)
        hollow = row.handler == "python"
        axes.plot(
            [row.ns],
            [groups.index(row.group)],
            marker="o",
            ms=6,
            color=tone,
            mfc="white" if hollow else tone,
            mew=1.3,
            ls="none",
        )
    middles = {
        state: sorted(row.ns for row in rows if row.state == state) for state in states
    }
    ends = [-math.inf, -math.inf]  # of what is written on each of two lines
    for state in sorted(states, key=lambda one: middles[one][len(middles[one]) // 2]):
        number = states.index(state)
        middle = middles[state][len(middles[state]) // 2]
        place = axes.transData.transform((middle, 0))[0] * 72 / fig.dpi
        half = len(state) * _LETTER / 2
        level = 0 if ends[0] < place - half else 1
        ends[level] = place + half + 6
        axes.annotate(
            state,
            (middle, 1),
            (0, 4 + level * _LINE * 0.9),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=colour(state, number + 3),
        )
    return fig


def bars(found: Sequence[tuple[str, Sequence[int]]]) -> Figure:
    """Draw what was counted: of each name a bar for each of its values, from above.

    The first is black, as a limit is, the third hollow; each has its number at its end.
    """
    thick, gap = 0.8 * _LINE, 0.45 * _LINE
    height = sum(thick * len(values) + gap for _, values in found)
    fig = figure(height + 4)
    left = max(len(name) for name, _ in found) * _LETTER + 12
    most = max(max(values) for _, values in found)
    right = len(f"{most:,}") * _LETTER + 8
    axes = fig.add_axes(
        (left / WIDTH, 0, (WIDTH - left - right) / WIDTH, height / (height + 4))
    )
    axes.set_xlim(0, most)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    at = gap / 2
    for name, values in found:
        axes.annotate(
            name,
            (0, at + thick * len(values) / 2),
            (-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
        )
        for number, value in enumerate(values):
            tone = INK if not number else colour("running")
            axes.barh(
                at + thick / 2,
                value,
                thick * 0.78,
                facecolor="white" if number == 2 else tone,
                edgecolor=tone,
            )
            axes.annotate(
                f"{value:,}",
                (value, at + thick / 2),
                (5, 0),
                textcoords="offset points",
                va="center",
                annotation_clip=False,
            )
            at += thick
        at += gap
    return fig


# ---- distributions -------------------------------------------------------------------


def percentiles(rows: Sequence[Row]) -> Figure:
    """Draw values over percentiles; each step to the right is ten times rarer."""
    fig = figure(250)
    rows = list(rows)
    found = [(row, row.counts()) for row in rows]
    most = max((counts.total for _, counts in found if counts), default=1)
    decades = max(2.0, math.log10(most))
    ends: list[_End] = []
    axes = fig.add_axes((0.16, 0.2, 0.5, 0.76))
    low, high = math.inf, 0.0
    for number, (row, counts) in enumerate(found):
        if counts is None or not counts.steps:
            continue
        xs, ys, last = [], [], 0.0
        for value, share in counts.shares():
            xs += [_rarity(last, decades), _rarity(share, decades)]
            ys += [value, value]
            last = share
        low, high = min(low, ys[0]), max(high, ys[-1])
        style = _style(row, rows, number)
        axes.plot(xs, ys, **style)
        ends.append(_End(xs[-1], ys[-1], row.group, style["color"]))
    axes.set_xlim(0, decades)
    axes.set_ylim(max(low, 1) / 1.5, high * 1.5)
    time_axis(axes.yaxis, low, high)
    shown = [0, *range(1, int(decades) + 1)]
    axes.set_xticks(shown, [_percent(n) for n in shown])
    axes.set_xlabel("percentile, %")
    plain(axes)
    _labels(axes, ends)
    return fig


def _rarity(share: float, most: float) -> float:
    return min(most, -math.log10(max(1 - share, 1e-12)))


def _percent(decade: int) -> str:
    return "0" if decade == 0 else f"{100 - 10.0 ** (2 - decade):.10g}"


def distribution(rows: Sequence[Row]) -> Figure:
    """Draw the share of calls up to each time, and that of their limits in grey."""
    fig = figure(260)
    rows = list(rows)
    axes = fig.add_axes((0.12, 0.19, 0.83, 0.77))
    low, high = math.inf, 0.0
    drawn: list[tuple[Row, list[tuple[int, float]], str]] = []
    for number, row in enumerate(rows):
        counts, beside = row.counts(), row.limit_counts()
        if beside is not None and beside.steps:
            _cdf(axes, beside.shares(), color="#9a9a9a", lw=1.1, zorder=1.5)
        if counts is None or not counts.steps:
            continue
        style = _style(row, rows, number)
        shares = counts.shares()
        _cdf(axes, shares, **style)
        drawn.append((row, shares, style["color"]))
        low = min(low, shares[0][0])
        high = max(high, _at(shares, 0.999) * 1.3)
    axes.set_xlim(max(low, 1) / 1.3, high)
    axes.set_ylim(0, 102)
    time_axis(axes.xaxis, low, high)
    axes.set_ylabel("% of calls")
    axes.set_xlabel("round trip (grey: the limit)")
    plain(axes)
    _on_curves(axes, drawn, low, high)
    return fig


def _cdf(axes: Axes, shares: Sequence[tuple[int, float]], **style: Any) -> None:
    axes.step(
        [shares[0][0], *(value for value, _ in shares)],
        [0, *(100 * share for _, share in shares)],
        where="post",
        **style,
    )


def _at(shares: Sequence[tuple[int, float]], share: float) -> int:
    return next(value for value, upto in shares if upto >= share - 1e-12)


def _on_curves(
    axes: Axes,
    drawn: Sequence[tuple[Row, list[tuple[int, float]], str]],
    low: float,
    high: float,
) -> None:
    """Say beside each curve what it is, each at a height of its own."""
    order = sorted(drawn, key=lambda one: _at(one[1], 0.5))
    for number, (row, shares, tone) in enumerate(order):
        share = 0.88 - 0.76 * (number + 0.5) / len(order)
        value = _at(shares, share)
        left = math.log(value / low) > 0.55 * math.log(high / low)
        axes.annotate(
            row.group,
            (value, 100 * share),
            (-6 if left else 6, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=tone,
        )


def _style(row: Row, rows: Sequence[Row], number: int) -> dict[str, Any]:
    """Return a line's look: the state's colour, dashes for its second and third."""
    same = [one for one in rows if one.state == row.state and one.state]
    place = same.index(row) if row in same else 0
    dashes = ("-", (0, (4, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
    return {
        "color": colour(row.state, number),
        "ls": dashes[place % len(dashes)],
        "solid_capstyle": "butt",
    }


@dataclass(frozen=True)
class _End:
    x: float
    y: float
    text: str
    tone: str


def _labels(axes: Axes, ends: Sequence[_End]) -> None:
    """Write each line's name at its end, and none over another."""
    step = FONT * _STEP * axes.figure.dpi / 72
    # Below is the last number of the axis.
    top, bottom = axes.bbox.ymax, axes.bbox.ymin + step / 2
    places = [axes.transData.transform((end.x, end.y))[1] for end in ends]
    order = sorted(range(len(ends)), key=lambda n: places[n])
    put: list[float] = []
    for n in order:
        wanted = min(max(places[n], bottom), top)
        put.append(wanted if not put else max(wanted, put[-1] + step))
    # What was pushed over the top pushes those below it back down.
    limit = top
    for place in reversed(range(len(put))):
        put[place] = min(put[place], limit)
        limit = put[place] - step
    for n, y in zip(order, put, strict=True):
        end = ends[n]
        axes.annotate(
            end.text,
            (1, (y - axes.bbox.ymin) / axes.bbox.height),
            (6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=end.tone,
            annotation_clip=False,
        )


# ---- lines over a number -------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a picture: its points, and what it is called."""

    text: str
    points: Sequence[tuple[float, float]]
    state: str = ""
    grey: bool = False


def lines(
    found: Sequence[Line],
    *,
    across: str,
    up: str = "",
    time_across: bool = False,
    time_up: bool = True,
) -> Figure:
    """Draw lines over a logarithmic axis, each named at its right end.

    ``across`` names the axis below; ``time_across`` and ``time_up``: it is in ns.
    """
    from matplotlib.ticker import NullLocator

    found = [line for line in found if line.points]
    # Each has a name at its end, and none is over another.
    fig = figure(max(250, (len(found) + 0.5) * FONT * _STEP / 0.76))
    letters = max(len(line.text) for line in found)
    room = max(0.1, min(0.42, (letters * _LETTER + 14) / WIDTH))
    axes = fig.add_axes((0.16, 0.2, 0.84 - room, 0.76))
    xs = [x for line in found for x, _ in line.points]
    ys = [y for line in found for _, y in line.points if y > 0]
    ends = []
    for order, line in enumerate(found):
        tone = GREY if line.grey else colour(line.state, order)
        points = sorted(line.points)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=tone,
            marker="o",
            ms=4,
            ls=(0, (4, 2)) if line.grey else "-",
        )
        ends.append(_End(*points[-1], line.text, tone))
    axes.set_xscale("log")
    low, high = min(xs), max(xs)
    axes.set_xlim(low / 1.15, high * 1.15)
    if time_across:
        time_axis(axes.xaxis, low, high)
    else:
        ticks = sorted(set(xs))
        while len(ticks) > 6:
            ticks = ticks[::-2][::-1]
        axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(ys) / 1.4, max(ys) * 1.4)
    log_axis(axes.yaxis, min(ys), max(ys), times if time_up else "{:,.10g}".format)
    axes.set_xlabel(across)
    if up:
        axes.set_ylabel(up)
    plain(axes)
    _labels(axes, ends)
    return fig


# ---- heat map ------------------------------------------------------------------------


def heat(
    values: Sequence[Sequence[float | None]], cpus: Sequence[int], names: Sequence[str]
) -> Figure:
    """Draw ns of row to column as colours, darker is slower, with numbers in µs.

    ``names`` stand beside the rows. Above ``MOST_NUMBERS`` CPUs there are colours only.
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    grid = np.array(
        [[np.nan if cell is None else cell for cell in row] for row in values], float
    )
    n = len(cpus)
    numbers = n <= MOST_NUMBERS
    left = max(len(name) for name in names) * _LETTER + 14 if numbers else 44.0
    side = WIDTH - left - 4
    top, bottom = 2.6 * _LINE, 2.6 * _LINE
    height = min(side / n, 64) * len(values) if numbers else side
    whole = height + top + bottom
    fig = figure(whole)
    axes = fig.add_axes((left / WIDTH, bottom / whole, side / WIDTH, height / whole))
    known = grid[~np.isnan(grid)]
    low, high = float(known.min()), float(known.max())
    norm = LogNorm(low * 0.999, max(high, low * _WIDE))
    image = axes.imshow(grid, cmap="viridis_r", norm=norm, aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("called core")
    if numbers:
        axes.set_xticks(range(n), [str(cpu) for cpu in cpus])
        axes.set_yticks(range(len(names)), names)
        for y, row in enumerate(grid):
            for x, cell in enumerate(row):
                if not math.isnan(cell):
                    dark = norm(cell) > 0.45
                    axes.text(
                        x,
                        y,
                        _us(cell),
                        ha="center",
                        va="center",
                        color="white" if dark else INK,
                    )
    else:
        step = max(1, n // 8)
        ticks = list(range(0, n, step))
        axes.set_xticks(ticks, [str(cpus[at]) for at in ticks])
        axes.set_yticks(ticks, [str(cpus[at]) for at in ticks])
        axes.set_ylabel("calling core")
    bar = fig.add_axes((left / WIDTH, 1.25 * _LINE / whole, side / WIDTH, 9 / whole))
    scale = fig.colorbar(image, cax=bar, orientation="horizontal")
    scale.outline.set_visible(False)
    time_axis(bar.xaxis, low, high)
    if high >= low * _WIDE:
        bar.set_xticks([low, high], [times(low), times(high)])
    else:  # two numbers would run into each other
        alike = times(low) == times(high)
        bar.set_xticks([low], [times(low) + ("" if alike else f" to {times(high)}")])
    for label, side_ in zip(bar.get_xticklabels(), ("left", "right"), strict=False):
        label.set(ha=side_)
    return fig


def _us(ns: float) -> str:
    us = ns / 1000
    return f"{us:.2f}" if us < 0.095 else f"{us:.1f}" if us < 9.95 else f"{us:.0f}"
