"""Commands without settings, without a home, or with files that their user may not look at: each says what to do."""

from __future__ import annotations

import errno
import os
import pwd
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_agent import environment, named_file, settings
from edge_agent.cli import main
from edge_agent.errors import EdgeAgentError, SettingsError
from edge_agent.package import trust
from edge_agent.settings import SYSTEM_CONTROL_SOCKET
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.transport import control
from edge_agent.transport.credentials import read_password, tls_context
from tests.support.certificates import Authority
from tests.support.processes import clean_environment


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which settings are looked for; the state, which is not there either, is beside it."""
    for name in [name for name in os.environ if name.startswith("EDGE_AGENT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CONFIGURATION_DIRECTORY", str(tmp_path / "conf"))
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setattr(settings, "SYSTEM_CONTROL_SOCKET", tmp_path / "run" / "control.sock")
    return tmp_path / "conf" / "config.toml"


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def denying(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This user may not look at what is there."""
    real = Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home who is in no list of users, as containers have them."""

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "CONFIGURATION_DIRECTORY", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def test_a_daemon_without_settings_says_which_file_and_which_lines(nowhere: Path) -> None:
    result = invoke("run")
    assert result.exit_code == 78
    assert result.stderr.startswith(f"edge-agent: there are no settings: no {nowhere}, and no EDGE_AGENT_*")
    assert f"write {nowhere} with these lines" in result.stderr
    assert "edge-agent doctor" in result.stderr
    assert "settings.md" in result.stderr
    lines = result.stderr.partition("with a value of yours:\n")[2].partition("            then")[0]
    nowhere.parent.mkdir()
    nowhere.write_text(lines)
    assert set(tomllib.loads(lines)) == {"registry", "models", "mqtt"}
    assert settings.load_for_daemon().default_model == "assistant"


def test_a_daemon_that_does_not_start_says_its_code_in_the_journal(tmp_path: Path) -> None:
    file = tmp_path / "stderr"
    with file.open("w") as stderr:
        status = os.fstat(stderr.fileno())
        environment = {
            **clean_environment(),
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
            "CONFIGURATION_DIRECTORY": str(tmp_path),
        }
        command = [sys.executable, "-m", "edge_agent", "run"]
        result = subprocess.run(command, stderr=stderr, env=environment, timeout=60, check=False)
    assert result.returncode == 78
    assert file.read_text().endswith("\n            code=settings_invalid\n")


def test_variables_are_settings_and_so_is_a_file_that_is_named(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = nowhere.parent.parent / "named.toml"
    named.write_text("")
    assert settings.load_for_daemon(named).models == {}
    monkeypatch.setenv("EDGE_AGENT_MQTT__HOST", "broker.example")
    assert settings.load_for_daemon().mqtt.host == "broker.example"
    assert settings.missing_settings(None) == ""


@pytest.mark.parametrize("arguments", [("probe", "hi"), ("status",), ("chat",), ("bench",)])
def test_commands_that_find_nothing_say_that_there_are_no_settings(
    nowhere: Path, arguments: tuple[str, ...]
) -> None:
    result = invoke(*arguments)
    assert result.exit_code in (3, 4)
    assert f"there are no settings: no {nowhere}, and no EDGE_AGENT_* variable" in result.stderr


def test_a_console_that_reaches_no_broker_says_that_there_are_no_settings(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    result = invoke("fleet", "status")
    assert result.exit_code == 1
    assert "localhost:1883 cannot be reached" in result.stderr
    assert f"there are no settings: no {nowhere}" in result.stderr


def test_a_settings_file_that_may_not_be_looked_at_is_no_missing_one(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denying(nowhere, monkeypatch)
    monkeypatch.setattr(Path, "open", lambda self, mode: self.stat())
    for command in ("run", "status", "models list", "fleet status"):
        result = invoke(*command.split())
        assert result.exit_code == 78
        assert f"settings file {nowhere} cannot be read: Permission denied" in result.stderr
        assert "use sudo, or let this user read it" in result.stderr


def test_a_user_without_a_home_is_told_which_key_to_set(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "SYSTEM_CONFIG", tmp_path / "none.toml")
    homeless(monkeypatch)
    assert settings.find_config() is None
    with pytest.raises(SettingsError, match=r"state_dir: the user has no home \(\$HOME\)"):
        settings.load()
    for key in ("state_dir", "control_socket"):
        file = tmp_path / "config.toml"
        file.write_text(
            f'state_dir = "/var/lib/x"\n{key} = "~/here"\n' if key != "state_dir" else f'{key} = "~/x"\n'
        )
        with pytest.raises(SettingsError, match="the user has no home"):
            settings.load(file)


def test_a_socket_that_may_not_be_looked_at_is_asked_and_says_so(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = settings.load()
    system = settings.SYSTEM_CONTROL_SOCKET
    assert system != SYSTEM_CONTROL_SOCKET
    assert settings.find_control_socket(loaded) == loaded.control_socket
    denying(loaded.control_socket, monkeypatch)
    assert settings.find_control_socket(loaded) == loaded.control_socket
    system.parent.mkdir()
    system.touch()
    assert settings.find_control_socket(loaded) == system, "the one that is there"
    system.unlink()
    denying(system, monkeypatch)
    connected: list[object] = []

    def connect(connection: socket.socket, path: str) -> None:
        connected.append(path)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(EdgeAgentError, match="permission denied on control socket"):
        list(control.call(settings.find_control_socket(loaded), "status"))
    assert connected == [str(system)] or connected == [str(loaded.control_socket)]


# --- A host that fails for the moment -------------------------------------------------------------------


def by_authority(file: Path) -> None:
    tls_context(MqttSettings(ca_file=str(file)))


def by_password(file: Path) -> None:
    read_password(MqttSettings(password_file=str(file)), None)


def by_key(file: Path) -> None:
    trust._fingerprint(str(file))


FAILING = [(errno.EIO, 1), (errno.ENFILE, 1), (errno.EACCES, 78), (errno.ENOENT, 78)]


@pytest.mark.parametrize(("number", "exit_code"), FAILING)
def test_a_service_whose_settings_cannot_be_read_for_the_moment_is_started_again(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    """systemd starts nothing again that ended with 78, and a disk or a table of files recovers."""
    nowhere.parent.mkdir()
    nowhere.touch()

    def failing(path: Path, limit_bytes: int) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(named_file, "read", failing)
    result = invoke("run")
    assert (result.exit_code, os.strerror(number) in result.stderr) == (exit_code, True)


@pytest.mark.parametrize(("number", "exit_code"), FAILING)
@pytest.mark.parametrize("read", [by_authority, by_key, by_password, environment.read_credential])
def test_so_is_one_with_such_a_file_that_its_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int, read: Callable[[Path], Any]
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    for owner, name in ((named_file, "read"), (ssl, "create_default_context"), (Path, "open")):
        monkeypatch.setattr(owner, name, failing)
    with pytest.raises(SettingsError) as caught:
        read(tmp_path / "file")
    assert (caught.value.code == "settings_invalid") == (exit_code == 78)


def test_a_key_of_another_certificate_is_a_wrong_setting(tmp_path: Path) -> None:
    """OpenSSL's number of it is ESTALE's."""
    authority = Authority(tmp_path, "one")
    one, other = authority.client("one"), authority.client("other")
    settings = MqttSettings(
        ca_file=str(authority.file), cert_file=str(one.certificate), key_file=str(other.key)
    )
    with pytest.raises(SettingsError) as caught:
        tls_context(settings)
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    assert caught.value.__cause__.errno == errno.ESTALE
    assert caught.value.code == "settings_invalid"
