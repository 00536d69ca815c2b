"""Whose prompts a package goes on from: with a wrapper that knows owners, and with that of 0.1.0, which knows none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from edge_agent.runner.loader import WrapperModel

SYSTEM = "Be brief."


def row(owner: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": owner}]}


class OldLane:
    """A prompt; what it has run is kept when it is closed, once."""

    def __init__(self, wrapper: OldWrapper, text: str) -> None:
        self.saw = list(wrapper.kept)
        self.text = text
        self._wrapper = wrapper
        self._closed = False

    def __iter__(self) -> Iterator[Any]:
        yield [(0, self.text)]

    def close(self) -> None:
        if not self._closed:
            self._wrapper.kept.append(self.text)
        self._closed = True


class OldWrapper:
    """0.1.0's: its sessions serve whoever comes. It has memory for `room` lanes.

    Attributes:
        kept: texts of the prompts that it has run and not forgotten.
        lanes: all that it ever opened.
    """

    def __init__(self, room: int = 4) -> None:
        self.kept: list[str] = []
        self.lanes: list[OldLane] = []
        self.forgot = 0
        self._engine = self.sessions = self
        self._room = room

    def unwrap_python_model(self) -> OldWrapper:
        return self

    def forget(self) -> None:
        self.kept.clear()
        self.forgot += 1

    def predict_streams(self, requests: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[OldLane]:
        if sum(not lane._closed for lane in self.lanes) >= self._room:
            return []
        ((asked, _),) = requests
        self.lanes.append(OldLane(self, asked["messages"][0]["content"]))
        return self.lanes[-1:]


class NewWrapper(OldWrapper):
    """One that knows owners."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[str] = []
        self.shared: list[str] = []

    def share(self, system: str) -> None:
        self.shared.append(system)

    def predict_streams(self, requests: Any, owner: str = "") -> list[OldLane]:
        self.owners.append(owner)
        return super().predict_streams(requests)


def model_of(wrapper: OldWrapper) -> WrapperModel:
    return WrapperModel(wrapper, flavor="scripted", signature="chat", golden=None)


def test_the_wrapper_is_told_whose_each_prompt_is() -> None:
    wrapper = NewWrapper()
    model = model_of(wrapper)
    assert None not in (model.start(row("a"), "a"), model.start(row("b"), "b"))
    assert wrapper.owners == ["a", "b"]
    assert wrapper.forgot == 0


@pytest.mark.parametrize("system", [SYSTEM, ""])
def test_after_the_warm_up_the_wrapper_shares_what_was_warmed(system: str) -> None:
    wrapper = NewWrapper()
    assert model_of(wrapper).warm_up(system) == ""
    assert wrapper.shared == [system]


def test_one_owner_goes_on_from_its_own_prompts_with_the_old_wrapper() -> None:
    wrapper = OldWrapper()
    model = model_of(wrapper)
    for _ in range(3):
        lane = model.start(row("a"), "a")
        assert lane is not None
        lane.close()
    assert wrapper.forgot == 0
    assert wrapper.lanes[-1].saw == ["a", "a"]


@pytest.mark.parametrize("seed", range(50))
def test_no_owner_goes_on_from_anothers_prompt_with_the_old_wrapper(seed: int) -> None:
    """Prompts of three owners begin and end in any order, beside one another."""
    chance, wrapper = random.Random(seed), OldWrapper()
    model = model_of(wrapper)
    open_lanes: list[Any] = []
    for _ in range(40):
        if open_lanes and chance.random() < 0.5:
            lane = open_lanes.pop(chance.randrange(len(open_lanes)))
            lane.close()
            lane.close()
        else:
            owner = chance.choice("abc")
            if lane := model.start(row(owner), owner):
                open_lanes.append(lane)
    assert len(wrapper.lanes) > 5
    for lane in wrapper.lanes:
        assert set(lane.saw) <= {lane.text}
