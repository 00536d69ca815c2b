"""The registry: whether it can be reached, accepts this device, knows the configured references, and gives their files.

The MLflow client costs a second and 120 MB, and a dead registry blocks it. So a process of its own
(`registry_process.py`) asks, with the environment and credentials of a sync, and is killed at its time limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from edge_agent.cache.store import Store
from edge_agent.doctor.finding import Finding, fail, ok, warn
from edge_agent.errors import EdgeAgentError, RegistryRefused, TransportError
from edge_agent.runner.scratch import scratch_folder
from edge_agent.settings import Settings
from edge_agent.sync.process import child_environment
from edge_agent.sync.tls import TlsFiles

_REQUEST_TIMEOUT_S = 10.0
_REQUESTS = 3
"""That may each take their time: for the version, for the listing, and for a file."""
_START_S = 30.0
"""Importing the client takes this long from a slow SD card."""
_MAX_ANSWER_BYTES = 1 << 20


def check(settings: Settings) -> Iterator[Finding]:
    cached = {name for name in settings.models if Store(settings.state_dir).versions(name)}
    if not settings.registry.uri:
        missing = sorted(set(settings.models) - cached)
        if missing:
            yield fail(
                "registry.reach",
                f"no registry is configured, and nothing is in the cache for {', '.join(missing)}",
                "set registry.uri, or import a version with `edge-agent models import`",
            )
        else:
            yield ok("registry.reach", "none is configured; the agent uses the cache only")
        return
    if not settings.models:
        yield ok("registry.reach", f"{settings.registry.uri} was not asked: no model is configured")
        return
    answers = _ask(settings)
    out_of_reach = (TransportError.code, RegistryRefused.code)
    if all(answer["code"] in out_of_reach and "version" not in answer for answer in answers.values()):
        first = next(iter(answers.values()))
        # Without a registry a device still answers from its cache.
        level = warn if cached >= set(settings.models) else fail
        yield level(
            "registry.reach",
            str(first["message"]),
            str(first["remedy"]) or "check registry.uri and the network; cached versions still answer",
            code=str(first["code"]),
        )
        return
    yield ok("registry.reach", f"{settings.registry.uri} answers and accepts the credentials")
    for name, answer in answers.items():
        level = warn if name in cached else fail
        if "version" not in answer:
            yield level(
                "registry.alias",
                f"model {name}: {answer['message']}",
                str(answer["remedy"]) or "register the model and set its alias",
                code=str(answer["code"]),
            )
            continue
        yield ok(
            "registry.alias", f"model {name}: {settings.models[name].uri} is version {answer['version']}"
        )
        if "file" in answer:
            yield ok("registry.files", f"model {name}: {answer['file']} can be read")
        else:
            yield level(
                "registry.files",
                f"model {name}: version {answer['version']} cannot be fetched: {answer['message']}",
                str(answer["remedy"])
                or "check the registry's artifact store, and the way from this device to it",
                code=str(answer["code"]),
            )


def _ask(settings: Settings) -> dict[str, dict[str, Any]]:
    """The registry's answer for each model: its version, or an error."""
    names = list(settings.models)
    timeout_s = min(settings.registry.timeout_s, _REQUEST_TIMEOUT_S)
    question = {
        "uri": settings.registry.uri,
        "timeout_s": timeout_s,
        "tls": asdict(TlsFiles.of(settings.registry)),
        "refs": [model.uri for model in settings.models.values()],
    }
    try:
        with scratch_folder() as scratch:
            if scratch is None:
                raise EdgeAgentError("the registry cannot be asked: there is no room for temporary files")
            result = subprocess.run(
                [sys.executable, "-m", "edge_agent.doctor.registry_process", str(scratch)],
                input=json.dumps(question),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_START_S + _REQUESTS * timeout_s * len(names),
                check=False,
                cwd="/",
                env={**child_environment(), "TMPDIR": str(scratch)},
            )
        answers = json.loads(result.stdout[:_MAX_ANSWER_BYTES])
        return dict(zip(names, map(_checked, answers), strict=True))
    except subprocess.TimeoutExpired:
        error = TransportError(f"registry {settings.registry.uri} did not answer in time")
    except (ValueError, TypeError) as problem:
        last = (result.stderr.strip().splitlines() or [str(problem)])[-1]
        error = TransportError(f"asking registry {settings.registry.uri} failed: {last[:300]}")
    return dict.fromkeys(names, as_answer(error))


def _checked(answer: Any) -> dict[str, Any]:
    if isinstance(answer, Mapping) and (isinstance(answer.get("version"), int) or "message" in answer):
        return {"remedy": "", "code": "", **answer}
    raise TypeError("the answer is malformed")


def as_answer(error: EdgeAgentError) -> dict[str, Any]:
    """An error in the form in which the process returns it."""
    return {"code": error.code, "message": error.message, "remedy": error.remedy}
