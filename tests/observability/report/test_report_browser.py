"""The HTML report in a real browser: no error on its console, every plot drawn, a screenshot kept."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from observability.report.command import main
from tests import ROOT
from tests.helpers import made_traces as made
from tests.observability.report.test_report import HOSTILE, faulty_steps

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    "--window-size=1240,4200",
)
ARTIFACTS = ROOT / "artifacts"
PLOTS = (
    "loss", "grad-norm", "learning-rate", "steps", "phases", "clusters", "slowest", "memory", "compared",
    "compared-loss",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium found (make browser installs it)")
    return found


def opened(browser: str, page: Path, *more: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *more, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=180)


PRESS = """<script>
const pressed = setInterval(function () {
  if (document.body.dataset.plotsDrawn !== "8") return;
  clearInterval(pressed);
  const plot = document.getElementById("steps");
  const ranges = [];
  for (const key of ["", "+", "ArrowRight", "-", "0"]) {
    plot.dispatchEvent(new KeyboardEvent("keydown", { key }));
    ranges.push(plot.layout.xaxis.range.map(Math.round).join(" "));
  }
  document.body.dataset.ranges = ranges.join(";");
}, 50);
</script>"""


def test_plots_zoom_and_move_by_the_keyboard(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main([str(made.write(tmp_path / "trace.jsonl", made.plain_steps(200))), "--html", str(page)]) == 0
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    page.write_text(text.replace("</body>", PRESS + "</body>"), encoding="utf-8")
    document = opened(browser, page, "--dump-dom")
    assert "CONSOLE" not in document.stderr, document.stderr
    ranges = re.search(r'data-ranges="([^"]*)"', document.stdout)
    assert ranges is not None
    before, closer, right, further, whole = (tuple(map(float, part.split())) for part in ranges.group(1).split(";"))
    width = before[1] - before[0]
    assert closer[1] - closer[0] == pytest.approx(width / 2, abs=2)
    assert right[0] == pytest.approx(closer[0] + width / 10, abs=2)
    assert further[1] - further[0] == pytest.approx(width, abs=3)
    assert whole == before


PRINTED = """<script>
const printed = setInterval(function () {
  if (document.body.dataset.plotsDrawn !== "8") return;
  clearInterval(printed);
  const width = () => document.querySelector("#steps .main-svg").getAttribute("width");
  document.body.dataset.paper = document.getElementById("steps").layout.paper_bgcolor;
  window.dispatchEvent(new Event("beforeprint"));
  setTimeout(function () {
    document.body.dataset.printed = width();
    window.dispatchEvent(new Event("afterprint"));
    setTimeout(() => { document.body.dataset.after = width(); }, 200);
  }, 200);
}, 50);
</script>"""


def test_dark_pages_have_dark_plots_and_paper_cuts_none(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main([str(made.write(tmp_path / "trace.jsonl", made.plain_steps(60))), "--html", str(page)]) == 0
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    page.write_text(text.replace("</body>", PRINTED + "</body>"), encoding="utf-8")
    document = opened(browser, page, "--dump-dom", "--blink-settings=preferredColorScheme=0")
    assert "CONSOLE" not in document.stderr, document.stderr
    told = dict(re.findall(r'data-(paper|printed|after)="([^"]*)"', document.stdout))
    assert told["paper"] == "#161c25"
    assert float(told["printed"]) == 680  # what A4 has room for
    assert float(told["after"]) > 1000


def test_the_report_draws_in_a_browser(browser: str, tmp_path: Path) -> None:
    steps = faulty_steps()
    for step in steps:
        step.phases[HOSTILE] = 5.0
    trace = made.write(tmp_path / "trace.jsonl", steps)
    other = made.write(tmp_path / "other.jsonl", made.plain_steps(250, seed=5))
    page = tmp_path / "report.html"
    assert main([str(trace), "--html", str(page), "--against", str(other)]) == 0

    document = opened(browser, page, "--dump-dom")
    assert "CONSOLE" not in document.stderr, document.stderr
    assert f'data-plots-drawn="{len(PLOTS)}"' in document.stdout
    for name in PLOTS:
        plot = re.search(rf'<div id="{name}".*?</svg>', document.stdout, re.DOTALL)
        assert plot is not None, name
        assert "main-svg" in plot.group(0)
    assert "<script>alert(1)" not in document.stdout
    assert "<img src=x" not in document.stdout

    ARTIFACTS.mkdir(exist_ok=True)
    picture = ARTIFACTS / "report.png"
    picture.unlink(missing_ok=True)
    opened(browser, page, f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000
