"""A version's way through a fleet, in waves that halt by themselves.

Who belongs to which wave (`plan.py`), how each device stands to the version (`standing.py`), what happens next
(`rules.py`) and what is retained on the broker (`state.py`, `before.py`) are values and rules without I/O. `console.py`
drives them over a broker and a registry, one console at a time (`lease.py`). ADR 18, docs/fleet.md.
"""
