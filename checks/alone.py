"""Load one file of another library, without the rest of that library or what it needs."""

import ast
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
        if len(args) == 1 and not kwargs and isinstance(args[0], (types.FunctionType, type)):
            return args[0]
        return super().__call__(*args, **kwargs)

    def __mro_entries__(self, bases: Any) -> Any:
        return ()  # a class that derives from a Stub is still a class

    def __instancecheck__(self, instance: Any) -> bool:
        return False  # nothing is an instance of what is not there


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a Stub for every module of the package, but those in `real`, and for what is missing of
    what the file itself imports: what other libraries look for in vain must stay missing."""

    def __init__(self, package: str, real: dict[str, Any], source: str) -> None:
        self.package, self.real = package, real
        self.made: set[str] = set()
        self.wanted = set[str]()
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            self.wanted |= {n.rsplit(".", i)[0] for n in names for i in range(n.count(".") + 1)}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        mine = name.partition(".")[0] == self.package
        if mine or (name in self.wanted and not self.elsewhere(name, path)):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def elsewhere(self, name: str, path: Any) -> bool:
        """Whether another finder knows the module."""
        try:
            finders = [finder for finder in sys.meta_path if not isinstance(finder, Stubs)]
            return any(
                finder.find_spec(name, path) for finder in finders if hasattr(finder, "find_spec")
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
    # not find_spec: an adapter may have the package's name, and lies on sys.path too
    path = next((p for place in sys.path if (p := Path(place) / package / file).is_file()), None)
    if path is None:
        raise ImportError(f"{package}/{file} is not installed: pip install --no-deps {package}")
    stubs = Stubs(
        package,
        {name.replace("__", "."): module for name, module in real.items()},
        path.read_text(encoding="utf-8"),
    )
    name = f"alone_{package}_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    module.__package__ = ".".join((package, *Path(file).parent.parts))  # for relative imports
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
