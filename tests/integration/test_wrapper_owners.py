"""What the numbers of one owner's answers tell about another's prompts: nothing. With the sample model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing.package import build_package
from tests.support.wrapper import Answer, forget, load, user

SYSTEM = "The secret of this house is kept below the third stone. You answer in one sentence. " * 3
ILLNESSES = ("diabetes", "cancer", "measles", "gout")
NO_OWNER = ""


@pytest.fixture(scope="module")
def loaded(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("owners") / "package"
    built = build_package(sample_model, target, name="sample", signature="chat", options={})
    return load(built.folder, kv_bytes=64 << 20)


@pytest.fixture
def model(loaded: Any) -> Any:
    """A model that nobody has asked, and that shares nothing."""
    forget(loaded)
    loaded.unwrap_python_model()._engine.sessions.common = []
    return loaded


@pytest.fixture
def warm(model: Any) -> Any:
    """A model that has run the system prompt, as a runner's warm-up does, and shares it."""
    ask_as(model, NO_OWNER, chat("Hi"), max_tokens=1)
    model.unwrap_python_model().share(SYSTEM)
    return model


def ask_as(model: Any, owner: str, row: dict[str, Any], **params: Any) -> Answer:
    (lane,) = model.unwrap_python_model().predict_streams([(row, {"max_tokens": 8, **params})], owner)
    try:
        return Answer([item for step in lane for _, item in step])
    finally:
        lane.close()


def cached(model: Any, owner: str, row: dict[str, Any], **params: Any) -> int:
    return ask_as(model, owner, row, **params).usage["cached_tokens"]


def chat(text: str, system: str = SYSTEM) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]}


def illness(name: str, system: str = "") -> dict[str, Any]:
    text = f"My doctor says that I have {name}. What should I eat?"
    return chat(text, system) if system else user(text)


# --- Another's prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", ILLNESSES)
def test_what_another_has_asked_does_not_show(model: Any, guess: str) -> None:
    ask_as(model, "victim", illness("diabetes"))
    assert cached(model, "spy", illness(guess)) == 0
    assert cached(model, "victim", illness("diabetes")) > 20, "its own prompts serve it"


def test_of_a_configured_system_prompt_everybody_has_the_same_part(warm: Any) -> None:
    common = len(warm.unwrap_python_model()._engine.sessions.common)
    assert common > 50
    assert cached(warm, "victim", illness("diabetes", SYSTEM)) == common, "warm before anybody asked"
    seen = {cached(warm, f"spy {guess}", illness(guess, SYSTEM)) for guess in ILLNESSES}
    assert seen == {common}
    own = ask_as(warm, "victim", illness("diabetes", SYSTEM)).usage
    assert own["cached_tokens"] in (common, own["prompt_tokens"] - 2)


@pytest.mark.parametrize("length", [1, 200])
def test_how_much_another_has_asked_does_not_show_in_what_is_shared(warm: Any, length: int) -> None:
    common = len(warm.unwrap_python_model()._engine.sessions.common)
    ask_as(warm, "victim", chat("word " * length))
    assert cached(warm, "spy", chat("Hello")) == common


def test_an_owner_that_has_run_the_system_prompt_leaves_others_theirs(warm: Any) -> None:
    long = chat("a word " * 60)
    ask_as(warm, "victim", long)
    ask_as(warm, "other", chat("first"))  # takes the victim's, since no other is there
    ask_as(warm, "victim", long)
    for number in range(4):
        ask_as(warm, "other", chat(f"question {number}"))
    usage = ask_as(warm, "victim", long).usage
    assert usage["cached_tokens"] == usage["prompt_tokens"] - 2


def test_an_answer_does_not_depend_on_whose_session_it_goes_on_from(warm: Any) -> None:
    rows = [illness(name, SYSTEM) for name in ILLNESSES]
    taken = [ask_as(warm, f"owner {number}", row, max_tokens=30).text for number, row in enumerate(rows)]
    for row, text in zip(rows, taken, strict=True):
        forget(warm)
        assert ask_as(warm, "alone", row, max_tokens=30).text == text


# --- The system prompt, which a client need not know ---------------------------------------------------


def guesses() -> dict[str, str]:
    """Beginnings of the system prompt, and what has as many characters and is none."""
    right = [SYSTEM[:length] for length in (10, 40, 90)]
    return {text: text[:-4] + "zzzz" for text in right}


@pytest.mark.parametrize("owner", ["spy", "somebody", NO_OWNER])
def test_a_right_guess_of_the_system_prompt_looks_like_a_wrong_one(warm: Any, owner: str) -> None:
    """The sessions that were kept are the runner's own, another's and the spy's, with the system prompt in them."""
    for asker in ("somebody", "spy"):
        ask_as(warm, asker, chat("Hello"))
    for system in (text for pair in guesses().items() for text in pair):
        assert cached(warm, owner, chat("Hello", system)) == 0
        forget_all_but_common(warm)


def test_a_chat_with_the_system_prompt_does_not_go_on_from_a_guess(warm: Any) -> None:
    for system in (text for pair in guesses().items() for text in pair):
        forget(warm)
        ask_as(warm, "spy", chat("Hello", system), max_tokens=1)
        assert cached(warm, "spy", chat("Hello")) == 0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_chat_that_was_stopped_within_the_system_prompt_answers_no_guess(warm: Any, steps: int) -> None:
    for system in (text for pair in guesses().items() for text in pair):
        forget(warm)
        stopped(warm, chat("Hello"), steps)
        assert cached(warm, "spy", chat("Hello", system)) == 0


def test_a_guess_that_was_stopped_looks_the_same_whether_it_was_right(warm: Any) -> None:
    for pair in guesses().items():
        found = []
        for text in pair:
            raw = {"prompt": f"{beginning(warm)}{text}"}
            forget(warm)
            stopped(warm, raw, 1)
            found.append((cached(warm, "spy", raw), cached(warm, "spy", chat("Hello"))))
        assert found[0] == found[1]


def test_the_whole_system_prompt_sent_along_is_as_good_as_the_configured_one(warm: Any) -> None:
    assert cached(warm, "client", chat("Hello", SYSTEM)) > 50


def test_a_short_beginning_of_a_template_costs_nobody_a_session(model: Any) -> None:
    model.unwrap_python_model().share("")
    ask_as(model, "victim", illness("diabetes"))
    assert {cached(model, f"spy {name}", illness(name)) for name in ILLNESSES} == {0}
    assert cached(model, "victim", illness("diabetes")) > 20


def stopped(model: Any, row: dict[str, Any], steps: int) -> None:
    """A prompt of the spy that is cancelled after so many steps."""
    (lane,) = model.unwrap_python_model().predict_streams([(row, {"max_tokens": 1})], "spy")
    for _ in range(steps):
        next(lane)
    lane.close()


def beginning(model: Any) -> str:
    """What stands before the system prompt's text in a rendered chat."""
    engine = model.unwrap_python_model()._engine
    text: str = engine.text(engine.sessions.common)
    assert SYSTEM[:40] in text
    return text[: text.index(SYSTEM[:40])]


def forget_all_but_common(model: Any) -> None:
    """Sessions of the test's own guesses go, so that each guess is the first."""
    sessions = model.unwrap_python_model()._engine.sessions
    sessions._kept = [
        kept for kept in sessions._kept if kept.tokens[: len(sessions.common)] == sessions.common
    ]
