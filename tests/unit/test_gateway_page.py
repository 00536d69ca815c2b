"""The page at `/` of the OpenAI interface: what it says of each state, and what browsers are told about it."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from edge_agent.errors import DaemonNotRunning, EdgeAgentError
from edge_agent.gateway.page import HEADERS, SHELL, Look, Page, words
from edge_agent.gateway.page.picture import HEIGHT, PLACES, WIDTH, picture_of
from edge_agent.gateway.page.rendering import render
from tests.support.gateway import ScriptedDaemon, ServedHere
from tests.support.page import NOW, STAND, Parsed, answered, model, recent, status
from tests.support.processes import short_folder

TOKEN = "0123456789abcdef0123456789abcdef"
FILES = Path(__file__).parents[2] / "edge_agent" / "gateway" / "page" / "files"
ALL_PATHS = ("/", "/page/state", "/page/script.js", "/page/style.css", "/page/icon.svg")


def shown(*models: dict[str, Any], prompts: tuple[dict[str, Any], ...] = (), **more: Any) -> Parsed:
    """The page of a device with these models."""
    return Parsed(render("page.html", Look(status=status(*models, **more), recent=recent(*prompts))))


# --- What it says ---------------------------------------------------------------------------------------


def test_a_device_that_is_well_says_what_it_is() -> None:
    page = shown(model(), prompts=(answered(),))
    for said in (
        *("press-3", "Ready", "edge-agent 0.1.0", "up 3 d 4 h", "nothing in the queue", "Active version 7"),
        *("Previous version 6", "models:/phi3-mini@prod", "21.4 tokens/s", "7 walls stand around it"),
        *("Broker connected mqtt.example:8883", "Registry reachable mlflow.example:5000, asked 3 min ago"),
        *("Cache 4.8 GB of 20.0 GB 51.5 GB free on the disk", "Walls Landlock 6, seccomp"),
        *("47 s ago answered 5.1 s 340 ms 0 ms 13 + 110 21.4",),
    ):
        assert said in page.words
    for left_out in ("Wanted", "Pinned", "Held", "quarantine", "Look at", "missing"):
        assert left_out not in page.words
    assert [each["aria-label"] for each in page.having("section", class_="card model")] == ["Model assistant"]
    assert not page.having("progress")


@pytest.mark.parametrize(
    ("look", "said"),
    [
        (Look(problem="no daemon answers on /run/c.sock"), "The daemon does not answer: no daemon answers on"),
        (Look(status=status(state="degraded"), recent=recent()), "No model is configured."),
        (
            Look(status=status(model(state="absent", version=None), state="starting"), recent=recent()),
            "Prompts wait in the queue.",
        ),
        (Look(status=status(model(), state="degraded"), recent=recent()), "somebody should look at this device"),
        (
            Look(status=status(model(state="failed", reason="it does not load"), state="degraded"), recent=recent()),
            "assistant gives no answers.",
        ),
        (Look(status=status(model(), state="one of tomorrow's"), recent=recent()), "one of tomorrow"),
        (Look(status={"state": "ready"}, recent={}), "Prompts are answered."),
    ],
)  # fmt: skip
def test_each_state_is_said_in_a_sentence(look: Look, said: str) -> None:
    assert said in Parsed(render("page.html", look)).words


def test_troubles_are_said_with_their_codes() -> None:
    page = shown(
        model(), state="degraded", troubles=[{"code": "quarantined", "text": "model assistant: bad"}]
    )
    assert "Look at model assistant: bad quarantined" in page.words


def test_an_update_shows_where_it_is_and_how_far() -> None:
    fetching = model(
        wanted={"version": 8, "via": "alias"},
        attempt={"version": 8, "digest": "", "step": "fetch", "code": None, "at": NOW},
        progress={"bytes": 600, "total_bytes": 2400, "bytes_per_s": 100.0, "eta_s": 18.0},
    )
    page = shown(fetching)
    assert (
        "Updating to version 8 Fetch Verify Try Take over 600 B of 2.4 kB, 100 B/s, 18 s left" in page.words
    )
    assert "Wanted version 8 by the settings" in page.words
    assert page.having("progress", value="600", max="2400") == [
        {"aria-label": "Fetching version 8", "value": "600", "max": "2400"}
    ]


@pytest.mark.parametrize(
    ("step", "standing"),
    [
        ("fetch", ["now", "ahead", "ahead", "ahead"]),
        ("verify", ["done", "now", "ahead", "ahead"]),
        ("gate", ["done", "done", "now", "ahead"]),
        ("activate", ["done", "done", "done", "now"]),
        ("active", []),
    ],
)
def test_the_steps_of_a_version_are_done_now_or_ahead(step: str, standing: list[str]) -> None:
    page = shown(model(attempt={"version": 8, "digest": "", "step": step, "code": None, "at": NOW}))
    steps = [has for tag, has in page.tags if tag == "li"]
    assert [has["data-standing"] for has in steps] == standing
    assert [has["data-standing"] for has in steps if has.get("aria-current") == "step"] == ["now"][
        : len(standing)
    ]


def test_a_fetch_whose_size_nobody_knows_is_no_division() -> None:
    progress = {"bytes": 600, "total_bytes": 0, "bytes_per_s": 0, "eta_s": None}
    assert shown(model(progress=progress, attempt=None)).having("progress", value="0", max="1")


def test_pins_holds_and_quarantine_are_said() -> None:
    attempt = {"version": 8, "digest": "", "step": "held", "code": "link_held", "at": NOW}
    page = shown(
        model(
            pinned="7-aa",
            attempt=attempt,
            link={"missing_bytes": 5, "held_until": None},
            quarantined={"5-bb": "golden prompt 2: Oslo"},
            update_problem="it waits for the night",
        )
    )
    assert "Pinned version 7 updates do not replace it" in page.words
    assert "Held version 8 the line has no time for it now" in page.words
    assert "In quarantine Version 5 golden prompt 2: Oslo" in page.words
    assert "it waits for the night" in page.words
    until = shown(model(attempt=attempt, link={"missing_bytes": 5, "held_until": NOW}))
    assert re.search(r"Held version 8 until 2026-09-2[12] \d\d:\d\d", until.words)


def test_a_version_that_failed_is_said_once() -> None:
    attempt = {"version": 8, "digest": "", "step": "verify", "code": "untrusted", "at": NOW - 60}
    assert "Tried last version 8 untrusted, 1 min ago" in shown(model(attempt=attempt)).words
    why = "version 8-cc is in quarantine: no signature"
    known = shown(
        model(
            attempt=attempt, quarantined={"8-cc": "no signature"}, reason="no signature", update_problem=why
        )
    )
    assert "Tried last" not in known.words
    assert known.words.count("no signature") == 1
    other = shown(model(quarantined={"8-cc": ""}, reason="another reason"))
    assert "another reason" in other.words


def test_walls_that_are_missing_are_counted_and_named() -> None:
    page = shown(model(walls={"stand": STAND[:2], "missing": {"system_calls": "no seccomp here"}}))
    assert "2 walls stand around it, 1 missing" in page.words
    assert "system calls no seccomp here" in page.words


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"uri": ""}, "Registry none"),
        ({"last_check": None}, "Registry not asked yet mlflow.example:5000"),
        ({"reachable": False, "problem": "connection refused"}, "Registry out of reach connection refused"),
        ({"problem": "403"}, "Registry refuses this device 403"),
        ({"uri": "https://name:secret@mlflow.example/a?key=secret"}, "reachable mlflow.example, asked"),
        ({"uri": "sqlite:////var/secret.db"}, "reachable sqlite, asked"),
        ({"uri": "http://[::1"}, "reachable http, asked"),
    ],
)
def test_the_registry_is_named_without_what_its_address_carries(more: dict[str, Any], said: str) -> None:
    page = shown(model(), registry={**status()["registry"], **more})
    assert said in page.words
    assert "secret" not in page.words


def test_a_prompt_without_an_answer_has_its_code_and_no_times() -> None:
    failed = {"at": NOW - 5, "model": "assistant", "code": "deadline_exceeded"}
    page = shown(model(), prompts=(answered(), failed))
    assert "5 s ago deadline exceeded – – – – – 47 s ago answered" in page.words, "the newest one first"


def test_a_model_is_named_beside_a_prompt_where_there_are_several() -> None:
    several = shown(model(), model(name="coder"), prompts=(answered(model="coder"),))
    assert "21.4 coder" in several.words


# --- Text from elsewhere is text ------------------------------------------------------------------------

HOSTILE = "\"><img src=x onerror=alert(1)><script>alert(1)</script>'{{ 7*7 }}</title></textarea>&lt;b&gt;"


def poisoned(value: Any) -> Any:
    """The same document with something bad in each text."""
    if isinstance(value, str):
        return value and value + HOSTILE
    if isinstance(value, Mapping):
        kept = {"state", "step", "via", "code"}
        return {key: item if key in kept else poisoned(item) for key, item in value.items()}
    return [poisoned(item) for item in value] if isinstance(value, list) else value


def test_names_and_reasons_are_text_and_never_markup() -> None:
    plain = model(
        reason="r",
        quarantined={"5-bb": "q"},
        pinned="7-aa",
        walls={"stand": ["files"], "missing": {"tcp": "w"}},
        attempt={"version": 8, "digest": "d", "step": "fetch", "code": None, "at": NOW},
        progress={"bytes": 1, "total_bytes": 2, "bytes_per_s": 1.0, "eta_s": 1.0},
    )
    said = status(plain, model(name="b"), troubles=[{"code": "c", "text": "t"}], state="degraded")
    prompts = recent(answered())
    benign = Parsed(render("page.html", Look(status=said, recent=prompts)))
    hostile = Parsed(render("page.html", Look(status=poisoned(said), recent=poisoned(prompts))))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in benign.tags]
    assert [set(has) for _, has in hostile.tags] == [set(has) for _, has in benign.tags]
    assert hostile.words.count("{{ 7*7 }}") > 10
    assert render("page.html", Look(problem=HOSTILE)).count("<script") == 1


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    prompts = (answered(), {"at": NOW, "model": "assistant", "code": "cancelled"})
    for page in (shown(model(), prompts=prompts), Parsed(render("page.html", None))):
        for tag, has in page.tags:
            assert tag != "style"
            assert not [name for name in has if name == "style" or name.startswith("on")], (tag, has)
            assert tag != "script" or has == {"src": "/page/script.js", "defer": ""}
            for name in ("src", "href", "action", "data", "poster"):
                assert re.match(r"/page/|#|$", has.get(name, "")), has
    for file in FILES.iterdir():
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), file
    script = (FILES / "script.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|eval|Function\(|srcdoc", script
    )
    assert not re.search(r"localStorage|document\.cookie|URLSearchParams", script)


# --- How it is served -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon() -> Iterator[ScriptedDaemon]:
    with short_folder() as folder:
        scripted = ScriptedDaemon(folder / "c.sock")
        scripted.status, scripted.recent = status(model()), recent(answered())
        yield scripted
        scripted.close()


@pytest.fixture(scope="module")
def served(daemon: ScriptedDaemon) -> Iterator[ServedHere]:
    with short_folder() as folder:
        here = ServedHere(daemon.path, folder)
        yield here
        here.close()


@pytest.fixture(scope="module")
def guarded(daemon: ScriptedDaemon) -> Iterator[ServedHere]:
    """A door with a token."""
    with short_folder() as folder:
        (folder / "token").write_text(TOKEN)
        here = ServedHere(daemon.path, folder, token_file=str(folder / "token"))
        yield here
        here.close()


@pytest.mark.parametrize("path", ALL_PATHS)
def test_browsers_are_told_to_run_nothing_but_ours(served: ServedHere, path: str) -> None:
    response = served.request("GET", path)
    assert response.status == 200
    assert HEADERS.items() <= response.headers.items()
    policy = response.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; ")
    for rule in ("frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
        assert rule in policy
    head = served.request("HEAD", path)
    assert (head.status, head.body) == (200, b"")


def test_the_page_has_the_device_in_it_and_its_state_alone_the_same_parts(served: ServedHere) -> None:
    whole = Parsed(served.request("GET", "/").body.decode())
    state = Parsed(served.request("GET", "/page/state").body.decode())
    for page in (whole, state):
        assert "press-3" in page.words
        assert page.having("div", id="top") and page.having("div", id="more")
    assert whole.having("section", id="chat") and not state.having("section", id="chat")
    assert served.request("GET", "/", unix=True).status == 200


def test_the_page_takes_no_posts_and_has_nothing_below_it(served: ServedHere) -> None:
    assert served.request("POST", "/").status == 405
    for path in ("/page", "/page/", "/page/page.html", "/page/../page/rendering.py", "/page/%2e%2e/view.py"):
        assert served.request("GET", path).status == 404, path


def test_without_the_token_a_browser_gets_the_empty_page_and_nothing_of_the_device(
    guarded: ServedHere,
) -> None:
    for path in sorted(SHELL):
        assert guarded.request("GET", path).status == 200, path
        assert guarded.request("HEAD", path).status == 200, path
        assert guarded.request("POST", path).status == 401, path
    shell = guarded.request("GET", "/")
    assert HEADERS.items() <= shell.headers.items()
    page = Parsed(shell.body.decode())
    assert "This device asks for a token" in page.words
    assert page.having("input", type="password")
    for said in (b"press-3", b"assistant", b"0.1.0", TOKEN.encode()):
        assert said not in shell.body
    wrong = guarded.request("GET", "/", authorization="Bearer wrong")
    assert wrong.body == shell.body
    for path in ("/page/state", "/metrics", "/v1/models", "/page/nothing"):
        refused = guarded.request("GET", path)
        assert (refused.status, refused.error["code"]) == (401, "unauthorized"), path
    assert b"press-3" not in guarded.request("GET", f"/?token={TOKEN}").body


def test_with_the_token_the_page_is_whole(guarded: ServedHere) -> None:
    for path in ("/", "/page/state"):
        assert b"press-3" in guarded.request("GET", path, authorization=f"Bearer {TOKEN}").body


@pytest.mark.parametrize("path", ALL_PATHS)
def test_other_hosts_and_other_pages_get_nothing_not_even_the_empty_page(
    served: ServedHere, guarded: ServedHere, path: str
) -> None:
    for here in (served, guarded):
        assert here.request("GET", path, host="evil.test").status == 421
        assert here.request("GET", path, origin="http://evil.test").status == 403
        framed = here.request("GET", path, origin="null")
        assert framed.status == 403


def test_the_daemon_is_asked_once_a_second_however_many_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.gateway.page.FRESH_S", 3600.0)  # all fifty look within the second
    asked: list[str] = []

    async def ask(op: str) -> Mapping[str, Any]:
        asked.append(op)
        await asyncio.sleep(0)
        return status(model()) if op == "status" else recent()

    async def look_often() -> list[bytes]:
        page = Page(ask)
        endpoint = next(route.endpoint for route in page.routes() if route.path == "/page/state")
        responses = await asyncio.gather(*(endpoint(Request({"type": "http"})) for _ in range(50)))
        return [bytes(response.body) for response in responses]

    assert len(set(asyncio.run(look_often()))) == 1
    assert asked == ["status", "recent"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DaemonNotRunning("no daemon answers"), "does not answer: no daemon answers"),
        (TimeoutError(), "it takes too long to say how it is"),
        (EdgeAgentError("unknown operation 'recent'"), "unknown operation"),
    ],
)
def test_a_daemon_that_does_not_answer_is_a_page_that_says_so(error: Exception, said: str) -> None:
    async def ask(op: str) -> Mapping[str, Any]:
        raise error

    page = Page(ask)
    endpoint = next(route.endpoint for route in page.routes() if route.path == "/")
    response = asyncio.run(endpoint(Request({"type": "http"})))
    assert response.status_code == 200
    shown_page = Parsed(bytes(response.body).decode())
    assert said in shown_page.words
    assert "Not answering" in shown_page.words


# --- Words and pictures ---------------------------------------------------------------------------------


def test_times_are_said_as_people_say_them() -> None:
    assert [words.ago(each) for each in (-3, 1, 47, 200, 7300)] == [
        "now",
        "now",
        "47 s ago",
        "3 min ago",
        "2 h ago",
    ]
    assert [words.took(each) for each in (None, 0.4, 340, 5120, 90_000)] == [
        "–",
        "0 ms",
        "340 ms",
        "5.1 s",
        "1 min 30 s",
    ]
    assert [words.rate(each) for each in (None, 21.44, 1234.5)] == ["–", "21.4", "1,234"]


def bars_of(path: str) -> list[tuple[float, float]]:
    """Left edge and height of each bar of a path, which are all of one width and stand on the ground line."""
    bars = re.findall(rf"M([\d.]+) {HEIGHT}v-([\d.]+)h3\.0v\2z", path)
    assert "".join(f"M{x} {HEIGHT}v-{height}h3.0v{height}z" for x, height in bars) == path
    return [(float(x), float(height)) for x, height in bars]


def test_a_picture_has_a_bar_for_each_prompt_the_newest_at_the_right() -> None:
    picture = picture_of("Speed", [10.0, math.nan, None, 20.0], lambda value: f"{value:.0f} t/s")
    step = WIDTH / PLACES
    assert bars_of(picture.bars) == [(WIDTH - 4 * step, HEIGHT / 2), (WIDTH - step, HEIGHT)]
    assert bars_of(picture.marks) == [(WIDTH - 3 * step, 5.0)], "and what was not measured has neither"
    assert (picture.middle, picture.top) == ("20 t/s", "20 t/s")
    assert picture.words == (
        "Speed of the last 2 prompts: half of them 20 t/s or less, from 10 t/s to 20 t/s; 1 without an answer"
    )


def test_a_picture_stays_in_its_frame() -> None:
    picture = picture_of("Speed", [float(number % 7) for number in range(250)], str)
    bars = bars_of(picture.bars)
    assert len(bars) == PLACES
    assert all(0 <= x <= WIDTH - 3 and 0 < height <= HEIGHT for x, height in bars)
    assert picture_of("Speed", [], str).bars == picture_of("Speed", [math.nan], str).bars == ""
    assert {height for _, height in bars_of(picture_of("Speed", [0.0, 0.0], str).bars)} == {2.0}
