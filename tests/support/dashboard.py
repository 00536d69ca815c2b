"""What docs/grafana-dashboard.json asks of Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "docs" / "grafana-dashboard.json").read_text("utf-8")
)
_ALL = {"$device": ".*", "$model": ".*", "$__rate_interval": "2m", "$__range": "5m"}
_LABEL_VALUES = re.compile(r"label_values\((.*), (\w+)\)")


def filled(query: str) -> str:
    """As Grafana sends it when everything is chosen."""
    for name, value in _ALL.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


def queries() -> list[str]:
    """Those of the panels."""
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def choices() -> Iterator[tuple[str, str]]:
    """Those of the variables: a query, and the label whose values it is asked for."""
    for each in DASHBOARD["templating"]["list"]:
        if each["type"] == "query":
            found = _LABEL_VALUES.fullmatch(each["definition"])
            assert found is not None, each
            yield found[1], found[2]
