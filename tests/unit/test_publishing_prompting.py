"""What `publish` says of a chat template and of end tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_agent import publishing
from edge_agent.cli import main
from edge_agent.errors import BadRequest, PublishError
from edge_agent.publishing import prompting
from edge_agent.publishing.register import Published

QUESTION = ("user",)
REFUSED = "the chat template refuses the messages"


class Template:
    """Counts characters.

    Args:
        refused: conversations that it refuses, by their roles.
        dropped: roles whose messages it loses.
        longest: characters that it takes.
    """

    def __init__(
        self, *, refused: Sequence[tuple[str, ...]] = (), dropped: Sequence[str] = (), longest: int = 10_000
    ) -> None:
        self._refused, self._dropped, self._longest = refused, dropped, longest

    def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        if tuple(message["role"] for message in messages) in self._refused:
            raise BadRequest(REFUSED)
        kept = [message for message in messages if message["role"] not in self._dropped]
        length = 1 + sum(len(message["content"]) for message in kept)
        return length if length <= self._longest else 0


def test_nothing_is_said_of_a_template_that_takes_everything() -> None:
    assert prompting.of_template(Template().count, chat=True) == []
    assert prompting.of_template(Template(longest=20).count, chat=True) == [], "too long is no fault"


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (("system", "user"), f"a system message ({REFUSED}): devices with models.NAME.system"),
        (("user", "assistant", "user"), f"user, assistant and user ({REFUSED}): clients"),
        (("user", "assistant"), f"ends with the assistant ({REFUSED}): clients"),
    ],
)  # fmt: skip
def test_each_conversation_that_is_refused_is_named(roles: tuple[str, ...], said: str) -> None:
    (line,) = prompting.of_template(Template(refused=[roles]).count, chat=True)
    assert said in line


def test_text_that_is_dropped_is_named() -> None:
    assert prompting.of_template(Template(dropped=["system"]).count, chat=True) == [
        "its chat template drops text from a system message: message 1, the system's"
    ]
    lines = prompting.of_template(Template(dropped=["assistant"]).count, chat=True)
    assert [line.rpartition(": ")[2] for line in lines] == ["message 2, the assistant's"] * 2


@pytest.mark.parametrize("template", [Template(refused=[QUESTION]), Template(dropped=["user"])])
def test_a_chat_package_that_takes_no_question_is_refused_and_a_prompt_package_is_not(
    template: Template,
) -> None:
    with pytest.raises(PublishError, match="takes no message of a user"):
        prompting.of_template(template.count, chat=True)
    (line,) = prompting.of_template(template.count, chat=False)
    assert line.startswith("it takes prompts only")


@pytest.mark.parametrize(
    ("configured", "tokenizer", "said"),
    [
        (2, {2}, None),
        ([2, 7], {2}, None),
        (2, set(), None),
        (None, {2}, "ends answers at no token, its tokenizer at token 2: answers end at each of them; add token 2 "),
        (0, {2}, "ends answers at token 0, its tokenizer at token 2: "),
        ([0, 3], {2, 3}, "at token 0 or 3, its tokenizer at token 2 or 3: answers end at each of them; add token 2 "),
    ],
)  # fmt: skip
def test_end_tokens_that_genai_config_lacks_are_named(
    configured: object, tokenizer: set[int], said: str | None
) -> None:
    lines = prompting.of_end_tokens(configured, frozenset(tokenizer))
    assert len(lines) == (said is not None)
    assert all(said in line for line in lines if said)


def test_the_command_says_what_limits_a_package_beside_its_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = Published(name="m", version=3, alias=None, digest="d", run_id="r", limits=("it has a limit",))
    monkeypatch.setattr(publishing, "publish_folder", lambda *_, **__: published)
    arguments = ["publish", str(tmp_path), "--name", "m", "--registry", "sqlite:///r.db", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert result.stderr == f"edge-agent: {tmp_path.name}: it has a limit (docs/models.md)\n"
    assert '"version": 3' in result.stdout and "limit" not in result.stdout
