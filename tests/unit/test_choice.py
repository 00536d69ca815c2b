"""Which version a device wants, and the transitions of a model's state."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.cache.state import MAX_QUARANTINED, CacheState, ModelState, parse
from edge_agent.errors import EdgeAgentError
from edge_agent.package.reference import ModelRef
from edge_agent.updates import choice, rollout
from edge_agent.updates.choice import BadDesired, Desired
from edge_agent.updates.rollout import NotInRollout
from tests.support.committed import fault

REFS = {"assistant": ModelRef.parse("models:/phi3@prod")}
BAD = fault("bad")
A, B, C = "1-aaaaaaaaaaaa", "2-bbbbbbbbbbbb", "3-cccccccccccc"


def desired(document: object) -> Desired:
    return choice.parse_desired(json.dumps(document).encode(), refs=REFS)


def test_a_desired_state_names_a_uri_a_version_or_gives_the_choice_back() -> None:
    assert desired({"models": {"assistant": {"uri": "models:/other@next"}}}).uris == {
        "assistant": "models:/other@next"
    }
    assert desired({"models": {"assistant": {"version": 7}}}).uris == {"assistant": "models:/phi3/7"}
    given_back = Desired(uris={"assistant": ""}, within_s=0.0)
    assert desired({"models": {"assistant": None}}) == given_back
    assert choice.parse_desired(b"", refs=REFS) == given_back
    with_mark = b'\xef\xbb\xbf{"models": {"assistant": null}}'
    assert choice.parse_desired(with_mark, refs=REFS) == given_back


def test_a_model_that_the_settings_no_longer_have_may_be_given_back() -> None:
    document = {"models": {"gone": None, "assistant": {"version": 7}}}
    assert desired(document).uris == {"assistant": "models:/phi3/7"}


def test_a_desired_state_may_be_followed_in_the_course_of_some_time() -> None:
    assert desired({"models": {"assistant": None}, "within_s": 300}).within_s == 300.0


@pytest.mark.parametrize(
    ("payload", "within_s"),
    [
        *((b"", 0), (b" \n", 0), (b"{}", 0), (b'{"within_s": 0}', 0), (b'{"within_s": 0.5}', 0.5)),
        *((b'\xef\xbb\xbf{"within_s": 300}', 300), (b'{"within_s": 86400}', 86_400)),
    ],
)
def test_a_request_to_check_says_in_the_course_of_what_time(payload: bytes, within_s: float) -> None:
    assert choice.parse_sync(payload) == within_s


@pytest.mark.parametrize(
    "payload",
    [
        *(b"now", b"300", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * 70_000 + b"{}"),
        *(b'{"within": 300}', b'{"within_s": 300, "more": 1}', b'{"within_s": -1}', b'{"within_s": 86401}'),
        *(b'{"within_s": true}', b'{"within_s": null}', b'{"within_s": "300"}', b'{"within_s": NaN}'),
    ],
)
def test_another_request_to_check_is_refused(payload: bytes) -> None:
    with pytest.raises(BadDesired):
        choice.parse_sync(payload)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"models": []},
        {"models": {"missing": {"version": 7}}},
        {"models": {"assistant": {"uri": "http://x"}}},
        {"models": {"assistant": {"version": 0}}},
        {"models": {"assistant": {"version": True}}},
        {"models": {"assistant": {"version": 1, "uri": "models:/a@b"}}},
        {"models": {}, "more": 1},
        {"within_s": 300},
        {"models": {"assistant": None}, "within_s": "300"},
    ],
)
def test_a_bad_desired_state_is_refused_as_a_whole(document: object) -> None:
    with pytest.raises(BadDesired):
        desired(document)


@given(st.binary(max_size=200))
def test_no_bytes_as_desired_state_raise_anything_else(payload: bytes) -> None:
    try:
        choice.parse_desired(payload, refs=REFS)
    except EdgeAgentError as error:
        assert isinstance(error, BadDesired)


def test_desired_is_stronger_than_the_settings() -> None:
    ref = REFS["assistant"]
    assert str(choice.wanted_ref(ref, ModelState())) == "models:/phi3@prod"
    assert str(choice.wanted_ref(ref, ModelState(desired="models:/phi3/4"))) == "models:/phi3/4"


def test_a_rollout_reaches_its_share_and_only_grows() -> None:
    devices = [f"device-{number}" for number in range(1000)]

    def reached(percent: float) -> set[str]:
        return {d for d in devices if rollout.in_rollout(device_id=d, name="m", version=3, percent=percent)}

    assert reached(0) == set()
    assert reached(100) == set(devices)
    assert 60 < len(reached(10)) < 140
    assert reached(10) <= reached(50)


@pytest.mark.parametrize("tag", [None, "", "100", "100%", " 100 "])
def test_no_tag_and_all_devices_let_everybody_through(tag: str | None) -> None:
    rollout.check_rollout(tag, device_id="d", name="m", version=3)


@pytest.mark.parametrize("tag", ["0", "0%", "soon", "nan", "inf", "1e999", "-5"])
def test_none_and_nonsense_let_nobody_through(tag: str) -> None:
    with pytest.raises(NotInRollout):
        rollout.check_rollout(tag, device_id="d", name="m", version=3)


def test_a_candidate_counts_how_often_it_was_tried() -> None:
    state = ModelState(active=A).trying(B).trying(B)
    assert (state.candidate, state.candidate_tries) == (B, 2)
    assert state.trying(C).candidate_tries == 1
    assert state.given_up().candidate is None


def test_a_refused_candidate_is_quarantined_unless_nothing_else_answers() -> None:
    assert ModelState(active=A).trying(B).refused(B, BAD).quarantined == {B: BAD}
    assert ModelState().trying(B).refused(B, BAD).quarantined == {}


def test_the_quarantine_keeps_the_newest_and_the_state_stays_small_enough_to_be_read() -> None:
    model = ModelState(active=A)
    keys = [f"{number}-{number:012x}" for number in range(1_500, 0, -1)]
    for key in keys:
        model = model.trying(key).refused(key, fault("\N{PERSONAL COMPUTER}" * 1_000))
    assert list(model.quarantined) == keys[-MAX_QUARANTINED:]
    state = CacheState(models={f"model-{number}": model for number in range(10)})
    assert len(state.encode()) < 1 << 20, "what the store reads"
    read = parse(state.encode())
    assert read == state
    assert list(read.model("model-0").quarantined) == list(model.quarantined), "the order is kept"
    again = model.trying(keys[-3]).refused(keys[-3], fault("again"))
    assert list(again.quarantined)[-1] == keys[-3]
    assert len(again.quarantined) == MAX_QUARANTINED


def test_a_switch_remembers_the_previous_version_and_frees_from_quarantine() -> None:
    state = ModelState(active=A, quarantined={B: BAD}).switched(B)
    assert (state.active, state.previous, state.quarantined) == (B, A, {})


def test_stepping_back_with_a_reason_quarantines_and_unpins() -> None:
    state = ModelState(active=B, previous=A, pinned=B).stepped_back(BAD)
    assert (state.active, state.previous, state.quarantined, state.pinned) == (A, None, {B: BAD}, None)


def test_stepping_back_from_damage_leaves_the_way_open() -> None:
    state = ModelState(active=B, previous=A).stepped_back(None)
    assert (state.active, state.previous, state.quarantined) == (A, B, {})
