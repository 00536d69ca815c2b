"""The page in a real Chromium: before a real device that is updated, and before a scripted one in all its states."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import QueueFull
from edge_agent.gateway import server as server_module
from edge_agent.publishing import publish_folder
from edge_agent.transport.control import Call
from tests.support import gateway, page
from tests.support.browser import ENTER, ESCAPE, SHIFT, TAB, Browser, running_browser
from tests.support.client import Client, chat, connected
from tests.support.gateway import ScriptedDaemon, ServedHere, accept, done, running_gateway
from tests.support.gateway import say as say_piece
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.page_looks import (
    DESK,
    SCREENS,
    answers,
    barriers,
    is_wider_than_the_screen,
    look_at,
    say,
    tab_to,
)
from tests.support.processes import running_daemon, short_folder, standing_still, wait_until
from tests.support.proxy import Proxy, running_proxy
from tests.support.sample_device import settings_for, wait_for_state
from tests.support.versions import FollowingDevice, bad_release, expect_lisbon

pytestmark = pytest.mark.look
SPAIN, MADRID = "What is the capital of Spain?", "The capital of Spain is Madrid."
CAPITALS = ("Spain", "Nepal", "France", "Norway", "Italy", "Egypt")
MOST_PICTURE_BYTES = 150_000
SLOW_BYTES_PER_S = 20_000
TOKEN = "0123456789abcdef0123456789abcdef"
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with short_folder() as folder, running_browser(folder) as running:
        yield running


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """The window, on a light desk; a test leaves no word in its console."""
    look_at(window, DESK, dark=False)
    window.errors()
    yield window
    assert window.errors() == []


# --- A real device --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device(
    broker: Broker, mlflow_server: Server, sample_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FollowingDevice, Proxy]]:
    """One with a version that answers, one in quarantine, and a slow line to its registry; and that line."""
    name = "capitals"
    publish_folder(sample_model, name=name, registry_uri=mlflow_server.uri, alias="prod")
    with running_proxy("127.0.0.1", mlflow_server.port) as line:
        config = settings_for(
            broker, f"http://127.0.0.1:{line.port}", device="press-3", inference={"threads": 1}
        )
        config["models"] = {"assistant": {"uri": f"models:/{name}@prod"}}
        with running_daemon(config) as daemon, connected(broker, device="press-3") as client:
            wait_for_state(daemon, "ready")
            running = FollowingDevice(daemon, client, mlflow_server, name)
            bad_release(running, sample_model, expect_lisbon, tmp_path_factory.mktemp("bad"))
            running.sync()
            running.wait_model(lambda model: "2-" in str(model["quarantined"]), "version 2 in quarantine")
            ask_much(client)
            yield running, line


def ask_much(client: Client) -> None:
    for number in range(60):
        country = CAPITALS[number % len(CAPITALS)]
        assert client.ask(chat(f"What is the capital of {country}?", seed=number)).status == 200
    assert client.ask(chat(SPAIN, max_tokens=100_000)).status == 413


@pytest.fixture(scope="module")
def served(device: tuple[FollowingDevice, Proxy]) -> Iterator[str]:
    """Where the device's page is."""
    with short_folder() as folder, running_gateway(device[0].daemon.control_socket, folder) as running:
        yield f"http://127.0.0.1:{running.port}/"


def test_it_chats_with_the_device_and_stops(
    browser: Browser, device: tuple[FollowingDevice, Proxy], served: str
) -> None:
    daemon = device[0].daemon
    browser.open(served)
    assert "press-3" in browser.text("h1")
    say(browser, SPAIN)
    browser.wait("document.querySelector('.said.model .note')", "the whole answer")
    assert answers(browser) == [MADRID]
    (runner,) = daemon.runners()
    before = daemon.log.count("prompt ended code=cancelled")
    with standing_still(runner):  # it cannot end by itself
        say(browser, "And of Nepal?")
        wait_until(lambda: daemon.status()["queue_depth"] == 1, 60, "the prompt")
        browser.press(ESCAPE)
        wait_until(lambda: daemon.log.count("prompt ended code=cancelled") == before + 1, 60, "its cancel")
        browser.wait("document.querySelector('#stop').hidden", "the end")
    assert browser.run("return document.querySelector('#text').value") == "And of Nepal?", (
        "it can be sent again"
    )
    assert browser.run("return document.activeElement.id") == "text"
    browser.press(ENTER)
    browser.wait("document.querySelectorAll('.said.model .note').length === 2", "the second answer")
    browser.wait(
        "document.querySelector('tbody td:nth-child(2)').innerText === 'answered'", "it in the table"
    )
    assert "cancelled" in browser.text("tbody")


def test_an_update_that_goes_on_is_shown_and_the_four_pictures_are_made(
    browser: Browser,
    device: tuple[FollowingDevice, Proxy],
    served: str,
    swapped_model: Path,
    pictures: Path,
) -> None:
    running, line = device
    line.slow(SLOW_BYTES_PER_S)
    running.publish(swapped_model)
    running.sync()
    browser.open(served)
    say(browser, SPAIN)
    browser.wait("document.querySelector('.said.model .note')", "the whole answer")
    browser.wait("document.querySelector('progress')?.value > 0", "the fetch of version 3")
    for said in (
        "Updating to version 3",
        "Fetch",
        "left",
        "Wanted",
        "In quarantine",
        "Lisbon",
        "quarantined",
    ):
        assert said in browser.text("#top"), said
    before = browser.run("return document.querySelector('progress').value")
    browser.wait(f"document.querySelector('progress')?.value > {before}", "more of it")
    for name, size, dark in SCREENS:
        look_at(browser, size, dark)
        shown = "more" if dark else "top"  # the pictures together show the whole page
        browser.run(
            "document.activeElement.blur(); document.getElementById(arguments[0]).scrollIntoView()", shown
        )
        assert barriers(browser) == [], name
        assert not is_wider_than_the_screen(browser), name
        picture = browser.picture()
        assert len(picture) <= MOST_PICTURE_BYTES, name
        (pictures / f"page-{name}.png").write_bytes(picture)
    line.restore()
    running.wait_model(lambda model: model["version"] == 3, "version 3")
    browser.wait(
        "document.querySelector('.facts dd').innerText.startsWith('version 3')", "version 3 on the page"
    )
    browser.wait("!document.querySelector('.update')", "the end of the update")
    assert answers(browser) == [MADRID], "the conversation is still there"


# --- A scripted device ----------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[ScriptedDaemon, ServedHere]]:
    with gateway.served_here() as made:
        yield made


@pytest.fixture
def scripted(pair: tuple[ScriptedDaemon, ServedHere]) -> ScriptedDaemon:
    """As new for each test."""
    daemon, _ = pair
    daemon.script = gateway.answer
    daemon.asked.clear()
    daemon.status = page.status(page.model(), page.model(name="coder", state="idle"))
    daemon.recent = page.recent(page.answered())
    return daemon


@pytest.fixture
def address(
    pair: tuple[ScriptedDaemon, ServedHere], scripted: ScriptedDaemon, browser: Browser
) -> Iterator[str]:
    yield f"http://localhost:{pair[1].port}/"
    browser.open("about:blank")  # before its interface ends


def test_an_answer_comes_in_pieces_and_stop_keeps_what_has_come(
    browser: Browser, scripted: ScriptedDaemon, address: str
) -> None:
    more: queue.SimpleQueue[str] = queue.SimpleQueue()

    def speak(call: Call) -> None:
        accept(call)
        say_piece(call, more.get(timeout=60))
        say_piece(call, more.get(timeout=60))
        wait_until(lambda: call.check(), 60, "the client to leave")

    scripted.script = speak
    browser.open(address)
    say(browser, "q")
    for piece, so_far in (("Mad", "Mad"), ("rid", "Madrid")):
        more.put(piece)
        browser.wait(f"document.querySelector('.said.model p').textContent === '{so_far}'", so_far)
        assert browser.run("return document.querySelector('#log').ariaBusy") == "true"
    tab_to(browser, "#stop")
    browser.press(ENTER)
    assert scripted.gone.get(timeout=60) == "chat", "the request has ended"
    browser.wait(
        "document.querySelector('.said.model .note')?.textContent === 'stopped'", "that it was stopped"
    )
    assert answers(browser) == ["Madrid"]
    scripted.script = gateway.answer
    say(browser, "again")
    browser.wait("document.querySelectorAll('.said.model .note').length === 2", "another answer")
    sent = scripted.asked[-1]["body"]
    assert [part in sent for part in ('"q"', '"Madrid"', '"again"', '"model":"assistant"')] == [True] * 4


def test_what_a_model_says_is_text_and_so_is_what_it_is_called(
    browser: Browser, scripted: ScriptedDaemon, address: str
) -> None:
    def speak(call: Call) -> None:
        accept(call)
        say_piece(call, HOSTILE)
        done(call, HOSTILE)

    scripted.script = speak
    scripted.status = page.status(page.model(name=HOSTILE, reason=HOSTILE), page.model(name="b"))
    browser.open(address)
    say(browser, HOSTILE)
    browser.wait("document.querySelector('.said.model .note')", "the answer")
    assert answers(browser) == [HOSTILE]
    assert browser.text(".said.user p") == HOSTILE
    assert browser.text(".model h2") == HOSTILE
    assert browser.run("return document.images.length + document.querySelectorAll('body script').length") == 0
    assert browser.run("return document.title") == "press-3: Ready"
    assert browser.run("return document.querySelector('#model').value") == HOSTILE


def test_a_refusal_is_said_and_the_text_is_kept(
    browser: Browser, scripted: ScriptedDaemon, address: str
) -> None:
    scripted.script = gateway.fail(QueueFull("the queue is full", retry_after_ms=10))
    browser.open(address)
    say(browser, "my question")
    browser.wait(
        "document.querySelector('#chat-problem').innerText.includes('the queue is full')", "the refusal"
    )
    assert browser.run("return document.querySelector('#text').value") == "my question"
    assert any("429" in message for message in browser.errors()), "the browser's own line, and no other"


def test_a_look_at_the_device_takes_no_focus_and_no_text(
    browser: Browser, scripted: ScriptedDaemon, address: str
) -> None:
    browser.open(address)
    tab_to(browser, "#text")
    browser.press(*"half a questi")
    scripted.status = page.status(page.model(version=8), page.model(name="coder"), state="starting")
    browser.wait("document.querySelector('.facts dd').innerText.startsWith('version 8')", "the next look")
    browser.press(*"on")
    assert browser.run("return document.querySelector('#text').value") == "half a question"
    browser.run("document.querySelector('summary').focus(); document.querySelector('details').open = true")
    scripted.status = page.status(page.model(version=9, reason="another"), page.model(name="coder"))
    browser.wait("document.querySelector('.facts dd').innerText.startsWith('version 9')", "the next look")
    assert browser.run("return [document.activeElement.tagName, document.querySelector('details').open]") == [
        "SUMMARY",
        True,
    ]
    tab_to(browser, ".scroll")
    assert browser.run("return document.title") == "press-3: Ready"


def test_everything_is_reached_with_the_keyboard(
    browser: Browser, scripted: ScriptedDaemon, address: str
) -> None:
    browser.open(address)
    browser.press(TAB)
    assert browser.text(":focus") == "Skip to the chat"
    browser.press(ENTER)
    browser.press(TAB)
    assert browser.run("return document.querySelector('#chat').contains(document.activeElement)")
    tab_to(browser, "#text")
    browser.press(*"one")
    browser.hold(SHIFT, ENTER)
    browser.press(*"two", ENTER)
    browser.wait("document.querySelector('.said.model .note')", "the answer")
    assert browser.run("return document.querySelector('.said.user p').textContent") == "one\ntwo"
    for selector in ("#send", ".scroll", "summary", "#model", "#log", "#new"):
        tab_to(browser, selector)
        ring = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", f"the focus is not seen on {selector}"
    browser.press(ENTER)
    assert answers(browser) == []
    assert browser.run("return document.activeElement.id") == "text"


STATES: dict[str, dict[str, Any]] = {
    "well": page.status(page.model(), page.model(name="coder", state="idle", pinned="7-aa")),
    "nothing": page.status(state="degraded"),
    "bad": page.status(
        page.model(
            state="failed",
            reason="it does not load " * 20,
            quarantined={"8-bb": "golden prompt 2: " + "x" * 300},
            walls={"stand": [], "missing": {"files": "this kernel has no Landlock"}},
            attempt={"version": 9, "digest": "", "step": "held", "code": "link_held", "at": page.NOW},
        ),
        state="degraded",
        troubles=[{"code": "unconfined", "text": "model assistant: " + "y" * 300}],
        broker={"host": "b", "port": 1, "connected": False, "problem": "connection refused"},
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_nothing_keeps_people_from_it_in_any_state(
    browser: Browser, scripted: ScriptedDaemon, address: str, state: str
) -> None:
    scripted.status = STATES[state]
    failed = {"at": page.NOW, "model": "assistant", "code": "deadline_exceeded"}
    scripted.recent = page.recent(
        *(page.answered(tokens_per_s=10.0 + number) for number in range(99)), failed
    )
    for name, size, dark in SCREENS:
        look_at(browser, size, dark)
        browser.open(address)
        say(browser, "q")
        browser.wait("document.querySelector('.said.model .note')", "the answer")
        assert barriers(browser) == [], name
        assert not is_wider_than_the_screen(browser), name


def test_a_daemon_that_ends_is_said_and_so_is_that_it_is_back(
    browser: Browser, scripted: ScriptedDaemon, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.open(address)
    assert browser.text(".device .sign") == "Ready"
    monkeypatch.setattr(scripted, "path", scripted.path)
    scripted.path.rename(scripted.path.with_suffix(".away"))
    browser.wait("document.querySelector('.device .sign').innerText === 'Not answering'", "that it is gone")
    scripted.path.with_suffix(".away").rename(scripted.path)
    browser.wait("document.querySelector('.device .sign').innerText === 'Ready'", "that it is back")


# --- A token, and a page that nobody looks at -----------------------------------------------------------------


def test_the_token_is_asked_for_and_stays_in_the_tab(browser: Browser, scripted: ScriptedDaemon) -> None:
    with short_folder() as folder:
        (folder / "token").write_text(TOKEN)
        here = ServedHere(scripted.path, folder, token_file=str(folder / "token"))
        try:
            use_token(browser, f"http://127.0.0.1:{here.port}/")
        finally:
            browser.open("about:blank")
            here.close()


def use_token(browser: Browser, address: str) -> None:
    for name, size, dark in SCREENS:
        look_at(browser, size, dark)
        browser.open(address)
        assert barriers(browser) == [], name
        assert not is_wider_than_the_screen(browser), name
    tab_to(browser, "#token")
    assert browser.errors() == []
    browser.press(*"wrong-wrong-wrong", ENTER)
    browser.wait(
        "document.querySelector('#entry-problem').innerText.includes('does not take')", "the refusal"
    )
    assert all("401" in message for message in browser.errors()), "the browser's own line, and no other"
    tab_to(browser, "#token")
    browser.press(*TOKEN, ENTER)
    browser.wait("document.querySelector('h1')?.innerText === 'press-3'", "the device")
    assert browser.run("return document.activeElement.id") == "text"
    browser.press(*"q", ENTER)
    browser.wait("document.querySelector('.said.model .note')", "the answer")
    assert browser.run("return [location.href, document.cookie, localStorage.length]") == [address, "", 0]
    browser.open(address)
    browser.wait("document.querySelector('h1')?.innerText === 'press-3'", "the device, without asking again")
    assert "owned" not in browser.text()
    browser.run("sessionStorage.clear()")
    browser.open(address)
    assert "asks for a token" in browser.text()


def test_a_page_in_a_hidden_tab_lets_the_interface_end(
    browser: Browser, scripted: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "KEEP_ALIVE_S", 1)
    with short_folder() as folder:
        here = ServedHere(scripted.path, folder, idle_s=20)
        try:
            browser.open(f"http://127.0.0.1:{here.port}/")
            browser.wait(
                "performance.getEntriesByName(location.href + 'page/state').length > 3", "some looks"
            )
            assert not here.server.should_exit, "one that is looked at keeps it"
            with browser.other_tab():
                here.wait_end()
            browser.wait("!document.querySelector('#lost').hidden", "that nothing answers any more")
        finally:
            here.close()
    assert all("ERR_CONNECTION_REFUSED" in message for message in browser.errors())
