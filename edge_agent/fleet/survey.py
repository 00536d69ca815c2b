"""Which devices there are: everybody whose retained topics a broker gives, or those of an operator's list.

    filters (wildcards, or each device's topics by name) → collect → Fleet
                                                         → follow  → Fleet, at each change

A list is for brokers that send nothing retained for a wildcard (RabbitMQ), and says who has never been seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_agent import named_file
from edge_agent.errors import EdgeAgentError
from edge_agent.fleet.broker import QUIET_S, FleetBroker
from edge_agent.fleet.devices import MAX_DEVICES, Fleet
from edge_agent.host.clock import CLOCK, Clock
from edge_agent.topics import ID_PATTERN, FleetTopics

_MAX_LIST_BYTES = 16 << 20


def read_list(path: Path) -> tuple[str, ...]:
    """The ids in a file, one a line, each once. Empty lines and lines that begin with `#` do not count.

    Raises:
        EdgeAgentError: the file cannot be read, has a line that is no id, or none that is one.
    """
    try:
        text = named_file.read(path, _MAX_LIST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise EdgeAgentError(f"the list of devices {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EdgeAgentError(f"the list of devices {path} is not UTF-8 (byte {error.start})") from error
    ids: dict[str, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        device_id = line.strip()
        if not device_id or device_id.startswith("#"):
            continue
        if not ID_PATTERN.fullmatch(device_id):
            raise EdgeAgentError(
                f"line {number} of {path} is no device_id: {device_id[:80]!r}",
                remedy="one id a line: 1 to 64 letters, digits, '_', '.', '-'",
            )
        ids[device_id] = None
    if not 0 < len(ids) <= MAX_DEVICES:
        raise EdgeAgentError(
            f"the list of devices {path} has {len(ids)} ids; 1 to {MAX_DEVICES} are possible"
        )
    return tuple(ids)


def filters(topics: FleetTopics, ids: tuple[str, ...] | None) -> list[str]:
    """What a console subscribes to.

    Args:
        ids: of the devices that are asked for by name; None for all.
    """
    if ids is None:
        return [topics.statuses, topics.reports]
    devices = [topics.of(device_id) for device_id in ids]
    return [topic for device in devices for topic in (device.status, device.reported)]


def look(broker: FleetBroker, topics: FleetTopics, ids: tuple[str, ...] | None = None) -> Fleet:
    """What is known now.

    Args:
        ids: as in `filters`.

    Raises:
        BrokerUnreachable, BrokerRefused: see `FleetBroker.collect`.
    """
    fleet = Fleet(topics, ids or ())
    fleet.take_all(broker.collect(filters(topics, ids)))
    return fleet


def follow(
    broker: FleetBroker,
    fleet: Fleet,
    wanted: list[str],
    *,
    every_s: float = QUIET_S,
    clock: Clock = CLOCK,
) -> Iterator[frozenset[str]]:
    """Keeps a fleet up to date for as long as it is iterated. Gives the ids of whom something was heard: first when
    there was time for all that is retained, then every `every_s`, also when there are none.

    Args:
        wanted: of `filters`.
    """
    heard: set[str] = set()
    due_s = clock.now_s() + QUIET_S
    with broker.watch(wanted) as watch:
        while True:
            message = watch.next(max(0.0, due_s - clock.now_s()))
            if message is not None and (device_id := fleet.take(message.topic, message.body)):
                heard.add(device_id)
            if clock.now_s() >= due_s:
                yield frozenset(heard)
                heard.clear()
                due_s = clock.now_s() + every_s
