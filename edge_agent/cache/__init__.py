"""Versions on disk: always whole, always verified."""
