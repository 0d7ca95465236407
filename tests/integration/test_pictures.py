"""A page of ``shmipi report`` in a browser: nothing clipped, nothing tiny, no request.

Debian's chromium takes the pictures (apt-get install chromium).
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest

from shmipi.report.page import html, sources

DATA = Path(__file__).resolve().parents[1] / "data" / "bench"
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium (Debian: apt-get install chromium)"
    ),
]

#: Looks at every text of the page, also at those in tables that are folded away.
PROBE = """
<script>
addEventListener('securitypolicyviolation', event => violations.push(event.blockedURI));
const violations = [];
addEventListener('load', () => {
  const seen = {texts: 0, least: 1e9, smallest: '', outside: [], over: []};
  for (const one of document.querySelectorAll('details')) one.open = true;
  const wide = document.documentElement.clientWidth;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const text = node.textContent.trim(), of = node.parentElement;
    if (!text || of.closest('script, style')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!box.width) continue;
    const matrix = of.ownerSVGElement ? of.getScreenCTM() : {a: 1, b: 0};
    const scale = Math.hypot(matrix.a, matrix.b);
    const size = parseFloat(getComputedStyle(of).fontSize) * scale;
    seen.texts++;
    if (size < seen.least) { seen.least = size; seen.smallest = text; }
    const frame = of.closest('svg') ? of.closest('svg').getBoundingClientRect()
                                    : {left: 0, right: wide, top: 0, bottom: 1e9};
    if (box.left < frame.left - 1 || box.right > frame.right + 1
        || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
      seen.outside.push(text);
  }
  for (const svg of document.querySelectorAll('svg')) {
    const boxes = [...svg.querySelectorAll('text')].map(
      one => [one.textContent, one.getBoundingClientRect()]);
    boxes.forEach(([name, a], at) => boxes.slice(at + 1).forEach(([other, b]) => {
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 2 && y > 0.4 * Math.min(a.height, b.height))
        seen.over.push(`${name} / ${other}`);
    }));
  }
  seen.scroll = document.documentElement.scrollWidth - wide;
  seen.wide = wide;
  seen.requests = performance.getEntriesByType('resource').map(one => one.name);
  seen.violations = violations;
  for (const one of document.querySelectorAll('details')) one.open = false;
  console.log('SEEN' + JSON.stringify(seen) + 'END');
});
</script>
"""


def look(page: Path, width: int, picture: Path) -> dict[str, Any]:
    """Take a picture of the page, and say what is on it.

    In a frame: chromium's own window is never narrower than 500 pixels.
    """
    assert CHROMIUM is not None
    frame = picture.with_suffix(".frame.html")
    frame.write_text(
        '<!DOCTYPE html><body style="margin: 0"><iframe style="border: 0"'
        f' width="{width}" height="4000" srcdoc="{escape(page.read_text())}"></iframe>'
    )
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={picture.parent}/profile"),
            f"--window-size={max(width, 500)},4000",
            f"--screenshot={picture}",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "HOME": str(picture.parent)},
    )
    found = re.search(r"SEEN(\{.*\})END", done.stderr)
    assert found, done.stderr
    seen: dict[str, Any] = json.loads(found[1])
    return seen


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = sources.documents([DATA])
    # A name that fills more than a line, and values that are almost one.
    more = {one["bench"]: copy.deepcopy(one) for one in documents}
    more["users"]["rows"][0]["what"] = "backtraces of as many CPUs as there are " * 2
    for number, row in enumerate(more["matrix"]["rows"]):
        row["rtt_ns"]["p50"] = 26_900 + 300 * number
    # As many lines as a picture of the usual height has no room to name.
    row = next(row for row in more["victim"]["rows"] if row["source"] == "shmipi")
    more["victim"]["rows"] = [
        {
            **row,
            "doorbell": f"bell {n}",
            "rate": rate,
            "lost_share": rate / 4e5 + n / 1e3,
        }
        for n in range(17)
        for rate in (1000, 100_000)
    ]
    text = html.page([*documents, more["users"], more["matrix"], more["victim"]])
    strict = "default-src 'none'"
    assert strict in text
    path = tmp_path_factory.mktemp("page") / "page.html"
    # The probe is the one script that it may run.
    text = text.replace(strict, f"{strict}; script-src 'unsafe-inline'")
    path.write_text(text.replace("</head>", f"{PROBE}</head>"))
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_is_whole_and_legible(page: Path, width: int) -> None:
    from matplotlib.image import imread

    picture = page.with_name(f"{width}.png")
    seen = look(page, width, picture)
    assert seen["wide"] == width
    assert seen["texts"] > 300
    assert seen["least"] >= 10, seen["smallest"]
    assert seen["outside"] == []
    assert seen["over"] == []
    assert seen["scroll"] == 0
    assert seen["requests"] == []
    assert seen["violations"] == []
    pixels = imread(picture)[:, :width]
    assert pixels.shape[1] == width
    inked = (pixels[..., :3].min(axis=2) < 0.5).mean()
    assert 0.005 < inked < 0.3  # neither empty nor a black page
