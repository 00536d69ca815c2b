"""Which devices take a version in which wave, and what does not start."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fleet.devices import Device, ModelReport, Wanted
from edge_agent.fleet.rollout.plan import (
    MAX_DEVICES,
    RolloutRefused,
    check_devices,
    check_version,
    make_plan,
)
from edge_agent.package.reference import ModelRef
from tests.support.generated_messages import examples
from tests.support.scripted_rollout import LIMITS, NAME, NEW, OLD, URI, plan_of

TWELVE = [f"device-{number}" for number in range(12)]
REF = ModelRef.parse(URI)


def device(device_id: str, uri: str = URI, via: str = "alias", name: str = NAME) -> Device:
    model = ModelReport(name=name, uri=uri, version=OLD, wanted=Wanted(version=OLD, via=via))
    return Device(device_id=device_id, state="ready", models=(model,))


def members(plan: object, wave: int, devices: list[str]) -> list[str]:
    return [each for each in devices if plan.wave_of(each) <= wave]  # type: ignore[attr-defined]


def test_waves_go_by_the_digest_of_device_name_and_version() -> None:
    def digest(each: str) -> str:
        return hashlib.sha256(f"{each}\n{NAME}\n{NEW}".encode()).hexdigest()

    plan = plan_of(TWELVE)
    assert [wave.devices for wave in plan.waves] == [1, 3, 12]
    ordered = sorted(TWELVE, key=digest)
    for number, wave in enumerate(plan.waves):
        assert set(members(plan, number, TWELVE)) == set(ordered[: wave.devices])


def test_canaries_come_first_by_name_and_count_in_the_shares() -> None:
    plan = plan_of(TWELVE, canaries=["device-7", "device-2"])
    assert plan.waves[0].title == "canaries"
    assert members(plan, 0, TWELVE) == ["device-2", "device-7"]
    assert [wave.devices for wave in plan.waves] == [2, 3, 4, 12]


@examples(100)
@given(
    st.sets(st.text("abcdef0123456789-", min_size=1, max_size=12), min_size=1, max_size=200),
    st.lists(st.floats(0.01, 99.9), max_size=6, unique=True).map(sorted),
    st.integers(0, 5),
)
def test_every_wave_adds_a_device_and_the_last_has_all(
    devices: set[str], percents: list[float], canaries: int
) -> None:
    first = sorted(devices)[:canaries]
    plan = plan_of(devices, canaries=first, percents=[*percents, 100])
    sizes = [len(members(plan, number, sorted(devices))) for number in range(len(plan.waves))]
    assert sizes == [wave.devices for wave in plan.waves]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == len(devices)


def test_a_device_that_appears_later_belongs_to_a_wave() -> None:
    plan = plan_of(TWELVE)
    assert {plan.wave_of(f"new-{number}") for number in range(200)} == {0, 1, 2}


@pytest.mark.parametrize("percents", [(), (5, 25), (25, 5, 100), (5, 5, 100), (0, 100), (5, 120), (-5, 100)])
def test_shares_that_do_not_rise_to_all_are_refused(percents: tuple[float, ...]) -> None:
    with pytest.raises(RolloutRefused, match="rise to 100"):
        plan_of(TWELVE, percents=percents)


def test_a_canary_that_has_not_the_model_is_refused_by_name() -> None:
    with pytest.raises(RolloutRefused, match="press-9"):
        plan_of(TWELVE, canaries=["press-9"])


def test_more_devices_than_a_plan_holds_are_refused() -> None:
    with pytest.raises(RolloutRefused, match="10001 devices"):
        make_plan(
            name=NAME,
            version=NEW,
            ref=REF,
            instead_of=OLD,
            devices=map(str, range(MAX_DEVICES + 1)),
            canaries=(),
            percents=(100,),
            limits=LIMITS,
        )


def test_devices_that_share_an_alias_may_start() -> None:
    others = [device("c", name="other", uri="models:/x/1"), Device(device_id="d")]
    assert check_devices([device("a"), device("b", via="pin"), *others], NAME) == REF


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ([], "no device reports a model"),
        ([device("a"), device("b", uri="models:/phi3-mini@beta")], "different references.*@prod.*@beta"),
        ([device("a", uri="models:/phi3-mini/6")], "fixed to models:/phi3-mini/6"),
        ([device("a"), device("b", uri="models:/phi3-mini/6", via="desired")], "b has a desired state"),
        ([device("a", uri="")], "unknown reference"),
    ],
)
def test_where_no_one_alias_can_move_nothing_starts(devices: list[Device], says: str) -> None:
    with pytest.raises(RolloutRefused, match=says):
        check_devices(devices, NAME)


def test_a_version_may_start_while_the_alias_names_another() -> None:
    assert check_version(NEW, ref=REF, tags={"edge_agent.rollout": ""}, named=OLD) == OLD


@pytest.mark.parametrize(
    ("tags", "named", "says"),
    [
        ({"edge_agent.rollout": "25"}, OLD, "edge_agent.rollout"),
        ({}, NEW, "names version 7 already"),
        ({}, None, "has no models:/phi3-mini@prod"),
    ],
)
def test_a_version_with_a_tag_or_the_alias_does_not_start(
    tags: dict[str, str], named: int | None, says: str
) -> None:
    with pytest.raises(RolloutRefused, match=says):
        check_version(NEW, ref=REF, tags=tags, named=named)
