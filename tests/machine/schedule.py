"""When the power is cut off, and what is going on: from a seed, so that a run can be repeated and continued.

A cut depends on the seed and its own number alone. `damage` says what is wrong with a device that has booted again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Activity(StrEnum):
    """What is going on, besides prompts, which always are."""

    PROMPTS = "prompts"
    UPDATE = "update"
    IMPORT = "import"
    JOURNAL = "journal rebuild"
    UPGRADE = "upgrade"


class Moment(StrEnum):
    """What a cut comes after."""

    BEGUN = "begun"  # the activity has begun
    TAKEN = "taken"  # the device has told the broker that it has a prompt: PUBACK
    SAID = "said"  # the device has published an answer, or its state
    OVER = "over"  # the activity has reported its end
    WRITTEN = "written"  # the disk has taken a write, and stalls


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a kind of machine is.

    Attributes:
        longest_s: what each activity takes, and then some: a cut comes within this time.
        prompts_s: from one prompt to the next.
        answer_s: what an answer may take after a boot.
        ready_s: what a boot may take, until the agent is ready.
    """

    longest_s: Mapping[Activity, float]
    prompts_s: float
    answer_s: float
    ready_s: float


EARLY = (0.0, 0.2, 0.8)
LATENCY_S = (0.0, 0.002)
MOST_EVENTS = 6
MOST_WRITES = 1000
_SOONEST_S, _LATEST_S = 0.0005, 0.2


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One end of the power.

    Attributes:
        moment: what it comes after.
        count: how often that must have happened since the activity began.
        delay_s: how long after that.
        early: the share of blocks that the disk makes durable before it is told to, in no order.
        latency_s: what the disk takes for a write and for a flush.
    """

    number: int
    activity: Activity
    moment: Moment
    count: int
    delay_s: float
    early: float
    latency_s: float


def cuts(seed: int, first: int, count: int, pace: Pace) -> Iterator[Cut]:
    """Cut `first` and those after it. Every five of them have each activity once.

    Most of the time nothing is on its way to the disk. So one cut in five comes at any time, two come within moments
    after a step that the device has reported, and two after a write that the disk has not yet answered.
    """
    for number in range(first, first + count):
        within = list(Activity)
        random.Random(f"{seed} {number // len(within)}").shuffle(within)
        drawn = random.Random(f"{seed} cut {number}")
        activity = within[number % len(within)]
        last = Moment.SAID if activity is Activity.PROMPTS else Moment.OVER
        moment = drawn.choice((Moment.BEGUN, Moment.TAKEN, last, Moment.WRITTEN, Moment.WRITTEN))
        delay_s = _SOONEST_S * (_LATEST_S / _SOONEST_S) ** drawn.random()
        if moment is Moment.BEGUN:
            delay_s = drawn.uniform(0, pace.longest_s[activity])
        yield Cut(
            number=number,
            activity=activity,
            moment=moment,
            count=_count(moment, drawn),
            delay_s=round(delay_s, 4),
            early=drawn.choice(EARLY),
            latency_s=drawn.choice(LATENCY_S),
        )


def _count(moment: Moment, drawn: random.Random) -> int:
    if moment is Moment.WRITTEN:  # the first ones as often as the many after them
        return int(MOST_WRITES ** drawn.random())
    return drawn.randint(1, MOST_EVENTS) if moment in (Moment.TAKEN, Moment.SAID) else 1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt that the broker took.

    Attributes:
        answers: all that came, as (status, text).
    """

    name: str
    answers: Sequence[tuple[int, str]]


@dataclass(kw_only=True)
class Seen:
    """What a device shows after a boot.

    Attributes:
        mounted: the options of the root file system.
        complaints: the kernel's, about the file system.
        state: the agent's own word for itself.
        answer: of the active version, over the control socket.
        verified: what `models verify` said, and its exit code.
        models: versions of the model in the cache that may run.
        versions: installed program versions that count as whole.
        current: the one that is in use.
        damaged: files of these that are not what their wheels had.
    """

    mounted: str = ""
    complaints: Sequence[str] = ()
    state: str = ""
    answer: str = ""
    verified: tuple[int, str] = (0, "")
    models: Sequence[int] = ()
    versions: Sequence[str] = ()
    current: str = ""
    damaged: Sequence[str] = ()
    prompts: Sequence[Prompt] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What had been reported as done before a cut, and must still be so.

    Attributes:
        model: this version of the model is in the cache.
        program: this version of the program is the current one.
    """

    model: int | None = None
    program: str = ""


def damage(seen: Seen, right: Sequence[str], reported: Reported) -> list[str]:
    """What is not as it was promised; nothing, when all is well.

    Args:
        right: the answers that versions of the model may give to `seen.answer`'s question.
    """
    found = [f"the file system: {line}" for line in seen.complaints]
    if "rw" not in seen.mounted.split(","):
        found.append(f"the root file system is mounted {seen.mounted or 'nowhere'}")
    if seen.state != "ready":
        found.append(f"the agent is {seen.state or 'not there'}")
    if seen.answer not in right:
        found.append(f"the active version answers {seen.answer!r}")
    if seen.verified[0]:
        found.append(f"models verify: {seen.verified[1]}")
    if seen.current not in seen.versions:
        found.append(f"the current version is {seen.current or 'none'}, whole are {' '.join(seen.versions)}")
    found += [f"installed and damaged: {name}" for name in seen.damaged]
    if reported.model is not None and reported.model not in seen.models:
        found.append(f"version {reported.model} was reported as done, the cache has {list(seen.models)}")
    if reported.program and reported.program != seen.current:
        found.append(f"{reported.program} was reported as installed, {seen.current or 'nothing'} is current")
    for prompt in seen.prompts:
        if not prompt.answers:
            found.append(f"lost: {prompt.name}")
        elif len(set(prompt.answers)) > 1:
            found.append(f"two answers: {prompt.name}: {prompt.answers}")
        elif prompt.answers[0][0] not in (200, 500):  # 500: it was running at two ends of the daemon
            found.append(f"refused: {prompt.name}: {prompt.answers[0]}")
    return found
