"""Measurements, never gates: run by hand, numbers go into notes."""
