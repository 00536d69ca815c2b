"""From the registry, or a file, into the cache: one process, and the daemon's side of it."""
