"""What one console has heard of a rollout and its devices. One thread's; no I/O.

Owns the newest document of each topic that a rollout reads, and keeps what follows from them for each device, so that a
message costs one device's share of work, not the fleet's.

    topic, body → View.take → state, request, seen
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from edge_agent.errors import EdgeAgentError
from edge_agent.fleet.devices import MAX_DEVICES, Device, Fleet
from edge_agent.fleet.rollout import desired
from edge_agent.fleet.rollout.before import Page, read_page
from edge_agent.fleet.rollout.plan import Plan
from edge_agent.fleet.rollout.request import Request
from edge_agent.fleet.rollout.standing import NOTHING_KNOWN, Before, Seen, seen_of
from edge_agent.fleet.rollout.state import State, parse
from edge_agent.topics import FleetTopics

_DESIRED = "model/desired"


class View:
    """
    Args:
        name: the model's, in the settings of the devices.
        expected: ids of devices, where the broker gives nothing for a wildcard; empty to hear of all.

    Attributes:
        heard: the newest state that came, until somebody takes it away.
        problem: why the newest one cannot be read; None if it can.
        request: what another console asks.
    """

    def __init__(self, topics: FleetTopics, name: str, *, expected: Sequence[str] = ()) -> None:
        self.heard: State | None = None
        self.problem: EdgeAgentError | None = None
        self.request: Request | None = None
        self._topics = topics
        self._name = name
        self._expected = tuple(expected)
        self._fleet = Fleet(topics, expected)
        self._desired: dict[str, bytes] = {}
        self._pages: dict[int, Page] = {}
        self._before: dict[str, Before] = {}
        self._of: tuple[str, Plan] | None = None
        self._waves: dict[str, int] = {}
        self._seen: dict[str, Seen | None] = {}

    @property
    def filters(self) -> list[str]:
        """What is to be heard."""
        own = [self.state_topic, self.request_topic, f"{self.state_topic}/before/+"]
        devices = self._expected or ("+",)
        roots = [self._topics.of(device_id) for device_id in devices]
        return own + [topic for root in roots for topic in (root.status, root.reported, root.desired)]

    @property
    def state_topic(self) -> str:
        return self._topics.rollout(self._name)

    @property
    def request_topic(self) -> str:
        return f"{self.state_topic}/request"

    def desired_topic(self, device_id: str) -> str:
        return self._topics.of(device_id).desired

    def page_topic(self, number: int) -> str:
        return f"{self.state_topic}/before/{number}"

    def forget(self) -> None:
        """The connection was lost: what is retained comes again, and what was removed meanwhile does not. What was
        known before the rollout stays."""
        self.heard = self.problem = self.request = None
        self._fleet = Fleet(self._topics, self._expected)
        self._desired.clear()
        self._seen.clear()

    def take_all(self, messages: Mapping[str, bytes]) -> None:
        """Reads what was collected, body by topic."""
        for topic, body in messages.items():
            self.take(topic, body)

    def take(self, topic: str, body: bytes) -> None:
        """Reads what came; of what is nobody's, nothing."""
        if topic == self.state_topic:
            self._take_state(body)
        elif topic == self.request_topic:
            self.request = Request.parse(body)
        elif topic.startswith(f"{self.state_topic}/before/"):
            number = topic.rpartition("/")[2]
            if number.isdecimal() and len(number) < 4 and (page := read_page(body)) is not None:
                self.remember(int(number), page)
        elif (speaker := self._topics.speaker(topic)) is not None:
            self._take_of_device(speaker, topic, body)

    def remember(self, number: int, page: Page) -> None:
        """A page of what was known of the devices."""
        self._pages[number] = page
        self._of = None

    def devices(self) -> list[Device]:
        """All devices of which something is known."""
        return self._fleet.devices()

    def desired_of(self, device_id: str) -> bytes:
        """What is retained for this device; empty for nothing."""
        return self._desired.get(device_id, b"")

    def told(self, device_id: str, body: bytes) -> None:
        """The broker has taken this for a device."""
        self._desired[device_id] = body
        self._seen.pop(device_id, None)

    def seen(self, state: State) -> list[Seen]:
        """How each device stands that has the model, has had it, or is told something; by id."""
        if self._of != (state.id, state.plan):
            self._of = (state.id, state.plan)
            pages = [page for page in self._pages.values() if page.rollout == state.id]
            self._before = {device_id: known for page in pages for device_id, known in page.devices.items()}
            self._waves.clear()
            self._seen.clear()
        ids = {*self._fleet.ids(), *self._desired, *self._before}
        for device_id in ids - self._seen.keys():
            self._seen[device_id] = self._look_at(device_id, state.plan)
        return [seen for device_id in sorted(ids) if (seen := self._seen[device_id]) is not None]

    def _look_at(self, device_id: str, plan: Plan) -> Seen | None:
        """None for a device that the rollout does not concern."""
        device = self._fleet.device(device_id)
        retained = self.desired_of(device_id)
        wanted = desired.version_in(retained, plan.name)
        known = self._before.get(device_id)
        if known is None and wanted != plan.version and device.model(plan.name) is None:
            return None
        if device_id not in self._waves:
            self._waves[device_id] = plan.wave_of(device_id)
        return seen_of(
            device,
            plan=plan,
            wave=self._waves[device_id],
            before=known or NOTHING_KNOWN,
            desired=wanted,
            released=desired.is_released_in(retained, plan.name),
        )

    def _take_state(self, body: bytes) -> None:
        self.problem = None
        if not body:
            self.heard = None
            return
        try:
            self.heard = parse(body)
        except EdgeAgentError as error:
            self.heard, self.problem = None, error

    def _take_of_device(self, speaker: tuple[str, str], topic: str, body: bytes) -> None:
        device_id, what = speaker
        if what == _DESIRED:
            if body and (device_id in self._desired or len(self._desired) < MAX_DEVICES):
                self._desired[device_id] = body
            elif not body:
                self._desired.pop(device_id, None)
        else:
            self._fleet.take(topic, body)
        self._seen.pop(device_id, None)


def names_of(devices: Iterable[Device], name: str) -> list[str]:
    """The devices that have the model."""
    return [device.device_id for device in devices if device.model(name) is not None]
