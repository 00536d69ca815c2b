"""What a rollout asks of the registry, and the one thing that it changes there: the alias at the end."""

from __future__ import annotations

from collections.abc import Mapping

from edge_agent.errors import UnknownReference
from edge_agent.fleet.rollout.plan import Plan, RolloutRefused
from edge_agent.package.reference import ModelRef
from edge_agent.settings.registry import RegistrySettings
from edge_agent.sync.registry import Registry
from edge_agent.sync.tls import TlsFiles

_LONGEST_REQUEST_S = 10.0
"""Shorter than the console's lease: it is renewed between two requests."""


class RolloutRegistry:
    """The registry of the settings. Imports MLflow with the first change."""

    def __init__(self, settings: RegistrySettings) -> None:
        if not settings.uri:
            raise RolloutRefused(
                "the settings name no registry",
                remedy="set registry.uri: a rollout ends by moving an alias there",
            )
        timeout_s = min(settings.timeout_s, _LONGEST_REQUEST_S)
        self._registry = Registry(settings.uri, timeout_s=timeout_s, tls=TlsFiles.of(settings))

    def tags_of(self, ref: ModelRef, version: int) -> Mapping[str, str]:
        """The tags of a version.

        Raises:
            UnknownReference: there is no such version.
            EdgeAgentError: the registry cannot be asked.
        """
        return self._registry.find(ref.at_version(version)).tags

    def named_by(self, ref: ModelRef) -> int | None:
        """The version that an alias names; None for none.

        Raises:
            EdgeAgentError: the registry cannot be asked.
        """
        try:
            return self._registry.find(ref).version
        except UnknownReference:
            return None

    def move_alias(self, plan: Plan) -> None:
        """See `console.AliasRegistry`."""
        named = self.named_by(plan.ref)
        if named == plan.version:
            return
        if named not in (None, plan.instead_of):
            raise RolloutRefused(
                f"somebody has moved {plan.uri} to version {named} since the rollout began",
                remedy=f"set it back to {plan.instead_of} and resume, or abort",
            )
        self._registry.move_alias(plan.ref, plan.version)
