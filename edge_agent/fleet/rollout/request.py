"""What one console asks of the one that acts: a document on `{prefix}/v1/@fleet/rollout/NAME/request`, retained. Pure.

The state's own topic has one writer, the console with the lease. Whoever has it next finds the request, too, so that it
is not lost where that console dies; an answer stands in the state, under the request's id.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum

_MAX_BYTES = 1024
_HEX = re.compile(r"[0-9a-f]{8,32}")


class Verb(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True)
class Request:
    """
    Attributes:
        id: of this request.
        rollout: the id of the rollout that it is about; of another one it is not obeyed.
    """

    id: str
    rollout: str
    verb: Verb

    def encode(self) -> bytes:
        return json.dumps({"id": self.id, "rollout": self.rollout, "do": str(self.verb)}).encode()

    @classmethod
    def parse(cls, body: bytes) -> Request | None:
        """None for nothing, and for what is no request. Never raises."""
        if not body or len(body) > _MAX_BYTES:
            return None
        try:
            document = json.loads(body)
            ids = document["id"], document["rollout"]
            verb = Verb(document["do"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not all(isinstance(each, str) and _HEX.fullmatch(each) for each in ids):
            return None
        return cls(id=ids[0], rollout=ids[1], verb=verb)
