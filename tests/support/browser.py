"""A real Chromium without a screen, driven over WebDriver: plain HTTP and JSON, so no library is needed for it.

Source: W3C, WebDriver; ChromeDriver's own `/goog/cdp/execute` for the Chrome DevTools Protocol.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.processes import free_port, is_healthy, serving, wait_until

ROOT = Path(__file__).parents[2]
FONTS = ROOT / ".tools" / "chromium" / "root" / "usr" / "share" / "fonts"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
TAB, ENTER, ESCAPE, SHIFT = "\ue004", "\ue007", "\ue00c", "\ue008"
_FONTS_CONF = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{fonts}</dir><dir>/usr/share/fonts</dir><cachedir>{cache}</cachedir>
<alias binding="same"><family>system-ui</family><prefer><family>Inter</family></prefer></alias>
<alias binding="same"><family>sans-serif</family><prefer><family>Inter</family></prefer></alias>
</fontconfig>
"""


class Browser:
    """One window. What fails raises AssertionError with the driver's words."""

    def __init__(self, port: int, folder: Path) -> None:
        self._url = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--lang=en"]
        arguments += [f"--user-data-dir={folder / 'profile'}", "--disable-dev-shm-usage", "--no-first-run"]
        chrome = {"binary": _program("chromium"), "args": arguments}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{made['sessionId']}"

    def close(self) -> None:
        self._call("DELETE", "")

    # --- Pages ------------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns; it has `arguments`."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition: str, what: str, timeout_s: float = 60) -> Any:
        """The value of an expression, once it is true."""
        try:
            return wait_until(lambda: self.run(f"return {condition}"), timeout_s, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}; the page says:\n{self.text()}") from error

    def text(self, selector: str = "body") -> str:
        """What a reader sees of an element."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def press(self, *keys: str) -> None:
        """Presses keys where the focus is, one after the other; nothing is clicked."""
        actions: list[dict[str, str]] = []
        for key in keys:
            actions += [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._act(actions)

    def hold(self, modifier: str, key: str) -> None:
        """A key while another one is held."""
        downs = [{"type": "keyDown", "value": each} for each in (modifier, key)]
        self._act([*downs, *({"type": "keyUp", "value": each} for each in (key, modifier))])

    def errors(self) -> list[str]:
        """What the console has of warnings and errors since it was asked last."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    # --- Screens ----------------------------------------------------------------------------------------

    def look(self, *, width: int, height: int, dark: bool, phone: bool = False) -> None:
        """The size of the window, and what the reader prefers. Motion is always reduced."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.cdp("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.cdp("Emulation.setEmulatedMedia", {"features": [scheme, still]})

    def picture(self, *, whole: bool = False) -> bytes:
        """A PNG of what is on the screen, or of the whole page."""
        found = self.cdp("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        return base64.b64decode(found["data"])

    @contextlib.contextmanager
    def other_tab(self) -> Iterator[None]:
        """In the block another tab is in front, and this one hidden."""
        here = self._call("GET", "/window")
        other = self._call("POST", "/window/new", {"type": "tab"})["handle"]
        self._call("POST", "/window", {"handle": other})
        try:
            yield
        finally:
            self._call("DELETE", "/window")
            self._call("POST", "/window", {"handle": here})

    def cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _act(self, actions: list[dict[str, str]]) -> None:
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._url + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:2000]}") from error


@contextlib.contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """A window that is closed at the end."""
    fonts = folder / "fonts.conf"
    fonts.write_text(_FONTS_CONF.format(fonts=FONTS, cache=folder / "fonts"))
    port = free_port()
    command = [_program("chromedriver"), f"--port={port}", "--allowed-ips=127.0.0.1"]
    environment = {
        "FONTCONFIG_FILE": str(fonts),
        "HOME": str(folder),
        "DBUS_SESSION_BUS_ADDRESS": "disabled:",
    }
    ready = partial(is_healthy, port, "/status")
    with serving(command, folder / "chromedriver.log", ready=ready, what="chromedriver", env=environment):
        browser = Browser(port, folder)
        try:
            yield browser
        finally:
            browser.close()


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"no {name}: ./build.sh look-test fetches it"
    return found
