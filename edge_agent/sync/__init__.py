"""Brings versions from the registry, or from a file, into the cache: one process, and the daemon's side of it."""
