"""The desired state that a fleet's operator publishes for this device: obeyed, or reported as not understood."""

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
            log.warning("desired state refused reason=%r", str(error))
            return
        self.problem = ""
        self._desire(desired.uris, desired.within_s)
