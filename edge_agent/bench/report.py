"""The benchmark's result as one document. Pure; `page.py` shows it to people.

The document: `model, version, digest, host, threads, launches, tokens, headline, against, sides, at_once, prefix,
newcomer, over_http, memory, roofline, ratios, notes`. Each ratio includes the two medians that it compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from edge_agent.bench.measurements import PEER_AT_ONCE, Measured, PeerTogether, Together, percentile
from edge_agent.bench.timing import summary
from edge_agent.documents import page

BARE, BARE_DEFAULT, PYFUNC, RUNNER, MQTT = "bare", "bare_default_threads", "pyfunc", "runner", "mqtt"
LLAMA_CPP = "llama.cpp"
SIDE_NAMES = {
    BARE: "bare library",
    BARE_DEFAULT: "bare library, its own threads",
    PYFUNC: "mlflow.pyfunc",
    RUNNER: "runner",
    MQTT: "over MQTT",
    LLAMA_CPP: "llama.cpp",
}
HEADLINE_TOKENS = 256
"""Of the prompt whose first token is in the headline."""
_QUALITY = "a comparison with llama.cpp is fair between builds that keep as much of the original"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One figure, and the project's goal for it.

    Attributes:
        value: `left / right`, or `left - right` if the name has a minus sign.
        goal: such as `>= 0.95`, and for what it holds; empty without one.
        left, right: the medians that are compared.
        unit: the unit of `left` and `right`.
    """

    name: str
    value: float
    goal: str
    left: float
    right: float
    unit: str

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None without one."""
        if not self.goal:
            return None
        relation, bound = self.goal.split()[:2]
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)


def document(
    head: Mapping[str, Any],
    sides: Mapping[str, Measured],
    together: Together | None,
    roofline: Mapping[str, float],
    notes: Sequence[str],
    against: Mapping[str, str] | None = None,
    of_peer: PeerTogether | None = None,
) -> dict[str, Any]:
    """The whole document, with medians instead of single values.

    Args:
        head: the model, the host and the options.
        roofline: `bandwidth_bytes_per_s` and `model_bytes`.
        against: the peer whose side is measured, too; None without one.
        of_peer: its answers at once; None without a peer.
    """
    lengths = {
        name: {str(length): summary(timings) for length, timings in measured.timings.items()}
        for name, measured in sides.items()
    }
    memory = {
        name: {
            "resident_bytes": int(median(measured.resident_bytes)),
            "peak_bytes": max(measured.peak_bytes),
        }
        for name, measured in sides.items()
    }
    decode = lengths[BARE]["32"]["decode_tokens_per_s"]
    limit = roofline["bandwidth_bytes_per_s"] / roofline["model_bytes"]
    result: dict[str, Any] = {
        **head,
        "headline": _headline(lengths, MQTT if MQTT in lengths else RUNNER, limit),
        "against": _against(against, lengths, of_peer) if against and of_peer else None,
        "sides": lengths,
        "load_ms": {name: round(median(m.load_ms), 1) for name, m in sides.items() if any(m.load_ms)},
        "memory": memory,
        "roofline": {
            **roofline,
            "limit_tokens_per_s": round(limit, 2),
            "decode_share": round(decode / limit, 3) if decode else None,
        },
    }
    if together is not None:
        result |= _together(together)
        result["memory"]["daemon"] = {"resident_bytes": int(median(together.daemon_bytes))}
        if together.http_ms:
            result["memory"]["gateway"] = {"resident_bytes": int(median(together.gateway_bytes))}
    result["ratios"] = [{**asdict(ratio), "reached": ratio.reached} for ratio in _ratios(result)]
    result["notes"] = [*notes, *([f"{_QUALITY}: {page('models.md')}"] if against else [])]
    return result


def _against(against: Mapping[str, str], lengths: Mapping[str, Any], of_peer: PeerTogether) -> dict[str, Any]:
    """The peer. Its answers at once are worth comparing while they are those that it gives alone."""
    return {
        **against,
        **_first_and_rate(lengths[LLAMA_CPP]),
        "at_once": {str(PEER_AT_ONCE): _at_once(of_peer.tokens_per_s, of_peer.first_token_ms)},
        "equal_answers": {"equal": sum(of_peer.equal), "of": len(of_peer.equal)},
    }


def _headline(lengths: Mapping[str, Any], side: str, limit_tokens_per_s: float) -> dict[str, Any]:
    """What somebody who asks this device meets."""
    found = _first_and_rate(lengths[side])
    rate = found["tokens_per_s"]
    return {
        "side": side,
        **found,
        "memory_share": round(rate / limit_tokens_per_s, 3) if rate else None,
    }


def _first_and_rate(side: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The first token at `HEADLINE_TOKENS`, or at the longest prompt below. Decode after the shortest prompt: then a
    token reads little but weights."""
    length = max((int(length) for length in side if int(length) <= HEADLINE_TOKENS), default=0)
    return {
        "tokens_per_s": side[str(min(map(int, side)))]["decode_tokens_per_s"],
        "first_token_ms": side[str(length)]["first_token_ms"],
        "prompt_tokens": length,
    }


def _together(together: Together) -> dict[str, Any]:
    at_once = {
        str(count): _at_once(rates, together.first_token_ms[count])
        for count, rates in together.tokens_per_s.items()
    }
    result: dict[str, Any] = {
        "at_once": at_once,
        "in_turn_tokens_per_s": round(median(together.in_turn_tokens_per_s), 2),
        "newcomer": {
            "first_token_ms_p50": round(median(together.newcomer_ms), 2),
            "first_token_ms_p95": round(percentile(together.newcomer_ms, 0.95), 2),
        },
        "prefix": None,
        "over_http": None,
    }
    if together.cold_ms:
        result["prefix"] = {
            "cold_ms": round(median(together.cold_ms), 2),
            "known_ms": round(median(together.known_ms), 2),
        }
    if together.http_ms:
        result["over_http"] = {
            "control_first_token_ms": round(median(together.control_ms), 2),
            "http_first_token_ms": round(median(together.http_ms), 2),
        }
    return result


def _at_once(tokens_per_s: Sequence[float], first_token_ms: Sequence[float]) -> dict[str, float]:
    return {
        "tokens_per_s": round(median(tokens_per_s), 2),
        "first_token_ms_p50": round(median(first_token_ms), 2),
        "first_token_ms_p95": round(percentile(first_token_ms, 0.95), 2),
    }


def _ratios(result: Mapping[str, Any]) -> list[Ratio]:
    sides, memory = result["sides"], result["memory"]
    short = {name: side["32"] for name, side in sides.items()}
    found: list[Ratio | None] = [
        _divided("decode, these threads / the library's own", "tokens/s", ">= 1.5",
                 short[BARE]["decode_tokens_per_s"], short[BARE_DEFAULT]["decode_tokens_per_s"]),
        _subtracted("memory, runner - bare library", "MB", "<= 80",
                    memory[RUNNER]["resident_bytes"] / 1e6, memory[BARE]["resident_bytes"] / 1e6),
    ]  # fmt: skip
    if MQTT in sides:
        alone = short[MQTT]["first_token_ms"]
        newcomer, prefix = result["newcomer"], result["prefix"]
        found += [
            _subtracted("first token, over MQTT - bare library", "ms", "<= 10 on a small model",
                        alone, short[BARE]["first_token_ms"]),
            _divided("decode, over MQTT / bare library", "tokens/s", ">= 0.95",
                     short[MQTT]["decode_tokens_per_s"], short[BARE]["decode_tokens_per_s"]),
            _divided("four prompts, at once / one after the other", "tokens/s", "",
                     result["at_once"]["4"]["tokens_per_s"], result["in_turn_tokens_per_s"]),
            _divided("first token of a newcomer, p50 / alone", "ms", "<= 2.5",
                     newcomer["first_token_ms_p50"], alone),
            _divided("first token of a newcomer, p95 / alone", "ms", "",
                     newcomer["first_token_ms_p95"], alone),
            _subtracted("memory, daemon", "MB", "<= 50", memory["daemon"]["resident_bytes"] / 1e6, 0.0),
        ]  # fmt: skip
        if over_http := result["over_http"]:
            found += [
                _subtracted("first token, over HTTP - over the control socket", "ms", "<= 5",
                            over_http["http_first_token_ms"], over_http["control_first_token_ms"]),
                _subtracted("memory, gateway", "MB", "<= 45", memory["gateway"]["resident_bytes"] / 1e6, 0.0),
            ]  # fmt: skip
        if prefix:
            found.append(_divided("first token, known 1,000-token prefix / cold", "ms", "<= 0.10",
                                  prefix["known_ms"], prefix["cold_ms"]))  # fmt: skip
        if LLAMA_CPP in sides:
            found += _against_llama_cpp(result)
    return [ratio for ratio in found if ratio is not None]


def _against_llama_cpp(result: Mapping[str, Any]) -> Iterator[Ratio | None]:
    sides, memory, load = result["sides"], result["memory"], result["load_ms"]
    short, long = "32", "1024"
    yield _divided(
        "decode, over MQTT / llama.cpp",
        "tokens/s",
        ">= 1.15",
        sides[MQTT][short]["decode_tokens_per_s"],
        sides[LLAMA_CPP][short]["decode_tokens_per_s"],
    )
    if long in sides[MQTT]:
        yield _divided(
            "first token at 1,024, over MQTT / llama.cpp",
            "ms",
            "<= 0.5",
            sides[MQTT][long]["first_token_ms"],
            sides[LLAMA_CPP][long]["first_token_ms"],
        )
    at_once = str(PEER_AT_ONCE)
    yield _divided(
        "four prompts at once, over MQTT / llama.cpp",
        "tokens/s",
        ">= 1.5",
        result["at_once"][at_once]["tokens_per_s"],
        result["against"]["at_once"][at_once]["tokens_per_s"],
    )
    yield _divided(
        "memory, runner / llama.cpp",
        "MB",
        "<= 1.0",
        memory[RUNNER]["peak_bytes"] / 1e6,
        memory[LLAMA_CPP]["peak_bytes"] / 1e6,
    )
    yield _divided("load, runner / llama.cpp", "ms", "<= 1.0", load[RUNNER], load[LLAMA_CPP])  # fmt: skip


def _divided(name: str, unit: str, goal: str, left: float | None, right: float | None) -> Ratio | None:
    if not left or not right:
        return None  # an answer of one token has no decode rate
    return Ratio(
        name=name,
        value=round(left / right, 3),
        goal=goal,
        left=round(left, 2),
        right=round(right, 2),
        unit=unit,
    )


def _subtracted(name: str, unit: str, goal: str, left: float, right: float) -> Ratio:
    difference = round(left - right, 2)
    return Ratio(
        name=name, value=difference, goal=goal, left=round(left, 2), right=round(right, 2), unit=unit
    )
