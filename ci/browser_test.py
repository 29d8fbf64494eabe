"""Opens 00_quickstart in JupyterLab in headless Chromium, runs all its cells and looks at the page: `make
browser-test`.

Checks that no cell ends in an error, that every picture is drawn and that the sliders are there and move the
picture. `--scale small --screenshot FILE` keeps a picture of the page. Speaks Chromium's own debugging
protocol: nothing is needed beyond the locked packages and Debian's `chromium`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import websocket
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).parents[1]
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
    return {run: c.executionCount !== null,
        errors: outputs.filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue),
            kinds: outputs.flatMap(o => Object.keys(o.data ?? {}))};
  });
})()"""
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen]:
    """A program that runs while the block does; it and what it started are ended afterwards."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def wait(what: str, found: Callable[[], Any], seconds: float) -> Any:
    """The first true value of `found`. Raises TimeoutError after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := found():
                return value
        except OSError:  # not listening yet
            pass
        time.sleep(0.5)
    raise TimeoutError(f"no {what} within {seconds:.0f} s")


class Page:
    """One tab of Chromium, by its debugging protocol."""

    def __init__(self, port: int):
        def tab() -> str | None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                return next(
                    (entry["webSocketDebuggerUrl"] for entry in json.load(answer) if entry["type"] == "page"),
                    None,
                )

        self.socket = websocket.create_connection(wait("browser", tab, 60), suppress_origin=True, timeout=120)
        self.count = 0

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def run(self, script: str) -> Any:
        """A script's value; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(
                found["exceptionDetails"].get("exception", {}).get("description", "script failed")
            )
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


def look(page: Page, screenshot: Path | None, seconds: float) -> None:
    """Run all cells and check what there is to see. Raises AssertionError or TimeoutError."""
    wait("notebook", lambda: page.run("typeof window.jupyterapp !== 'undefined'") and page.run(CELLS), 120)
    page.run(f"window.jupyterapp.shell.activateById({PANEL}.id), window.jupyterapp.shell.collapseLeft()")
    page.run("void window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def done() -> list[dict[str, Any]] | None:
        cells = page.run(CELLS)
        failed = [error for cell in cells for error in cell["errors"]]
        assert not failed, failed
        return cells if all(cell["run"] for cell in cells) else None

    cells = wait("end of the run", done, seconds)
    pictures = sum(cell["kinds"].count("image/png") for cell in cells)
    assert pictures >= 4, f"{pictures} pictures"
    page.run("document.querySelector('.widget-hslider, .jupyter-widgets')?.scrollIntoView({block: 'center'})")
    sliders = wait("sliders", lambda: page.run("document.querySelectorAll('.widget-hslider').length"), 60)
    assert sliders == 2, f"{sliders} sliders"
    cell = "document.querySelector('.widget-hslider').closest('.jp-Cell')"
    picture = f"{cell}.querySelector('img')?.src ?? ''"
    before = wait("picture under the sliders", lambda: page.run(picture), 60)
    page.run("document.querySelector('.widget-hslider .noUi-handle').focus()")
    for kind in ("keyDown", "keyUp"):
        page.send(
            "Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37
        )
    wait("other picture after a slider moved", lambda: page.run(picture) not in ("", before), 60)
    broken = page.run(
        "Array.from(document.images).filter(i => i.complete && !i.naturalWidth && i.src).length"
    )
    assert not broken, f"{broken} pictures are not drawn"
    if screenshot:
        page.run(f"{cell}.scrollIntoView({{block: 'center'}})")
        page.run("document.querySelectorAll('.Toastify').forEach(notice => notice.remove())")
        time.sleep(2)
        page.screenshot(screenshot)
    print(f"{len(cells)} cells ran without an error; {pictures} pictures, {sliders} sliders that work")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="smoke", choices=("smoke", "small"))
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--seconds", type=float, default=900, help="time for the cells")
    given = parser.parse_args(argv)
    chromium = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
        None,
    )
    if chromium is None:
        print("no Chromium: on Debian, as root, apt-get install chromium", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        notebook = parameterize_notebook(
            load_notebook_node(str(ROOT / "notebooks" / "00_quickstart.ipynb")), {"scale": given.scale}
        )
        (scratch / "notebooks").mkdir()
        nbformat.write(notebook, scratch / "notebooks" / "00_quickstart.ipynb")
        port, debugging, token = free_port(), free_port(), secrets.token_hex(16)
        server = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={scratch / 'notebooks'}",
            "--LabApp.expose_app_in_browser=True",
        ]
        address = f"http://127.0.0.1:{port}/lab/tree/00_quickstart.ipynb?token={token}"
        browser = [
            chromium,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1280,960",
            "--force-device-scale-factor=1",
            f"--remote-debugging-port={debugging}",
            f"--user-data-dir={scratch / 'profile'}",
            "about:blank",
        ]
        with running(server, scratch / "server.log"), running(browser, scratch / "browser.log"):
            try:
                wait(
                    "JupyterLab",
                    lambda: (
                        urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}").status == 200
                    ),
                    120,
                )
                page = Page(debugging)
                page.send("Page.enable")
                page.send("Page.navigate", url=address)
                look(page, given.screenshot, given.seconds)
            except Exception:
                sys.stderr.write((scratch / "server.log").read_text()[-2000:])
                raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
