"""What is printed of power cuts: a row for each, and at the end one for each activity."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.machine.rig import Loss
from tests.machine.schedule import Activity, Cut, Moment

HEADER = (
    " cut  activity                        after  going on  early  latency  kernel KiB  disk KiB  prompts  waiting"
    "  again  ready  found"
)
_SUMMARY = (
    "activity         cuts  going on  kernel KiB        disk KiB          prompts  waiting  again  ready         "
    "harm"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cut, and what it left.

    Attributes:
        prompts: those that the broker had taken since the boot; `waiting` of them had no answer.
        repeated: answers that came again.
        ready_s: from the start of the machine to the last answer.
        found: what is not as promised.
    """

    cut: Cut
    loss: Loss
    prompts: int
    waiting: int
    repeated: int
    ready_s: float
    found: Sequence[str]

    def __str__(self) -> str:
        kernel = "-" if self.loss.kernel_bytes is None else str(self.loss.kernel_bytes // 1024)
        return (
            f"{self.cut.number:>4}  {self.cut.activity:<16} {_after(self.cut):>20}  {self._going_on():>8}"
            f"  {self.cut.early:>5.0%} {self.cut.latency_s * 1000:>5.0f} ms {kernel:>11}"
            f" {self.loss.disk_bytes // 1024:>9} {self.prompts:>8} {self.waiting:>8} {self.repeated:>6}"
            f" {self.ready_s:>6.0f}  {'; '.join(self.found) or 'as promised'}"
        )

    def _going_on(self) -> str:
        if self.loss.over is None:
            return "yes"
        return "no" if self.loss.over == 0 else f"exit {self.loss.over}"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each activity; two figures are median and maximum."""
    yield _SUMMARY
    for activity in [*Activity, None]:
        its = [row for row in rows if activity in (None, row.cut.activity)]
        if not its:
            continue
        seen = [row.loss.kernel_bytes for row in its if row.loss.kernel_bytes is not None]
        kernel = _spread([count / 1024 for count in seen]) if seen else "-"
        disk = _spread([row.loss.disk_bytes / 1024 for row in its])
        ready = _spread([row.ready_s for row in its])
        yield (
            f"{activity or 'all':<16} {len(its):>4} {sum(row.loss.over is None for row in its):>9}  {kernel:<16}"
            f"  {disk:<16} {sum(row.prompts for row in its):>8} {sum(row.waiting for row in its):>8}"
            f" {sum(row.repeated for row in its):>6}  {ready:<12} {sum(bool(row.found) for row in its):>5}"
        )


def _after(cut: Cut) -> str:
    if cut.moment is Moment.BEGUN:
        return f"{cut.delay_s:.1f} s"
    moment = f"{cut.moment} {cut.count}" if cut.moment is Moment.WRITTEN else str(cut.moment)
    return f"{moment} +{cut.delay_s * 1000:.0f} ms"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f}, {max(values):.0f}"
