"""A language model that somebody else wrote: it tries what the prompt names, and answers with what came of it.

{"prompt": "read /etc/passwd"}          see `TRICKS`
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow


def _in_a_thread(_: str) -> str:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append("done"))
    thread.start()
    thread.join()
    return found[0]


def _in_a_loop(_: str) -> str:
    return asyncio.run(asyncio.sleep(0, "done"))


def _write_for_itself(_: str) -> str:
    folder = Path(tempfile.mkdtemp())
    (folder / "file").write_text("done")
    (folder / "other").mkdir()
    (folder / "file").rename(folder / "other" / "moved")
    text = (folder / "other" / "moved").read_text()
    shutil.rmtree(folder)
    (Path(tempfile.gettempdir()) / "left").write_text("left behind")
    return f"{text} in {tempfile.gettempdir()}"


def _write(path: str) -> str:
    Path(path).write_text("mine")
    return "done"


def _connect(address: str) -> str:
    if address.startswith("/"):
        socket.socket(socket.AF_UNIX).connect(address)
    else:
        socket.create_connection(("127.0.0.1", int(address)), 10)
    return "done"


def _kill(_: str) -> str:
    os.kill(os.getppid(), signal.SIGKILL)
    return "done"


TRICKS: dict[str, Callable[[str], str]] = {
    "read": lambda path: Path(path).read_text(),
    "write": _write,
    "connect": _connect,
    "kill": _kill,
    "fork": lambda _: str(os.fork()),
    "run": lambda program: subprocess.run([program], capture_output=True, check=True, text=True).stdout,
    "environment": lambda _: Path(f"/proc/{os.getppid()}/environ").read_text(),
    "thread": _in_a_thread,
    "loop": _in_a_loop,
    "scratch": _write_for_itself,
    "threads": lambda _: str(threading.active_count()),
    "score": lambda _: Path("/proc/self/status").read_text(),
}


class Curious(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
        text = str(model_input["prompt"][0] if hasattr(model_input, "columns") else model_input["prompt"])
        name, _, argument = text.partition(" ")
        try:
            return TRICKS[name](argument)
        except Exception as error:  # noqa: BLE001 - the answer says what came of it
            return f"{type(error).__name__}: {error}"

    def predict_stream(self, context: Any, model_input: Any, params: Any = None) -> Iterator[Any]:
        if "messages" in model_input:  # only counted: nobody chats with it
            count = len(str(model_input["messages"]))
        else:
            yield self.predict(context, model_input, params)
            count = 1
        yield {"finish_reason": "stop", "usage": {"prompt_tokens": count, "completion_tokens": 1}}


mlflow.models.set_model(Curious())
