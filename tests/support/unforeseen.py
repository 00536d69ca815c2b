"""`edge-agent` as a real process in which something that nobody foresaw happens to chosen prompts.

    python unforeseen.py PYTHON -m edge_agent ARGUMENT…

Its exceptions quote the prompt, as those of a library do: at its acceptance, and on its way to the runner.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

ON_ACCEPTANCE = "unforeseen on acceptance"
ON_THE_WAY = "unforeseen on the way"


def _raising(function: Callable[..., Any], words: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if words in repr(arguments):
            raise ValueError(f"cannot understand {arguments!r}")
        return function(*arguments, **options)

    return call


def main() -> None:
    from edge_agent.chat.intake import Intake
    from edge_agent.runner import protocol

    Intake.take = _raising(Intake.take, ON_ACCEPTANCE)  # type: ignore[method-assign]
    protocol.with_system = _raising(protocol.with_system, ON_THE_WAY)
    sys.argv = sys.argv[3:]
    runpy.run_module("edge_agent", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
