"""A console's view of many devices: what they say of themselves, what they are asked, and nothing of their own.

There is no server: the broker's retained topics are all that is known. Contract: docs/fleet.md.
"""
