"""What a fleet's operator tells this device over MQTT: obeyed, or reported as not understood."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from edge_agent.package.reference import ModelRef
from edge_agent.updates import choice

log = logging.getLogger(__name__)


class DesiredState:
    """`model/desired`. The network thread hands it in; any thread may look at `problem`.

    Args:
        refs: what the settings of each configured model name.
        desire: told the wanted uri of each model that is named, empty to follow the settings again, and in the course
            of how many seconds to ask the registry.

    Attributes:
        problem: why the last one is not obeyed; empty when it is.
    """

    def __init__(
        self, refs: Mapping[str, ModelRef], desire: Callable[[Mapping[str, str], float], None]
    ) -> None:
        self.problem = ""
        self._refs = refs
        self._desire = desire

    def take(self, payload: bytes) -> None:
        """Obeys a desired state as a whole, or not at all."""
        try:
            desired = choice.parse_desired(payload, refs=self._refs)
        except choice.BadDesired as error:
            self.problem = str(error)
            log.warning("desired state refused code=%s reason=%r", error.code, str(error))
            return
        self.problem = ""
        self._desire(desired.uris, desired.within_s)


class SyncRequests:
    """`ctl/sync`. The network thread hands it in.

    Args:
        check: told in the course of how many seconds to ask the registry; 0 for at once.
    """

    def __init__(self, check: Callable[[float], None]) -> None:
        self._check = check

    def take(self, payload: bytes) -> None:
        """Asks the registry, if that is what the message wants."""
        try:
            within_s = choice.parse_sync(payload)
        except choice.BadDesired as error:
            log.warning("request to check refused code=%s reason=%r", error.code, str(error))
            return
        self._check(within_s)
