"""The daemon's metrics in the format that a scraper asks for: Prometheus' text, or OpenMetrics. Pure.

The names and numbers are those of `metrics/families.py`; prometheus-client writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from edge_agent.metrics.families import FAMILIES, Document

_VERSION = re.compile(r";\s*version=([^;]*)")
_VERSIONS = ("0.0.4", "1.0.0")


class _Families(Collector):
    def __init__(self, document: Document) -> None:
        self._document = document

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            metric = Metric(family.name, family.help, family.kind)
            for sample in family.samples(self._document):
                metric.add_sample(sample.name, sample.labels, sample.value)
            if metric.samples:
                yield metric


def exposition(document: Document, accept: str) -> tuple[bytes, str]:
    """The text and its content type.

    Args:
        document: the daemon's; empty where it does not answer.
        accept: the header, as a client sent it.
    """
    # The library compares any version, and says it back: it hears of those that there are.
    known = [each for each in accept.split(",") if _version(each) in ("", *_VERSIONS)]
    encode, content_type = choose_encoder(",".join(known))
    return encode(_Families(document)), content_type


def _version(accepted: str) -> str:
    found = _VERSION.search(accepted)
    return found[1].strip() if found else ""
