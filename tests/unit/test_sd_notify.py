"""sd_notify against real sockets."""

from __future__ import annotations

import logging
import os
import socket
import threading
from pathlib import Path

import pytest

from edge_agent.environment import is_a_service, service_manager
from edge_agent.sd_notify import Notifier


@pytest.fixture
def manager(short_dir: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    end.bind(str(short_dir / "notify"))
    end.settimeout(60)
    return end


def received(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_ready_arrives_with_a_status_in_one_message(manager: socket.socket) -> None:
    with manager:
        Notifier(manager.getsockname()).ready("2 models loaded")
        assert received(manager) == ["READY=1", "STATUS=2 models loaded"]


def test_an_abstract_address_is_understood() -> None:
    name = f"edge-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(60)
        Notifier(f"@{name}").stopping()
        assert received(manager) == ["STOPPING=1"]


def test_a_status_can_not_add_a_line(manager: socket.socket) -> None:
    with manager:
        Notifier(manager.getsockname()).status("loading\nMAINPID=1")
        assert received(manager) == ["STATUS=loading MAINPID=1"]


def test_the_watchdog_gets_two_signs_of_life_in_each_interval(manager: socket.socket) -> None:
    with manager:
        notifier = Notifier(manager.getsockname(), watchdog_interval_s=30)
        for now in range(100, 131):
            notifier.watchdog(float(now))
        notifier.extend_timeout(1.5)
        assert [received(manager) for _ in range(4)] == [
            ["WATCHDOG=1"],
            ["WATCHDOG=1"],
            ["WATCHDOG=1"],
            ["EXTEND_TIMEOUT_USEC=1500000"],
        ]


def test_no_watchdog_asked_for_means_none_sent(manager: socket.socket) -> None:
    with manager:
        notifier = Notifier(manager.getsockname())
        notifier.watchdog(1.0)
        notifier.status("still here")
        assert received(manager) == ["STATUS=still here"]


def test_without_a_manager_every_call_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(None, watchdog_interval_s=1)
    notifier.ready()
    notifier.watchdog(1.0)
    assert not caplog.records


def test_a_manager_that_went_away_is_logged_once_and_raises_nothing(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(str(short_dir / "gone"))
    with caplog.at_level(logging.WARNING):
        notifier.ready()
        notifier.status("x")
    assert len(caplog.records) == 1


def test_a_manager_that_does_not_read_does_not_stop_the_daemon(manager: socket.socket) -> None:
    with manager, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                filler.sendto(b"x", manager.getsockname())
        notifier = Notifier(manager.getsockname())
        telling = threading.Thread(target=notifier.status, args=("bounded",), daemon=True)
        telling.start()
        telling.join(60)
        assert not telling.is_alive()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (None, None)),
        ({"NOTIFY_SOCKET": "/run/notify"}, ("/run/notify", None)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "30000000"}, ("@n", 30.0)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "5000000", "WATCHDOG_PID": str(os.getpid())}, ("@n", 5.0)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}, ("@n", None)),
        ({"NOTIFY_SOCKET": "vsock:2:1", "WATCHDOG_USEC": "soon"}, (None, None)),
    ],
)
def test_what_the_manager_says_in_the_environment(
    environment: dict[str, str], expected: tuple[str | None, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert service_manager() == expected


def test_a_process_that_the_manager_has_started_itself_is_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    assert not is_a_service()
    monkeypatch.setenv("SYSTEMD_EXEC_PID", "1")
    assert not is_a_service()
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    assert is_a_service()
