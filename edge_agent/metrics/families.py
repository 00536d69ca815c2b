"""The metrics by their names: each reads its samples out of the daemon's document.

Owns the names, and so what the gateway's `/metrics` and the textfile have in common. Names that OpenTelemetry's GenAI
conventions define are theirs, written as Prometheus writes them (`gen_ai.server.time_to_first_token`, in seconds, is
`gen_ai_server_time_to_first_token_seconds`); a model's configured name is `gen_ai_request_model` everywhere. The
document may be that of another version of the daemon: what it lacks has no samples. Table: docs/operating.md.
Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edge_agent.errors import PromptError, by_code
from edge_agent.metrics.measurements import OK

MODEL = "gen_ai_request_model"
_STATES = ("starting", "ready", "degraded")
_MODEL_STATES = ("absent", "idle", "loading", "ready", "failed")

Kind = Literal["counter", "gauge", "histogram", "info"]
Document = Mapping[str, Any]
Labels = dict[str, str]
Readings = Iterable[tuple[Labels, Any]]
Read = Callable[[Document], Readings]
_SUFFIXES: Mapping[Kind, str] = {"counter": "_total", "info": "_info"}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line of the exposition: `name{labels} value`."""

    name: str
    labels: Labels
    value: float


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: without the suffix of its kind.
        read: gives a number, or a histogram with its bounds, for each set of labels.
    """

    name: str
    kind: Kind
    help: str
    read: Read

    @property
    def full_name(self) -> str:
        """As its samples are called; those of a histogram have suffixes beside it."""
        return self.name + _SUFFIXES.get(self.kind, "")

    def samples(self, document: Document) -> Iterator[Sample]:
        for labels, value in self.read(document):
            if self.kind == "histogram":
                yield from _histogram(self.name, labels, value)
            elif isinstance(value, int | float):
                yield Sample(name=self.full_name, labels=labels, value=float(value))


def _histogram(name: str, labels: Labels, value: Any) -> Iterator[Sample]:
    read, bounds = value
    buckets = (*read["buckets"], read["count"])
    for bound, count in zip((*bounds, math.inf), buckets, strict=True):
        edge = "+Inf" if bound == math.inf else repr(float(bound))
        yield Sample(name=f"{name}_bucket", labels={**labels, "le": edge}, value=float(count))
    yield Sample(name=f"{name}_count", labels=labels, value=float(read["count"]))
    yield Sample(name=f"{name}_sum", labels=labels, value=float(read["sum"]))


# --- Where a number stands in the document ------------------------------------------------------------------


def _at(*path: str) -> Read:
    """The one number at this place."""

    def read(document: Document) -> Readings:
        value: Any = document
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        yield {}, value

    return read


def _models(document: Document) -> Iterator[tuple[Labels, Document]]:
    for name, model in document.get("models", {}).items():
        yield {MODEL: name}, model


def _of_models(key: str) -> Read:
    """A number of each model."""
    return lambda document: ((labels, model.get(key)) for labels, model in _models(document))


def _times(key: str, **more: str) -> Read:
    """A histogram of each model."""

    def read(document: Document) -> Readings:
        bounds = document.get("bounds", {}).get(key)
        for labels, model in _models(document):
            if bounds is not None and key in model:
                yield {**labels, **more}, (model[key], bounds)

    return read


def _tokens(document: Document) -> Readings:
    kinds = (_times(f"{kind}_tokens", gen_ai_token_type=kind) for kind in ("input", "output"))
    return itertools.chain.from_iterable(read(document) for read in kinds)


def _with_status(counts: Mapping[str, Any], labels: Labels) -> Readings:
    """Counts by code, and what MQTT and HTTP say with that code."""
    errors = by_code(PromptError)
    for code, count in counts.items():
        status = 200 if code == OK else errors[code].status if code in errors else 500
        yield {**labels, "code": code, "status": str(status)}, count


def _answers(document: Document) -> Readings:
    for labels, model in _models(document):
        yield from _with_status(model.get("answers", {}), labels)


def _refused(document: Document) -> Readings:
    return _with_status(document.get("refused", {}), {})


def _check_failures(document: Document) -> Readings:
    for labels, model in _models(document):
        for code, count in model.get("check_failures", {}).items():
            yield {**labels, "code": code}, count


def _events(document: Document) -> Readings:
    return (({"event": event}, count) for event, count in document.get("counters", {}).items())


def _up(document: Document) -> Readings:
    yield {}, int(bool(document))


def _build(document: Document) -> Readings:
    if version := document.get("agent_version"):
        yield {"version": version}, 1


def _state(document: Document) -> Readings:
    if state := document.get("state"):
        yield from (({"state": each}, int(each == state)) for each in _STATES)


def _model_info(document: Document) -> Readings:
    """Of each model that has a version."""
    for labels, model in _models(document):
        if model.get("version") is not None:
            known = {key: str(model.get(key) or "") for key in ("version", "digest", "flavor")}
            yield {**labels, **known}, 1


def _model_state(document: Document) -> Readings:
    for labels, model in _models(document):
        for each in _MODEL_STATES:
            yield {**labels, "state": each}, int(each == model.get("state"))


def _memory(document: Document) -> Readings:
    yield {"process": "daemon", MODEL: ""}, document.get("memory_bytes")
    for process in ("sync", "gateway"):
        yield {"process": process, MODEL: ""}, document.get(f"{process}_memory_bytes")
    for labels, model in _models(document):
        yield {"process": "runner", **labels}, model.get("memory_bytes")


FAMILIES = (
    Family(
        "gen_ai_server_time_to_first_token_seconds",
        "histogram",
        "From a prompt's acceptance to its first text",
        _times("first_token_s"),
    ),
    Family(
        "gen_ai_server_time_per_output_token_seconds",
        "histogram",
        "For each token of an answer after its first one",
        _times("per_token_s"),
    ),
    Family(
        "gen_ai_server_request_duration_seconds",
        "histogram",
        "From a prompt's acceptance to the end of its answer; answers with status 200",
        _times("request_s"),
    ),
    Family(
        "gen_ai_client_token_usage",
        "histogram",
        "Tokens of prompts and of answers with status 200",
        _tokens,
    ),
    Family(
        "edge_agent_request_queue_time_seconds",
        "histogram",
        "From a prompt's acceptance until a runner took it up; answers with status 200",
        _times("queue_s"),
    ),
    Family(
        "edge_agent_cached_prompt_tokens",
        "counter",
        "Tokens of prompts whose keys and values the model still had",
        _of_models("cached_tokens"),
    ),
    Family("edge_agent_answers", "counter", "Answers of accepted prompts", _answers),
    Family("edge_agent_prompts_refused", "counter", "Requests that were not accepted", _refused),
    Family(
        "edge_agent_answers_dropped",
        "counter",
        "Answers that were forgotten before anybody took them",
        _at("answers_dropped"),
    ),
    Family(
        "edge_agent_prompts_damaged",
        "counter",
        "Prompts that the journal could not read back",
        _at("prompts_damaged"),
    ),
    Family("edge_agent_queue_depth", "gauge", "Prompts that wait or run", _at("queue_depth")),
    Family("edge_agent_queue_limit", "gauge", "limits.queue_depth", _at("queue_limit")),
    Family(
        "edge_agent_runner_deaths",
        "counter",
        "Runners that ended by themselves; another is started in their place",
        _of_models("runner_deaths"),
    ),
    Family(
        "edge_agent_memory_resident_bytes",
        "gauge",
        "Memory of the daemon, of a model's runners, and of sync and gateway while they run",
        _memory,
    ),
    Family("edge_agent_cache_bytes", "gauge", "Bytes of all blobs in the cache", _at("cache", "bytes")),
    Family("edge_agent_cache_quota_bytes", "gauge", "cache.quota_bytes", _at("cache", "quota_bytes")),
    Family(
        "edge_agent_cache_free_bytes",
        "gauge",
        "Bytes free on the cache's file system",
        _at("cache", "free_bytes"),
    ),
    Family(
        "edge_agent_checks",
        "counter",
        "Checks of a model for another version, those that found nothing new too",
        _of_models("checks"),
    ),
    Family("edge_agent_check_failures", "counter", "Checks that failed", _check_failures),
    Family(
        "edge_agent_sync_bytes",
        "counter",
        "Bytes of versions that have come, from the registry and from mirrors",
        _of_models("sync_bytes"),
    ),
    Family(
        "edge_agent_mirror_bytes",
        "counter",
        "Those of them that came from mirrors, in syncs that ended well",
        _of_models("mirror_bytes"),
    ),
    Family(
        "edge_agent_link_used_bytes",
        "gauge",
        "Bytes of downloads today, where link.bytes_per_day bounds them",
        _at("link", "used_bytes"),
    ),
    Family(
        "edge_agent_link_limit_bytes",
        "gauge",
        "link.bytes_per_day; 0 for no bound",
        _at("link", "bytes_per_day"),
    ),
    Family(
        "edge_agent_registry_reachable",
        "gauge",
        "Whether the registry answered the last check",
        _at("registry", "reachable"),
    ),
    Family(
        "edge_agent_broker_connected",
        "gauge",
        "Whether the broker is connected",
        _at("broker", "connected"),
    ),
    Family(
        "edge_agent_connection_events",
        "counter",
        "What happened on the way to the broker",
        _events,
    ),
    Family("edge_agent_state", "gauge", "1 for the state that the device is in", _state),
    Family("edge_agent_model_state", "gauge", "1 for the state that a model is in", _model_state),
    Family("edge_agent_model", "info", "The version of a model that is active", _model_info),
    Family("edge_agent_build", "info", "The agent's own version", _build),
    Family(
        "edge_agent_start_time_seconds",
        "gauge",
        "When the daemon started, in seconds since 1970",
        _at("started_at"),
    ),
    Family("edge_agent_up", "gauge", "Whether the daemon answers", _up),
)
"""All of them. A document without anything says that the daemon does not answer, and no more."""
