"""The line's budget on a device: what waits, what is said of it, and how it goes on.

Nothing here waits for a clock, but for one long test: windows are far away or open, and budgets are bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.support.mlflow_server import Server
from tests.support.processes import Daemon, wait_until
from tests.support.proxy import Proxy, running_proxy
from tests.support.versions import KATHMANDU, MADRID, FollowingDevice

SLOW_BYTES_PER_S = 400_000
"""Small pieces, so that a bound in bytes is met closely."""
BUDGET_BYTES = 600_000


def far_away() -> str:
    """A window, in UTC, that opens in five to six hours."""
    opens = datetime.now(UTC) + timedelta(hours=6)
    return f"{opens:%H}:00-{opens:%H}:30"


def noon() -> str:
    """A time zone whose day does not end soon."""
    hours = 12 - datetime.now(UTC).hour
    return f"Etc/GMT{-hours:+d}" if hours else "UTC"


def with_link(device: FollowingDevice, **link: Any) -> None:
    device.daemon.config["link"] = link
    device.daemon.restart()
    device.wait_model(lambda m: m["state"] == "ready", "the model")
    device.sync()


def is_held(model: dict[str, Any]) -> bool:
    return model["link"] is not None and model["progress"] is None


def staged_bytes(device: FollowingDevice) -> int:
    staging = device.daemon.state_dir / "models" / "staging"
    return sum(path.stat().st_size for path in staging.rglob("*.part"))


def fetched_bytes(device: FollowingDevice, version: int) -> int:
    """By the sync that ended with the version."""
    (found,) = re.findall(rf"version fetched .* version={version} bytes_fetched=(\d+)", device.daemon.log)
    return int(found)


@pytest.fixture
def proxied(
    follow: Callable[..., FollowingDevice], mlflow_server: Server
) -> Iterator[tuple[FollowingDevice, Proxy]]:
    """A device and its line to the registry."""
    host, port = mlflow_server.uri.removeprefix("http://").split(":")
    with running_proxy(host, int(port)) as proxy:
        yield follow(registry={"uri": f"http://{proxy.host}:{proxy.port}"}), proxy


@pytest.mark.long
def test_a_download_is_held_until_its_window_costs_nothing_and_comes_when_an_operator_says_now(
    follow: Callable[..., FollowingDevice], swapped_model: Path
) -> None:
    device = follow()
    device.publish(swapped_model)
    reported = f"{device.client.root}/model/reported"
    device.client.subscribe(reported)
    window = far_away()
    with_link(device, windows=[window], timezone="UTC")
    model = device.wait_model(is_held, "version 2 is held")
    missing = model["link"]["missing_bytes"]
    text = f"version 2 is held until {window[:5]} UTC by link.windows, {missing} bytes are missing"
    assert model["update_problem"].startswith(text)
    assert missing > 1_000_000
    assert datetime.fromtimestamp(model["link"]["held_until"], UTC).strftime("%H:%M") == window[:5]
    assert device.ask() == MADRID
    assert device.daemon.status()["state"] == "ready", "nothing is wrong"

    def says_held(payload: bytes) -> bool:
        document = json.loads(payload)["models"]["assistant"]
        attempt = document["attempt"] or {}
        return bool(
            attempt.get("step") == "held" and document["link"] == model["link"] and text in document["reason"]
        )

    device.client.wait(lambda m: m.topic == reported and says_held(m.payload))
    told = device.do("pull", "assistant")
    assert (told["state"], told["code"], told["version"], told["bytes_fetched"]) == (
        "held",
        "link_held",
        2,
        0,
    )
    assert (told["missing_bytes"], told["held_until"]) == tuple(model["link"].values())
    for arguments in (("models", "pull"), ("status",)):
        assert text in " ".join(device.daemon.cli(*arguments).stdout.split())
    assert not list((device.daemon.state_dir / "models" / "staging").iterdir())

    client = mlflow.MlflowClient(device.server.uri, device.server.uri)
    client.set_registered_model_alias(device.name, "prod", "1")
    assert device.do("pull", "assistant")["state"] == "active"
    assert device.model()["link"] is None
    assert [version["version"] for version in device.do("list")] == [1]
    client.set_registered_model_alias(device.name, "prod", "2")
    assert device.do("pull", "assistant", "--now")["state"] == "active"
    assert (device.ask(), device.model()["link"]) == (KATHMANDU, None)


@pytest.mark.long
def test_a_download_stops_with_the_days_bytes_which_a_crash_does_not_forget_and_goes_on(
    proxied: tuple[FollowingDevice, Proxy], swapped_model: Path
) -> None:
    device, proxy = proxied
    with_link(device, bytes_per_day=BUDGET_BYTES, timezone=noon())
    proxy.slow(SLOW_BYTES_PER_S)
    device.publish(swapped_model)
    device.sync()
    missing = device.wait_model(is_held, "version 2 is held")["link"]["missing_bytes"]
    here = staged_bytes(device)
    used = device.daemon.status()["link"]["used_bytes"]
    assert here >= BUDGET_BYTES // 2, "what came is kept"
    assert BUDGET_BYTES <= used <= BUDGET_BYTES + (1 << 20)
    assert missing > 0
    device.daemon.kill()
    device.daemon.start()
    device.sync()
    device.wait_model(is_held, "version 2 is held again")
    assert device.daemon.status()["link"]["used_bytes"] >= used
    told = device.do("pull", "assistant")
    assert (told["state"], told["bytes_fetched"], told["missing_bytes"]) == ("held", 0, missing)
    assert staged_bytes(device) == here
    proxy.restore()
    with_link(device, bytes_per_day=10**9, timezone=noon())
    device.wait_model(lambda m: m["version"] == 2, "version 2")
    assert fetched_bytes(device, 2) == missing, "nothing came twice"
    assert device.ask() == KATHMANDU


@pytest.mark.long
def test_a_download_stops_at_the_end_of_its_window_and_goes_on_in_the_next(
    proxied: tuple[FollowingDevice, Proxy], swapped_model: Path
) -> None:
    device, proxy = proxied
    size = sum(path.stat().st_size for path in swapped_model.iterdir())
    device.publish(swapped_model)
    proxy.slow(size / 900)  # it takes far longer than the window does
    now = datetime.now(UTC)
    ends = now + timedelta(seconds=270)  # to the minute: 210 to 270 s, in which the daemon starts
    with_link(device, windows=[f"{now - timedelta(hours=1):%H:%M}-{ends:%H:%M}"], timezone="UTC")
    device.wait_model(lambda m: m["progress"] is not None, "version 2 comes")
    missing = device.wait_model(is_held, "version 2 is held", timeout_s=420)["link"]["missing_bytes"]
    assert 0 < missing < size
    proxy.restore()
    with_link(device, windows=["00:00-24:00"], timezone="UTC")
    device.wait_model(lambda m: m["version"] == 2, "version 2")
    assert fetched_bytes(device, 2) == missing, "nothing came twice"
    assert device.ask() == KATHMANDU


@pytest.mark.long
def test_a_version_takes_over_when_the_machine_is_not_in_use_any_more(
    follow: Callable[..., FollowingDevice], swapped_model: Path, tmp_path: Path
) -> None:
    in_use = tmp_path / "in-use"
    device = follow(link={"inhibit_file": str(in_use)})
    in_use.touch()
    device.publish(swapped_model)
    device.sync()
    model = device.wait_model(is_held, "version 2 is held")
    assert model["link"] == {"missing_bytes": 0, "held_until": None}
    assert str(in_use) in model["update_problem"]
    for how in ((), ("--now",)):
        told = device.do("pull", "assistant", *how)
        assert (told["state"], told["code"]) == ("held", "activation_held"), "the file is not an operator's"
    device.daemon.kill()
    device.daemon.start()
    device.wait_model(is_held, "it is held after a crash, too")
    assert [version["state"] for version in device.do("list")] == ["active", "candidate"]
    assert device.ask() == MADRID
    in_use.unlink()
    device.wait_model(lambda m: m["version"] == 2, "version 2 takes over by itself")
    assert device.ask() == KATHMANDU
    in_use.touch()
    assert device.do("rollback", "assistant")["version"] == 1, "the way out of trouble is not held"
    assert device.ask() == MADRID


@pytest.mark.long
def test_a_file_that_an_operator_brings_uses_no_line_and_waits_for_its_time(
    follow: Callable[..., FollowingDevice], swapped_model: Path, tmp_path: Path
) -> None:
    device, file = follow(), tmp_path / "version.tar"
    device.publish(swapped_model)
    device.do("pull", "assistant")
    device.do("export", "assistant", "2", str(file))
    device.do("rollback", "assistant")
    device.do("unpin", "assistant")
    device.do("rm", "assistant", "2")
    device.daemon.config["registry"]["uri"] = ""
    with_link(device, windows=[far_away()], bytes_per_day=1, activate_windows=[far_away()], timezone="UTC")
    told = device.do("import", str(file))
    assert (told["state"], told["code"], told["missing_bytes"]) == ("held", "activation_held", 0)
    assert device.ask() == MADRID
    with_link(device, activate_windows=["00:00-24:00"], timezone="UTC")
    device.wait_model(lambda m: m["version"] == 2, "it takes over after a restart, without a registry")


@pytest.mark.parametrize(
    ("link", "key"),
    [({"timezone": "Mars/Olympus"}, "link.timezone"), ({"windows": ["10pm-5am"]}, "link.windows")],
)
def test_a_line_that_nobody_understands_is_refused_at_start(
    new_daemon: Callable[..., Daemon], link: dict[str, Any], key: str
) -> None:
    daemon = new_daemon({"link": link})
    daemon.start(ready=False)
    assert daemon.wait_exit() == 78
    wait_until(lambda: key in daemon.log, 10, "the key in the log")
