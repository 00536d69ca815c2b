"""When the power is cut off, and what is going on: from a seed, so that a run can be repeated and continued.

A cut depends on the seed and its own number alone. `damage` says what is wrong with a device that has booted again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Activity(StrEnum):
    """What is going on, besides prompts, which always are."""

    PROMPTS = "prompts"
    UPDATE = "update"
    IMPORT = "import"
    JOURNAL = "journal rebuild"
    UPGRADE = "upgrade"


LONGEST_S = {
    Activity.PROMPTS: 30.0,
    Activity.UPDATE: 120.0,
    Activity.IMPORT: 60.0,
    Activity.JOURNAL: 45.0,
    Activity.UPGRADE: 420.0,
}
"""A cut comes within this time after its activity has begun: what it takes in an emulated machine, and then some."""
EARLY = (0.0, 0.2, 0.8)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One end of the power.

    Attributes:
        delay_s: how long after the activity has begun.
        early: the share of blocks that the disk makes durable before it is told to, in no order.
    """

    number: int
    activity: Activity
    delay_s: float
    early: float


def cuts(seed: int, first: int, count: int) -> Iterator[Cut]:
    """Cut `first` and those after it. Every five of them have each activity once."""
    for number in range(first, first + count):
        within = list(Activity)
        random.Random(f"{seed} {number // len(within)}").shuffle(within)
        drawn = random.Random(f"{seed} cut {number}")
        activity = within[number % len(within)]
        yield Cut(
            number=number,
            activity=activity,
            delay_s=round(drawn.uniform(0, LONGEST_S[activity]), 1),
            early=drawn.choice(EARLY),
        )


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
        versions: installed program versions that count as whole.
        current: the one that is in use.
        damaged: files of these that are not what their wheels had.
    """

    mounted: str = ""
    complaints: Sequence[str] = ()
    state: str = ""
    answer: str = ""
    verified: tuple[int, str] = (0, "")
    versions: Sequence[str] = ()
    current: str = ""
    damaged: Sequence[str] = ()
    prompts: Sequence[Prompt] = field(default_factory=tuple)


def damage(seen: Seen, right: Sequence[str]) -> list[str]:
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
    for prompt in seen.prompts:
        if not prompt.answers:
            found.append(f"lost: {prompt.name}")
        elif len(set(prompt.answers)) > 1:
            found.append(f"two answers: {prompt.name}: {prompt.answers}")
        elif prompt.answers[0][0] not in (200, 500):  # 500: it was running at two ends of the daemon
            found.append(f"refused: {prompt.name}: {prompt.answers[0]}")
    return found
