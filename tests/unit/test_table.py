"""Tables of every width: whole, split, or a block for each row; nothing is cut."""

import io
import os
import pty

import pytest

from shmipi.report.table import Listing, can_redraw, columns_of, folded, write


@pytest.fixture
def listing() -> Listing:
    made = Listing(("NAME", "CPUS", "WHAT IT DOES"), right=("CPUS",), title="machines")
    made.add_row("lab", "4", "runs a task and waits")
    made.add_row("big", "1024", "halts")
    return made


def text(listing: Listing, width: int | None) -> list[str]:
    return [line for line, _ in listing.lines(width)]


def test_whole_where_there_is_room(listing: Listing) -> None:
    expected = [
        "machines",
        "NAME  CPUS  WHAT IT DOES",
        "lab      4  runs a task and waits",
        "big   1024  halts",
    ]
    assert text(listing, None) == expected
    assert text(listing, 33) == expected
    assert listing.tables(33) == 1


def test_columns_are_split_behind_the_keys(listing: Listing) -> None:
    assert text(listing, 32) == [
        "machines",
        "NAME  CPUS",
        "lab      4",
        "big   1024",
        "",
        "NAME  WHAT IT DOES",
        "lab   runs a task and waits",
        "big   halts",
    ]
    assert listing.tables(32) == 2


def test_a_block_for_each_row_where_not_even_two_columns_fit(listing: Listing) -> None:
    assert text(listing, 24) == [
        "machines",
        "NAME          lab",
        "CPUS          4",
        "WHAT IT DOES  runs a",
        "              task and",
        "              waits",
        "",
        "NAME          big",
        "CPUS          1024",
        "WHAT IT DOES  halts",
    ]


@pytest.mark.parametrize("width", range(10, 60))
def test_no_width_loses_a_word(listing: Listing, width: int) -> None:
    words = " ".join(text(listing, width)).split()
    for cells, _ in [(listing.columns, ""), *listing.rows]:
        for word in " ".join(cells).split():
            assert word in words


def test_prose_is_folded_under_its_words() -> None:
    assert folded("a b c", None) == "a b c"
    assert folded("one two three", 9) == "one two\nthree"
    assert folded("  name  two three", 13) == "  name  two\nthree"
    assert folded("[1] two three four", 14) == "[1] two three\n    four"
    assert folded("  name  two three four", 18) == "  name  two three\n        four"


def test_how_wide_a_line_may_be() -> None:
    # Undone before the test is over: pytest looks at these, too, to say how it went.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        assert columns_of(io.StringIO()) is None
        master, slave = pty.openpty()
        with open(slave, "w") as terminal:
            assert columns_of(terminal) == 80  # it does not know its size
            patch.setenv("TERM", "xterm")
            assert can_redraw(terminal)
            for term in ("dumb", ""):
                patch.setenv("TERM", term)
                assert not can_redraw(terminal)
            patch.setenv("COLUMNS", "33")
            assert columns_of(terminal) == 33
        os.close(master)
        assert columns_of(io.StringIO()) == 33
        for odd in ("", "0", "-1", "x", "\u0663", "9" * 30):
            patch.setenv("COLUMNS", odd)
            assert columns_of(io.StringIO()) is None


def test_no_control_codes_but_on_a_terminal(listing: Listing) -> None:
    stream = io.StringIO()
    write(listing.lines(), stream)
    assert stream.getvalue().splitlines() == text(listing, None)
