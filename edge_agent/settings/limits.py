"""What a prompt, a package and a runner may have: `[limits]`, `[trust]`, `[inference]`."""

from __future__ import annotations

from pydantic import Field

from edge_agent.settings.section import Bytes, Seconds, Section


class LimitSettings(Section):
    """Limits for clients."""

    queue_depth: int = Field(default=32, ge=1, le=100_000, description="prompts waiting and running")
    payload_bytes: int = Field(default=102_400, ge=256, le=1 << 24, description="size of one request")
    deadline_s: Seconds = Field(default=120, description="for prompts without a deadline")
    max_deadline_s: Seconds = Field(
        default=3600, description="the longest deadline that a client may ask for"
    )


class TrustSettings(Section):
    """Which packages may run."""

    public_keys: tuple[str, ...] = Field(
        default=(), description="PEM files; with one, every package must be signed"
    )
    allow_unsigned_code: bool = Field(
        default=False, description="true: model code that nobody signed may run, behind the walls"
    )
    unconfined_code: bool = Field(
        default=False, description="true: model code may run where this host cannot build the walls"
    )


class InferenceSettings(Section):
    """How models run."""

    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="threads for one operation; 0: measured once for each model, and remembered",
    )
    memory_limit_bytes: Bytes = Field(
        default=0, description="all runners together; 0: the limits of the host and its cgroup"
    )
    drain_s: Seconds = Field(default=20, description="time for running prompts at SIGTERM")
    parallel: int = Field(default=4, ge=1, le=16, description="prompts that one model answers at once")
    share_prefixes: bool = Field(
        default=False,
        description="true: clients share the beginnings of prompts, and can tell what others asked",
    )
    kv_bytes: Bytes = Field(
        default=512 << 20, description="keys and values that a model keeps; always at least one context"
    )
