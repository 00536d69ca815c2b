"""Home Assistant's own schemas and templates, for what a device tells it. Run by a Python that has that package.

    {"document", "bodies": {topic: body}} on stdin  →  {"version", "entities": {key: state}, "available": […]} on stdout

An entity's state is what Home Assistant makes of the body on its topic; an error of a schema ends the program.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from importlib.metadata import version
from typing import Any


async def states_of(document: dict[str, Any], bodies: dict[str, str], folder: str) -> dict[str, Any]:
    """Checks the message as Home Assistant does when it comes, and renders each template."""
    from homeassistant.components.mqtt import sensor, update
    from homeassistant.components.mqtt.schemas import DEVICE_DISCOVERY_SCHEMA, SHARED_OPTIONS
    from homeassistant.core import HomeAssistant
    from homeassistant.helpers.template import Template

    home = HomeAssistant(folder)
    DEVICE_DISCOVERY_SCHEMA(json.loads(json.dumps(document)))
    shared = {option: document[option] for option in SHARED_OPTIONS if option in document}
    platforms = {"sensor": sensor, "update": update}
    entities = {}

    def render(template: str, body: str) -> Any:
        return Template(template, home).async_render_with_possible_json_value(body)

    for key, component in document["components"].items():
        config = {**shared, "device": document["device"], **component}
        platform = platforms[config.pop("platform")]
        platform.DISCOVERY_SCHEMA(json.loads(json.dumps(config)))
        state = render(config["value_template"], bodies[config["state_topic"]])
        entities[key] = update.MQTT_JSON_UPDATE_SCHEMA(json.loads(state)) if platform is update else state
    availability = document["availability"][0]
    offline = json.dumps({"state": "offline", "time": 1, "boot_id": "b"})
    available = [
        render(availability["value_template"], body) for body in (bodies[availability["topic"]], offline)
    ]
    return {"version": version("homeassistant"), "entities": entities, "available": available}


def main() -> None:
    """See the module."""
    given = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        json.dump(asyncio.run(states_of(given["document"], given["bodies"], folder)), sys.stdout)


if __name__ == "__main__":
    main()
