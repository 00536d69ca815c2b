"""Which walls a version's runner is asked for, and what is said of those that stand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_agent.errors import Unconfined
from edge_agent.package import trust
from edge_agent.package.trust import Rule, TrustDecision
from edge_agent.serving.seat import Serving
from tests.support.committed import DECISION
from tests.support.scripted_runner import Script, ScriptedHost
from tests.unit.serving.conftest import NewLife

CODE = replace(DECISION, rule=Rule.UNSIGNED_CODE_ALLOWED, unsigned_code=True)
WRAPPER = replace(DECISION, rule=Rule.SHIPPED_WRAPPER)
NO_LANDLOCK = {"files": "this kernel has no Landlock", "tcp": "this kernel has no Landlock"}


def test_only_code_that_this_agent_does_not_ship_is_a_packages_own() -> None:
    own = {rule for rule in Rule if trust.runs_own_code(replace(DECISION, rule=rule))}
    assert own == {Rule.SIGNED_CODE, Rule.UNSIGNED_CODE_ALLOWED}


@pytest.mark.parametrize(
    ("decision", "unconfined", "confined"),
    [(DECISION, False, False), (WRAPPER, False, False), (CODE, False, True), (CODE, True, False)],
)
def test_only_a_packages_own_code_must_be_confined_and_only_the_wrapper_is_taken_for_it(
    decision: TrustDecision, unconfined: bool, confined: bool, new_life: NewLife
) -> None:
    life = new_life(
        allow_unsigned_code=True,
        unconfined_code=unconfined,
        sandbox={"network": True, "read": ["/srv/table"]},
    )
    life.serve(1, decision=decision)
    request = life.newest_runner(1).request
    assert request is not None
    assert (request.confined, request.network, request.read) == (confined, True, ["/srv/table"])
    assert request.shipped_wrapper == (decision is WRAPPER)


def test_the_status_says_which_walls_stand_while_it_is_loaded(new_life: NewLife, host: ScriptedHost) -> None:
    life = new_life(idle_unload_s=60)
    assert life.lifecycle.status()["walls"] is None
    host.script(1, Script(walls=["limits"], missing_walls=NO_LANDLOCK))
    life.serve(1)
    assert life.lifecycle.status()["walls"] == {"stand": ["limits"], "missing": NO_LANDLOCK}
    host.now_s += 60.0
    life.lifecycle.unload_when_idle()
    assert life.lifecycle.status()["walls"] is None


def test_code_without_walls_is_a_trouble_and_data_without_walls_is_not(
    new_life: NewLife, host: ScriptedHost
) -> None:
    life = new_life(allow_unsigned_code=True, unconfined_code=True)
    for version, missing in ((1, NO_LANDLOCK), (2, NO_LANDLOCK), (3, {"tcp": "it is old"})):
        host.script(version, Script(missing_walls=missing))
    life.serve(1)
    assert life.lifecycle.unconfined == ""
    for version in (2, 3):
        life.serve(version, decision=CODE)
        said = life.lifecycle.unconfined
        assert ("files: this kernel has no Landlock" in said) == (version == 2), "tcp is not of the minimum"


def test_a_version_that_cannot_be_confined_is_not_put_into_quarantine(
    new_life: NewLife, host: ScriptedHost
) -> None:
    life = new_life(allow_unsigned_code=True)
    life.serve(1)
    host.script(2, Script(load_error=Unconfined("this host cannot confine it")))
    life.commit(2, decision=CODE)
    with pytest.raises(Unconfined):
        life.adopt(2)
    assert (life.active, life.quarantined, life.ask()) == (1, {}, 1)
    assert life.lifecycle.serving is Serving.READY
