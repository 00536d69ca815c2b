"""Status documents as a daemon would give them, and a control socket that gives them: for what commands print."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_agent.errors import EdgeAgentError
from edge_agent.transport.control import Call, ControlServer

NOW = 1_790_000_000
WEIGHTS = 2_000_000_000


def model(**fields: Any) -> dict[str, Any]:
    """Of a model that runs version 6, and for which nothing is going on."""
    return {
        "name": "assistant",
        "uri": "models:/phi3-mini@prod",
        "version": 6,
        "digest": "a" * 64,
        "flavor": "onnxruntime-genai 0.18.0",
        "state": "ready",
        "reason": "",
        "walls": {"stand": ["files", "network"], "missing": {}},
        "tokens_per_s": 21.4,
        "previous": None,
        "candidate": None,
        "pinned": None,
        "quarantined": {},
        "update_problem": "",
        "progress": None,
        "wanted": {"version": 6, "via": "alias"},
        "attempt": None,
        "gate": None,
        "link": None,
        "held": None,
        **fields,
    }


def attempt(step: str, *, code: str | None = None, **fields: Any) -> dict[str, Any]:
    """Of version 7, which began its step 12 s ago."""
    return {
        "version": 7,
        "digest": "b" * 64,
        "step": step,
        "code": code,
        "at": NOW - 12,
        "took_s": {},
        "golden": None,
        **fields,
    }


def document(*models: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Of a device that is ready, with its registry asked a minute ago."""
    registry = {"reachable": True, "problem": "", "last_check": NOW - 60, "asking": False}
    return {
        "state": "ready",
        "time": NOW,
        "agent_version": "1.0.0",
        "queue_depth": 0,
        "models": list(models or [model()]),
        "troubles": [],
        "cache": {"bytes": 2 * WEIGHTS, "quota_bytes": 20_000_000_000, "free_bytes": 9_000_000_000},
        "link": {"bytes_per_day": 0, "used_bytes": None},
        "broker": {"host": "broker.example", "port": 8883, "connected": True},
        **fields,
        "registry": {"uri": "http://mlflow.example:5000", **registry, **fields.get("registry", {})},
    }


class ScriptedStatus:
    """What the daemon says next time. Any thread.

    Attributes:
        document: of the status.
        failure: what it says instead.
    """

    def __init__(self, path: Path) -> None:
        self.document = document()
        self.failure: EdgeAgentError | None = None
        self._server = ControlServer(path, {"status": self._answer})
        self._thread = threading.Thread(target=self._server.run, name="scripted-status")
        self._thread.start()

    def close(self) -> None:
        self._server.close()
        self._thread.join(60)

    def _answer(self, call: Call) -> None:
        if failure := self.failure:
            raise failure
        call.send("done", status=self.document)


@contextmanager
def scripted_status(folder: Path) -> Iterator[ScriptedStatus]:
    """A daemon's control socket in a folder, and the settings file of a device that has it: `config.toml`."""
    (folder / "config.toml").write_text(
        f'device_id = "dev"\nstate_dir = "{folder}/state"\ncontrol_socket = "{folder}/c.sock"\n'
        '[models.assistant]\nuri = "models:/phi3-mini@prod"\n'
    )
    server = ScriptedStatus(folder / "c.sock")
    try:
        yield server
    finally:
        server.close()
