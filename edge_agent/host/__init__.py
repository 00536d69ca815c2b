"""What this machine has: control groups, memory, CPUs, and the name that all of it goes by."""
