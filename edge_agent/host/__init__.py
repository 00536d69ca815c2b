"""This machine: control groups, memory, CPUs, and one line that identifies all of them."""
