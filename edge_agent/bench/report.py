"""The benchmark's result as one document, and as tables for people. Pure except for printing.

The document: `model, version, digest, host, threads, launches, tokens, sides, at_once, prefix, newcomer, over_http,
memory, roofline, ratios, notes`. Each ratio includes the two medians that it compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from edge_agent import terminal
from edge_agent.bench.measurements import Measured, Together, percentile
from edge_agent.bench.timing import summary

BARE, BARE_DEFAULT, PYFUNC, RUNNER, MQTT = "bare", "bare_default_threads", "pyfunc", "runner", "mqtt"
SIDE_NAMES = {
    BARE: "bare library",
    BARE_DEFAULT: "bare library, its own threads",
    PYFUNC: "mlflow.pyfunc",
    RUNNER: "runner",
    MQTT: "over MQTT",
}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One figure with a goal.

    Attributes:
        value: `left / right`, or `left - right` if the name has a minus sign.
        goal: such as `>= 0.93`.
        unit: the unit of `left` and `right`.
    """

    name: str
    value: float
    goal: str
    left: float
    right: float
    unit: str


def document(
    head: Mapping[str, Any],
    sides: Mapping[str, Measured],
    together: Together | None,
    roofline: Mapping[str, float],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The whole document, with medians instead of single values.

    Args:
        head: the model, the host and the options.
        roofline: `bandwidth_bytes_per_s` and `model_bytes`.
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
    result["ratios"] = [asdict(ratio) for ratio in _ratios(result)]
    result["notes"] = list(notes)
    return result


def _together(together: Together) -> dict[str, Any]:
    at_once = {
        str(count): {
            "tokens_per_s": round(median(rates), 2),
            "first_token_ms_p50": round(median(together.first_token_ms[count]), 2),
            "first_token_ms_p95": round(percentile(together.first_token_ms[count], 0.95), 2),
        }
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


def _ratios(result: Mapping[str, Any]) -> list[Ratio]:
    sides, memory = result["sides"], result["memory"]
    short = {name: side["32"] for name, side in sides.items()}
    found: list[Ratio | None] = [
        _divided("decode, these threads / the library's own", "tokens/s", ">= 1.5",
                 short[BARE]["decode_tokens_per_s"], short[BARE_DEFAULT]["decode_tokens_per_s"]),
        _subtracted("memory, runner - bare library", "MB", "<= 130",
                    memory[RUNNER]["resident_bytes"] / 1e6, memory[BARE]["resident_bytes"] / 1e6),
    ]  # fmt: skip
    if MQTT in sides:
        alone = short[MQTT]["first_token_ms"]
        newcomer, prefix = result["newcomer"], result["prefix"]
        found += [
            _subtracted("first token, over MQTT - bare library", "ms", "<= 10 on a small model",
                        alone, short[BARE]["first_token_ms"]),
            _divided("decode, over MQTT / bare library", "tokens/s", ">= 0.93",
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
    return [ratio for ratio in found if ratio is not None]


def _divided(name: str, unit: str, goal: str, left: float | None, right: float | None) -> Ratio | None:
    if not left or not right:
        return None  # an answer of one token has no decode rate
    return Ratio(name=name, value=round(left / right, 3), goal=goal, left=left, right=right, unit=unit)


def _subtracted(name: str, unit: str, goal: str, left: float, right: float) -> Ratio:
    difference = round(left - right, 2)
    return Ratio(
        name=name, value=difference, goal=goal, left=round(left, 2), right=round(right, 2), unit=unit
    )


def print_report(result: Mapping[str, Any]) -> None:
    """Prints tables on stdout."""
    terminal.echo(f"model     {result['model']} version {result['version']}, {result['threads']} threads")
    terminal.echo(f"host      {result['host']}")
    terminal.echo(
        f"medians of {result['launches']} launches of each side, in turn; {result['tokens']} new tokens\n"
    )
    rows = [
        (SIDE_NAMES[name], length, *(_number(values[key]) for key in _COLUMNS))
        for name, lengths in result["sides"].items()
        for length, values in lengths.items()
    ]
    terminal.print_table(("SIDE", "PROMPT", *_COLUMNS.values()), rows)
    if "at_once" in result:
        terminal.echo()
        terminal.print_table(
            ("AT ONCE", "TOKENS/S", "FIRST TOKEN P50 MS", "P95 MS"),
            [
                (count, *(_number(value) for value in row.values()))
                for count, row in result["at_once"].items()
            ],
        )
    terminal.echo()
    _print_memory(result)
    roofline = result["roofline"]
    share = f"{roofline['decode_share']:.0%}" if roofline["decode_share"] else "not known"
    terminal.echo(
        f"\nroofline  {terminal.human_bytes(roofline['bandwidth_bytes_per_s'])}/s read, "
        f"{terminal.human_bytes(roofline['model_bytes'])} for a token: "
        f"at most {roofline['limit_tokens_per_s']:.1f} tokens/s; decode reaches {share}\n"
    )
    terminal.print_table(
        ("COMPARED", "VALUE", "GOAL", "LEFT", "RIGHT", "UNIT"),
        [(r["name"], _number(r["value"]), r["goal"], _number(r["left"]), _number(r["right"]), r["unit"])
         for r in result["ratios"]],
    )  # fmt: skip
    for note in result["notes"]:
        terminal.echo(f"note      {note}")


def _print_memory(result: Mapping[str, Any]) -> None:
    rows = [
        (
            SIDE_NAMES.get(name, name),
            terminal.human_bytes(row["resident_bytes"]),
            terminal.human_bytes(row["peak_bytes"]) if "peak_bytes" in row else "",
        )
        for name, row in result["memory"].items()
    ]
    terminal.print_table(("MEMORY", "RESIDENT", "PEAK"), rows)


_COLUMNS = {
    "first_token_ms": "FIRST TOKEN MS",
    "total_ms": "TOTAL MS",
    "prefill_tokens_per_s": "PREFILL TOKENS/S",
    "decode_tokens_per_s": "DECODE TOKENS/S",
}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
