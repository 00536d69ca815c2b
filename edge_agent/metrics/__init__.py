"""What the daemon measures, and how it is written for others: instruments, measurements, names, text."""
