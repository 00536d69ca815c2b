"""docs/walkthrough.md: every command on the page, run in its order, against a real registry and a real broker."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import clean_environment

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "walkthrough.md"
MARK = "walkthrough-block"


def blocks() -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def script(found: list[tuple[str, str]]) -> str:
    """One shell script: files are written under the name in their first line, commands run as they stand."""
    lines = ["set -eu", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for number, (language, content) in enumerate(found):
        if language in ("python", "toml"):
            name = content.splitlines()[0].removeprefix("# ")
            lines.append(f"cat >'{name}' <<'END-OF-FILE'\n{content}END-OF-FILE")
        elif language == "sh":
            lines.append(f"echo '{MARK} {number}'\n{content}")
    return "\n".join(lines)


@pytest.mark.long
def test_every_command_of_the_walkthrough_works_as_it_is_written(
    mlflow_server: Server, broker: Broker, tmp_path: Path
) -> None:
    found = blocks()
    assert {language for language, _ in found} == {"sh", "python", "toml", "text"}
    text = script(found).replace("http://localhost:5000", mlflow_server.uri)
    text = text.replace("port = 1883", f"port = {broker.port}").replace("-p 1883", f"-p {broker.port}")
    result = subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env=clean_environment({"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}),
        check=False,
    )
    output = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, output[-8000:]
    printed = re.split(rf"^{MARK} (\d+)$", result.stdout, flags=re.MULTILINE)
    outputs = {int(number): content for number, content in zip(printed[1::2], printed[2::2], strict=True)}
    last = -1
    for number, (language, content) in enumerate(found):
        if language == "sh":
            last = number
        elif language == "text" and last >= 0:
            for line in content.splitlines():
                assert line in outputs[last] or line in result.stderr, (
                    f"{line!r} is missing:\n{output[-8000:]}"
                )
