"""Who gets in: names, origins and tokens, and what it takes to be open to a network."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent import settings as settings_module
from edge_agent.doctor import certificates
from edge_agent.errors import ControlSocketError, SettingsError
from edge_agent.gateway import refused
from edge_agent.gateway.doors import LOCAL_HOSTS, Door, open_doors
from edge_agent.gateway.guard import Guard
from edge_agent.gateway.refusals import CannotListen, HostRefused, Unauthorized
from edge_agent.settings import Settings
from edge_agent.settings.http import Address
from tests.support.certificates import Authority
from tests.support.processes import free_port, short_folder, to_toml

TOKEN = "0123456789abcdef"


async def _nothing(*_: object) -> None: ...


def headers(**fields: str) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]


def code(guard: Guard, given: list[tuple[bytes, bytes]]) -> int:
    refusal = guard.refusal(given)
    return refusal.status if refusal else 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("localhost.", 200),
        ("evil.test", 421),
        ("localhost.evil.test", 421),
        ("evil.test@localhost", 421),
        ("localhost@evil.test", 421),
        ("localhost/evil.test", 421),
        ("localhost?", 421),
        ("localhost:80:80", 421),
        ("localhost:x", 421),
        ("localhost:99999", 421),
        ("[::1", 421),
        ("", 421),
        (" ", 421),
        ("0.0.0.0", 421),
        ("\xe4", 421),
    ],
)
def test_only_a_name_of_this_device_is_a_host(host: str, status: int) -> None:
    assert code(Guard(_nothing, hosts=LOCAL_HOSTS), headers(host=host)) == status


def test_a_request_has_one_host() -> None:
    guard = Guard(_nothing, hosts=LOCAL_HOSTS)
    assert code(guard, []) == 421
    assert code(guard, headers(host="localhost") * 2) == 421


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("http://evil.test", 403),
        ("https://localhost.evil.test", 403),
        ("null", 403),
        ("", 403),
        ("http://localhost@evil.test", 403),
        ("localhost", 403),
    ],
)
def test_a_page_from_elsewhere_is_refused(origin: str, status: int) -> None:
    assert code(Guard(_nothing, hosts=LOCAL_HOSTS), headers(host="localhost", origin=origin)) == status


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN}", 200),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        ("Bearer", 401),
        ("Bearer \xe4", 401),
        ("", 401),
        (None, 401),
    ],
)
def test_a_token_is_asked_for_after_host_and_origin(authorization: str | None, status: int) -> None:
    guard = Guard(_nothing, hosts=LOCAL_HOSTS, token=TOKEN)
    given = headers(
        host="localhost", **({"authorization": authorization} if authorization is not None else {})
    )
    assert code(guard, given) == status
    assert code(guard, [*given, *headers(origin="http://evil.test")]) == 403
    assert code(guard, [*given, *headers(authorization=f"Bearer {TOKEN}")]) in (200, 401)
    if authorization is not None:
        assert code(guard, [*given, *headers(authorization=f"Bearer {TOKEN}")]) == 401, "two of them"


# --- What was refused, in the log -----------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name == refused.__name__]
    caplog.clear()
    return lines


def test_a_flood_of_refusals_is_a_line_each_minute(caplog: pytest.LogCaptureFixture) -> None:
    seen = refused.RefusedRequests()
    for number in range(1000):
        seen.add(Unauthorized("no"), f"192.0.2.{number % 10}", now_s=100.0)
    assert told(caplog) == ["requests refused code=unauthorized peer=192.0.2.0 times=1"]
    seen.add(HostRefused("no"), None, now_s=101.0)
    assert told(caplog) == ["requests refused code=host_refused peer=unix times=1"], "each kind by itself"
    seen.step(159.9)
    assert told(caplog) == []
    seen.step(160.0)
    assert told(caplog) == ["requests refused code=unauthorized peer=192.0.2.9 times=999"]
    seen.step(300.0)
    assert told(caplog) == [], "nothing came since"
    seen.add(Unauthorized("no"), "192.0.2.1", now_s=400.0)
    assert told(caplog) == ["requests refused code=unauthorized peer=192.0.2.1 times=1"]


# --- Doors ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        (made / "token").write_text(TOKEN + "\n")
        yield made


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pair = Authority(tmp_path_factory.mktemp("tls")).server()
    return {"cert_file": str(pair.certificate), "key_file": str(pair.key)}


def load(folder: Path, **http: Any) -> Settings:
    content = {"state_dir": str(folder / "state"), "control_socket": str(folder / "c.sock")}
    file = folder / "config.toml"
    file.write_text(to_toml({**content, "http": {"listen": f"127.0.0.1:{free_port()}", **http}}))
    return settings_module.load(file)


def opened(settings: Settings, *passed: socket.socket) -> list[Door]:
    doors = open_doors(settings, [each.detach() for each in passed])
    for door in doors:
        door.listener.close()
    return doors


def test_by_default_there_are_a_loopback_address_and_a_socket_beside_the_daemons(folder: Path) -> None:
    assert Settings.model_fields["http"].default.address == Address(host="127.0.0.1", port=8080)
    tcp, unix = opened(load(folder))
    assert (tcp.token, tcp.tls, tcp.hosts) == ("", None, LOCAL_HOSTS)
    assert (unix.token, unix.tls) == ("", None)
    assert (folder / "http.sock").stat().st_mode & 0o777 == 0o660


def test_a_token_and_tls_are_for_tcp_only(folder: Path, tls: dict[str, str]) -> None:
    tcp, unix = opened(load(folder, token_file=str(folder / "token"), allowed_hosts=["Box.lan"], **tls))
    assert (tcp.token, unix.token) == (TOKEN, "")
    assert tcp.tls is not None and unix.tls is None
    assert tcp.hosts == unix.hosts == LOCAL_HOSTS | {"box.lan"}


@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("listen", ["0.0.0.0", "[::]", "192.0.2.1"])
def test_a_network_takes_a_token_and_tls(
    folder: Path, tls: dict[str, str], listen: str, with_tls: bool, with_token: bool
) -> None:
    more = {**(tls if with_tls else {}), **({"token_file": str(folder / "token")} if with_token else {})}
    settings = load(folder, listen=f"{listen}:{free_port()}", **more)
    if with_token and with_tls:
        if listen == "0.0.0.0":
            assert "0.0.0.0" in opened(settings)[0].hosts
        return
    with pytest.raises(SettingsError) as caught:
        open_doors(settings)
    assert "http.listen" in caught.value.message
    assert ("http.token_file" in caught.value.message) is not with_token
    assert ("http.cert_file" in caught.value.message) is not with_tls


def test_a_socket_of_the_service_manager_is_held_to_the_same_rule(folder: Path) -> None:
    settings = load(folder)
    with pytest.raises(SettingsError, match="may be reached from a network"):
        opened(settings, socket.create_server(("0.0.0.0", 0)))
    (door,) = open_doors(settings, [socket.create_server(("127.0.0.1", 0)).detach()])
    assert str(door) == f"http://127.0.0.1:{door.listener.getsockname()[1]}"
    door.listener.close()
    assert not (folder / "http.sock").exists(), "it opens none of its own"


@pytest.mark.parametrize("text", ["short", "", "0123456789abcde\xe4", "0123456789 \x07bcdef"])
def test_a_token_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / "token").write_text(text)
    with pytest.raises(SettingsError, match=r"^http\.token_file: ") as caught:
        open_doors(load(folder, token_file=str(folder / "token")))
    assert not text or text not in str(caught.value)


def test_files_that_are_not_there_are_named(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"http\.token_file"):
        open_doors(load(folder, token_file=str(folder / "missing")))
    with pytest.raises(SettingsError, match=r"http\.cert_file"):
        open_doors(load(folder, cert_file=str(folder / "missing"), key_file=str(folder / "missing")))


def test_an_address_that_is_taken_is_named(folder: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(CannotListen, match=r"http\.listen: 127\.0\.0\.1 port \d+"),
    ):
        open_doors(load(folder, listen=f"127.0.0.1:{other.getsockname()[1]}"))
    with pytest.raises(ControlSocketError, match=r"http\.socket"):
        open_doors(load(folder, listen="", socket="/proc/no/http.sock"))


def test_doctor_says_when_the_certificate_expires(folder: Path) -> None:
    for hours, level in ((24 * 365, "ok"), (24, "warn"), (-1, "fail")):
        pair = Authority(folder).server(lasts=datetime.timedelta(hours=hours))
        http = load(folder, cert_file=str(pair.certificate), key_file=str(pair.key)).http
        (finding,) = certificates.check_http(http)
        assert (finding.level, "http.cert_file" in finding.message) == (level, True)
    assert list(certificates.check_http(load(folder).http)) == []
