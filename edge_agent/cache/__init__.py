"""Versions on disk: always whole, always verified, changed by one process at a time, within a quota."""
