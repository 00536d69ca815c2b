"""sd_notify: tells the service manager how the daemon is doing.

Owns the sending end of `$NOTIFY_SOCKET`. It never raises into the daemon and never waits for the manager. It sends
READY once, STATUS at each change, WATCHDOG from the main loop as long as the daemon's parts are alive, STOPPING
once, and EXTEND_TIMEOUT while a start or a stop takes long. Without a socket every call does nothing.

Source: sd_notify(3), "Notes" and "Well-known assignments" (systemd 252).
"""

from __future__ import annotations

import logging
import socket

log = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 0.5


class Notifier:
    """Sends messages to the service manager. Owned by the main thread.

    Args:
        address: `$NOTIFY_SOCKET`, a path or `@` and an abstract name; None if there is no manager.
        watchdog_interval_s: the manager restarts a daemon that is silent for so many seconds; None for no watchdog.
    """

    def __init__(self, address: str | None, watchdog_interval_s: float | None = None) -> None:
        self.watchdog_interval_s = watchdog_interval_s
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._watchdog_due = float("-inf")
        self._failed = False

    def ready(self, status: str = "") -> None:
        """READY=1: the daemon has started; with an optional status line."""
        self._send("READY=1", *([_status(status)] if status else []))

    def status(self, text: str) -> None:
        """STATUS: one line for `systemctl status`."""
        self._send(_status(text))

    def watchdog(self, now: float) -> None:
        """WATCHDOG=1: the daemon is alive. Call it often; it sends at most twice in each interval.

        Args:
            now: monotonic seconds.
        """
        if self.watchdog_interval_s is None or now < self._watchdog_due:
            return
        if self._send("WATCHDOG=1"):
            self._watchdog_due = now + self.watchdog_interval_s / 2

    def stopping(self, status: str = "") -> None:
        """STOPPING=1: the daemon has begun to stop."""
        self._send("STOPPING=1", *([_status(status)] if status else []))

    def extend_timeout(self, seconds: float) -> None:
        """EXTEND_TIMEOUT: the start or the stop may take this many seconds more, from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send(self, *lines: str) -> bool:
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
                end.settimeout(_SEND_TIMEOUT_S)  # a manager that does not read must not block the daemon
                end.sendto("\n".join(lines).encode(), self._address)
                return True
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("service manager not told code=notify_failed error=%s", error)
        return False


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())[:1024]
