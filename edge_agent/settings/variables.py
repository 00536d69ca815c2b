"""What the variables say: `EDGE_AGENT_MQTT__HOST` is `mqtt.host`, and a list is JSON.

pydantic-settings reads them. It is imported where there is one to read: with what it imports it takes 5 MB of a process
for as long as that lives, and most devices have a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from edge_agent import environment
from edge_agent.errors import SettingsError

ENV_PREFIX = "EDGE_AGENT_"


def from_variables(settings: type[BaseModel]) -> dict[str, Any]:
    """The keys that variables set, in tables as in the file; nothing is checked yet.

    Args:
        settings: says which keys are tables, and which are lists.

    Raises:
        SettingsError: a variable names no setting, or is not the JSON that its setting needs.
    """
    given = environment.names(ENV_PREFIX)
    for variable in given:  # pydantic-settings ignores a misspelt one
        key = variable.removeprefix(ENV_PREFIX).lower().split("__")[0]
        if key not in settings.model_fields:
            raise SettingsError(f"variable {variable} does not name a setting: {key!r} is unknown")
    return _read(settings) if given else {}


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both in one: where a key is in both, a table is the two tables in one, and any other value is the one above."""
    both = {
        key: over(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping)
    }
    return {**below, **above, **both}


def _read(settings: type[BaseModel]) -> dict[str, Any]:
    import pydantic_settings

    source = pydantic_settings.EnvSettingsSource(
        settings,  # type: ignore[arg-type]  # it looks at the fields only
        case_sensitive=False,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
    )
    try:
        return source()
    except pydantic_settings.SettingsError as error:
        raise SettingsError(f"environment: {error}") from error
