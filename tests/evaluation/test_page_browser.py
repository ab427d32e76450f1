"""The pages in a browser: headless Chromium draws them, and asks nobody for anything."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hqqplus.evaluation.compare import comparison_page
from hqqplus.evaluation.page import run_page
from hqqplus.evaluation.report import Report
from hqqplus.evaluation.run_folder import Run, open_run, run_of
from tests.pages import NASTY, layers, nasty_layers, nasty_report, not_finite, packed_folder, report

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --no-proxy-server --hide-scrollbars"
WIDTHS = (400, 1280)
# What a careless page would do: it asks for a picture, runs a script, and is wider than its window.
CARELESS = """<!doctype html><body><img src="stolen.png"><script>window.ran = true</script>
<div style="width: 900px">wide</div><svg viewBox="0 0 10 10"><path class="curve" d="M0 0L5 5"/></svg></body>"""
# Each page in a frame of each width; what is found there is left in the title.
PROBE = """<!doctype html><title>not run</title><body><script>
const found = {};
function look(name, frame) {
  const page = frame.contentDocument, window_ = frame.contentWindow, width = page.documentElement.clientWidth;
  const out = box => box.width && (box.right > width + 1 || box.left < -1);
  const scrolled = node => node.parentElement && node.parentElement.closest(".scrolls");
  const texts = [...page.querySelectorAll("svg text")].map(node => node.getBoundingClientRect());
  found[name] = {
    width: width,
    overflow: page.documentElement.scrollWidth - width,
    outside: [...page.querySelectorAll("body *")].filter(node => out(node.getBoundingClientRect()) && !scrolled(node))
      .map(node => node.outerHTML.slice(0, 90)),
    curves: [...page.querySelectorAll("path.curve")].filter(node => node.getTotalLength() > 1
      && window_.getComputedStyle(node).stroke.startsWith("rgb")).length,
    marks: page.querySelectorAll("svg circle").length,
    smallest: Math.min(...texts.map(box => box.height)),
    requests: window_.performance.getEntriesByType("resource").map(entry => entry.name),
    scripts: page.scripts.length, ran: Boolean(window_.ran),
    color: window_.getComputedStyle(page.body).backgroundColor,
    text: page.body.innerText,
  };
}
const frames = %s.map(([name, address, width]) => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 1000px; border: 0`;
  frame.src = address;
  document.body.append(frame);
  return [name, frame];
});
window.onload = () => {
  for (const [name, frame] of frames) look(name, frame);
  for (const [, frame] of frames) frame.remove();
  const output = document.createElement("pre");
  output.id = "found";
  output.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
  document.body.append(output);
};
</script></body>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> page."""
    attack = "<img src='/stolen.png' onerror='window.ran = true'><script>window.ran = true</script>" + NASTY

    def as_run(made: Report, some: Any) -> Run:
        return run_of(made, some, "nowhere")

    nasty = nasty_report()
    wide = "w" * 300
    sample = {"prompt": attack, "parent": wide, "quantized": attack, "recovered": f"{attack}\n{wide}\n\t{wide}"}
    nasty = report(**{**vars(nasty), "samples": [sample], "name": attack + wide})
    packed = open_run(packed_folder(tmp_path_factory.mktemp("pages") / "packed"))
    plain = as_run(report(), layers(32))
    other = as_run(report(name="other " + "name" * 40, ppl_recovered=9.0, bits_per_weight=1.25), layers(3))
    many = [as_run(report(name=f"run {i}", ppl_recovered=5 + i / 10), layers()) for i in range(12)]
    return {
        "run": run_page(plain),
        "nasty": run_page(as_run(nasty, nasty_layers())),
        "not-finite": run_page(as_run(not_finite(), None)),
        "packed": run_page(packed),
        "compared": comparison_page([plain, other, as_run(nasty, nasty_layers()), packed]),
        "many": comparison_page(many),
        "careless": CARELESS,
    }


class Server:
    """The pages on this machine, and which addresses the browser asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                super().do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def browse(profile: Path, address: str, *flags: str) -> str:
    if BROWSER is None:
        pytest.skip("no browser: apt-get install chromium")
    # Whatever a page might name, this machine alone is found.
    command = [BROWSER, *FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    command += [f"--user-data-dir={profile}", *flags, address]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def seen(
    pages: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """What the browser found on each page at each width, and what it asked for."""
    folder = tmp_path_factory.mktemp("site")
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    frames = [(f"{name} {width}", f"{name}.html", width) for name in pages for width in WIDTHS]
    (folder / "probe.html").write_text(PROBE % json.dumps(frames), encoding="utf-8")
    server = Server(folder)
    try:
        profile = tmp_path_factory.mktemp("profile")
        dom = browse(profile, f"{server.address}/probe.html", "--virtual-time-budget=20000", "--dump-dom")
        encoded = re.search(r'<pre id="found">([^<]+)</pre>', dom)
        assert encoded is not None, dom
        import base64

        yield json.loads(base64.b64decode(encoded[1])), server.asked
    finally:
        server.server.shutdown()
        server.server.server_close()


def of(seen: Any, name: str) -> list[Any]:
    return [seen[0][f"{name} {width}"] for width in WIDTHS]


def test_the_probe_sees_a_careless_page(seen: Any) -> None:
    narrow, wide = of(seen, "careless")
    assert (narrow["width"], wide["width"]) == WIDTHS
    assert narrow["overflow"] > 400
    assert narrow["outside"]
    assert wide["overflow"] == 0
    assert narrow["ran"]
    assert narrow["scripts"] == 1
    assert [name.rpartition("/")[2] for name in narrow["requests"]] == ["stolen.png"]
    assert "/stolen.png" in seen[1]


def test_nothing_was_asked_for_and_nothing_ran(seen: Any, pages: dict[str, str]) -> None:
    expected = {"/probe.html", "/favicon.ico", "/stolen.png", *(f"/{name}.html" for name in pages)}
    assert set(seen[1]) <= expected
    for name in pages.keys() - {"careless"}:
        for found in of(seen, name):
            assert found["requests"] == []
            assert (found["scripts"], found["ran"]) == (0, False)
    # The careless page alone asked for the picture that what the models wrote names too; a browser asks for it once.
    assert seen[1].count("/stolen.png") <= len(WIDTHS)


def test_no_page_is_wider_than_its_window(seen: Any, pages: dict[str, str]) -> None:
    for name in pages.keys() - {"careless"}:
        for found in of(seen, name):
            assert found["overflow"] == 0, (name, found["width"])
            assert found["outside"] == [], (name, found["width"])


def test_the_curves_are_drawn_and_can_be_read(seen: Any) -> None:
    for found in of(seen, "run"):
        # Loss and its mean, perplexity, three kinds of layers.
        assert found["curves"] == 6
        assert found["marks"] == 3 + 2 + 96
        assert found["smallest"] > 11
        assert "Recovered\n5.14" in found["text"]
    for found in of(seen, "compared"):
        assert found["curves"] == 3 * 2 + 4
    for found in of(seen, "not-finite"):
        assert "No finite perplexity was measured." in found["text"]
        assert found["curves"] == 0
    for found in of(seen, "nasty"):
        assert "<script>window.ran = true</script>" in found["text"]


def test_a_page_opened_from_the_disk(pages: dict[str, str], tmp_path: Path) -> None:
    """As people open it, light and dark: pictures of it differ, and neither is empty."""
    from PIL import Image

    page = tmp_path / "report.html"
    page.write_text(pages["run"], encoding="utf-8")
    shades = []
    for dark in (0, 1):
        picture = tmp_path / f"{dark}.png"
        # 0 is dark, 1 is light.
        flags = [f"--blink-settings=preferredColorScheme={1 - dark}", "--window-size=1280,2000"]
        browse(tmp_path / "profile", page.as_uri(), *flags, f"--screenshot={picture}")
        with Image.open(picture) as image:
            colors = image.convert("RGB").getcolors(maxcolors=2**24)
            assert image.size == (1280, 2000)
        assert colors is not None
        assert len(colors) > 50
        shades.append(max(colors)[1])
    assert shades == [(255, 255, 255), (20, 23, 28)]
