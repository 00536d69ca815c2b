"""`edge-agent fleet …`: an operator's view of many devices. Contract: docs/fleet.md."""

from __future__ import annotations

import click

from edge_agent.cli.command import Group
from edge_agent.cli.fleet import plan, rollout, status, sync


@click.group(cls=Group)
def fleet() -> None:
    """See and ask all devices of a broker. There is no server: what devices retain there is what is known.

    The settings need [mqtt], and [registry] for a rollout. A device's file works, too, if the broker's
    rules let it read others.

    \b
    Examples:
      edge-agent --config operator.toml fleet status
      edge-agent --config operator.toml fleet plan assistant 8
      edge-agent --config operator.toml fleet rollout assistant 8 --canary press-3
    """


fleet.add_command(status.status)
fleet.add_command(sync.sync)
fleet.add_command(plan.plan)
fleet.add_command(rollout.rollout)
