"""The report in a real browser: it renders, fits narrow and wide screens, and follows both colour schemes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from whimbrel.report import write_report
from whimbrel.report.fixtures.sample import awkward_report, sample_report
from whimbrel.report.schema import Report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 820, 1280)
SCHEMES = {"light": (1, "rgb(252, 252, 250)"), "dark": (0, "rgb(20, 23, 26)")}

# Runs inside the page. A table scrolls inside its own box, so what lies in one may be wider than the screen.
MEASURE = """
<script>
addEventListener("load", () => {
  const wide = document.documentElement.clientWidth;
  const seen = (e) => e.getClientRects().length > 0;
  const name = (e) => e.tagName + " " + (e.textContent || "").trim().slice(0, 40);
  const parts = [...document.body.querySelectorAll("*")].filter((e) => seen(e) && e.id !== "tip");
  const out = parts.filter((e) => !e.closest(".scroll") && !e.closest("svg")).filter((e) => {
    const box = e.getBoundingClientRect();
    return box.right > wide + 0.5 || box.left < -0.5;
  });
  const clipped = [], touching = [], small = [];
  let drawn = 0;
  for (const svg of document.querySelectorAll("svg")) {
    if (!seen(svg)) continue;
    drawn += 1;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((e) => [e, e.getBoundingClientRect()]);
    for (const [e, box] of texts) {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 ||
          box.bottom > frame.bottom + 1) clipped.push(name(e));
      if (box.height < 11) small.push(name(e));
    }
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
      const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (across > 1 && down > 3) touching.push(name(a) + " / " + name(b));
    }));
  }
  parent.postMessage({
    wide, drawn, clipped, touching, small,
    out: out.map(name),
    scrolls: document.documentElement.scrollWidth - wide,
    titles: [...document.querySelectorAll("h2")].map((e) => e.textContent),
    background: getComputedStyle(document.body).backgroundColor,
    tips: document.querySelectorAll("[data-tip]").length,
  }, "*");
});
</script>
"""

FRAMES = """<!doctype html><body style="margin:0"><script>
const found = [];
addEventListener("message", (event) => {
  found.push(event.data);
  if (found.length === %(count)d) {
    const out = document.createElement("pre");
    out.id = "found";
    out.textContent = JSON.stringify(found);
    document.body.append(out);
  }
});
</script>%(frames)s</body>"""


def browse(page: Path, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open one page in a browser that has never run before and may not reach the network."""
    assert CHROMIUM is not None
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--no-sandbox"]
    profile = home / f"profile-{len(list(home.glob('profile-*')))}"
    command = [CHROMIUM, "--headless", *quiet, f"--user-data-dir={profile}", "--enable-logging=stderr", *options]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page wrote to the console."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", autouse=True)
def _chromium():
    if CHROMIUM is None:
        pytest.skip("could not run: no chromium found (Debian and Ubuntu: apt-get install chromium)")


def measure(report: Report, home: Path, scheme: int) -> dict[int, dict]:
    """What a page measured of itself, by width, in one colour scheme."""
    text = write_report(report, home / "report.html").read_text(encoding="utf-8")
    # The page forbids every script but its own, so the copy that measures itself goes without that rule.
    text, changed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert changed == 1
    # Tables are measured open.
    copy = text.replace("<details>", "<details open>").replace("</body>", f"{MEASURE}</body>")
    (home / "measured.html").write_text(copy, encoding="utf-8")
    frame = '<iframe src="measured.html" style="border:0;width:%dpx;height:900px"></iframe>'
    frames = "".join(frame % width for width in WIDTHS)
    (home / "frames.html").write_text(FRAMES % {"count": len(WIDTHS), "frames": frames}, encoding="utf-8")
    colours = f"--blink-settings=preferredColorScheme={scheme}"
    done = browse(home / "frames.html", home, "--dump-dom", "--virtual-time-budget=5000", colours)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert match, done.stderr
    assert complaints(done) == []
    return {each["wide"]: each for each in json.loads(unescape(match[1]))}


@pytest.fixture(scope="module", params=sorted(SCHEMES))
def measured(request, tmp_path_factory):
    scheme, background = SCHEMES[request.param]
    return measure(sample_report(), tmp_path_factory.mktemp(request.param), scheme), background


def test_every_width_and_section_is_drawn(measured):
    found, _ = measured
    assert sorted(found) == sorted(WIDTHS)
    for each in found.values():
        assert each["titles"] == [
            "Training",
            "Averaging",
            "Memory",
            "Recall",
            "Inside the model",
            "Long context",
            "Side by side",
            "Repeat it",
        ]
        assert each["drawn"] == 16
        assert each["tips"] > 200


def test_nothing_is_wider_than_the_screen(measured):
    for width, each in measured[0].items():
        assert (width, each["scrolls"], each["out"]) == (width, 0, [])


def test_labels_are_whole_apart_and_large_enough(measured):
    for width, each in measured[0].items():
        assert (width, each["clipped"]) == (width, [])
        assert (width, each["touching"]) == (width, [])
        assert (width, each["small"]) == (width, [])


def test_long_names_and_extremes_stay_on_the_screen(tmp_path):
    for width, each in measure(awkward_report(), tmp_path, 1).items():
        assert (width, each["scrolls"], each["out"]) == (width, 0, [])
        assert (width, each["clipped"]) == (width, [])
        assert (width, each["touching"]) == (width, [])


def test_background_follows_the_scheme(measured):
    found, background = measured
    assert {each["background"] for each in found.values()} == {background}


def test_the_page_itself_runs_without_complaint(tmp_path):
    """As written, with its own rule for scripts and styles: the marks lose their titles to the page's script."""
    page = write_report(sample_report(), tmp_path / "report.html")
    done = browse(page, tmp_path, "--dump-dom")
    assert complaints(done) == []
    assert "data-tip=" in done.stdout
    assert done.stdout.count("<title>") == 1
    picture = tmp_path / "page.png"
    done = browse(page, tmp_path, f"--screenshot={picture}", "--window-size=1280,900")
    assert complaints(done) == []
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (1280, 900)
    assert picture.stat().st_size > 20_000
