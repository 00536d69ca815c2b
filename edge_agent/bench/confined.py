"""A side of the benchmark behind a runner's walls: `python -m edge_agent.bench.confined MODULE ARGUMENT…`.

They are built before the module is imported, and with it numpy. It may read what the first argument names: the model.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from edge_agent.host.confinement import Confinement, confine

if __name__ == "__main__":
    confine(Confinement(read=(Path(sys.argv[2]),)))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
