"""What is asked of the daemon over the control socket, by the operation's name: probe, chat, status, metrics, recent,
models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from edge_agent.chat.intake import Intake
from edge_agent.errors import PromptError
from edge_agent.transport.control import Call, Operation
from edge_agent.transport.control_prompts import ControlPrompts


class RunOperation(Protocol):
    """Runs an operation on the cache by its name. What comes from outside is checked there."""

    def __call__(
        self,
        do: str,
        *,
        name: object,
        version: object,
        file: int | None,
        allow_older: object,
        now: object,
        on_event: Callable[[Mapping[str, Any]], None],
    ) -> Any: ...


def control_operations(
    *,
    prompts: ControlPrompts,
    intake: Intake,
    status: Callable[[], Mapping[str, Any]],
    headline: Callable[[], Mapping[str, Any]],
    metrics: Callable[[], Mapping[str, Any]],
    recent: Callable[[], Mapping[str, Any]],
    run_operation: RunOperation,
    note_refusal: Callable[[str], None],
    note_gateway: Callable[[int, object], None],
) -> dict[str, Operation]:
    """All operations, for the control server.

    Args:
        status: the full status document.
        headline: the status topic's object, which costs no look at the disk.
        metrics: their document.
        recent: what the last prompts took.
        note_refusal: told the code of each prompt that is not accepted.
        note_gateway: told the process of each request of the gateway, and what it says that it has in memory.
    """

    def refusals_noted(ask: Callable[[Call, Intake], None]) -> Operation:
        def run(call: Call) -> None:
            try:
                ask(call, intake)
            except PromptError as error:  # one that was accepted has its error in its answer
                note_refusal(error.code)
                raise

        return run

    def on_status(call: Call) -> None:
        call.send("done", status=headline() if call.request.get("brief") is True else status())

    def on_models(call: Call) -> None:
        """An operation on the cache; its progress goes to the client."""
        fields = call.request
        result = run_operation(
            str(fields.get("do")),
            name=fields.get("name"),
            version=fields.get("version"),
            file=call.file,
            allow_older=fields.get("allow_older"),
            now=fields.get("now"),
            on_event=lambda event: call.send("progress", progress=dict(event)),
        )
        call.send("done", result=result)

    def gateway_noted(operation: Operation) -> Operation:
        def run(call: Call) -> None:
            if (resident_bytes := call.request.get("gateway_memory_bytes")) is not None:
                note_gateway(call.process, resident_bytes)
            operation(call)

        return run

    return {
        "probe": refusals_noted(prompts.probe),
        "chat": gateway_noted(refusals_noted(prompts.chat)),
        "status": gateway_noted(on_status),
        "metrics": gateway_noted(lambda call: call.send("done", metrics=metrics())),
        "recent": gateway_noted(lambda call: call.send("done", recent=recent())),
        "models": on_models,
    }
