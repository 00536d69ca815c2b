"""What each device says of a version before anything moves: what it lacks, whether it fits, and when it would begin.

A few devices are asked at a time, and the next one once one has answered, or has taken long: each may ask the registry
for a manifest, and a thousand at once would be its busiest moment. Only devices that are there are asked; a request is
not left waiting for one that is not.

    devices → {"id", "reply_to", "model", "version"} on ctl/plan → answers on this plan's own topics → Answer, each

Contract: docs/mqtt.md, *A plan*.
"""

from __future__ import annotations

import collections
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edge_agent.errors import Pinned, Quarantined, UnknownModel
from edge_agent.fleet.broker import FleetBroker, Outgoing, Watch
from edge_agent.fleet.devices import NEVER_SEEN, Device
from edge_agent.fleet.fields import number, read_object, text, whole, word
from edge_agent.fleet.overview import WAITING
from edge_agent.host.clock import CLOCK, Clock
from edge_agent.topics import FleetTopics

AT_ONCE = 32
SLOW_S = 5.0
"""After this time the next device is asked, though one has not answered."""
ANSWER_TIMEOUT_S = 60.0
SOON_S = 60.0
"""What would begin within this time would begin now."""

OUTCOMES = ("now", "later", "cannot", "unknown", "silent", "offline", "no_model", "never_seen")

_FOR_GOOD = frozenset({Quarantined.code, Pinned.code})
"""What is in the way of a version whatever its size, which may not be known."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one device says of the version, or why it says nothing.

    Attributes:
        outcome: `now`, `later` (it waits for its time), `cannot`, `unknown` (it could not find out), `silent` (asked,
            and no answer came), `offline`, `no_model` (it has no model of this name), or `never_seen`.
        missing_bytes: what it would have to fetch; None if nobody knows.
        free_bytes: what its cache has room for.
        fits: whether cache and memory have room; None if nobody knows.
        would_start_at: when it could begin, in seconds since 1970; None for at once, and if nobody knows.
        code: of docs/operating.md: why it cannot, waits, or does not know; None for nothing.
        reason: the same, for people.
    """

    device_id: str
    outcome: str
    missing_bytes: int | None = None
    free_bytes: int | None = None
    fits: bool | None = None
    would_start_at: float | None = None
    code: str | None = None
    reason: str = ""

    def document(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"device": fields.pop("device_id"), **fields}


def ask(
    broker: FleetBroker,
    topics: FleetTopics,
    devices: Sequence[Device],
    *,
    model: str,
    version: int,
    now: float,
    reply_prefix: str = "replies/",
    report: Callable[[int, int], None] = lambda done, of: None,
    clock: Clock = CLOCK,
) -> list[Answer]:
    """Asks all devices that are there.

    Args:
        model: the settings' name.
        now: seconds since 1970.
        reply_prefix: where devices may answer; one of `mqtt.reply_prefixes`.
        report: called with how many have answered, or have had their time, of how many.

    Returns:
        an answer for each device, in their order.

    Raises:
        BrokerUnreachable, BrokerRefused: see `FleetBroker`.
    """
    answers = {each.device_id: _unasked(each, model) for each in devices}
    asked = [device_id for device_id, answer in answers.items() if answer is None]
    plan_id = f"plan-{uuid.uuid4().hex[:12]}"
    inbox = f"{reply_prefix}{broker.name}"
    bodies = {
        device_id: json.dumps(
            {"id": plan_id, "reply_to": f"{inbox}/{device_id}/{plan_id}", "model": model, "version": version}
        ).encode()
        for device_id in asked
    }
    with broker.watch([f"{inbox}/+/{plan_id}"]) as watch:
        waiting = collections.deque(asked)
        since: dict[str, float] = {}
        while waiting or since:
            prompt = sum(1 for asked_s in since.values() if clock.now_s() - asked_s < SLOW_S)
            begin = [waiting.popleft() for _ in range(min(AT_ONCE - prompt, len(waiting)))]
            broker.publish_all([Outgoing(topic=topics.of(each).plan, body=bodies[each]) for each in begin])
            since.update(dict.fromkeys(begin, clock.now_s()))
            for answer in _come(watch, since, clock, plan_id=plan_id, now=now):
                del since[answer.device_id]
                answers[answer.device_id] = answer
            report(len(asked) - len(waiting) - len(since), len(asked))
    return [answer for answer in answers.values() if answer is not None]


def _unasked(device: Device, model: str) -> Answer | None:
    """Why a device is not asked; None if it is."""
    if device.state in (NEVER_SEEN, "offline"):
        return Answer(device_id=device.device_id, outcome=device.state)
    if device.models and device.model(model) is None:
        return Answer(device_id=device.device_id, outcome="no_model")
    return None


def _come(watch: Watch, since: dict[str, float], clock: Clock, *, plan_id: str, now: float) -> list[Answer]:
    """The answers that have come, once there is one, and those whose time is over."""
    found: dict[str, Answer] = {}
    over_s = min(since.values()) + ANSWER_TIMEOUT_S - clock.now_s()
    message = watch.next(max(0.0, min(SLOW_S, over_s)))
    while message is not None:
        device_id = message.topic.split("/")[-2]
        if device_id in since and (answer := read_answer(device_id, message.body, plan_id=plan_id, now=now)):
            found[device_id] = answer
        message = watch.next(0)
    over_s = clock.now_s() - ANSWER_TIMEOUT_S
    for device_id, asked_s in since.items():
        if asked_s <= over_s:
            found.setdefault(device_id, Answer(device_id=device_id, outcome="silent"))
    return list(found.values())


def read_answer(device_id: str, body: bytes, *, plan_id: str, now: float) -> Answer | None:
    """A device's answer; None for what is none. Never raises."""
    document = read_object(body)
    if document is None or document.get("id", plan_id) != plan_id:
        return None
    fits = document.get("fits")
    answer = Answer(
        device_id=device_id,
        outcome="now",
        missing_bytes=whole(document.get("missing_bytes")),
        free_bytes=whole(document.get("free_bytes")),
        fits=fits if isinstance(fits, bool) else None,
        would_start_at=number(document.get("would_start_at")),
        code=word(document.get("code")) or None,
        reason=text(document.get("reason")),
    )
    return Answer(**{**vars(answer), "outcome": _outcome(answer, now)})


def _outcome(answer: Answer, now: float) -> str:
    if answer.code == UnknownModel.code:
        return "no_model"
    if answer.fits is not False and (answer.code is None or answer.code in WAITING):
        late = answer.would_start_at is not None and answer.would_start_at > now + SOON_S
        return "later" if late or answer.code else "now"
    return "unknown" if answer.fits is None and answer.code not in _FOR_GOOD else "cannot"
