"""The real terminal that tests look at: what stands on it, its size, its colours, its keys, its end."""

from __future__ import annotations

import sys

from tests.support.terminal import Screen

_PYTHON = (sys.executable, "-c")


def test_a_line_is_as_long_as_the_screen_is_wide() -> None:
    with Screen([*_PYTHON, "print('x' * 50)"], columns=40, rows=5) as screen:
        assert screen.wait() == 0
        assert screen.lines() == ["x" * 40, "x" * 10]


def test_what_left_the_screen_can_be_read() -> None:
    program = "for n in range(9): print(n)"
    with Screen([*_PYTHON, program], columns=40, rows=3) as screen:
        assert screen.wait() == 0
        assert screen.scrolled() == [str(n) for n in range(9)]
        assert "0" not in screen.lines()


def test_keys_and_colours_and_the_exit_code_arrive() -> None:
    program = "import sys; print('\\033[32mready\\033[0m', end='', flush=True); sys.exit(len(input()))"
    with Screen([*_PYTHON, program], columns=40, rows=5) as screen:
        assert screen.wait_for("ready") == ["ready"]
        assert "\x1b[32mready" in screen.coloured()
        screen.type("abc")
        screen.press("Enter")
        assert screen.wait() == 3


def test_a_program_that_keeps_the_screen_is_seen_to_do_so() -> None:
    with Screen([*_PYTHON, "print('\\033[?1049h\\033[?25lmine', flush=True); input()"]) as screen:
        screen.wait_for("mine")
        assert not screen.is_as_found
