"""A rollout's plan: which devices take the version in which wave, and what ends it. Pure.

Owns the order of the devices: first the canaries, by name; then all others by `place_of`. A wave is a place up to which
the version is offered, not a list of devices: so ten thousand devices have a short plan, and a device that appears in
the middle belongs to a wave, too. Refuses to start where finishing could not move one alias that all devices share.

    devices → check_devices → the alias → check_version → make_plan → Plan
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edge_agent import printable
from edge_agent.errors import EdgeAgentError, SettingsError
from edge_agent.fleet.devices import Device
from edge_agent.package.place import place_of
from edge_agent.package.reference import ROLLOUT_TAG, ModelRef

MAX_DEVICES = 10_000
MAX_CANARIES = 100
MAX_WAVES = 20
MAX_SOAK_S = 30 * 86_400.0
MAX_FAILED = MAX_DEVICES
PLACE_DIGITS = 16
"""Of a place, in a plan: no two of ten thousand devices have the same 64 bits."""
_LAST_PLACE = "f" * PLACE_DIGITS
_SHOWN = 5


class RolloutRefused(EdgeAgentError):
    """A rollout does not start, or cannot do now what is asked of it."""

    code = "rollout_refused"


@dataclass(frozen=True, kw_only=True)
class Wave:
    """One step of a plan. Each has all devices of those before it, and at least one more.

    Attributes:
        title: for people: `canaries`, or its share, such as `25%`.
        devices: how many it had when the plan was made, those of earlier waves included.
        upto: the first `PLACE_DIGITS` digits of the last place in it; empty for canaries only.
    """

    title: str
    devices: int
    upto: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a wave is passed, and when the rollout halts.

    Attributes:
        soak_s: how long a wave that has taken the version is watched.
        max_failed: more devices than this may not fail.
        min_speed: of a device's own tokens per second before; 0: speed does not count.
    """

    soak_s: float
    max_failed: int
    min_speed: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What does not change once a rollout has begun.

    Attributes:
        name: the model's, in the settings of the devices.
        version: registered version that is rolled out.
        uri: `models:/NAME@ALIAS`, which all devices follow.
        instead_of: the version that the alias named at the start.
        waves: the last one has all devices.
    """

    name: str
    version: int
    uri: str
    instead_of: int
    canaries: tuple[str, ...]
    waves: tuple[Wave, ...]
    limits: Limits

    @property
    def ref(self) -> ModelRef:
        return ModelRef.parse(self.uri)

    def wave_of(self, device_id: str) -> int:
        """The first wave that has this device, by its number from 0."""
        if device_id in self.canaries:
            return 0
        place = place_of(device_id, name=self.name, version=self.version)[:PLACE_DIGITS]
        last = len(self.waves) - 1
        return next(
            (number for number, wave in enumerate(self.waves) if wave.upto and place <= wave.upto), last
        )


def check_devices(devices: Iterable[Device], name: str) -> ModelRef:
    """The alias that all devices with this model follow.

    Raises:
        RolloutRefused: there is none: no device has the model, a device does not follow an alias, or they follow
            different ones.
    """
    followers: dict[str, list[str]] = {}
    for device in devices:
        model = device.model(name)
        if model is None:
            continue
        if model.wanted is not None and model.wanted.via == "desired":
            raise RolloutRefused(
                f"device {device.device_id} has a desired state for {name!r} already",
                remedy="end what set it: finish or abort that rollout, or publish null for this model "
                "to the device's model/desired",
            )
        followers.setdefault(model.uri, []).append(device.device_id)
    if not followers:
        raise RolloutRefused(
            f"no device reports a model {name!r}",
            remedy="NAME is the one in the devices' settings, [models.NAME]; see `edge-agent fleet status`",
        )
    if len(followers) > 1:
        raise RolloutRefused(
            f"the devices' {name!r} follow different references: {_listed(followers)}",
            remedy="a rollout ends by moving the one alias that all of them follow; give them the same uri",
        )
    return _alias(next(iter(followers)), name)


def _alias(uri: str, name: str) -> ModelRef:
    try:
        ref = ModelRef.parse(uri)
    except SettingsError as error:
        raise RolloutRefused(
            f"the devices report an unknown reference for {name!r}: {error.message}"
        ) from error
    if ref.alias is None:
        raise RolloutRefused(
            f"the devices' {name!r} is fixed to {uri}",
            remedy="a rollout ends by moving an alias: let the devices' uri name one, models:/NAME@ALIAS",
        )
    return ref


def _listed(followers: Mapping[str, Sequence[str]]) -> str:
    shown = [f"{uri or 'nothing'} ({len(ids)}, such as {ids[0]})" for uri, ids in followers.items()]
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


def check_version(version: int, *, ref: ModelRef, tags: Mapping[str, str], named: int | None) -> int:
    """Holds what the registry says of a version against the rules for starting.

    Args:
        ref: the alias that the devices follow.
        tags: of the version.
        named: the version that the alias names now; None for none.

    Returns:
        the version that the alias names.

    Raises:
        RolloutRefused: a tag decides already who takes this version, or the alias names it, or nothing.
    """
    if tags.get(ROLLOUT_TAG):
        raise RolloutRefused(
            f"version {version} of {ref.name!r} has the tag {ROLLOUT_TAG}, which decides already who takes it",
            remedy="delete the tag, or go on with percentages: set the tag higher and move the alias",
        )
    if named is None:
        raise RolloutRefused(
            f"the registry has no {ref}", remedy="set the alias to the version that runs now"
        )
    if named == version:
        raise RolloutRefused(f"{ref} names version {version} already: every device gets it by itself")
    return named


def make_plan(
    *,
    name: str,
    version: int,
    ref: ModelRef,
    instead_of: int,
    devices: Iterable[str],
    canaries: Sequence[str],
    percents: Sequence[float],
    limits: Limits,
) -> Plan:
    """The plan for these devices.

    Args:
        ref: the alias that all devices follow.
        instead_of: the version that it names.
        devices: all that have the model.
        canaries: those that come first.
        percents: shares of all devices, canaries included, in rising order up to 100.

    Raises:
        RolloutRefused: a canary is not among the devices, there are too many of something, or the shares do not rise
            to 100.
    """
    known = set(devices)
    _check(known, canaries, percents)
    first = tuple(dict.fromkeys(canaries))
    places = sorted(
        place_of(device_id, name=name, version=version)[:PLACE_DIGITS] for device_id in known - set(first)
    )
    waves = [Wave(title="canaries", devices=len(first), upto="")] if first else []
    have = len(first)
    for percent in percents:
        if have == len(known):
            break
        have = max(math.ceil(len(known) * percent / 100 - 1e-9), have + 1)
        everybody = have == len(known)
        upto = _LAST_PLACE if everybody else places[have - len(first) - 1]
        waves.append(Wave(title="100%" if everybody else f"{percent:g}%", devices=have, upto=upto))
    return Plan(
        name=name,
        version=version,
        uri=str(ref),
        instead_of=instead_of,
        canaries=first,
        waves=tuple(waves),
        limits=limits,
    )


def _check(known: set[str], canaries: Sequence[str], percents: Sequence[float]) -> None:
    if not 0 < len(known) <= MAX_DEVICES:
        raise RolloutRefused(f"{len(known)} devices have the model; a rollout takes 1 to {MAX_DEVICES}")
    if missing := [device_id for device_id in canaries if device_id not in known]:
        shown = ", ".join(printable.text(device_id[:64]) for device_id in missing[:_SHOWN])
        raise RolloutRefused(
            f"no device that has the model is called {shown}", remedy="see `edge-agent fleet status`"
        )
    if len(canaries) > MAX_CANARIES:
        raise RolloutRefused(f"more than {MAX_CANARIES} canaries: make them a wave")
    rising = all(low < high for low, high in zip((0.0, *percents), percents, strict=False))
    if not percents or not rising or percents[-1] != 100 or len(percents) >= MAX_WAVES:
        raise RolloutRefused(
            "the waves are not shares that rise to 100%",
            remedy="write for example --waves 5%,25%,100%; the last wave is all devices, because the alias then moves",
        )
