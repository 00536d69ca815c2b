"""A broker as an outbox sees it: the real `Connection` over a client of the test, with a rule for each topic."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer, Arrival, Prompt, Source, State
from edge_agent.topics import Topics
from edge_agent.transport.connection import Connection
from edge_agent.transport.outbox import Outbox, Refusal

TAKES, NOT_AUTHORIZED, HANGS_UP, SAYS_NOTHING = "Success", "Not authorized", "hangs up", ""
NOBODY_LISTENS = "No matching subscribers"
HANG_UP = 0x80
"""What paho says of a connection that was closed without a word."""


@dataclass(frozen=True, kw_only=True)
class Published:
    topic: str
    payload: bytes
    qos: int
    mid: int


class _Client:
    """What a `Connection` needs of paho."""

    def __init__(self) -> None:
        self.published: list[Published] = []
        self.acked: list[int] = []

    def publish(self, topic: str, payload: bytes, *, qos: int, **_: Any) -> Published:
        message = Published(topic=topic, payload=payload, qos=qos, mid=len(self.published) + 1)
        self.published.append(message)
        return message

    def ack(self, mid: int, qos: int) -> None:
        self.acked.append(mid)

    def want_write(self) -> bool:
        return False


class Room:
    """An outbox, its journal, and a broker whose rule says what becomes of each topic.

    Attributes:
        rule: topic → one of `TAKES` and so on.
        log: topics in the order in which the broker got them, the status left out.
        ends: how many connections it ended.
        abrupt: with a connection that it ends, the PUBACKs of the same turn are lost.
        now_s: the clock; only the test moves it.
    """

    def __init__(self, folder: Path, rule: Callable[[str], str] = lambda topic: TAKES) -> None:
        self.now_s = 1_000.0
        self.rule = rule
        self.log: list[str] = []
        self.ends = 0
        self.abrupt = False
        self.counters: collections.Counter[str] = collections.Counter()
        self.journal = Journal(folder / "journal.db", moment=self.moment())
        self._topics = Topics(prefix="edge", device_id="dev", reply_prefixes=("replies/",))
        self.restart()

    def restart(self) -> None:
        """The daemon's next start: what an outbox had in memory is gone."""
        self.outbox = Outbox(
            topics=self._topics, journal=self.journal, counters=self.counters, now=self.moment
        )
        self.outbox.set_retained(self._topics.status, b"{}")
        self.connect()

    def moment(self) -> Moment:
        return Moment(boot_id="boot", boot_s=self.now_s, wall_s=self.now_s)

    def connect(self) -> None:
        self.client = _Client()
        self.connection = Connection(
            client=cast(Any, self.client), version5=True, started_s=self.now_s, connected=True
        )
        self._seen = 0
        self.outbox.begin()

    def accept(self, topic: str, *, identity: bytes | None = None) -> int:
        """A request that is to be answered on this topic: its row, or that of the request that it repeats."""
        arrival = Arrival(
            id="q",
            identity=identity,
            body_sha256=hashlib.sha256(topic.encode()).digest(),
            source=Source.MQTT,
            model="m",
            document={},
            form=Form.JSON,
            stream=True,
            answer_topic=topic,
            correlation=None,
            deadline_s=60,
        )
        accepted = self.journal.accept(arrival, moment=self.moment(), queue_depth=1 << 30, retry_after_ms=1)
        return accepted.row

    def prompt(self, topic: str, *, identity: bytes | None = None) -> Prompt:
        """A prompt that runs, and is to be answered on this topic."""
        self.accept(topic, identity=identity)
        prompt = self.journal.claim("m")
        assert prompt is not None
        return prompt

    def answer(self, topic: str, *, told: bool = True, identity: bytes | None = None) -> int:
        """An answer for this topic; its text is the number of its row.

        Args:
            told: the outbox is told of it; otherwise it is one that a start finds in the journal.
        """
        row = self.prompt(topic, identity=identity).row
        self.journal.answer(row, Answer(payload=str(row).encode(), properties={}), moment=self.moment())
        if told:
            self.outbox.answered(row)
        return row

    def refuse(self, topic: str, mid: int) -> None:
        """A refusal of the message `mid`."""
        refusal = Refusal(
            topic=topic,
            correlation=None,
            form=Form.JSON,
            answer=Answer(payload=b"{}", properties={}),
            refused_mid=mid,
        )
        self.outbox.refuse(refusal, self.connection)

    def turn(self, seconds: float = 0.0) -> None:
        """Time passes; the outbox sends; the broker does to each message what its rule says."""
        self.now_s += seconds
        self.outbox.send_due(self.connection)
        new = self.client.published[self._seen :]
        self._seen += len(new)
        self.log += [message.topic for message in new if message.topic != self._topics.status]
        lost = self.abrupt and any(self.rule(message.topic) == HANGS_UP for message in new)
        for message in new:
            said = self.rule(message.topic)
            if lost or said == HANGS_UP:
                self.hang_up()
                return
            if message.qos and said != SAYS_NOTHING:
                self.outbox.published(self.connection, message.mid, ReasonCode(PacketTypes.PUBACK, said))

    def hang_up(self, reason: int = HANG_UP) -> None:
        """The connection ends, and the next one begins half a second later."""
        self.ends += 1
        self.connection._on_disconnect(ReasonCode(PacketTypes.DISCONNECT, identifier=reason))
        self.outbox.end(self.connection)
        self.now_s += 0.5
        self.connect()

    def pass_by(self, seconds: float, *, step_s: float = 1.0) -> None:
        """Turns, one after each step."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.turn(step_s)

    def states(self) -> list[State]:
        """Of every row."""
        with self.journal._file.transaction() as db:
            return [State(row["state"]) for row in db.execute("SELECT state FROM prompts ORDER BY row")]
