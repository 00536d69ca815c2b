"""`edge-agent fleet rollout`: brings a version to all devices in waves, and says what becomes of it.

A rollout is on the broker, not in this process: Ctrl-C leaves it there, and any console continues it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_agent import terminal
from edge_agent.cli.command import FAILED, Command, FiniteRange, Group, Invocation
from edge_agent.cli.fleet import options, rollout_page
from edge_agent.errors import BrokerUnreachable
from edge_agent.fleet.broker import FleetBroker
from edge_agent.fleet.devices import Device
from edge_agent.fleet.rollout.console import Clocks, Console, check_nothing_active, no_rollout
from edge_agent.fleet.rollout.plan import (
    MAX_FAILED,
    MAX_SOAK_S,
    Limits,
    Plan,
    check_devices,
    check_version,
    make_plan,
)
from edge_agent.fleet.rollout.request import Verb
from edge_agent.fleet.rollout.state import OVER, Phase, State
from edge_agent.fleet.rollout.view import View, names_of
from edge_agent.topics import FleetTopics

if TYPE_CHECKING:
    from edge_agent.fleet.rollout.registry import RolloutRegistry

INTERRUPTED = 130
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
_CLOCKS = Clocks(wall_s=time.time, mono_s=time.monotonic, sleep=time.sleep)


class _Rollout(Group):
    """What is no command of its own begins a rollout: `rollout NAME VERSION` is `rollout start NAME VERSION`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {*self.commands, *self.get_help_option_names(ctx)}
        return super().parse_args(ctx, ["start", *args] if args and args[0] not in own else args)


@click.group(cls=_Rollout)
def rollout() -> None:
    """Bring a version to all devices in waves that halt by themselves.

    `rollout NAME VERSION` is short for `rollout start NAME VERSION`. The settings need [mqtt] and [registry].

    \b
    Examples:
      edge-agent fleet rollout assistant 8 --canary press-3,press-9 --waves 5%,25%,100% --soak 30m
      edge-agent fleet rollout status assistant
      edge-agent fleet rollout abort assistant
    """


class _Soak(click.ParamType[float]):
    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", str(value))
        if match is None or (seconds := float(match[1]) * _UNITS[match[2]]) > MAX_SOAK_S:
            self.fail(f"{value!r} is no time such as 90s, 30m or 2h, up to {MAX_SOAK_S / 86_400:.0f}d")
        return seconds


class _Shares(click.ParamType[tuple[float, ...]]):
    name = "shares"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        shares = [share.strip().removesuffix("%") for share in str(value).split(",")]
        if not all(re.fullmatch(r"\d{1,3}(\.\d{1,6})?", share) for share in shares):
            self.fail(f"{value!r} is no list of shares such as 5%,25%,100%")
        return tuple(map(float, shares))


@rollout.command(cls=Command)
@click.argument("name")
@click.argument("version", type=click.IntRange(1, 10**18 - 1))
@click.option("--canary", "canaries", default="", metavar="A,B", help="Devices that come first, by name.")
@click.option(
    "--waves",
    type=_Shares(),
    default="5%,25%,100%",
    show_default=True,
    metavar="SHARES",
    help="Shares of all devices, canaries included, up to 100%.",
)
@click.option(
    "--soak",
    type=_Soak(),
    default="30m",
    show_default=True,
    metavar="TIME",
    help="How long each wave is watched.",
)
@click.option(
    "--max-failed",
    type=click.IntRange(0, MAX_FAILED),
    default=0,
    show_default=True,
    metavar="N",
    help="Halt when more devices than this have failed.",
)
@click.option(
    "--min-speed",
    type=FiniteRange(0, 1),
    default=0.8,
    show_default=True,
    metavar="RATIO",
    help="Halt when a device is slower than this share of its own speed before; 0: never.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document at the end; lines go to stderr.")
@options.devices_option
@click.pass_obj
def start(
    invocation: Invocation,
    name: str,
    version: int,
    canaries: str,
    waves: tuple[float, ...],
    soak: float,
    max_failed: int,
    min_speed: float,
    as_json: bool,
    devices_file: Path | None,
) -> None:
    """Roll VERSION of the model NAME out, and stay until it is done or halts.

    NAME is the model's name in the devices' settings. Each wave is told to run VERSION; what is outside
    follows the alias to the old one. After the last wave the alias moves, and nobody is told anything.

    Ctrl-C leaves the rollout as it is; `rollout resume NAME` continues it, from any console.
    Exits with 0 when it is done, with 1 when it was refused, halted or aborted.

    \b
    Examples:
      edge-agent fleet rollout assistant 8 --canary press-3,press-9 --waves 5%,25%,100% --soak 30m
      edge-agent fleet rollout assistant 8 --max-failed 2 --min-speed 0.8 --json
    """
    with options.console(invocation) as (broker, topics):
        registry = _registry(invocation)
        console = _console(broker, topics, name, devices_file, registry)
        console.collect()
        check_nothing_active(console.view)
        devices = console.view.devices()
        ref = check_devices(devices, name)
        plan = make_plan(
            name=name,
            version=version,
            ref=ref,
            instead_of=check_version(
                version, ref=ref, tags=registry.tags_of(ref, version), named=registry.named_by(ref)
            ),
            devices=names_of(devices, name),
            canaries=[each.strip() for each in canaries.split(",") if each.strip()],
            percents=waves,
            limits=Limits(soak_s=soak, max_failed=max_failed, min_speed=min_speed),
        )
        _say_plan(plan, devices, as_json=as_json)
        console.begin(plan)
        state = _drive(
            console, lambda state: state.phase in OVER or state.phase is Phase.HALTED, as_json=as_json
        )
    _end(state, as_json=as_json)


def _say_plan(plan: Plan, devices: Sequence[Device], *, as_json: bool) -> None:
    if as_json:
        return
    offline = sum(device.state == "offline" for device in devices if device.model(plan.name) is not None)
    without = sum(device.model(plan.name) is None for device in devices)
    terminal.print_page(rollout_page.plan_page(plan))
    if offline:
        terminal.echo(f"{offline} of them are offline: they take it when they are back")
    if without:
        terminal.echo(f"{without} more devices have not reported a model {plan.name!r}: they are in no wave")


@rollout.command(cls=Command)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def status(invocation: Invocation, name: str, as_json: bool) -> None:
    """Show where the rollout of the model NAME is. Needs the broker only.

    \b
    Examples:
      edge-agent fleet rollout status assistant
      edge-agent fleet rollout status assistant --json | jq .state
    """
    with options.console(invocation) as (broker, topics):
        view = View(topics, name)
        view.take_all(broker.collect([view.state_topic]))
    if view.problem is not None:
        raise view.problem
    if view.heard is None:
        raise no_rollout()
    if as_json:
        terminal.echo(json.dumps(rollout_page.document(view.heard), ensure_ascii=False))
        return
    terminal.print_page(rollout_page.page(view.heard, now=time.time()))
    terminal.echo(_driver(view.heard, time.time()))


def _driver(state: State, now: float) -> str:
    """Who drives it."""
    if state.phase in OVER:
        return ""
    if state.lease is not None and now < state.lease.expires_at:
        return f"console {state.lease.console} drives it"
    return f"no console drives it; {rollout_page.what_next(state)}"


@rollout.command(cls=Command)
@click.argument("name")
@options.devices_option
@click.pass_obj
def pause(invocation: Invocation, name: str, devices_file: Path | None) -> None:
    """Tell no more devices, and pass no more waves, until somebody resumes.

    \b
    Examples:
      edge-agent fleet rollout pause assistant
    """
    state = _ask(invocation, name, devices_file, Verb.PAUSE, lambda state: True)
    terminal.echo(f"paused in wave {state.wave + 1} of {len(state.plan.waves)}")


@rollout.command(cls=Command)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document at the end; lines go to stderr.")
@options.devices_option
@click.pass_obj
def resume(invocation: Invocation, name: str, as_json: bool, devices_file: Path | None) -> None:
    """Continue the rollout of NAME, whoever began it, and stay until it is done or halts.

    After a halt it goes on without the devices that have failed or are in trouble now. While another
    console drives it, this one watches, and takes over when that one is gone.

    \b
    Examples:
      edge-agent fleet rollout resume assistant
    """
    state = _ask(
        invocation,
        name,
        devices_file,
        Verb.RESUME,
        lambda state: state.phase in OVER or state.phase is Phase.HALTED,
        as_json=as_json,
    )
    _end(state, as_json=as_json)


@rollout.command(cls=Command)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document at the end; lines go to stderr.")
@options.devices_option
@click.pass_obj
def abort(invocation: Invocation, name: str, as_json: bool, devices_file: Path | None) -> None:
    """End the rollout of NAME: every device follows the alias again, to the version that it has still.

    Not once the last wave has passed: the alias moves then.

    \b
    Examples:
      edge-agent fleet rollout abort assistant
    """
    state = _ask(
        invocation,
        name,
        devices_file,
        Verb.ABORT,
        lambda state: state.phase is Phase.ABORTED,
        as_json=as_json,
    )
    if as_json:
        terminal.echo(json.dumps(rollout_page.document(state), ensure_ascii=False))
    else:
        terminal.echo(f"aborted; the devices follow {state.plan.uri} to version {state.plan.instead_of}")


def _ask(
    invocation: Invocation,
    name: str,
    devices_file: Path | None,
    verb: Verb,
    is_over: Callable[[State], bool],
    *,
    as_json: bool = False,
) -> State:
    """Asks the console that drives the rollout, or drives it itself, until it is over.

    Raises:
        RolloutRefused: it makes no sense now.
    """
    with options.console(invocation) as (broker, topics):
        console = _console(broker, topics, name, devices_file, _registry(invocation))
        console.collect()
        console.ask(verb)
        return _drive(console, is_over, as_json=as_json)


def _registry(invocation: Invocation) -> RolloutRegistry:
    """Its client takes a while to import."""
    from edge_agent.fleet.rollout.registry import RolloutRegistry

    return RolloutRegistry(invocation.settings().registry)


def _console(
    broker: FleetBroker,
    topics: FleetTopics,
    name: str,
    devices_file: Path | None,
    registry: RolloutRegistry,
) -> Console:
    view = View(topics, name, expected=options.listed(devices_file) or ())
    return Console(view, broker=broker, registry=registry, clocks=_CLOCKS)


def _drive(console: Console, is_over: Callable[[State], bool], *, as_json: bool) -> State:
    """Stays until it is over, and shows what happens."""
    try:
        with rollout_page.shown(as_json=as_json) as console.tell:
            return console.run(is_over)
    except KeyboardInterrupt:
        try:
            if console.leave():
                terminal.echo("nobody has answered yet: what was asked is taken back", err=True)
        except BrokerUnreachable:
            terminal.echo("the broker cannot be reached: what was asked may still be done", err=True)
        if console.state is not None:
            terminal.echo(
                f"the rollout is {console.state.phase}; {rollout_page.what_next(console.state)}", err=True
            )
        sys.exit(INTERRUPTED)


def _end(state: State, *, as_json: bool) -> None:
    """Says how it ended, and ends this process so."""
    if as_json:
        terminal.echo(json.dumps(rollout_page.document(state), ensure_ascii=False))
    elif state.phase is Phase.DONE:
        terminal.echo(
            f"done: {state.plan.uri} names version {state.plan.version}; {rollout_page.tally(state)}"
        )
    else:
        terminal.echo(f"edge-agent: {rollout_page.ended(state)}", err=True)
        if advice := rollout_page.what_next(state):
            terminal.echo(f"            {advice}", err=True)
    sys.exit(0 if state.phase is Phase.DONE else FAILED)
