"""Versions on a device: the switch, rollback, pins, desired state, poison prompts, damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Message, chat
from tests.support.in_the_middle import stopped_in_the_middle
from tests.support.processes import wait_until
from tests.support.sample_device import wait_for_state
from tests.support.versions import KATHMANDU, MADRID, FollowingDevice, asking, check_switched_once, golden


@pytest.fixture
def device(follow: Callable[..., FollowingDevice]) -> FollowingDevice:
    return follow()


def test_a_release_that_passes_its_golden_prompts_takes_over_under_load(
    device: FollowingDevice, swapped_model: Path, short_dir: Path
) -> None:
    device.publish(swapped_model, golden=golden(short_dir, "Kathmandu"))
    with asking(device) as answers:
        device.sync()
        device.wait_model(lambda m: m["version"] == 2, "version 2")
        wait_until(lambda: answers[-1].properties["version"] == "2", 60, "an answer of version 2")
    check_switched_once(answers)


def test_rollback_pins_and_unpin_follows_again(device: FollowingDevice, swapped_model: Path) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")
    assert device.ask() == KATHMANDU
    document = device.do("rollback", "assistant")
    assert document["version"] == 1
    assert document["pinned"].startswith("1-")
    assert device.ask() == MADRID
    device.sync()
    device.do("pull", "assistant")
    assert device.ask() == MADRID, "the pin holds"
    device.do("unpin", "assistant")
    device.wait_model(lambda m: m["version"] == 2, "version 2 again")
    assert device.ask() == KATHMANDU
    device.do("activate", "assistant", "1")
    assert device.ask() == MADRID


@pytest.mark.long
def test_versions_are_removed_when_nothing_needs_them(
    device: FollowingDevice, swapped_model: Path, sample_model: Path
) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")
    assert device.do("rm", "assistant", "2", code=1)
    assert device.do("rm", "assistant", "1")["bytes_freed"] > 0
    assert [version["version"] for version in device.do("list")] == [2]
    device.publish(sample_model, options={"max_length": 300})
    device.do("pull", "assistant")
    device.publish(sample_model, options={"max_length": 200})
    device.do("pull", "assistant")
    device.do("prune")
    assert [version["state"] for version in device.do("list")] == ["previous", "active"]
    assert device.ask() == MADRID


def test_a_desired_state_is_obeyed_reported_and_given_back(
    device: FollowingDevice, swapped_model: Path
) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")
    desired, reported = f"{device.client.root}/model/desired", f"{device.client.root}/model/reported"
    device.client.subscribe(reported)
    try:
        wish = {"models": {"assistant": {"version": 1}}}
        device.client.publish(desired, json.dumps(wish), retain=True)
        device.wait_model(lambda m: m["version"] == 1, "the desired version")
        uri = f"models:/{device.name}/1"
        device.client.wait(  # the retained one may be of the time before
            lambda m: (
                m.topic == reported
                and (m.json["models"]["assistant"]["version"], m.json["models"]["assistant"]["uri"])
                == (1, uri)
            ),
            timeout_s=60,
        )
        device.daemon.restart()
        wait_for_state(device.daemon, "ready")
        assert device.model()["version"] == 1
        device.client.publish(desired, b'{"models": {"assistant": {"version": "latest"}}}', retain=True)
        device.client.wait(
            lambda m: m.topic == reported and "needs" in m.json["models"]["assistant"]["reason"], timeout_s=60
        )
        assert device.model()["version"] == 1, "a bad wish is reported, not obeyed"
        device.client.publish(desired, b'{"models": {"assistant": null}}', retain=True)
        device.wait_model(lambda m: m["version"] == 2, "the settings' choice")
    finally:
        device.client.publish(desired, b"", retain=True)


@pytest.mark.long
def test_the_progress_of_a_fetch_is_reported_and_its_end(
    follow: Callable[..., FollowingDevice], swapped_model: Path
) -> None:
    device = follow(cache={"max_bytes_per_s": 50_000})  # half a minute, and several looks take place in it
    reported = f"{device.client.root}/model/reported"
    device.client.subscribe(reported)
    device.publish(swapped_model)
    device.sync()

    def progress(message: Message) -> dict[str, Any]:
        found: dict[str, Any] = message.json["models"]["assistant"]["progress"]
        return found

    came = device.client.wait(lambda m: m.topic == reported and progress(m), timeout_s=60)
    assert 0 < progress(came)["bytes"] <= progress(came)["total_bytes"] < 2_000_000
    assert 0 < progress(came)["bytes_per_s"] < 1_000_000
    printed = device.daemon.cli("status").stdout
    assert "fetching" in printed
    device.client.wait(
        lambda m: m.topic == reported and m.json["models"]["assistant"]["version"] == 2 and not progress(m),
        timeout_s=180,
    )


@pytest.mark.long
def test_several_poisonous_prompts_roll_back_and_one_does_not(
    device: FollowingDevice, swapped_model: Path
) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")

    def crash(seed: int) -> None:
        long = chat("Count", max_tokens=1950, stream=True, seed=seed)
        long["response_format"] = {"type": "regex", "regex": "(0|1){1900}"}
        runner, (correlation,) = stopped_in_the_middle(device.client, device.daemon, long)
        runner.kill()
        assert device.client.answer(correlation).status == 500

    for _ in range(4):
        crash(1)
    assert device.ask() == KATHMANDU, "one prompt, repeated, rolls nothing back"
    crash(2)
    crash(3)
    assert device.ask() == MADRID
    model = device.model()
    assert model["version"] == 1
    assert "3 different prompts" in next(iter(model["quarantined"].values()))


@pytest.mark.long
def test_a_damaged_active_version_gives_way_and_is_mended(
    device: FollowingDevice, swapped_model: Path
) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")
    device.daemon.stop()
    (weights,) = [
        file
        for file in (device.daemon.state_dir / "models" / "versions").rglob("model.onnx.data")
        if file.parents[2].name.startswith("2-")
    ]
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    device.server.stop()
    try:
        device.daemon.start()
        wait_for_state(device.daemon, "ready")
        assert device.ask() == MADRID, "the previous version answers"
    finally:
        device.server.start()
    result = device.do("pull", "assistant")
    assert result["version"] == 2
    assert 0 < result["bytes_fetched"] < 1_700_000, "the damaged file only"
    assert device.ask() == KATHMANDU
    assert device.do("verify")["damaged"] == []


def test_verify_finds_damage_and_mends_it_while_the_agent_runs(device: FollowingDevice) -> None:
    blobs = device.daemon.state_dir / "models" / "blobs" / "sha256"
    weights = max(blobs.iterdir(), key=lambda file: file.stat().st_size)
    copy = bytearray(weights.read_bytes())
    copy[1000] ^= 1
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.write(copy)
    document = device.do("verify")
    assert document["damaged"] == []
    assert [entry["path"].rsplit("/", 1)[-1] for entry in document["repaired"]] == ["model.onnx.data"]
    assert device.ask() == MADRID
