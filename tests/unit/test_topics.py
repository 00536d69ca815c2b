"""Topics, and the rule that the agent is nobody's deputy."""

import pytest

from edge_agent.errors import BadRequest
from edge_agent.topics import FleetTopics, Topics

TOPICS = Topics(prefix="edge", device_id="press-3", reply_prefixes=("replies/", "edge/"))


def test_topics_are_those_of_the_contract() -> None:
    assert TOPICS.chat == "edge/v1/press-3/req/chat"
    assert TOPICS.cancel == "edge/v1/press-3/ctl/cancel"
    assert TOPICS.status == "edge/v1/press-3/status"
    assert TOPICS.response("a") == "edge/v1/press-3/rsp/a"
    assert TOPICS.stream("replies/me") == "replies/me/stream"


@pytest.mark.parametrize(
    "topic", ["replies/me", "replies/a/b", "edge/v1/press-3/rsp/7", "edge/v1/other/rsp/7"]
)
def test_an_answer_may_go_under_a_reply_prefix(topic: str) -> None:
    assert TOPICS.check_answer_topic(topic) == topic


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "replies",
        "elsewhere/me",
        "replies/+",
        "replies/#",
        "replies/\0",
        "replies/\x01",
        "replies/\x7f",
        "replies/\x9f",
        "replies/\ufdd0",
        "replies/\ufffe",
        "replies/\U0010ffff",
        "replies/\ud800",
        "$SYS/broker",
        "replies/" + "x/" * 7,
        "replies/" + "x" * 300,
        "edge/v1/press-3/req/chat",
        "edge/v1/other/req/chat",
        "edge/v1/press-3/ctl/cancel",
        "edge/v1/press-3/status",
        "edge/v1/press-3/model/desired",
    ],
)
def test_an_answer_goes_nowhere_else(topic: str) -> None:
    with pytest.raises(BadRequest):
        TOPICS.check_answer_topic(topic)


def test_a_fleets_topics_are_those_of_the_contract() -> None:
    fleet = FleetTopics(prefix="site/a")
    assert fleet.statuses == "site/a/v1/+/status"
    assert fleet.reports == "site/a/v1/+/model/reported"
    assert fleet.rollout("assistant") == "site/a/v1/@fleet/rollout/assistant"
    assert fleet.of("press-3").plan == "site/a/v1/press-3/ctl/plan"
    assert fleet.of("press-3").desired == "site/a/v1/press-3/model/desired"


def test_a_topic_says_which_device_speaks() -> None:
    fleet = FleetTopics(prefix="edge")
    assert fleet.speaker(fleet.of("press-3").reported) == ("press-3", "model/reported")
    for topic in (
        fleet.rollout("a"),
        "edge/v1/press-3",
        "edge/v1//status",
        "edge/v2/press-3/status",
        "other/x",
    ):
        assert fleet.speaker(topic) is None
