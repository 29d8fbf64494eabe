"""Headless Chromium by its own debugging protocol, for `browser_test`.

Nothing is needed beyond the locked packages and Debian's `chromium`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 960  # pixels


def program() -> str | None:
    """Where Chromium is on this machine; None if it has none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


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


@contextmanager
def opened(scratch: Path) -> Iterator[Page]:
    """A page of a Chromium of its own, whose profile and log are in a scratch folder.

    Raises FileNotFoundError without a Chromium.
    """
    chromium = program()
    if chromium is None:
        raise FileNotFoundError("no Chromium: on Debian, as root, apt-get install chromium")
    port = free_port()
    scratch.mkdir(parents=True, exist_ok=True)
    command = [
        chromium,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--window-size={WIDTH},{HEIGHT}",
        "--force-device-scale-factor=1",
        f"--remote-debugging-port={port}",
        f"--user-data-dir={scratch / 'profile'}",
        "about:blank",
    ]
    with running(command, scratch / "browser.log"):
        yield Page(port)


class Page:
    """One tab of Chromium."""

    def __init__(self, port: int):
        def tab() -> str | None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                return next(
                    (entry["webSocketDebuggerUrl"] for entry in json.load(answer) if entry["type"] == "page"),
                    None,
                )

        self.socket = websocket.create_connection(wait("browser", tab, 60), suppress_origin=True, timeout=120)
        self.count = 0
        self.send("Page.enable")

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

    def go(self, address: str) -> None:
        """Open an address and wait until it is loaded."""
        self.run("window.left = true")
        self.send("Page.navigate", url=address)
        wait(address, lambda: self.run("!window.left && document.readyState === 'complete'"), 120)

    def resize(self, width: int, height: int = HEIGHT) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, colours: str) -> None:
        """What a visitor's system asks for: "light" or "dark"."""
        asked = [{"name": "prefers-color-scheme", "value": colours}]
        self.send("Emulation.setEmulatedMedia", features=asked)

    def press(self, key: str, code: int) -> None:
        """A key by its name and number, such as ("ArrowLeft", 37), where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def broken_pictures(self) -> list[str]:
        """The addresses of what should be drawn and is not."""
        return self.run(
            "Array.from(document.images).filter(i => i.src && i.complete && !i.naturalWidth).map(i => i.src)"
        )

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
