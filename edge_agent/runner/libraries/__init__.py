"""What a runner of this agent's own wrapper imports: of MLflow what loads a package, and nothing beside it.

`import mlflow.pyfunc` brings pandas, and everything by which MLflow judges models, with a web server in it: half of its
memory and of its time, and no answer of the wrapper takes any of it. Nothing is taken away:

    DEFERRED  modules that MLflow only names. They are there, and are imported where one is used for the first time.
    LEFT_OUT  libraries that MLflow does without. `mlflow-skinny`, which a device has, does not bring them.

Code of somebody else's package is never run like this: it finds its libraries as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from edge_agent.runner.libraries.deferred import Deferred

DEFERRED: Mapping[str, Sequence[str]] = {
    "mlflow.genai": (),
    "mlflow.gateway": (),
    "pandas": ("DataFrame", "Series"),
}
"""Modules → their classes that MLflow writes into annotations when it is imported."""
LEFT_OUT = ("pyarrow", "scipy")


def lighten() -> None:
    """Defers and leaves out what was not imported yet. For a process that runs no code but this agent's own.

    It does not import: that is MLflow's own `import`, and the package's, afterwards.
    """
    for library in LEFT_OUT:
        sys.modules.setdefault(library, None)  # type: ignore[arg-type]  # an import raises ModuleNotFoundError
    sys.meta_path.insert(0, Deferred(DEFERRED))
