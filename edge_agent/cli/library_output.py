"""What libraries print by themselves, kept from the screen: logs, warnings, banners, of Python and of what it calls.

What a command has to say it returns or raises. Only where something fails that nobody foresaw, the end of what was
printed is shown, because it may say why.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import click

from edge_agent import terminal
from edge_agent.errors import EdgeAgentError

_STDOUT, _STDERR = 1, 2
_SHOWN_BYTES = 8192


@contextmanager
def hidden() -> Iterator[None]:
    """Hides what this process writes to stdout and stderr in the block. Only for commands: it is the whole process."""
    with tempfile.TemporaryFile() as printed:
        _flush()
        saved = {number: os.dup(number) for number in (_STDOUT, _STDERR)}
        for number in saved:
            os.dup2(printed.fileno(), number)
        unforeseen = True
        try:
            yield
            unforeseen = False
        except (EdgeAgentError, click.ClickException, TimeoutError, KeyboardInterrupt):
            unforeseen = False
            raise
        finally:
            _flush()
            for number, original in saved.items():
                os.dup2(original, number)
                os.close(original)
            if unforeseen:
                printed.seek(max(0, printed.seek(0, os.SEEK_END) - _SHOWN_BYTES))
                terminal.echo(printed.read().decode(errors="replace"), err=True)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
