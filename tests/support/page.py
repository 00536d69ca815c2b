"""What a device says of itself, for tests of the page that shows it; and the page's HTML, taken apart."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

NOW = 1_790_000_000
STAND = ["descriptors", "limits", "files", "tcp", "signals", "memory", "system_calls"]


def model(**more: Any) -> dict[str, Any]:
    """A model that is as it should be, in the status."""
    return {
        "name": "assistant",
        "uri": "models:/phi3-mini@prod",
        "version": 7,
        "digest": "d",
        "flavor": "onnxruntime-genai 0.18.0",
        "state": "ready",
        "reason": "",
        "walls": {"stand": STAND, "missing": {}},
        "tokens_per_s": 21.44,
        "previous": "6-0a0b",
        "candidate": None,
        "pinned": None,
        "quarantined": {},
        "update_problem": "",
        "progress": None,
        "wanted": {"version": 7, "via": "alias"},
        "attempt": {"version": 7, "digest": "", "step": "active", "code": None, "at": NOW - 9000},
        "gate": None,
        "link": None,
        **more,
    }


def status(*models: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As `edge-agent status --json` has it."""
    return {
        "state": "ready",
        "time": NOW,
        "boot_id": "b",
        "seq": 1,
        "agent_version": "0.1.0",
        "queue_depth": 0,
        "models": list(models),
        "troubles": [],
        "walls": {"landlock": 6, "seccomp": True},
        "cache": {"bytes": 4_800_000_000, "quota_bytes": 20_000_000_000, "free_bytes": 51_500_000_000},
        "registry": {"uri": "http://mlflow.example:5000", "reachable": True, "problem": "", "last_check": NOW - 200},
        "link": {"bytes_per_day": 0, "used_bytes": None},
        "broker": {"host": "mqtt.example", "port": 8883, "connected": True, "problem": ""},
        **more,
    }  # fmt: skip


def recent(*prompts: dict[str, Any]) -> dict[str, Any]:
    return {"device_id": "press-3", "started_at": NOW - 277_000, "prompts": list(prompts)}


def answered(**more: Any) -> dict[str, Any]:
    return {
        "at": NOW - 47,
        "model": "assistant",
        "code": "ok",
        "queue_ms": 0.4,
        "first_token_ms": 340.2,
        "total_ms": 5120.0,
        "tokens_per_s": 21.4,
        "prompt_tokens": 13,
        "completion_tokens": 110,
        "cached_tokens": 0,
        **more,
    }


class Parsed(HTMLParser):
    """A page as a browser would see it.

    Attributes:
        tags: each element with its attributes, in their order.
        words: its text, with single spaces.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._words: list[str] = []
        self.feed(html)
        self.close()

    @property
    def words(self) -> str:
        return " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self._words.append(data)

    def having(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        """The attributes of the elements of that kind with these attributes (`class_` for `class`)."""
        named = {name.rstrip("_"): value for name, value in wanted.items()}
        return [has for each, has in self.tags if each == tag and named.items() <= has.items()]
