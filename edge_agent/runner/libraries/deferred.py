"""Modules that are imported when they are used for the first time, not when they are named.

`importlib.util.LazyLoader` does not do: it imports a package as soon as one of its submodules is imported, and has
nothing for the classes that others write into annotations. Here a package gets stand-ins for these, and is imported at
the first look at anything else that it should have. It is the same module object before and after. One thread.

    find_spec → a module without contents → first look at it → its own loader fills it → as it is anywhere
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class Deferred(MetaPathFinder):
    """Finds some modules, and defers them. One that is imported already, or is not installed, stays as it is.

    Args:
        modules: by their names; for each the classes that get stand-ins. A package with such is imported before its
            submodules, which must not see them.
    """

    def __init__(self, modules: Mapping[str, Sequence[str]]) -> None:
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname in self._modules:
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Later(spec.loader, self._modules[fullname])
            return spec
        package = fullname.rpartition(".")[0]
        if self._modules.get(package) and _Later.fill(sys.modules[package]) and fullname in sys.modules:
            return ModuleSpec(fullname, _There(sys.modules.pop(fullname)))  # else it would be imported twice
        return None


class _Later(Loader):
    """Leaves a module to its own loader at the first look at it."""

    def __init__(self, loader: Loader, classes: Sequence[str]) -> None:
        self._loader = loader
        self._classes = classes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def look(name: str) -> Any:
            self.fill(module)
            return getattr(module, name)

        vars(module)["__getattr__"] = look
        vars(module).update({name: _StandIn(name, (), {"module": module}) for name in self._classes})

    @staticmethod
    def fill(module: ModuleType) -> bool:
        """Imports a module if it was deferred until now, and says whether it was.

        Raises:
            ImportError: it cannot be imported. It stays deferred, so the next look says so as well.
        """
        spec = module.__spec__
        if spec is None or not isinstance(spec.loader, _Later):
            return False
        later = spec.loader
        for key in ("__getattr__", *later._classes):
            vars(module).pop(key, None)
        spec.loader = module.__loader__ = later._loader
        try:
            later._loader.exec_module(module)
        except BaseException:
            spec.loader = module.__loader__ = later
            later.exec_module(module)
            raise
        return True


class _There(Loader):
    """Gives a module that was imported while it was searched for."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _StandIn(type):
    """In place of a class whose module is deferred: no instance exists, and to make one is a look at the module."""

    module: ModuleType

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # annotations ask each class for such
            raise AttributeError(name)
        return getattr(cls._real(), name)

    def __instancecheck__(cls, instance: Any) -> bool:
        found = vars(cls.module).get(cls.__name__)
        return found is not None and found is not cls and isinstance(instance, found)

    def _real(cls) -> Any:
        _Later.fill(cls.module)
        return getattr(cls.module, cls.__name__)
