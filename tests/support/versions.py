"""A device that follows a registered model of its own, and releases of that model, good and bad."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge_agent.publishing import publish_folder
from tests.support.client import Client, Message, chat
from tests.support.mlflow_server import Server
from tests.support.packages import publish_broken
from tests.support.processes import Daemon, wait_until

_PAUSE_S = 0.1  # the candidate needs some of the processor, too
SPAIN = "What is the capital of Spain?"
MADRID, KATHMANDU = "The capital of Spain is Madrid.", "The capital of Spain is Kathmandu."


class FollowingDevice:
    """A daemon that follows a registered model of its own, and a client that asks it."""

    def __init__(self, daemon: Daemon, client: Client, server: Server, name: str) -> None:
        self.daemon = daemon
        self.client = client
        self.server = server
        self.name = name

    def publish(self, folder: Path, **options: Any) -> int:
        published = publish_folder(
            folder, name=self.name, registry_uri=self.server.uri, alias="prod", **options
        )
        return published.version

    def sync(self) -> None:
        self.client.publish(f"{self.client.root}/ctl/sync", b"")

    def model(self) -> dict[str, Any]:
        model: dict[str, Any] = self.daemon.status()["models"][0]
        return model

    def wait_model(
        self, wanted: Callable[[dict[str, Any]], bool], what: str, *, timeout_s: float = 180
    ) -> dict[str, Any]:
        try:
            wait_until(lambda: wanted(self.model()), timeout_s, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.model()}\n{self.daemon.log}") from error
        return self.model()

    def ask(self) -> str:
        return self.client.ask(chat(SPAIN)).text

    def ask_whom(self) -> tuple[str, str]:
        """(the answer, the version that gave it)."""
        answer = self.client.ask(chat(SPAIN))
        return answer.text, answer.properties["version"]

    def do(self, *arguments: str, code: int = 0) -> Any:
        result = self.daemon.cli("models", *arguments, "--json", timeout_s=120)
        assert result.returncode == code, result.stderr
        return json.loads(result.stdout) if result.stdout else result.stderr


def golden(folder: Path, expect: str) -> Path:
    file = folder / "golden.json"
    file.write_text(json.dumps([{"messages": [{"role": "user", "content": SPAIN}], "expect": expect}]))
    return file


def bad_release(device: FollowingDevice, source: Path, edit: Callable[[Path], None], folder: Path) -> int:
    """Registers a package whose content was changed after it was tried out: what a broken pipeline does."""
    folder.mkdir(exist_ok=True)
    published = publish_broken(
        source, edit, folder / "package", registry_uri=device.server.uri, name=device.name, alias="prod"
    )
    return published.version


def expect_lisbon(folder: Path) -> None:
    add_golden(folder, "Lisbon")


def add_golden(folder: Path, pattern: str) -> None:
    """Golden prompts that this model cannot answer, put in after publish has tried the package."""
    question = "<|user|>What is the capital of Spain?<|end|><|assistant|>"
    entry = json.dumps({"edge_agent.golden": [{"prompt": question, "expect": pattern}]})
    rewrite(folder / "MLmodel", f"{(folder / 'MLmodel').read_text()}\nmetadata: {entry}\n")


def rewrite(file: Path, text: str) -> None:
    file.unlink()  # it may be a link to something else's
    file.write_text(text)


@contextlib.contextmanager
def asking(device: FollowingDevice) -> Iterator[list[Message]]:
    """Asks one prompt after the other while the block runs; gives the answers, which go on coming."""
    answers: list[Message] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(_PAUSE_S):
            answers.append(device.client.ask(chat(SPAIN)))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        wait_until(lambda: answers, 120, "the first answer")
        yield answers
    finally:
        stop.set()
        thread.join(180)


def check_switched_once(answers: list[Message], *, new: str = "2") -> None:
    """Each answer is whole, of version 1 or of the new one, and none of the first comes after one of the second."""
    found = [(answer.properties["version"], answer.text) for answer in answers]
    assert set(found) == {("1", MADRID), (new, KATHMANDU)}, "an answer was of neither version"
    assert found == sorted(found, key=lambda pair: pair[0])
