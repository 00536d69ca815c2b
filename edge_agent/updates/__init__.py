"""What should run, and who asked for it."""
