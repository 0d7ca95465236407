"""``shmipi report``: what the page and the text say of recorded documents."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shmipi.cli import main
from shmipi.errors import CommandError
from shmipi.report.hist import Counts
from shmipi.report.page import sources
from shmipi.report.page.sections import sections
from shmipi.report.page.times import times

DATA = Path(__file__).resolve().parents[1] / "data" / "bench"
KIB = 1024


def document(name: str) -> dict[str, Any]:
    (found,) = sources.documents([DATA / f"{name}.json"])
    return found


def page_of(*documents: dict[str, Any]) -> str:
    from shmipi.report.page import html

    return html.page(list(documents))


@pytest.fixture(scope="module")
def page() -> str:
    """The page of all recorded documents."""
    return page_of(*sources.documents([DATA]))


def words(page: str) -> str:
    """What the page says, without its marks."""
    import html

    body = page[page.index("<main>") :]
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)))


# ---- what it says --------------------------------------------------------------------


def test_the_finding_comes_first_and_from_the_data(page: str) -> None:
    rows = document("latency")["rows"]
    native = [row for row in rows if row["handler"] == "native"]
    polling = next(row for row in native if row["target_state"] == "polling")
    halted = next(row for row in native if row["doorbell"] == "futex")
    said = words(page)
    sentence = (
        f"A call to a CPU that polls takes {times(polling['rtt_ns']['p50'])} ; waking"
        f" one that is halted takes {times(halted['rtt_ns']['p50'])} ,"
    )
    assert sentence in said
    assert f"{halted['ratio']:.2f} times what its bare system call takes" in said
    # First the finding, then the facts, then what is not to be trusted, then pictures.
    order = [sentence[:20], "Processor", "not to be trusted", "Each call beside its"]
    places = [said.index(text) for text in order]
    assert places == sorted(places)


def test_another_figure_is_another_finding() -> None:
    changed = document("latency")
    for row in changed["rows"]:
        if row["doorbell"] == "futex":
            row["rtt_ns"]["p50"], row["ratio"] = 7_654_321, 3.21
    (one,) = sections([changed])
    assert "halted takes **7.65 ms**" in one.finding
    assert "3.21 times what its bare system call takes" in one.finding


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.json")))
def test_every_bench_has_a_finding_and_a_picture(name: str) -> None:
    (one,) = sections([document(name)])
    assert re.search(r"\*\*.+?\*\*", one.finding), "no figure in it"
    assert one.plates


def test_every_row_is_there(page: str) -> None:
    said = words(page)
    for row in document("latency")["rows"]:
        name = " ".join(
            word
            for word in (row["target_state"], row["doorbell"], row["sender_wait"])
            if word not in ("none", "spin")
        )
        assert name in said
        assert f"{row['ratio']:.2f}\N{MULTIPLICATION SIGN}" in said
    for row in document("users")["rows"]:
        assert f"{row['user']}: {row['what']}" in said
    for name in document("limits")["limits"]:
        assert name in said
    for row in document("boot")["rows"]:
        assert f"{row['ncpus']} " in said
    for row in document("irq")["rows"] + document("controllers")["rows"]:
        assert row["controller"] in said


def test_what_is_not_to_be_trusted_is_said_in_the_words_of_check() -> None:
    from shmipi.report import compare

    shown = document("latency")
    for row in shown["rows"]:
        row.pop("why", None)
        row["valid"] = True
    for limit in shown["limits"].values():
        limit.pop("why", None)
        limit["valid"] = True
    shown["rows"][2].update(valid=False, why=["a CPU changed its core"])
    page = page_of(shown)
    said = words(page)
    assert "1 of 8 rows is not to be trusted" in said
    assert "a CPU changed its core" in said
    assert "halted futex \N{DAGGER}" in said  # in the picture, too
    assert "polling \N{DAGGER}" not in said
    for text in compare.doubts(shown):
        assert re.sub(r"\s+", " ", text) in said


def test_where_nothing_speaks_against_it_the_page_says_so() -> None:
    boot = document("boot")
    boot["machine"].update(load_1m=0.1, steal_share=0.0)
    said = words(page_of(boot))
    assert "Nothing was found that speaks against these figures" in said
    assert "not to be trusted" not in said


def test_documents_of_two_computers_are_said_to_be() -> None:
    other = document("boot")
    other["machine"]["cpu_model"] = "Another One"
    said = words(page_of(document("latency"), other))
    assert "of different computers: cpu_model" in said


def test_a_bench_that_nobody_has_heard_of_does_no_harm() -> None:
    page = page_of(document("boot"), {**document("boot"), "bench": "newer"})
    assert re.findall("<h2>(.*?)</h2>", page) == ["Boot", "All figures"]


def test_names_from_a_document_are_text_and_nothing_else() -> None:
    shown = document("users")
    shown["rows"][0]["what"] = "<script>alert(1)</script> & <b>"
    page = page_of(shown)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page


def test_histograms_of_any_bench(capsys: Any) -> None:
    from shmipi.report.page.text import histograms

    for name, first in (
        ("latency", "\npolling, native"),
        ("gap", "none poll gap_us 1 native rtt: "),
        ("matrix", " rtt: "),
    ):
        shown = document(name)
        histograms(shown, sys.stdout, everything=True)
        text = capsys.readouterr().out
        assert first in text
        counted = [
            int(number.replace(",", ""))
            for number in re.findall(r": ([\d,]+) in all$", text, re.MULTILINE)
        ]
        assert all(counted)
        lines = re.findall(r" +([\d,]+) +[\d.]+ % #+$", text, re.MULTILINE)
        assert sum(int(line.replace(",", "")) for line in lines) == sum(counted)
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    histograms(document("boot"), sys.stdout, everything=True)
    assert capsys.readouterr().out == "\nno row has a distribution\n"


# ---- a replay ------------------------------------------------------------------------


def test_a_replay_stands_beside_the_kernel() -> None:
    shown = document("replay")
    kernel, played, changed = shown["kernel"], shown["replay"], shown["what_if"]
    page = page_of(shown)
    said = words(page)
    assert f"Replay: {shown['file']}" in said
    assert (
        f"Of {kernel['queued']} calls the kernel's CPUs rang for {kernel['rung']}, the"
        f" replay's for {played['rung']}" in said
    )
    assert changed["words"][0] in said.replace("Lazy-resched:", "lazy-resched:")
    (one,) = sections([shown])
    assert [plate.picture.name for plate in one.plates] == [
        "replay-rows",
        "replay-counts",
    ]
    lengths, counts = (words(f"<main>{p.picture.svg()}") for p in one.plates)
    for vector in ("call_function_single", "reschedule"):
        times_ = [
            side["ipi"][vector]["send_to_entry_us"]["p50"]
            for side in (kernel, played, changed["replay"])
        ]
        assert f"{vector.replace('_', ' ')}, sent to taken" in lengths
        for us in times_[1:]:
            assert f"{us / times_[0]:.2f}\N{MULTIPLICATION SIGN}" in lengths
        for side in (kernel, played, changed["replay"]):
            assert str(side["ipi"][vector]["sent"]) in counts.split()
    assert "All figures of shmipi replay" in said
    for name in ("kernel", "replay", "lazy-resched"):
        assert f"<th>{name}</th>" in page


def test_another_replay_is_another_finding() -> None:
    shown = document("replay")
    shown["replay"]["rung"] = 4711
    shown["what_if"], shown["rows"][0]["why"] = None, []
    shown["why"] = []
    said = words(page_of(shown))
    assert "the replay's for 4,711 ;" in said
    assert "lazy-resched" not in said
    assert "hollow" not in said


def test_what_speaks_against_a_replay_is_said() -> None:
    shown = document("replay")
    shown["warnings"] = ["12 events were lost"]
    shown["rows"] = [{"file": "x", "valid": False, "why": ["it came too late"]}]
    said = words(page_of(shown))
    assert "the trace: 12 events were lost" in said
    assert "1 of 1 rows is not to be trusted" in said
    assert "it came too late" in said


def test_a_replay_as_text(capsys: Any) -> None:
    assert main(["report", str(DATA / "replay.json"), "--text"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ +kernel +replay +lazy-resched$", shown, re.MULTILINE)
    assert "\x1b" not in shown


def test_a_damaged_replay_is_wrong_usage(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "r.json").write_text('{"schema": "shmipi.replay/1", "kernel": 1}')
    assert main(["report", str(tmp_path)]) == 2
    assert "a document of `shmipi replay`, damaged" in capsys.readouterr().err


def test_two_documents_of_a_kind_share_no_id() -> None:
    page = page_of(*(document(name) for name in ("replay", "replay", "gap", "gap")))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 4


# ---- what it is ----------------------------------------------------------------------


def test_a_page_is_small_and_names_no_host(page: str) -> None:
    assert len(page.encode()) < 400 * KIB
    bare = re.sub(r"base64,[^\"]+", "base64,", page)
    assert not re.findall(r"https?:|//[a-z]|@import|<script|<link|<iframe", bare)
    fetched = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    for target in (one or other for one, other in fetched):
        kinds = ("#", "data:application/gzip;base64,", "data:image/png;base64,")
        assert target.startswith(kinds)
    assert "default-src 'none'" in page


def test_the_data_are_left_out_where_they_do_not_fit(page: str) -> None:
    import base64
    import gzip

    (data,) = re.findall(r"data:application/gzip;base64,([^\"]+)", page)
    kept = json.loads(gzip.decompress(base64.b64decode(data)))
    assert kept == sources.documents([DATA])
    large = document("boot")
    # What cannot be compressed.
    large["noise"] = random.Random(1).randbytes(400 * KIB).hex()
    page = page_of(large)
    assert "data:application/gzip" not in page
    assert len(page.encode()) < 400 * KIB


def test_a_page_is_valid_html(page: str) -> None:
    html5lib = pytest.importorskip("html5lib")
    parser = html5lib.HTMLParser()
    parser.parse(page)
    assert parser.errors == []
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page):
        assert (target[0] or target[1]) in ids


def test_two_pages_of_the_same_data_are_the_same() -> None:
    assert page_of(document("latency")) == page_of(document("latency"))


def test_text_in_pictures_is_text(page: str) -> None:
    (picture,) = re.findall(
        r"<h3>Each call beside its limit</h3>.*?(<svg.*?</svg>)", page, re.DOTALL
    )
    assert ">halted futex" in picture
    assert "font:" not in picture  # one size for all, which the page has
    widths = set(re.findall(r'viewBox="0 0 (\S+) ', page))
    assert widths == {"440"}


# ---- distributions -------------------------------------------------------------------


def test_pictures_are_short_and_what_they_say_is_whole() -> None:
    from shmipi.report.page.plot import _for_page

    drawn = (
        '<svg viewBox="0 0 440 9"><g id="axes"><g ><path d="M 1.256 2.5 \nL -3.14159 4'
        ' \nz" style="fill: none"/></g><g id="empty"/>'
        "<text style=\"font-size: 12.5px; font-family: 'DejaVu Sans', sans-serif;"
        ' text-anchor: middle; fill: #1a1a1a" transform="rotate(-0 1 2)">99.9991'
        "</text></g></svg>"
    )
    assert _for_page(drawn, "x", 'a "picture"') == (
        '<svg viewBox="0 0 440 9" role="img" aria-label="a &quot;picture&quot;">'
        '<path d="M1.2 2.5L-3.1 4z" style="fill: none"/>'
        '<text style="text-anchor: middle">99.9991</text></svg>'
    )


def test_what_has_no_room_is_left_out_in_turn(monkeypatch: Any) -> None:
    from shmipi.report.page import html

    whole = page_of(document("boot"))
    found = []
    for room in (len(whole.encode()), 11_600, 10_900, 1_000):
        monkeypatch.setattr(html, "MOST_BYTES", room)
        try:
            page = page_of(document("boot"))
        except CommandError as error:
            found.append(str(error))
            continue
        assert len(page.encode()) <= room
        found.append(("data:application/gzip" in page, "<table" in page))
        assert ("The tables have no room" in page) == ("<table" not in page)
        assert "<svg" in page
    *pages, refused = found
    assert pages == [(True, True), (False, True), (False, False)]
    assert refused.endswith(" KiB, and 0 at most: give fewer documents")


def test_names_of_columns_are_text_and_nothing_else() -> None:
    shown = document("replay")
    shown["what_if"]["policy"] = 'x"; } </style><script>alert(1)</script>'
    page = page_of(shown)
    assert "<script" not in page
    assert page.count("</style>") == 1
    rules = re.findall(r"::before \{ content: (.*); \}$", page, re.MULTILINE)
    assert '"kernel"' in rules
    assert all(re.fullmatch(r'"[\w\\ ]*"', rule) for rule in rules)


def test_long_names_are_folded() -> None:
    shown = document("users")
    what = (
        "an operation of which there are so many words that they fill a line, and more"
    )
    shown["rows"][0]["what"] = what
    (one,) = sections([shown])
    texts = re.findall(r">([^<]*)</text>", one.plates[0].picture.svg())
    assert max(map(len, texts)) <= 60
    assert what in " ".join(texts)


def test_counts_are_those_of_hdrhistogram() -> None:
    from hdrh.histogram import HdrHistogram

    from shmipi import _core
    from shmipi.bench.hist import described

    hist = _core.Hist()
    for n in range(1, 4000):
        hist.record(n * n)
    found = described(hist)
    counts = Counts.of(found)
    theirs = HdrHistogram.decode(found["hist"])
    assert counts.steps == tuple(
        (item.value_iterated_to, item.count_added_in_this_iter_step)
        for item in theirs.get_recorded_iterator()
    )
    assert counts.total == 3999
    assert counts.shares()[-1][1] == 1


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        *((0.4, "0.4 ns"), (9.96, "9.96 ns"), (324.4, "324 ns"), (999.4, "999 ns")),
        *((999.9, "1 µs"), (20_600, "20.6 µs"), (999_999, "1 ms"), (1.5e9, "1.5 s")),
        *((100_000, "100 µs"), (200e9, "200 s")),
    ],
)
def test_times(ns: float, text: str) -> None:
    assert times(ns) == text


# ---- the command ---------------------------------------------------------------------


def test_a_directory_makes_a_page_in_it(tmp_path: Path, capsys: Any) -> None:
    for name in ("boot", "latency"):
        shutil.copy(DATA / f"{name}.json", tmp_path)
    (tmp_path / "other.json").write_text('{"schema": "shmipi.doctor/1"}')
    assert main(["report", str(tmp_path), "--png"]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "IPI latency on" in text
    pngs = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pngs == [
        "report-boot-lines.png",
        "report-latency-distribution.png",
        "report-latency-percentiles.png",
        "report-latency-rows.png",
    ]
    shown = capsys.readouterr().out
    for name in ("report.html", *pngs):
        assert name in shown
        assert (tmp_path / name).read_bytes()
    # A report is written over, anything else is not.
    assert main(["report", str(tmp_path)]) == 0
    (tmp_path / "report.html").write_text("<p>mine</p>")
    assert main(["report", str(tmp_path)]) == 2
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"


def test_a_page_on_standard_output(capsys: Any) -> None:
    assert main(["report", str(DATA / "boot.json"), "-o", "-"]) == 0
    assert capsys.readouterr().out.startswith("<!DOCTYPE html>")


def test_what_is_no_result_is_wrong_usage(tmp_path: Path, capsys: Any) -> None:
    damaged = document("latency")
    damaged["rows"][0]["rtt_ns"]["hist"] = "HISTnothing"
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("[]")
    for arguments, said in (
        ([str(tmp_path / "damaged.json")], "histogram"),
        ([str(tmp_path / "empty")], "no document"),
        ([str(tmp_path / "other.json")], "no document"),
        ([str(tmp_path / "missing")], "No such file"),
        ([str(DATA), "-o", str(tmp_path)], "no name of a file"),
        ([str(DATA), "-o", str(tmp_path / "no" / "where.html")], "no name of a file"),
        ([str(DATA), "--text", "--png"], "--text prints"),
        ([str(DATA), "-o", "-", "--png"], "--png needs"),
    ):
        assert main(["report", *arguments]) == 2, arguments
        message = capsys.readouterr().err
        assert said in message
        assert "Traceback" not in message


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    target = tmp_path / "page.html"
    for missing in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            arguments = ["report", str(DATA / "boot.json"), "-o", str(target)]
            assert main(arguments) == 1
            message = capsys.readouterr().err
            assert "pip install 'shmipi[report]'" in message
            assert missing in message
            # Words need no pictures.
            assert main(["report", str(DATA / "latency.json"), "--text"]) == 0
            capsys.readouterr()
    assert not target.exists()


def test_pictures_are_imported_for_pages_only() -> None:
    program = (
        "import sys, shmipi; from shmipi.cli import main;"
        "main(sys.argv[1:]);"
        "print(sorted({'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    for arguments in (
        ["report", str(DATA / "latency.json"), "--text"],
        ["check", str(DATA / "latency.json")],
        ["report", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_as_text_with_histograms(capsys: Any) -> None:
    assert main(["report", str(DATA / "latency.json"), "--text"]) == 0
    shown = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", shown)
    assert "A call to a CPU that polls takes" in shown
    rows = document("latency")["rows"]
    counted = re.findall(r"\n(.+): ([\d,]+) in all\n((?:.+\n)+)", shown)
    assert len(counted) == len(rows)
    for row, (_, total, lines) in zip(rows, counted, strict=True):
        assert int(total.replace(",", "")) == row["rtt_ns"]["count"]
        bars = re.findall(r"^ *[\d.]+ \S+ +([\d,]+) +[\d.]+ % #+$", lines, re.M)
        assert sum(int(bar.replace(",", "")) for bar in bars) == row["calls"]


def test_recorded_documents_are_not_changed_by_a_report() -> None:
    before = sources.documents([DATA])
    kept = copy.deepcopy(before)
    page_of(*before)
    assert before == kept
