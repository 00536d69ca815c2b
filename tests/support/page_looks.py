"""What somebody does with the page in a browser: reads it, chats, looks for what keeps people out of it."""

from __future__ import annotations

from typing import Any

from tests.support.browser import ENTER, ROOT, TAB, Browser

AXE = ROOT / ".tools" / "axe" / "axe.min.js"
DESK, PHONE = (1280, 900), (390, 844)
SCREENS = [
    (f"{'phone' if size is PHONE else 'desk'}-{'dark' if dark else 'light'}", size, dark)
    for size in (DESK, PHONE)
    for dark in (False, True)
]
"""Each with its name: on a desk and on a phone, light and dark."""


def look_at(browser: Browser, size: tuple[int, int], dark: bool) -> None:
    browser.look(width=size[0], height=size[1], dark=dark, phone=size is PHONE)


def barriers(browser: Browser) -> list[str]:
    """What axe-core finds that keeps people from using the page, serious or worse: its rule and where."""
    browser.run(AXE.read_text())
    found: list[dict[str, Any]] = browser.run(
        "return axe.run(document, {resultTypes: ['violations']}).then(found => found.violations)"
    )
    return [
        f"{each['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def tab_to(browser: Browser, selector: str, most: int = 40) -> None:
    """Presses Tab until the focus is there, as somebody without a mouse does."""
    for _ in range(most):
        if browser.run("return document.activeElement.matches(arguments[0])", selector):
            return
        browser.press(TAB)
    raise AssertionError(f"no way to {selector} with the Tab key")


def say(browser: Browser, text: str) -> None:
    """Asks with the keyboard only."""
    tab_to(browser, "#text")
    browser.press(*text, ENTER)


def answers(browser: Browser) -> list[str]:
    """What the model has said, as a reader sees it."""
    found: list[str] = browser.run(
        "return [...document.querySelectorAll('.said.model p:first-of-type')].map(each => each.textContent)"
    )
    return found


def is_wider_than_the_screen(browser: Browser) -> bool:
    return bool(browser.run("return document.documentElement.scrollWidth > window.innerWidth"))
