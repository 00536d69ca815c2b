"""What Home Assistant has to know to show this device: one retained message of its MQTT discovery.

Owns that message and its topic. It names the device's own topics and says by templates where in their documents a value
stands, so no value is published twice. The button of an `update` entity publishes what the message says; so the message
is another one, and is published again, whenever a newer version is wanted.

Source: Home Assistant, "MQTT discovery" (device discovery, since 2024.11), "MQTT update", "MQTT sensor".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import edge_agent
from edge_agent.topics import Topics

MAX_STATE_CHARACTERS = 255
"""Of a state in Home Assistant; a longer one is refused there."""
_STATES = ("starting", "ready", "degraded", "offline")
_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9_-]")


def topic(prefix: str, device_id: str) -> str:
    """Where a device's message is retained.

    Args:
        prefix: of Home Assistant, `homeassistant` unless somebody has changed it there.
    """
    return f"{prefix}/device/{_id_of(device_id)}/config"


def document(topics: Topics, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The message.

    Args:
        models: of `model/reported`, by their configured names.
    """
    own = _id_of(topics.device_id)
    components: dict[str, dict[str, Any]] = {
        f"{own}_state": {
            "platform": "sensor",
            "name": "State",
            "device_class": "enum",
            "options": list(_STATES),
            "state_topic": topics.status,
            "value_template": "{{ value_json.state }}",
        },
        f"{own}_queue": {
            "platform": "sensor",
            "name": "Queue",
            "state_class": "measurement",
            "unit_of_measurement": "prompts",
            "state_topic": topics.status,
            "value_template": "{{ value_json.queue_depth | default(0) }}",
        },
        f"{own}_trouble": {
            "platform": "sensor",
            "name": "Last error",
            "entity_category": "diagnostic",
            "state_topic": topics.status,
            "value_template": (
                "{{ (value_json.troubles | default([]) | map(attribute='text') | first | default('none', true))"
                f"[:{MAX_STATE_CHARACTERS}] }}}}"
            ),
        },
    }
    for name, report in models.items():
        for key, component in _of_model(topics, name, report).items():
            components[f"{own}_{_id_of(name, prefix='')}_{key}"] = component
    return {
        "device": {
            "identifiers": [own],
            "name": topics.device_id,
            "manufacturer": "edge-agent",
            "model": "language models",
            "sw_version": edge_agent.__version__,
        },
        "origin": {"name": "edge-agent", "sw_version": edge_agent.__version__},
        "availability": [
            {
                "topic": topics.status,
                "value_template": "{{ 'offline' if value_json.state == 'offline' else 'online' }}",
            }
        ],
        "qos": 1,
        "components": {key: {"unique_id": key, **component} for key, component in components.items()},
    }


def _of_model(topics: Topics, name: str, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    quoted = _jinja(name)
    this = f"value_json.models[{quoted}]"
    component: dict[str, dict[str, Any]] = {
        "version": {
            "platform": "sensor",
            "name": f"{name} version",
            "state_topic": topics.reported,
            "value_template": f"{{{{ {this}.version }}}}",
        },
        "speed": {
            "platform": "sensor",
            "name": f"{name} speed",
            "state_class": "measurement",
            "unit_of_measurement": "tokens/s",
            "state_topic": topics.status,
            "value_template": (
                f"{{{{ value_json.models | default([]) | selectattr('name', 'eq', {quoted}) "
                "| map(attribute='tokens_per_s') | first | default(none) }}"
            ),
        },
        "reason": {
            "platform": "sensor",
            "name": f"{name} reason",
            "entity_category": "diagnostic",
            "state_topic": topics.reported,
            "value_template": f"{{{{ ({this}.reason or 'none')[:{MAX_STATE_CHARACTERS}] }}}}",
        },
        "update": {
            "platform": "update",
            "name": name,
            "title": name,
            "device_class": "firmware",
            "state_topic": topics.reported,
            "value_template": _update_template(this),
        },
    }
    if latest := _latest(report):
        component["update"] |= {
            "command_topic": topics.desired,
            "payload_install": json.dumps({"models": {name: {"version": latest}}}),
            "retain": True,
        }
    return component


def _update_template(this: str) -> str:
    """From a model's report to what an `update` entity takes. A version that is in quarantine here is no update."""
    return (
        f"{{% set m = {this} %}}"
        "{% set bad = m.quarantined | map(attribute='version') | list %}"
        "{% set w = m.wanted.version if m.wanted else none %}"
        "{% set latest = w if w and w not in bad else m.version %}"
        "{% set p = m.progress %}"
        "{{ dict({'in_progress': p is not none, "
        "'update_percentage': (100 * p.bytes / p.total_bytes) | round(1) if p and p.total_bytes else none, "
        f"'release_summary': (m.reason or '')[:{MAX_STATE_CHARACTERS}]}}, "
        "**dict({'installed_version': m.version | string} if m.version else {}, "
        "**({'latest_version': latest | string} if latest else {}))) | tojson }}"
    )


def _latest(report: Mapping[str, Any]) -> int | None:
    """The version that the button asks for; None while the registry has said nothing of one."""
    wanted = (report.get("wanted") or {}).get("version")
    bad: Iterable[Any] = (entry["version"] for entry in report.get("quarantined") or ())
    return wanted if isinstance(wanted, int) and wanted not in bad else report.get("version")


def _jinja(text: str) -> str:
    """A configured name as a string in a template: such a name has neither quotes nor backslashes."""
    return f"'{text}'"


def _id_of(name: str, prefix: str = "edge_agent_") -> str:
    """An id in Home Assistant's alphabet; another one for each name."""
    if not _NOT_IN_IDS.search(name):
        return f"{prefix}{name}"
    return f"{prefix}{_NOT_IN_IDS.sub('_', name)}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
