"""The one file that travels in every package."""
