"""The steps about the OpenAI interface: off at first, started by a connection, confined, gone when it is idle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.boot import ANSWER, QUESTION
from tests.boot.agent import Agent, expect
from tests.boot.container import Container, wait_until

UNIT = "edge-agent-http"
_ASK = """
import http.client, json, socket, sys
connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=120)
if sys.argv[1] == "unix":
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect("/run/edge-agent-http.sock")
body = json.dumps({"messages": [{"role": "user", "content": sys.argv[2]}]})
connection.request("POST", "/v1/chat/completions", body, {"Host": "localhost", **json.loads(sys.argv[3])})
response = connection.getresponse()
print(json.dumps([response.status, json.loads(response.read())]))
"""
_LOOK = """
import urllib.request
with urllib.request.urlopen("http://127.0.0.1:8080/", timeout=120) as response:
    print(response.headers["Content-Security-Policy"])
    print(response.read().decode())
"""


class Interface:
    """The steps, in their order. They leave it on."""

    def __init__(self, container: Container, agent: Agent, *, exposure_limit: float) -> None:
        self._in = container
        self._agent = agent
        self._exposure_limit = exposure_limit

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("OpenAI interface", self.start_with_a_connection),
            ("OpenAI interface in a network", self.refuse_a_network),
            ("OpenAI interface idle", self.end_when_idle),
        ]

    def start_with_a_connection(self) -> str:
        off = self._in.run("systemctl", "is-enabled", f"{UNIT}.socket", check=False).stdout.strip()
        expect(off == "disabled", f"the socket is {off}")
        self._in.run("systemctl", "enable", "--now", f"{UNIT}.socket")
        expect(self._of("ActiveState") == "inactive", "it runs before anybody asks")
        for way in ("tcp", "unix"):
            status, document = self._ask(way)
            expect(status == 200, f"over {way}: {document}")
            text = document["choices"][0]["message"]["content"]
            expect(text == ANSWER, text)
        page = self._in.run("python3", "-c", _LOOK).stdout
        expect(page.startswith("default-src 'none'") and "walls stand around it" in page, page[:3000])
        status, document = self._ask("tcp", Host="evil.test")
        expect(status == 421, str(document))
        status_file = self._in.run("cat", f"/proc/{self._of('MainPID')}/status").stdout
        fields = dict(line.split(":\t", 1) for line in status_file.splitlines() if ":\t" in line)
        expect(fields["Seccomp"] == "2", "it has no filter of system calls")
        user, daemons = fields["Uid"].split()[0], self._in.run("id", "-u", "edge-agent").stdout.strip()
        expect(user not in ("0", daemons), f"its user is {user}")
        said = self._journal()
        expect("walls missing" not in said, said)
        exposure = self._in.run("systemd-analyze", "security", "--no-pager", UNIT).stdout
        found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", exposure)
        expect(found is not None and float(found[1]) <= self._exposure_limit, exposure[-300:])
        return f"off at first; then 200 over TCP and the socket, a page, 421 for another Host; user {user}, all walls"

    def refuse_a_network(self) -> str:
        """A socket that a network may reach, without a token and TLS."""
        folder = self._in.root / f"etc/systemd/system/{UNIT}.socket.d"
        folder.mkdir()
        (folder / "open.conf").write_text("[Socket]\nListenStream=0.0.0.0:8081\n")
        self._in.run("systemctl", "stop", UNIT)
        self._in.run("systemctl", "daemon-reload")
        self._in.run("systemctl", "restart", f"{UNIT}.socket")
        self._ask("tcp", check=False)
        # More often than systemd's default limit of starts, behind which the socket would be stopped.
        wait_until(lambda: int(self._of("NRestarts") or 0) > 5, 120, "failures")
        wait_until(lambda: self._of("ExecMainStatus") == "78", 60, "one that has failed, between two starts")
        said = self._journal()
        expect("http.token_file" in said, said)
        (folder / "open.conf").unlink()
        folder.rmdir()
        self._in.run("systemctl", "daemon-reload")
        self._in.run("systemctl", "restart", f"{UNIT}.socket")
        status, document = self._ask("tcp")
        expect(status == 200, str(document))
        return "exit 78, keys named, without a token and TLS; without that address it answers again"

    def end_when_idle(self) -> str:
        pid = self._of("MainPID")
        wait_until(lambda: self._of("ActiveState") == "inactive", 120, "its end")
        expect(self._of("ExecMainStatus") == "0", self._of("ExecMainStatus"))
        status, document = self._ask("tcp")
        expect(status == 200, str(document))
        return f"ended by itself with 0; the next connection started it again: {pid} → {self._of('MainPID')}"

    def _ask(self, way: str, *, check: bool = True, **headers: str) -> tuple[int, dict[str, Any]]:
        said = self._in.run("python3", "-c", _ASK, way, QUESTION, json.dumps(headers), check=check).stdout
        status, document = json.loads(said or "[0, {}]")
        return status, document

    def _of(self, name: str) -> str:
        return self._in.run("systemctl", "show", UNIT, "--value", f"--property={name}").stdout.strip()

    def _journal(self) -> str:
        return self._in.run("journalctl", "--no-pager", f"--unit={UNIT}", "--output=cat").stdout
