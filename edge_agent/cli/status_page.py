"""The status document for people: the device line by line, then each model with what is going on with it below.

Pure. What a model's lines say, first what stands and then what moves:

    pinned, desired, held → update: the step of the version that comes, and how long those before it took → reason
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edge_agent import printable, terminal
from edge_agent.terminal import Coloured, Rows, human_bytes

Page = list[str | Rows]

_COLOURS = {
    "ready": "green",
    "idle": "green",
    "starting": "cyan",
    "loading": "cyan",
    "degraded": "yellow",
    "absent": "yellow",
    "offline": "red",
    "failed": "red",
}
_DOING = {
    "fetch": "fetching",
    "verify": "verifying",
    "gate": "loading",
    "activate": "waiting for the running prompts to end",
}
_DONE = {"fetch": "fetched", "verify": "verified", "gate": "tried", "activate": "taken over"}


def page(status: Mapping[str, Any], *, now: float) -> Page:
    """
    Args:
        status: as `status --json` prints it.
        now: seconds since 1970.
    """
    parts: Page = [Rows(("", ""), list(_device(status)))]
    models = status["models"]
    if models:
        rows: list[tuple[object, ...]] = [
            (model["name"], _state(model["state"]), model["version"], model["uri"], model["flavor"])
            for model in models
        ]
        notes = [list(_of_model(model, now)) for model in models]
        parts += ["", Rows(("MODEL", "STATE", "VERSION", "URI", "FLAVOR"), rows, notes)]
    return parts


def _device(status: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    cache, registry, broker = status["cache"], status["registry"], status["broker"]
    of = f"edge-agent {status['agent_version']}, queue {status['queue_depth']}"
    yield "state", Coloured(status["state"], _COLOURS.get(status["state"], ""), f"   ({of})")
    for _, text in terminal.troubles_of(status):
        yield "look at", Coloured(printable.line(text), "yellow")
    problem = f": {printable.line(broker['problem'])}" if broker.get("problem") else ""
    connected = "connected" if broker["connected"] else f"not connected{problem}"
    yield "broker", f"{broker['host']}:{broker['port']} {connected}"
    unheard = broker.get("answers_unheard", 0)
    if count := broker.get("answers_undelivered", 0) - unheard:
        yield "", f"did not take {count} answers"
    if unheard:
        yield "", f"had nobody who listened to {unheard} answers"
    yield "registry", f"{registry['uri'] or 'none'}   {_reach(registry)}"
    yield (
        "cache",
        f"{human_bytes(cache['bytes'])} of {human_bytes(cache['quota_bytes'])}, "
        f"{human_bytes(cache['free_bytes'])} free on the disk",
    )
    line = status.get("link") or {}
    if line.get("bytes_per_day"):
        used = "?" if line["used_bytes"] is None else human_bytes(line["used_bytes"])
        yield "line", f"{used} of {human_bytes(line['bytes_per_day'])} today"
    for model in status["models"]:
        if walls := model.get("walls"):
            lacks = "".join(f"; no {wall} ({printable.line(why)})" for wall, why in walls["missing"].items())
            yield "walls", f"{model['name']}: {', '.join(walls['stand'])}{lacks}"


def _reach(registry: Mapping[str, Any]) -> str:
    asking = "being asked now, " if registry.get("asking") else ""
    if registry["last_check"] is None:
        return f"{asking}not asked yet"
    answer = "out of reach"
    if registry["reachable"]:
        answer = "refuses this device" if registry.get("problem") else "reachable"
    return f"{asking}{answer}, last asked {terminal.moment(registry['last_check'])}"


def _of_model(model: Mapping[str, Any], now: float) -> Iterator[tuple[str, object]]:
    yield from terminal.standing_of(model)
    if update := _update(model, now):
        yield "update", update
    if reason := terminal.reason_of(model, but=(model.get("held") or {}).get("reason", "")):
        yield "reason", Coloured(reason, "yellow" if model["state"] in ("failed", "absent") else "")


def _update(model: Mapping[str, Any], now: float) -> str:
    """What becomes of the version that comes, or has come; empty where none does."""
    attempt, progress = model.get("attempt"), model.get("progress")
    if progress and not (attempt and attempt["step"] == "fetch"):  # of the fallback
        return f"fetching {_bytes(progress)}"
    if not attempt or attempt["step"] == "held":
        return ""
    which, step, code = f"version {attempt['version']}", attempt["step"], attempt["code"]
    done = "".join(
        f"; {_DONE[known]} in {terminal.span(took)}"
        for known, took in attempt.get("took_s", {}).items()
        if known in _DONE
    )
    if code:
        where = "after it was active" if step == "active" else f"at {step}"
        return f"{which} failed {where}, {terminal.moment(attempt['at'])}: {code}{done}"
    if step == "active":
        return f"{which} is active since {terminal.moment(attempt['at'])}{done}" if done else ""
    doing = f"fetching {_bytes(progress)}" if progress else step_of(attempt)
    return f"{which}: {doing}, for {terminal.span(max(0.0, now - attempt['at']))}{done}"


def step_of(attempt: Mapping[str, Any]) -> str:
    """What is done with a version now; `attempt` is that of a model in the status, and has not ended."""
    if golden := attempt.get("golden"):
        return f"trying, golden prompt {golden['asking']} of {golden['of']}"
    return _DOING.get(step := str(attempt["step"]), step)


def _bytes(progress: Mapping[str, Any]) -> str:
    done, total = progress["bytes"], progress["total_bytes"]
    percent = f" ({100 * done // total} %)" if total else ""
    left = "" if progress["eta_s"] is None else f", {terminal.span(progress['eta_s'])} left"
    return f"{human_bytes(done)} of {human_bytes(total)}{percent}, {human_bytes(progress['bytes_per_s'])}/s{left}"


def _state(state: str) -> Coloured:
    return Coloured(state, _COLOURS.get(state, ""))
