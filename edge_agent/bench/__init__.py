"""`edge-agent bench`, see `run.py`. Empty: each side is a process that imports this, and its memory is measured."""
