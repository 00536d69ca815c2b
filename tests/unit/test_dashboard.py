"""docs/grafana-dashboard.json against the names that there are. What a real Prometheus says to it: `look-test`."""

from __future__ import annotations

import re

from edge_agent.metrics.families import FAMILIES, MODEL
from tests.support.dashboard import DASHBOARD, choices, filled, queries

_NAME = re.compile(r"\b((?:edge_agent|gen_ai)_\w+?)(?:_bucket|_count|_sum)?(?=\{)")


def test_each_metric_is_on_the_dashboard_and_each_of_its_names_is_a_metric() -> None:
    used = {name for query in queries() for name in _NAME.findall(filled(query))}
    assert used == {family.full_name for family in FAMILIES}


def test_every_panel_shows_the_chosen_devices_only() -> None:
    assert [query for query in queries() if query.count("{") != query.count('{instance=~"$device"')] == []
    assert [label for _, label in choices()] == ["instance", MODEL]


def test_no_panel_stands_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        fields = {
            (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
        }
        assert not fields & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= fields
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
