"""What a user sees, in headless Chromium: `make browser-test`.

Opens notebooks in JupyterLab at scale "smoke" and runs all their cells: none ends in an error and every
picture is drawn; some run twice in one kernel; sliders move the picture. Then opens three pages of the site,
wide and narrow, light and dark, and searches it. `--screenshots FOLDER` keeps what was seen.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

sys.path.insert(0, str(Path(__file__).parents[1]))  # this file is run as a script

from ci.chromium import Page, free_port, opened, program, running, wait

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "_build" / "html"
WIDTHS = (1280, 400)  # pixels
CONTRAST = 4.5  # of text on its ground, at least (WCAG 2.1, AA)


@dataclass(frozen=True)
class Visit:
    """A notebook to open, how often it runs in one kernel, and what is to be seen at least."""

    name: str
    times: int = 1
    pictures: int = 1
    sliders: int = 0


VISITS = (
    Visit("00_quickstart", pictures=4, sliders=2),
    Visit("03_imagenet1k", times=2),
    Visit("17_your_data", times=2),
    Visit("18_lesson", pictures=4, sliders=2),
)
PAGES = ("index.html", "notebooks/05_guidance_ablation.html", "api.html")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help='beginnings of notebooks\' names, or "site"')
    parser.add_argument("--scale", default="smoke", choices=("smoke", "small"))
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the pages")
    parser.add_argument("--seconds", type=float, default=900, help="time for a notebook's cells")
    given = parser.parse_args(argv)
    if program() is None:
        print("no Chromium: on Debian, as root, apt-get install chromium", file=sys.stderr)
        return 2
    only = tuple(given.only)
    visits = [visit for visit in VISITS if not only or visit.name.startswith(only)]
    with tempfile.TemporaryDirectory() as folder, lab(visits, Path(folder), given.scale) as address:
        for visit in visits:  # a browser each: one that was left with unsaved changes asks first
            with opened(Path(folder) / visit.name) as page:
                page.go(address.format(visit.name))
                look_at_notebook(page, visit, given.seconds)
                keep(page, given.screenshots, visit.name)
    if not only or "site" in only:
        with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as page:
            look_at_site(page, given.screenshots)
    return 0


def keep(page: Page, folder: Path | None, name: str) -> None:
    if folder:
        page.run("document.querySelectorAll('.Toastify').forEach(notice => notice.remove())")
        time.sleep(1)
        page.screenshot(folder / f"{name}.png")


# --- notebooks

# The notebook's cells as the application has them: what each has run and put out.
PANEL = "Array.from(window.jupyterapp.shell.widgets('main')).find(w => w.content?.model?.cells)"
CELLS = (
    "(() => {"
    + f"const panel = {PANEL};"
    + """
  const cells = panel?.content?.model?.cells;
  if (!panel?.sessionContext?.session?.kernel || !cells) return null;
  return Array.from(cells).filter(c => c.type === 'code').map(c => {
    const outputs = c.toJSON().outputs;
    return {count: c.executionCount ?? 0,
        errors: outputs.filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue),
            kinds: outputs.flatMap(o => Object.keys(o.data ?? {}))};
  });
})()"""
)
SLIDER_CELL = "document.querySelector('.widget-hslider').closest('.jp-Cell')"


@contextmanager
def lab(visits: list[Visit], scratch: Path, scale: str) -> Iterator[str]:
    """JupyterLab over these notebooks while the block runs; a notebook's address, "{}" for its name."""
    notebooks = scratch / "notebooks"
    notebooks.mkdir()
    for visit in visits:
        own = load_notebook_node(str(ROOT / "notebooks" / f"{visit.name}.ipynb"))
        nbformat.write(parameterize_notebook(own, {"scale": scale}), notebooks / f"{visit.name}.ipynb")
    port, token = free_port(), secrets.token_hex(16)
    server = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={notebooks}",
        "--LabApp.expose_app_in_browser=True",
    ]
    ready = f"http://127.0.0.1:{port}/api?token={token}"
    log = scratch / "server.log"
    with running(server, log):
        try:
            wait("JupyterLab", lambda: urllib.request.urlopen(ready).status == 200, 120)
            # A workspace each, so that no notebook that was open before opens again.
            yield f"http://127.0.0.1:{port}/lab/workspaces/{{0}}/tree/{{0}}.ipynb?token={token}"
        except Exception:
            sys.stderr.write(log.read_text()[-2000:])
            raise


def look_at_notebook(page: Page, visit: Visit, seconds: float) -> None:
    """Run all cells and check what there is to see. Raises AssertionError or TimeoutError."""
    wait("notebook", lambda: page.run("typeof window.jupyterapp !== 'undefined'") and page.run(CELLS), 120)
    page.run(f"window.jupyterapp.shell.activateById({PANEL}.id), window.jupyterapp.shell.collapseLeft()")
    for _ in range(visit.times):
        cells = run_all(page, seconds)
    pictures = sum(cell["kinds"].count("image/png") for cell in cells)
    assert pictures >= visit.pictures, f"{visit.name}: {pictures} pictures"
    if visit.sliders:
        check_sliders(page, visit.sliders)
    assert not (broken := page.broken_pictures()), f"{visit.name}: not drawn: {broken}"
    seen = f"{pictures} pictures, {visit.sliders} sliders"
    print(f"{visit.name}: {len(cells)} cells ran, times: {visit.times}; {seen}", flush=True)


def run_all(page: Page, seconds: float) -> list[dict[str, Any]]:
    """Every code cell after it has run once more."""
    before = max(cell["count"] for cell in page.run(CELLS))
    page.run("void window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def done() -> list[dict[str, Any]] | None:
        cells = page.run(CELLS)
        failed = [error for cell in cells for error in cell["errors"]]
        assert not failed, failed
        return cells if all(cell["count"] > before for cell in cells) else None

    return wait("end of the run", done, seconds)


def check_sliders(page: Page, expected: int) -> None:
    """That the sliders are there, and that another picture is drawn where one is moved."""
    page.run("document.querySelector('.widget-hslider, .jupyter-widgets')?.scrollIntoView({block: 'center'})")
    found = wait("sliders", lambda: page.run("document.querySelectorAll('.widget-hslider').length"), 60)
    assert found == expected, f"{found} sliders"
    picture = f"{SLIDER_CELL}.querySelector('img')?.src ?? ''"
    before = wait("picture under the sliders", lambda: page.run(picture), 60)
    page.run("document.querySelector('.widget-hslider .noUi-handle').focus()")
    page.press("ArrowLeft", 37)
    wait("other picture after a slider moved", lambda: page.run(picture) not in ("", before), 60)
    page.run(f"{SLIDER_CELL}.scrollIntoView({{block: 'center'}})")


# --- the site

# Of every text on the page that is seen: how much its colour differs from the ground that it stands on.
WORST_CONTRAST = """(() => {
  const parts = colour => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    for (; node; node = node.parentElement) {
      const own = getComputedStyle(node).backgroundColor;
      if (!own.startsWith('rgb') || (parts(own)[3] ?? 1) > 0.5) return own;
    }
    return 'rgb(255, 255, 255)';
  };
  const kinds = ['p', 'td', 'th', 'li', 'h1', 'h2'].map(kind => `article ${kind}`).join(', ');
  const found = Array.from(document.querySelectorAll(kinds))
    .filter(node => node.innerText?.trim() && node.offsetParent)
    .map(node => {
      const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), node.innerText.slice(0, 60)];
    });
  return found.sort((x, y) => x[0] - y[0])[0];
})()"""


def look_at_site(page: Page, screenshots: Path | None) -> None:
    """Three pages, wide and narrow, light and dark, and a search. Raises AssertionError or TimeoutError."""
    if not all((SITE / name).is_file() for name in PAGES):
        raise FileNotFoundError(f"no site in {SITE}: make site")
    port = free_port()
    server = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", str(SITE)]
    with tempfile.TemporaryDirectory() as folder, running(server, Path(folder) / "site.log"):
        address = f"http://127.0.0.1:{port}/"
        wait("site", lambda: urllib.request.urlopen(address).status == 200, 60)
        for name in PAGES:
            for width in WIDTHS:
                for colours in ("light", "dark"):
                    page.resize(width)
                    page.prefer(colours)
                    page.go(address + name)
                    check_page(page, f"{name}, {width} px, {colours}")
                    keep(page, screenshots, f"{Path(name).stem}-{width}-{colours}")
        check_search(page, address)
    print(f"the site: {len(PAGES)} pages, {WIDTHS[0]} and {WIDTHS[1]} px wide, light and dark; search")


def check_page(page: Page, what: str) -> None:
    assert not (broken := page.broken_pictures()), f"{what}: not drawn: {broken}"
    wide = page.run("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 1, f"{what}: {wide} px wider than the window"
    contrast, text = page.run(WORST_CONTRAST)
    assert contrast >= CONTRAST, f"{what}: contrast {contrast:.1f} of {text!r}"
    blurred = page.run(
        "Array.from(document.querySelectorAll('article img')).filter("
        "i => !i.src.endsWith('.svg') && i.naturalWidth < 0.9 * i.clientWidth).map(i => i.src)"
    )
    assert not blurred, f"{what}: enlarged: {blurred}"


def check_search(page: Page, address: str) -> None:
    """That a word of the library is found, and one that is nowhere is not."""
    found, summary = {}, "document.querySelector('.search-summary')?.innerText"
    for word in ("influence", "zyxwvu"):
        page.go(f"{address}search.html?q={word}")
        wait("end of the search", lambda: page.run(summary), 60)
        found[word] = page.run("document.querySelectorAll('ul.search li').length")
    assert found["influence"] > 3 and found["zyxwvu"] == 0, found


if __name__ == "__main__":
    sys.exit(main())
