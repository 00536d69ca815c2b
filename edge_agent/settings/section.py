"""What all sections of the settings have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86_400)]


class Section(BaseModel):
    """One table of the file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
