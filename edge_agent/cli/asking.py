"""One prompt from the command line, with or without the daemon; both ways give the same result.

Result: question, answer, model, version, flavor, finish_reason, usage, queue_ms, first_token_ms, tokens_per_s.
`first_token_ms` counts from the prompt's acceptance, so the time in the queue is a part of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent import terminal
from edge_agent.cache.store import Store
from edge_agent.chat import messages
from edge_agent.cli import waiting
from edge_agent.cli.command import reported_error, said_by_daemon, unanswered
from edge_agent.errors import EdgeAgentError, ModelFailed, NoModel, RunnerError, UnknownModel
from edge_agent.runner.protocol import Done, with_system
from edge_agent.serving.lifecycle import budget_of, lifecycle_of
from edge_agent.serving.runner import Runner
from edge_agent.settings import Settings, find_control_socket
from edge_agent.transport import control

OnText = Callable[[str], None]

_GRACE_S = 10.0


def ask_daemon(
    settings: Settings, question: str, *, model: str | None, timeout_s: float | None, on_text: OnText
) -> dict[str, Any]:
    """Asks the running daemon. While nothing comes, says on stderr what is waited for.

    Args:
        timeout_s: the prompt's deadline; None takes the settings' `limits.deadline_s`.
        on_text: called with each piece of the answer.

    Raises:
        DaemonNotRunning: nothing answers on the control socket.
        PromptError: the daemon refused the prompt; the error has the daemon's code.
    """
    name = model or settings.default_model or "the model"

    def tell(obstacle: str) -> None:
        terminal.echo(f"edge-agent: {name}: {obstacle}", err=True)

    with waiting.told_while_silent(lambda: waiting.obstacle(_status(settings), model), tell) as heard:

        def take(text: str) -> None:
            heard()
            on_text(text)

        done = prompt_daemon(settings, {"text": question}, model=model, timeout_s=timeout_s, on_text=take)
    return messages.result(question, done["answer"], version=int(done["version"]), flavor=done["flavor"])


def prompt_daemon(
    settings: Settings,
    prompt: Mapping[str, Any],
    *,
    model: str | None,
    timeout_s: float | None = None,
    on_text: OnText,
) -> dict[str, Any]:
    """Has the running daemon answer a prompt. Whatever ends this ends the prompt, too: the connection is closed.

    Args:
        prompt: its `text`, or its `messages`.
        timeout_s, on_text: see `ask_daemon`.

    Returns:
        The last event: the `answer`, and the `version` and `flavor` that gave it.

    Raises:
        DaemonNotRunning, PromptError: see `ask_daemon`.
    """
    deadline_s = timeout_s if timeout_s is not None else settings.limits.deadline_s
    events = control.call(
        find_control_socket(settings),
        "probe",
        timeout_s=deadline_s + _GRACE_S,
        model=model,
        deadline_ms=max(1, round(deadline_s * 1000)),
        **prompt,
    )
    with contextlib.closing(events):
        for event in events:
            kind = event.get("event")
            if kind == "delta":
                on_text(event["text"])
            elif kind == "error":
                raise _explained(reported_error(event), settings, model)
            elif kind == "done":
                if "error" in event["answer"]:
                    raise reported_error(event["answer"]["error"])
                return event
    raise unanswered()


def _status(settings: Settings) -> dict[str, Any]:
    return said_by_daemon(settings, "status")


def _explained(error: EdgeAgentError, settings: Settings, model: str | None) -> EdgeAgentError:
    """That there is no model is no last word where one is on its way."""
    if not isinstance(error, NoModel):
        return error
    try:
        status = _status(settings)
    except (EdgeAgentError, TimeoutError):
        return error
    why = waiting.obstacle(status, model)
    if waiting.is_coming(status, model):
        name = model or status["models"][0]["name"]
        remedy = "ask again then; `edge-agent status --watch` shows it"
        return NoModel(f"model {name!r} is not here yet: {why}", remedy=remedy)
    why = why.removeprefix("absent: ")
    return error if why in error.message else NoModel(f"{error.message}; {why}", remedy=error.remedy)


def ask_direct(
    settings: Settings, question: str, *, model: str | None, timeout_s: float | None, on_text: OnText
) -> dict[str, Any]:
    """Loads the active version from the cache into a new runner and asks it, without daemon and journal.

    Raises:
        NoModel: no version of this model is in the cache, or it does not load.
        PromptError: the model refused the prompt.
        RunnerError: the runner died. The message quotes its last output, which must not be logged.
    """
    name = model or settings.default_model
    if name is None:
        raise NoModel("no model is configured", remedy="add a [models.NAME] table to the settings")
    if name not in settings.models:
        raise UnknownModel(f"no model is called {name!r} here; there are {', '.join(settings.models)}")
    body = messages.encode({"messages": [{"role": "user", "content": question}]})
    request = messages.parse(body, limit_bytes=settings.limits.payload_bytes)
    document = with_system(request.document, settings.models[name].system)
    store = Store(settings.state_dir)
    lifecycle = lifecycle_of(settings, name, store, budget_of(settings, store))
    try:
        with lifecycle.lease() as lease:
            if lease is None:
                raise NoModel(
                    f"model {name!r} cannot answer: {lifecycle.reason}", remedy="run `edge-agent models pull`"
                )
            if lease.system_refused and document.get("messages") != request.document.get("messages"):
                raise ModelFailed(lease.system_refused)
            try:
                answer = _generate(
                    lease.runner,
                    document,
                    model=name,
                    timeout_s=timeout_s or settings.limits.deadline_s,
                    on_text=on_text,
                )
            except RunnerError as error:
                raise type(error)(f"{error.message}; it printed: {lease.runner.last_output()}") from error
            return messages.result(question, answer, version=lease.version, flavor=lease.flavor)
    finally:
        lifecycle.close()


def _generate(
    runner: Runner, document: dict[str, Any], *, model: str, timeout_s: float, on_text: OnText
) -> dict[str, Any]:
    """Runs one prompt, passes its text on as it comes, and returns the completion."""
    started_s = time.monotonic()
    first_s: float | None = None
    texts: list[str] = []
    for item in runner.generate("probe", document, timeout_s=timeout_s):
        if isinstance(item, Done):
            return messages.completion(
                request_id="probe",
                created_s=int(time.time()),
                model=model,
                text="".join(texts),
                finish_reason=item.finish_reason,
                usage=item.usage,
                timings=timings_now(item, started_s=started_s, first_s=first_s),
            )
        first_s = time.monotonic() if first_s is None else first_s
        texts.append(item.text)
        on_text(item.text)
    raise ModelFailed("the model gave no answer")


def timings_now(done: Done, *, started_s: float, first_s: float | None) -> dict[str, float]:
    """The `timings` of an answer that ends in this moment and waited for nobody.

    Args:
        started_s, first_s: monotonic; `first_s` is None where no text came.
    """
    ended_s = time.monotonic()
    return messages.timings(
        queued_s=started_s,
        started_s=started_s,
        first_s=first_s if first_s is not None else ended_s,
        ended_s=ended_s,
        tokens=done.usage.get("completion_tokens", 0),
        measured=done.timings,
    )
