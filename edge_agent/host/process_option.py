"""An option of this process, as the kernel keeps it. Source: prctl(2)."""

from __future__ import annotations

import ctypes
import os


def set_process_option(option: int, value: int) -> None:
    """
    Args:
        option: one of `PR_SET_…` that take a number.

    Raises:
        OSError: the kernel refuses, or does not know it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
