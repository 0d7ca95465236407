"""A report as one page of HTML that needs nothing else: no script, no request."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from shmipi._version import __version__
from shmipi.bench import registry
from shmipi.errors import CommandError
from shmipi.names import BENCHES
from shmipi.report import compare, replay
from shmipi.report.cells import Cells
from shmipi.report.page.plot import require
from shmipi.report.page.sections import Section, sections

__all__ = ["GENERATOR", "MOST_BYTES", "page", "pictures"]

#: A page is no larger: it goes by mail. The data in it are left out first.
MOST_BYTES: Final = 400 * 1024
GENERATOR: Final = "shmipi report"


def page(documents: Sequence[dict[str, Any]], missing: Sequence[str] = ()) -> str:
    """Return the page. ``CommandError`` where what draws it is not installed.

    ``missing`` says what should be there and is not, a sentence each.
    """
    require()
    from jinja2 import Environment
    from markupsafe import Markup

    found = sections(documents)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["marked"] = lambda text: Markup(marked(text))
    environment.filters["quoted"] = lambda text: Markup(_quoted(text))
    template = environment.from_string(
        resources.files(__package__).joinpath("page.html").read_text("utf-8")
    )
    about: dict[str, Any] = {
        "generator": GENERATOR,
        "version": __version__,
        "title": title(found),
        "finding": finding(found),
        "facts": facts(documents),
        "doubts": doubts(documents, missing),
        "sections": [
            {
                "bench": one.bench,
                "id": f"t{number}",
                "heading": one.heading,
                "command": one.command,
                "about": BENCHES.get(one.bench, one.document.get("file", one.bench)),
                "finding": "" if one is found[0] else one.finding,
                "plates": [
                    {
                        "title": plate.title,
                        "text": plate.text,
                        "svg": Markup(plate.picture.svg()),
                        "kind": plate.picture.name.partition("-")[2],
                    }
                    for plate in one.plates
                ],
                "table": _table(one.document),
            }
            for number, one in enumerate(found)
        ],
    }
    data = base64.b64encode(gzip.compress(_data(documents), mtime=0)).decode()
    bare = [{**one, "table": None} for one in about["sections"]]
    text = ""
    for less in ({}, {"data": ""}, {"data": "", "tables": False, "sections": bare}):
        text = str(template.render(**{**about, "data": data, "tables": True, **less}))
        if len(text.encode()) <= MOST_BYTES:
            return text
    raise CommandError(
        f"a page of them has {len(text.encode()) // 1024} KiB, and {MOST_BYTES // 1024}"
        " at most: give fewer documents"
    )


def pictures(documents: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the PNG of each picture of the page."""
    require()
    for one in sections(documents):
        for plate in one.plates:
            yield plate.picture.name, plate.picture.png()


def title(found: Sequence[Section]) -> str:
    """Return what the page is called."""
    model = found[0].document["machine"].get("cpu_model") or "this computer"
    return f"{'IPI latency' if found[0].bench == 'latency' else 'IPIs'} on {model}"


def finding(found: Sequence[Section]) -> str:
    """Return the sentence that stands first: what was found."""
    return next((one.finding for one in found if one.finding), "No row was measured.")


def _quoted(text: str) -> str:
    """Return a text as a string of CSS: whatever could end it is a number there."""
    letters = (
        letter
        if letter.isascii() and (letter.isalnum() or letter == " ")
        else f"\\{ord(letter):x} "
        for letter in text
    )
    return f'"{"".join(letters)}"'


def marked(text: str) -> str:
    """Return a text as HTML: ``**this**`` is strong, all else is as it is."""
    from markupsafe import escape

    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text)))


# ---- what stands above ---------------------------------------------------------------


def facts(documents: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what the computer is: a name and words for each fact that is known."""
    machine = documents[0]["machine"]
    clocked = next((one for one in documents if "timer_ns" in one), {})
    used = [machine.get("sender_core"), machine.get("target_core")]
    cores = " and ".join(str(core) for core in used if core is not None)
    found = {
        "Processor": machine.get("cpu_model"),
        "Cores": f"{cores} of {machine.get('cores')}"
        if cores
        else machine.get("cores"),
        "Machine": " ".join(
            word
            for word in (
                f"{machine['virtualisation']} guest,"
                if machine.get("virtualisation")
                else "",
                machine.get("kernel"),
            )
            if word
        ),
        "Clock": f"{clocked['clock']}, a stamp costs {clocked['timer_ns']:.0f} ns"
        if clocked
        else machine.get("clocksource"),
        "Idle": f"{machine['idle_driver']}, exit {machine.get('idle_exit_us')} µs"
        if machine.get("idle_driver")
        else None,
        "Load at the start": f"{machine['load_1m']:g} on {machine.get('ncores')} cores"
        if machine.get("load_1m") is not None
        else None,
        "Time stolen": f"{machine['steal_share']:.2%} since boot"
        if machine.get("steal_share") is not None
        else None,
        "Python": machine.get("python"),
    }
    return [(name, str(words)) for name, words in found.items() if words]


@dataclass(frozen=True)
class Doubts:
    """What speaks against the figures: one sentence, the reasons, and all of them."""

    sentence: str
    reasons: list[str]
    everything: list[str]


def doubts(documents: Sequence[dict[str, Any]], missing: Sequence[str] = ()) -> Doubts:
    """Return what is not to be trusted, by ``shmipi check``'s own words."""
    everything: dict[str, None] = dict.fromkeys(missing)
    invalid = rows = 0
    reasons: dict[str, list[str]] = {text: [] for text in missing}
    for document in documents:
        prefix = f"{document.get('bench')}: " if len(documents) > 1 else ""
        for text in compare.doubts(document):
            everything[prefix + text] = None
            if compare.of_machine(text):
                reasons.setdefault(_like(text), []).append(text)
        own = document["rows"] or list((document.get("limits") or {}).values())
        for row in own:
            rows += 1
            if row.get("valid") is False:
                invalid += 1
                for why in {_without_name(why) for why in row.get("why") or ()}:
                    reasons.setdefault(_like(why), []).append(why)
    others = dict.fromkeys(
        text.removeprefix("machine: ")
        for one in documents[1:]
        for text in compare.differences(documents[0], one)
        if text.startswith("machine: ") and "_core " not in text
    )
    for text in others:
        said = f"the documents are of different computers: {text}"
        everything[said] = None
        reasons[said] = []
    if not everything:
        return Doubts("", [], [])
    sentence = "Read these figures with care."
    if invalid:
        is_ = "is" if invalid == 1 else "are"
        sentence = f"{invalid} of {rows} rows {is_} not to be trusted (\N{DAGGER})."
    # What is said of most rows first; of the rest the list of all has it.
    listed = sorted(reasons.items(), key=lambda one: -len(one[1]) or -999)
    return Doubts(
        sentence, [_reason(*one) for one in listed[:_REASONS]], list(everything)
    )


#: How many reasons stand in the box.
_REASONS: Final = 5


def _without_name(why: str) -> str:
    """Return the reason without the limit whose it is: many have the same."""
    return re.sub(r"^limit \w+: ", "", why)


def _like(why: str) -> str:
    return re.sub(r"[\d.]+", "#", why)


def _reason(like: str, found: list[str]) -> str:
    if not found:
        return like
    worst = max(found, key=lambda why: float((re.findall(r"\d+\.?\d*", why) or [0])[0]))
    more = len(found) - 1
    return worst if not more else f"{worst} (the worst of {more + 1})"


# ---- what stands below ---------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    header: Cells
    rows: list[Cells]
    notes: list[str]


def _table(document: dict[str, Any]) -> _Shown | None:
    """Return the document as ``shmipi bench`` prints it."""
    if document.get("bench") == "replay":
        return _Shown(*replay.table(document))
    if document.get("bench") not in BENCHES:
        return None
    return _Shown(*registry.load(str(document["bench"])).table(document))


def _data(documents: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps(list(documents), separators=(",", ":")).encode()
