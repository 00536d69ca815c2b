"""The name of a thread as the kernel knows it, and `top -H` shows it: Python keeps its own names to itself."""

from __future__ import annotations

import ctypes

_PR_SET_NAME = 15
_MAX_BYTES = 15


def name_this_thread(name: str) -> None:
    """
    Args:
        name: its first 15 bytes count.

    Source: prctl(2), PR_SET_NAME.
    """
    ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:_MAX_BYTES]))
