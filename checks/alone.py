"""Load one file of another library, without the rest of that library or what it needs."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock


class Stub(mock.MagicMock):
    """Stands in for anything. Called with a function alone, as a decorator is, it gives that back."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType):
            return args[0]
        return super().__call__(*args, **kwargs)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a Stub for every module of the package, but those in `real`, and for what is missing."""

    def __init__(self, package: str, real: dict[str, Any]) -> None:
        self.package, self.real = package, real
        self.made: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == self.package or not self.elsewhere(name):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def elsewhere(self, name: str) -> bool:
        """Whether another finder knows the module."""
        top = name.partition(".")[0]
        try:
            finders = [finder for finder in sys.meta_path if finder is not self]
            return any(
                finder.find_spec(top, None) for finder in finders if hasattr(finder, "find_spec")
            )
        except (ImportError, ValueError):
            return False

    def create_module(self, spec: Any) -> Any:
        self.made.add(spec.name)
        module = self.real.get(spec.name) or Stub(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        pass


def load_alone(package: str, file: str, **real: Any) -> Any:
    """The module in a file of an installed package; ImportError if the package is not there.

    file: its path within the package. real: modules of the package that are not to be stubs, by
    their dotted names with __ for each dot. For one of them that is itself a file of the package,
    call load_alone twice.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is not installed: pip install --no-deps {package}")
    places = list(spec.submodule_search_locations or [str(Path(str(spec.origin)).parent)])
    path = next(p for p in (Path(place) / file for place in places) if p.exists())
    stubs = Stubs(package, {name.replace("__", "."): module for name, module in real.items()})
    name = f"alone_{package}_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] == package}
    sys.meta_path.insert(0, stubs)
    sys.modules[name] = module  # dataclasses look there
    try:
        found.loader.exec_module(module)
    finally:
        sys.meta_path.remove(stubs)
        for made in stubs.made:
            sys.modules.pop(made, None)
        sys.modules.update(hidden)
    return module
