"""`edge-agent doctor`: what is wrong on this device, and what to do about it.

Owns the order of the checks. Each check looks at the real thing within a time limit, leaves no trace, and works
whether the daemon is running or not:

    host → settings and their files → daemon and unit → broker → registry → mirrors → cache → models

While the daemon is connected, doctor does not open a second connection to the broker: if the broker uses the user
name as the client id (docs/broker.md), that would end the daemon's session.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from edge_agent import logs
from edge_agent.doctor import (
    broker,
    cache,
    certificates,
    files,
    host,
    mirrors,
    models,
    registry,
    service,
    walls,
)
from edge_agent.doctor.finding import Finding, fail, failed, ok, unfinished, warn
from edge_agent.documents import page
from edge_agent.errors import EdgeAgentError, SettingsError
from edge_agent.settings import Settings

_Check = tuple[str, Callable[[], Iterator[Finding]]]


def diagnose(
    load: Callable[[], Settings], *, config: Path | None, begin: Callable[[str], None] = lambda check: None
) -> Iterator[Finding]:
    """Runs every check and yields each finding as soon as it is known.

    Args:
        load: reads the settings; if they are invalid, only the host and the unit are checked.
        config: the settings file; None if there is none.
        begin: called with the name of each check before it runs.
    """
    for name, check in chain(_of_the_machine(), _of_the_settings(load, config)):
        begin(name)
        yield from _run(name, check)


def _of_the_machine() -> Iterator[_Check]:
    yield "host", host.check_processor
    yield "host", host.check_clock


def _of_the_settings(load: Callable[[], Settings], config: Path | None) -> Iterator[_Check]:
    try:
        settings = files.with_stored_credentials(load())
    except SettingsError as error:
        remedy = f"correct the key in the settings file; {page('settings.md')} lists all of them"
        finding = failed("settings", error, remedy)
        yield "settings", lambda: iter([finding])
        yield "unit", service.check_unit
        return
    status = service.ask_daemon(settings)
    yield "settings", lambda: _check_settings(settings, config)
    yield "settings.files", lambda: files.check(settings, config, service.unit_properties())
    yield "settings.tls", lambda: certificates.check(settings.mqtt)
    yield "settings.tls", lambda: certificates.check_registry(settings.registry)
    yield "settings.tls", lambda: certificates.check_http(settings.http)
    yield "libraries", lambda: host.check_libraries(settings)
    yield "host.walls", lambda: walls.check(settings, status.document)
    yield "unit", service.check_unit
    yield "daemon", lambda: service.check_daemon(settings, status)
    yield "dns", lambda: host.check_names(settings)
    yield "broker", lambda: broker.check(settings, status.document)
    yield "registry", lambda: registry.check(settings)
    yield "mirrors", lambda: mirrors.check(settings)
    yield "cache", lambda: cache.check(settings)
    yield "models", lambda: models.check(settings, status.document)


def _check_settings(settings: Settings, config: Path | None) -> Iterator[Finding]:
    if config is None:
        yield warn(
            "settings",
            "no settings file found; every key has its default",
            f"write one; see {page('settings.md')}",
        )
    elif not settings.models:
        yield warn("settings", "no model is configured", "add a [models.NAME] table to the settings")
    else:
        yield ok("settings", f"valid; device {settings.device_id}, models {', '.join(settings.models)}")


def _run(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Reports a check that fails to run as a finding, so that the others go on."""
    try:
        yield from check()
    except SettingsError as error:
        yield failed(name, error, "correct the key or the file that the message names")
    except EdgeAgentError as error:
        yield failed(name, error, "see `edge-agent status`")
    except OSError as error:
        yield fail(
            name,
            f"cannot be checked: {error}",
            "run doctor as root, or as a member of the group edge-agent",
        )
    except subprocess.TimeoutExpired as error:
        yield unfinished(name, error.timeout)
    except Exception as error:  # noqa: BLE001 - whatever is broken on this device, the other checks run
        places = " ".join(logs.describe(error).split())
        yield fail(name, f"the check itself failed: {places}", "report this, with a support archive")
