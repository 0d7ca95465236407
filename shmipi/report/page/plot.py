"""What all pictures share: matplotlib, one width, and SVG that stands in a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shmipi.errors import CommandError
from shmipi.report.page.times import times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "FONT",
    "GREY",
    "INK",
    "WIDTH",
    "Picture",
    "colour",
    "figure",
    "log_axis",
    "plain",
    "require",
    "time_axis",
]

#: All pictures are so wide, and their text so high, in the units of their SVG: on a
#: phone of 390 pixels, 360 of which are theirs, a letter is 10.2 pixels high still.
WIDTH: Final = 440.0
FONT: Final = 12.5
INK: Final = "#1a1a1a"
GREY: Final = "#6b6b6b"
#: Of Okabe and Ito's colours, which differ for everybody: by the target's state.
_COLOURS: Final = {"polling": "#0072b2", "halted": "#d55e00", "running": "#00855f"}
_OTHERS: Final = ("#0072b2", "#d55e00", "#00855f", "#b0528a", "#7a5195", "#8a6d00")


@dataclass(frozen=True)
class Picture:
    """A picture: its name, what it shows in words, and who draws it.

    ``draw`` makes the figure of matplotlib anew at each call.
    """

    name: str
    about: str
    draw: Callable[[], Figure]

    def svg(self) -> str:
        """Return it as SVG to be put into a page: its text is text."""
        import matplotlib

        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.name}):
            self.draw().savefig(out, format="svg", metadata=nothing, transparent=True)
        return _for_page(out.getvalue(), self.name, self.about)

    def png(self) -> bytes:
        """Return it as a PNG, 1,100 pixels wide."""
        import matplotlib

        out = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.draw().savefig(out, format="png", dpi=180, facecolor="white")
        return out.getvalue()


_STYLE: Final = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": FONT,
    "axes.labelsize": FONT,
    "axes.labelcolor": INK,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "path.simplify": True,
}


def require() -> None:
    """Raise ``CommandError`` that says what to install where there is no matplotlib."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError(
            f"a page needs {error.name}, which is not installed: pip install"
            " 'shmipi[report]' (or: pip install matplotlib jinja2); --text does without"
        ) from None


def figure(height: float) -> Figure:
    """Return an empty figure of the one width."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 72, height / 72))


def colour(state: str, number: int = 0) -> str:
    """Return the colour of a target's state; of other things, by their number."""
    return _COLOURS.get(state) or _OTHERS[number % len(_OTHERS)]


def time_axis(axis: Any, low: float, high: float) -> None:
    """Make an axis one of ns, logarithmic, with times in words."""
    log_axis(axis, low, high, times)


def log_axis(axis: Any, low: float, high: float, say: Callable[[float], str]) -> None:
    """Make an axis logarithmic from ``low`` to ``high``; ``say`` writes its numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log")
    axis.set_major_locator(FixedLocator(_ticks(low, high)))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: say(value)))
    axis.set_minor_formatter(NullFormatter())


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers in a range: decades, or what is between where few are."""
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [
            step * 10.0**decade
            for decade in range(-6, 13)
            for step in steps
            if low / 1.25 <= step * 10.0**decade <= high * 1.25
        ]
        if len(found) >= 2:
            break
    return found[::2] if len(found) > 5 else found


def plain(axes: Axes, *, x: bool = True, y: bool = True) -> None:
    """Give axes a light grid."""
    if x:
        axes.grid(True, axis="x")
    if y:
        axes.grid(True, axis="y")
    axes.tick_params(length=3)


# ---- SVG for a page ------------------------------------------------------------------

_FAR: Final = re.compile(r"(\d+\.\d)\d+")
_ID: Final = re.compile(r'\bid="([^"]+)"')
_REFERENCE: Final = re.compile(r"(?:url\(#|href=\"#)([^)\"]+)")


def _for_page(text: str, name: str, about: str) -> str:
    """Return what matplotlib wrote as an element of HTML.

    Ids are those of one page, and only where something refers to them; what names a
    host (namespaces, metadata) is not needed there.
    """
    import html

    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    used = set(_REFERENCE.findall(text))
    text = _ID.sub(
        lambda found: f'id="{name}-{found[1]}"' if found[1] in used else "", text
    )
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    # Every text has one size, one family and mostly one colour: the page's style has.
    text = re.sub(r"font(?:-size|-family)?: (?:'[^']*'|[^;\"'])*;? ?", "", text)
    text = re.sub(rf"(<text [^>]*?);? ?fill: {INK}", r"\1", text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", text)
    text = re.sub(r"\bstyle=\"\s*\"", "", text)
    # Of marks alone: what is written between them is for people.
    text = re.sub(r"<[^>]*>", lambda mark: _FAR.sub(r"\1", mark[0]), text)
    text = re.sub(r'\bd="[^"]*"', _dense, text)
    text = _without_groups(text)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
    text = re.sub(r" +(/?>)", r"\1", text)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    head = (
        f'<svg viewBox="{box[1]}" role="img"'
        f' aria-label="{html.escape(about, quote=True)}">'
    )
    return head + text[text.index(">") + 1 :].strip()


def _dense(path: re.Match[str]) -> str:
    """Return a path without the blanks that it can do without."""
    return re.sub(r"\s*([A-Za-z])\s*(?=[-\d.]|\")", r"\1", path[0].replace("\n", " "))


def _without_groups(text: str) -> str:
    """Return SVG without the groups that say nothing, and those that are empty."""
    found: list[str] = []
    kept: list[bool] = []
    for part in re.split(r"(<g\b[^>]*>|</g>)", text):
        if part.startswith("<g") and part.endswith("/>"):
            continue
        if part.startswith("<g"):
            kept.append(bool(part[2:-1].strip()))
            if not kept[-1]:
                continue
        elif part == "</g>" and not kept.pop():
            continue
        found.append(part)
    return re.sub(r"\n\s*\n+", "\n", "".join(found))
