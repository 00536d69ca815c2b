"""`edge-agent doctor` against a real daemon, broker, registry and cache, whole and broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_agent import settings as settings_module
from edge_agent.doctor import broker as broker_check
from edge_agent.doctor import cache as cache_check
from edge_agent.doctor import certificates as certificates_check
from edge_agent.doctor import files as files_check
from edge_agent.doctor import models as models_check
from edge_agent.doctor.finding import Finding, Level
from edge_agent.environment import SERVICE_CREDENTIALS
from edge_agent.settings import Settings
from tests.support.certificates import HOUR, Authority
from tests.support.doctor import doctor
from tests.support.documented_broker import DEVICE, ROOT, SECRET, Application, documented_broker, tls_settings
from tests.support.host import OTHER_USER
from tests.support.mosquitto import Broker, running_broker
from tests.support.mqtt_agent import Agent, Recorder
from tests.support.processes import Daemon, free_port, short_folder, to_toml, wait_until
from tests.support.sample_device import settings_for


def settings_of(folder: Path, config: dict[str, Any]) -> Settings:
    file = folder / "doctor.toml"
    file.write_text(to_toml({"state_dir": str(folder / "state"), **config}))
    return settings_module.load(file)


def levels(findings: Iterator[Finding]) -> dict[str, Level]:
    return {finding.check: finding.level for finding in findings}


# --- The whole ------------------------------------------------------------------------------------------


def test_a_device_that_works_has_no_failure(agent: Daemon) -> None:
    code, found = doctor(agent)
    failures = {check: finding for check, finding in found.items() if finding["level"] == "fail"}
    assert (code, failures) == (0, {})
    assert {
        *("host.cpu", "host.clock", "host.libraries", "host.walls", "host.dns", "settings", "daemon", "unit"),
        *("broker.connect", "broker.subscribe", "broker.publish", "registry.reach", "registry.alias"),
        *("cache.folder", "cache.hard_links", "cache.room", "cache.content", "cache.state"),
        *("models.version", "models.memory", "models.threads"),
    } <= set(found)
    assert "is version 1" in found["registry.alias"]["message"]
    assert "the daemon is connected" in found["broker.connect"]["message"]


def test_with_everything_gone_each_failure_names_its_remedy(
    agent: Daemon, new_daemon: Callable[..., Daemon], short_dir: Path
) -> None:
    """No daemon, no broker, no registry, and a damaged cache."""
    state = short_dir / "state"
    subprocess.run(["cp", "-a", str(agent.state_dir), str(state)], check=True)  # hard links stay links
    for name in ("journal.db", "c.sock"):
        (state / name).unlink(missing_ok=True)
    config = {
        "registry": {"uri": f"http://127.0.0.1:{free_port()}"},
        "models": agent.config["models"],
        "mqtt": {"host": "127.0.0.1", "port": free_port()},
    }
    daemon = new_daemon(config, folder=short_dir)
    blob = next((daemon.state_dir / "models" / "blobs" / "sha256").iterdir())
    blob.chmod(0o600)
    with blob.open("ab") as file:
        file.write(b"more")
    code, found = doctor(daemon)
    assert code == 1
    expected = {
        "daemon": "warn",
        "broker.connect": "fail",
        "registry.reach": "warn",  # a device goes on with its cache
        "cache.content": "fail",
        "cache.hard_links": "ok",
    }
    assert {check: found[check]["level"] for check in expected} == expected
    assert "1 of " in found["cache.content"]["message"]
    assert "models verify" in found["cache.content"]["remedy"]
    assert not list(daemon.state_dir.rglob("*doctor*")), "it leaves nothing"
    text = daemon.cli("doctor", timeout_s=120)
    assert text.returncode == 1
    assert re.search(r"^fail  broker.connect .*\n +→ check mqtt.host", text.stdout, re.MULTILINE)


def test_invalid_settings_are_a_finding_and_the_host_is_looked_at_all_the_same(
    new_daemon: Callable[..., Daemon],
) -> None:
    daemon = new_daemon({"mqtt": {"prot": 1883}})
    code, found = doctor(daemon)
    assert (code, found["settings"]["level"]) == (1, "fail")
    assert "mqtt.prot: unknown key" in found["settings"]["message"]
    assert "host.cpu" in found


def test_a_registry_that_is_out_of_reach_is_a_failure_for_a_device_that_has_nothing(
    new_daemon: Callable[..., Daemon], broker: Broker
) -> None:
    daemon = new_daemon(settings_for(broker, f"http://127.0.0.1:{free_port()}", device="empty"))
    code, found = doctor(daemon)
    assert (code, found["registry.reach"]["level"]) == (1, "fail")
    assert found["broker.publish"]["level"] == "ok"


# --- Files and certificates -----------------------------------------------------------------------------

DAY = 24 * HOUR
YEAR = 365 * DAY


def certificates_of(folder: Path, mqtt: dict[str, Any]) -> list[Finding]:
    return list(certificates_check.check(settings_of(folder, {"mqtt": mqtt}).mqtt))


def test_certificates_that_ended_or_will_soon_and_a_key_of_another_pair_are_found_out(
    short_dir: Path,
) -> None:
    authority = Authority(short_dir, lasts=YEAR)
    good, soon = authority.client("good", lasts=YEAR), authority.client("soon", lasts=10 * DAY)
    ended = authority.client("ended", lasts=-HOUR)
    for pair, level in ((good, Level.OK), (soon, Level.WARN), (ended, Level.FAIL)):
        of_authority, of_device = certificates_of(short_dir, tls_settings(authority, pair))
        assert (of_authority.level, of_device.level) == (Level.OK, level), of_device
        assert "mqtt.cert_file" in of_device.message
    mixed = {**tls_settings(authority, good), "key_file": str(soon.key)}
    mismatch = certificates_of(short_dir, mixed)[0]
    assert mismatch.level is Level.FAIL
    assert f"{soon.key} does not belong to the certificate {good.certificate}" in mismatch.message
    good.key.write_text("no key")
    assert certificates_of(short_dir, tls_settings(authority, good))[0].level is Level.FAIL
    # The authority's next certificate is beside its last one, which has ended.
    old = Authority(short_dir, "old", lasts=-HOUR)
    assert certificates_of(short_dir, tls_settings(old))[0].level is Level.FAIL
    old.file.write_bytes(old.file.read_bytes() + authority.file.read_bytes())
    assert certificates_of(short_dir, tls_settings(old))[0].level is Level.OK


def test_files_that_are_missing_empty_or_open_to_everybody_are_found_out(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(short_dir))
    short_dir.chmod(0o755)
    password = short_dir / "mqtt-password"
    settings = settings_of(
        short_dir,
        {
            "mqtt": {"password_file": str(password)},
            "trust": {"public_keys": ["/none.pem"]},
            "http": {
                "token_file": "/none.token",
                "cert_file": "/none.crt",
                "key_file": f"{SERVICE_CREDENTIALS.parent}/http/http-key",
            },
        },
    )

    def found() -> str:
        return "\n".join(finding.message for finding in files_check.check(settings, None, {}))

    assert f"{password} (mqtt.password_file): No such file" in found()
    assert "/none.pem (trust.public_keys[0]): No such file" in found()
    assert "/none.token (http.token_file): No such file" in found()
    assert "/none.crt (http.cert_file): No such file" in found()
    assert "http.key_file" not in found()  # nobody but its service sees a credential
    password.write_text("\n")
    password.chmod(0o644)
    assert f"{password} (mqtt.password_file): every user can read it" in found()
    assert f"{password} is empty" in found()


@pytest.mark.parametrize(
    ("file", "hidden"), [("/tmp/in-use", True), ("/run/kiosk/in-use", False), ("", False)]
)
def test_a_file_that_the_service_would_never_see_is_found_out(
    short_dir: Path, file: str, hidden: bool
) -> None:
    settings = settings_of(short_dir, {"link": {"inhibit_file": file}})
    found = files_check.check(settings, None, {"LoadState": "loaded", "User": "nobody-has-this-name"})
    assert [
        f"{file} (link.inhibit_file)" in finding.message for finding in found if finding.level is Level.FAIL
    ] == ([True] if hidden else [])


def test_what_the_services_user_cannot_read_or_write_is_found_out_by_that_user(short_dir: Path) -> None:
    """As root, the service is another user's: the state directory says whose. Any other user has nobody to ask for."""
    short_dir.chmod(0o755)
    password = short_dir / "password"
    password.write_text("secret")
    password.chmod(0o600)
    settings = settings_of(short_dir, {"mqtt": {"password_file": str(password)}})
    settings.state_dir.mkdir()
    config = short_dir / "doctor.toml"
    if os.geteuid() != 0:
        assert list(files_check.check(settings, config, {})) == []
        return
    os.chown(settings.state_dir, OTHER_USER, OTHER_USER)
    (refused,) = files_check.check(settings, config, {})
    assert (refused.check, refused.level) == ("settings.access", Level.FAIL)
    assert refused.message.endswith(f"cannot read {password}")
    os.chown(password, OTHER_USER, OTHER_USER)
    (fine,) = files_check.check(settings, config, {})
    assert fine.level is Level.OK, fine
    settings.state_dir.chmod(0o500)
    (refused,) = files_check.check(settings, config, {})
    assert refused.message.endswith(f"cannot write to {settings.state_dir}")


# --- The broker -----------------------------------------------------------------------------------------


@contextmanager
def ruled_broker(folder: Path, rules: str) -> Iterator[Broker]:
    acl = folder / "rules.acl"
    acl.write_text(rules)
    acl.chmod(0o600)
    with running_broker(folder, extra_config=f"acl_file {acl}") as running:
        yield running


def test_a_broker_whose_rules_keep_answers_back_is_found_out(short_dir: Path) -> None:
    with ruled_broker(short_dir, "topic read edge/v1/dev/#\n") as broker:
        settings = settings_of(short_dir, settings_for(broker, ""))
        found = levels(broker_check.check(settings, None))
    assert found == {
        "broker.connect": Level.OK,
        "broker.subscribe": Level.OK,
        "broker.publish": Level.FAIL,
        "broker.self_test": Level.OK,
    }


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_the_check_leaves_no_session_with_the_broker(short_dir: Path, protocol: str) -> None:
    """A session that stays would be handed every prompt of this device."""
    with running_broker(short_dir) as broker:
        settings = settings_of(short_dir, settings_for(broker, "", mqtt={"protocol": protocol}))
        assert set(levels(broker_check.check(settings, None)).values()) == {Level.OK}
        again = [finding.message for finding in broker_check.check(settings, None)]
        log = broker.log_text()
        assert again
        sessions = [line for line in log.splitlines() if "Sending CONNACK" in line and "-doctor" in line]
        assert len(sessions) >= 2
        assert all("(0, " in line for line in sessions), "session present"


def test_a_wrong_password_is_found_out_and_the_right_one_accepted(short_dir: Path) -> None:
    with documented_broker(passwords=True) as (broker, authority):
        password = short_dir / "password"
        mqtt = {"username": DEVICE, "password_file": str(password), **tls_settings(authority)}
        settings = settings_of(short_dir, settings_for(broker, "", device=DEVICE, mqtt=mqtt))
        password.write_text("not the one\n")
        (finding,) = broker_check.check(settings, None)
        assert (finding.check, finding.level) == ("broker.connect", Level.FAIL)
        assert "Not authorized" in finding.message
        password.write_text(SECRET)
        found = levels(broker_check.check(settings, None))
        assert set(found.values()) <= {Level.OK, Level.WARN}  # the test's certificate ends within the hour
        assert found["broker.publish"] is Level.OK


def test_a_prompt_that_waits_in_the_daemons_session_is_not_lost_to_the_check(short_dir: Path) -> None:
    """docs/broker.md takes the certificate's name for the client id: the check gets the daemon's session."""
    with documented_broker() as (broker, authority):
        mqtt = tls_settings(authority, authority.client(DEVICE))
        place = {"host": broker.host, "port": broker.port, **mqtt}
        with Agent(short_dir, {"req/chat/+": Recorder()}, device=DEVICE, **place) as agent:
            agent.wait_connected()
        with Application(broker, authority, "shop") as shop:
            assert shop.publish(f"{ROOT}/req/chat/shop", b"asked while away") == "Success"
        settings = settings_of(short_dir, settings_for(broker, "", device=DEVICE, mqtt=mqtt))
        assert levels(broker_check.check(settings, None))["broker.publish"] is Level.OK
        handler = Recorder()
        with Agent(short_dir, {"req/chat/+": handler}, device=DEVICE, **place):
            wait_until(lambda: handler.seen == [b"asked while away"], 60, "the prompt")


# --- The cache ------------------------------------------------------------------------------------------


def test_a_state_that_is_damaged_is_said_and_left_for_the_daemon(short_dir: Path) -> None:
    settings = settings_of(short_dir, {"models": {"assistant": {"uri": "models:/m@prod"}}})
    models = settings.state_dir / "models"
    models.mkdir(parents=True)
    (models / "state.json").write_text("{")
    found = levels(cache_check.check(settings))
    assert found["cache.state"] is Level.FAIL
    assert {"models.version", "models.threads"} <= set(levels(models_check.check(settings, None)))
    assert (models / "state.json").read_text() == "{"


def test_a_disk_that_is_too_full_for_an_update_is_a_warning(short_dir: Path) -> None:
    settings = settings_of(short_dir, {"cache": {"min_free_bytes": 1 << 49}})
    (settings.state_dir / "models").mkdir(parents=True)
    assert levels(cache_check.check(settings))["cache.room"] is Level.WARN


# --- The support archive --------------------------------------------------------------------------------


def test_the_support_archive_has_what_helps_and_nothing_secret(agent: Daemon, short_dir: Path) -> None:
    """Its members are checked by name; test_secrets.py looks for planted secrets in a whole run."""
    file = short_dir / "support.tar.gz"
    code, _ = doctor(agent, "--bundle", str(file))
    assert code == 0
    assert file.stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as archive:
        members = {
            os.path.basename(member.name): archive.extractfile(member).read()  # type: ignore[union-attr]  # noqa: PTH119
            for member in archive
        }
    assert set(members) == {
        *(
            "doctor.json",
            "versions.json",
            "host.json",
            "settings.json",
            "status.json",
            "cache.json",
            "files.json",
            "unit.json",
            "log.txt",
            "kernel.txt",
        )
    }
    assert json.loads(members["status.json"])["state"] == "ready"
    assert json.loads(members["settings.json"])["models"]["assistant"]["uri"] == "models:/sample@prod"
    assert json.loads(members["cache.json"])["state"]["models"]["assistant"]["active"].startswith("1-")
    assert "onnxruntime-genai" in json.loads(members["versions.json"])["packages"]
    assert "journal.db" in {file["path"] for file in json.loads(members["files.json"])}
    assert json.loads(members["host.json"])["disk_bytes"]["free"] > 0


def test_a_support_archive_of_a_device_with_invalid_settings(new_daemon: Callable[..., Daemon]) -> None:
    with short_folder() as folder:
        daemon = new_daemon({"mqtt": {"prot": 1883}})
        code, _ = doctor(daemon, "--bundle", str(folder / "s.tar.gz"))
        assert code == 1
        with tarfile.open(folder / "s.tar.gz") as archive:
            assert "edge-agent-support/doctor.json" in archive.getnames()


def test_a_support_archive_of_a_device_that_is_broken_in_several_places(
    new_daemon: Callable[..., Daemon], short_dir: Path
) -> None:
    """A credential that is no text, and a cache that is a file: what can be known is in it."""
    (short_dir / "mlflow-tracking-token").write_bytes(b"\xff planted")
    (short_dir / "state").mkdir()
    (short_dir / "state" / "models").touch()
    daemon = new_daemon(
        {"registry": {"uri": "http://127.0.0.1:1"}, "models": {"assistant": {"uri": "models:/m@prod"}}},
        folder=short_dir,
    )
    daemon.env["CREDENTIALS_DIRECTORY"] = str(short_dir)
    file = short_dir / "s.tar.gz"
    code, found = doctor(daemon, "--bundle", str(file))
    assert code == 1
    assert "mlflow-tracking-token" in found["registry"]["message"]
    assert "mlflow-tracking-token" in found["settings.files"]["message"]
    with tarfile.open(file) as archive:
        cached = archive.extractfile("edge-agent-support/cache.json")
        assert cached is not None
        assert json.load(cached)
        assert "edge-agent-support/files.json" in archive.getnames()
