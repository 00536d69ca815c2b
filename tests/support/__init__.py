"""Real servers and real processes for the tests: a broker, a registry, the daemon."""
