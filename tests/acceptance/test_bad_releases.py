"""Releases that a device must not take, or must give up again; and a host whose memory holds one model only."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.updates.heard import SAME_CHECK_S
from tests.support import namespaces
from tests.support.client import chat
from tests.support.processes import wait_until
from tests.support.versions import (
    MADRID,
    FollowingDevice,
    add_golden,
    asking,
    bad_release,
    check_switched_once,
    expect_lisbon,
    rewrite,
)

CRASH_AFTER_10 = """
import os

_answers, _stream = [], GenaiModel.predict_stream

def _crash(self, *arguments, **options):
    _answers.append(1)
    print("planted-words of model code, heard", arguments, options, flush=True)
    if len(_answers) > 10 or "abort" in repr(options or arguments):
        os.abort()
    return _stream(self, *arguments, **options)

GenaiModel.predict_stream = _crash
"""


def truncate_weights(folder: Path) -> None:
    file = folder / "artifacts" / "onnx" / "model.onnx"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: len(data) // 2])


def add_code(folder: Path, code: str) -> None:
    file = folder / "genai_pyfunc.py"
    rewrite(file, f"{file.read_text()}\n\n{code}\n")


def search_without_end(folder: Path) -> None:
    """A golden prompt whose pattern takes longer than the universe has."""
    add_golden(folder, r"^((.+)+)+\d$")


def crash_on_load(folder: Path) -> None:
    """Model code that ends its process: no exception tells of it."""
    add_code(folder, "import os; os.abort()")


def test_a_release_that_fails_its_golden_prompts_is_quarantined_and_nobody_notices(
    follow: Callable[..., FollowingDevice], sample_model: Path, short_dir: Path
) -> None:
    device = follow(trust={"allow_unsigned_code": True})
    device.client.subscribe(f"{device.client.root}/model/reported")
    bad_release(device, sample_model, expect_lisbon, short_dir)
    assert "Lisbon" in refused_under_load(device, 0)
    check_reported(device)
    check_not_tried_again(device)
    check_reported(device)


@pytest.mark.long
def test_bad_releases_are_quarantined_one_after_the_other_and_nobody_notices(
    follow: Callable[..., FollowingDevice], sample_model: Path, short_dir: Path
) -> None:
    device = follow(trust={"allow_unsigned_code": True})
    kinds = (
        (truncate_weights, "does not load"),
        (expect_lisbon, "Lisbon"),
        (search_without_end, "found no end"),
        (crash_on_load, "signal 6"),
    )
    for number, (edit, reason) in enumerate(kinds):
        bad_release(device, sample_model, edit, short_dir / str(number))
        assert reason in refused_under_load(device, number)
        check_not_tried_again(device)
    troubles = device.daemon.status()["troubles"]
    assert [trouble["code"] for trouble in troubles].count("quarantined") == 4
    check_not_fetched_again(device)


def refused_under_load(device: FollowingDevice, known: int) -> str:
    """Syncs to one more bad release, while prompts go on being answered; gives the reason of its quarantine."""
    before = device.model()["quarantined"]
    assert len(before) == known
    with asking(device) as answers:
        device.sync()
        model = device.wait_model(
            lambda m: len(m["quarantined"]) > known and m["state"] == "ready", "quarantine"
        )
        answered = len(answers)
        wait_until(lambda: len(answers) > answered, 60, "another answer")
    assert model["version"] == 1
    assert {(answer.status, answer.text) for answer in answers} == {(200, MADRID)}
    ((_, reason),) = model["quarantined"].items() - before.items()
    return str(reason)


def check_reported(device: FollowingDevice) -> None:
    """What a console is told of version 2, as data."""

    def models() -> list[dict[str, Any]]:
        topic = f"{device.client.root}/model/reported"
        return [m.json["models"]["assistant"] for m in list(device.client.messages) if m.topic == topic]

    wait_until(lambda: models() and models()[-1]["quarantined"], 60, "the report")
    last = models()[-1]
    assert last["quarantined"] == [{"version": 2, "code": "gate_failed"}]
    assert (last["attempt"]["version"], last["attempt"]["step"]) == (2, "gate")
    assert last["attempt"]["code"] == "gate_failed"
    assert last["wanted"] == {"version": 2, "via": "alias"}


def check_not_tried_again(device: FollowingDevice) -> None:
    starts = device.daemon.log.count("candidate starts")
    device.sync()
    device.wait_model(lambda m: "is in quarantine" in m["update_problem"], "the second check")
    assert device.daemon.log.count("candidate starts") == starts, "it was tried again"


def check_not_fetched_again(device: FollowingDevice) -> None:
    """Its files may go: they come back when an operator asks for them, and not before."""
    removed = device.do("prune")["removed"]
    assert 5 in [entry["version"] for entry in removed]
    used_bytes = device.daemon.status()["cache"]["bytes"]
    last_check = device.daemon.status()["registry"]["last_check"]
    time.sleep(SAME_CHECK_S)  # what comes sooner is the same check, and its time is not written down
    device.sync()
    wait_until(lambda: device.daemon.status()["registry"]["last_check"] != last_check, 60, "another check")
    assert "is in quarantine" in device.model()["update_problem"]
    assert "signal 6" in device.model()["update_problem"]
    assert device.daemon.status()["cache"]["bytes"] == used_bytes
    assert "is in quarantine" in device.do("pull", "assistant", code=1)
    assert 5 in [entry["version"] for entry in device.do("list")]


def test_a_release_that_crashes_after_ten_prompts_gives_the_work_back(
    follow: Callable[..., FollowingDevice], swapped_model: Path, short_dir: Path
) -> None:
    device = follow(trust={"allow_unsigned_code": True})
    bad_release(device, swapped_model, lambda folder: add_code(folder, CRASH_AFTER_10), short_dir)
    device.sync()
    device.wait_model(lambda m: m["version"] == 2, "version 2")
    direct = device.daemon.cli("probe", "--direct", "Please abort.", timeout_s=120)
    assert direct.returncode == 1
    assert "signal 6" in direct.stderr and "planted-words" in direct.stderr, (
        "who asks by hand sees its last words"
    )
    statuses = []
    for number in range(60):
        question = chat("What is the capital of Spain?", max_tokens=20 + number)
        statuses.append(device.client.ask(question).status)
        if device.client.ask(chat("Hello", max_tokens=number + 1)).properties.get("version") == "1":
            break
    model = device.wait_model(lambda m: m["version"] == 1 and m["state"] == "ready", "version 1 again")
    assert "3 different prompts" in next(iter(model["quarantined"].values()))
    assert device.ask() == MADRID
    crashes = device.daemon.log.count("runner died model=")
    assert crashes == 3
    assert device.daemon.log.count("how='signal 6'") == 3
    assert "planted-words" not in device.daemon.log, "what model code prints may have a prompt in it"
    assert statuses.count(500) <= crashes, "only the prompt that ran is lost with a runner"
    assert set(statuses) <= {200, 500}
    check_not_tried_again(device)


# --- Memory for one model ------------------------------------------------------------------------------


def test_where_memory_holds_one_model_the_old_one_goes_first_and_comes_back_if_it_must(
    follow: Callable[..., FollowingDevice], sample_model: Path, swapped_model: Path, short_dir: Path
) -> None:
    device = follow(before=namespaces.little_memory(short_dir, available_bytes=100_000_000))
    bad_release(device, sample_model, expect_lisbon, short_dir / "bad")
    assert "Lisbon" in refused_under_load(device, 0)
    assert device.daemon.log.count("memory holds one model only") == 1
    device.publish(swapped_model)
    most = 0

    def switched() -> bool:
        nonlocal most
        most = max(most, len(device.daemon.runners()))
        return bool(answers) and answers[-1].properties["version"] == "3"

    with asking(device) as answers:
        device.sync()
        wait_until(switched, 90, "an answer of version 3")
    check_switched_once(answers, new="3")
    assert most == 1
    assert device.daemon.log.count("memory holds one model only") == 2
