"""Which version of MQTT the next connection offers."""

from __future__ import annotations

import dataclasses

import pytest

from edge_agent.transport.protocol_choice import TRUST_S, Attempt, ProtocolChoice

HANG_UP, SILENT, UNSUPPORTED = Attempt(hung_up=True), Attempt(silent=True), Attempt(unsupported=True)
REFUSED = Attempt()


@dataclasses.dataclass
class Broker:
    """What a broker does with an offer of MQTT 5, and of 3.1.1; None: it takes it."""

    on_5: Attempt | None
    on_3: Attempt | None = None


def offers(choice: ProtocolChoice, broker: Broker, times: int, *, wall_s: float = 1e9) -> str:
    """What is offered in so many attempts; what is accepted is in upper case, and ends later."""
    found = ""
    for _ in range(times):
        choice.begin(wall_s)
        said = broker.on_5 if choice.version5 else broker.on_3
        letter = "e" if choice.version5 else "c"
        choice.note(said or Attempt(accepted=True), wall_s)
        if said is None:
            choice.ended()
        found += letter if said else letter.upper()
    return found


def test_several_hang_ups_bring_one_attempt_with_the_older_protocol_and_the_second_time_settles_it() -> None:
    assert offers(ProtocolChoice("auto"), Broker(HANG_UP), 8) == "eeeCeCCC"


def test_one_silence_is_enough_for_an_attempt_with_the_older_protocol() -> None:
    assert offers(ProtocolChoice("auto"), Broker(SILENT), 6) == "eCeCCC"


def test_a_broker_that_says_what_it_cannot_speak_is_believed() -> None:
    assert offers(ProtocolChoice("auto"), Broker(UNSUPPORTED), 4) == "eCCC"


@pytest.mark.parametrize("way", [HANG_UP, SILENT, UNSUPPORTED])
def test_what_worked_is_remembered_over_a_restart_for_a_day(way: Attempt) -> None:
    known = ProtocolChoice("auto")
    offers(known, Broker(way), 8)
    until_s = known.older_until_s
    assert until_s == 1e9 + TRUST_S
    again = ProtocolChoice("auto", older_until_s=until_s)
    assert offers(again, Broker(way), 2, wall_s=until_s - 1) == "CC"
    again = ProtocolChoice("auto", older_until_s=until_s)
    assert offers(again, Broker(way), 3, wall_s=until_s + 1) == "eCC"
    assert again.older_until_s == until_s + 1 + TRUST_S


def test_a_broker_that_was_upgraded_is_found_out_within_a_day() -> None:
    choice = ProtocolChoice("auto", older_until_s=1e9)
    assert offers(choice, Broker(None), 3, wall_s=1e9 + 1) == "EEE"
    assert choice.speaks_5 and not choice.older_until_s


def test_a_broker_that_hung_up_while_it_started_is_offered_5_again() -> None:
    choice = ProtocolChoice("auto")
    assert offers(choice, Broker(HANG_UP), 4) == "eeeC"
    assert offers(choice, Broker(None), 2) == "EE"


def test_a_broker_that_does_not_answer_at_all_is_offered_both() -> None:
    assert offers(ProtocolChoice("auto"), Broker(SILENT, SILENT), 6) == "ececec"
    assert offers(ProtocolChoice("auto"), Broker(HANG_UP, HANG_UP), 8) == "eeeceeec"


@pytest.mark.parametrize("way", [HANG_UP, UNSUPPORTED])
def test_what_is_remembered_is_dropped_where_it_is_wrong(way: Attempt) -> None:
    choice = ProtocolChoice("auto", older_until_s=1e9 + 60)
    assert offers(choice, Broker(None, way), 6).endswith("EEE")


def test_a_broker_that_was_replaced_by_one_without_5_is_believed() -> None:
    choice = ProtocolChoice("auto", speaks_5=True)
    assert offers(choice, Broker(UNSUPPORTED), 3) == "eCC"
    assert not choice.speaks_5


@pytest.mark.parametrize(
    ("choice", "attempt"),
    [
        (ProtocolChoice("auto", speaks_5=True), HANG_UP),
        (ProtocolChoice("auto", speaks_5=True), SILENT),
        (ProtocolChoice("5"), HANG_UP),
        (ProtocolChoice("5"), UNSUPPORTED),
        (ProtocolChoice("auto"), REFUSED),
    ],
)
def test_nothing_else_changes_the_protocol(choice: ProtocolChoice, attempt: Attempt) -> None:
    assert offers(choice, Broker(attempt), 8) == "e" * 8


def test_a_fixed_older_protocol_stays() -> None:
    assert offers(ProtocolChoice("3.1.1"), Broker(None), 3) == "CCC"
