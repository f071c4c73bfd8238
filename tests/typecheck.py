"""Checks what the core's signatures say, shapes of arrays included, whenever a test calls them.

`install` has modules checked as they are imported. jaxtyping's own plugin does the same, but wraps functions without
arrays, too, and checks every argument twice: with it tests take twice as long.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is fine where a float is asked for


def checked(f: Callable) -> Callable:
    """f, which raises where it is called with or returns what its signature does not say."""
    inner = typed(f)
    if not any("Tensor, '" in str(x) for x in f.__annotations__.values()):  # as in Float[Tensor, 'B H N']
        return inner

    @functools.wraps(f)
    def in_one_scope(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):  # in which a dimension has one size
            return inner(*args, **kwargs)

    return in_one_scope


def _member(x: Any) -> Any:
    match x:
        case FunctionType() if x.__annotations__:
            return checked(x)
        case classmethod() | staticmethod():
            return type(x)(_member(x.__func__))
        case property():
            return property(_member(x.fget), _member(x.fset), _member(x.fdel), x.__doc__)
    return x


def check(module: ModuleType) -> None:
    """Replaces functions and methods that the module defines by checked ones."""
    for name, x in list(vars(module).items()):
        if getattr(x, "__module__", None) != module.__name__:
            continue
        if isinstance(x, type):
            for of, y in list(vars(x).items()):
                if (new := _member(y)) is not y:
                    setattr(x, of, new)
        else:
            setattr(module, name, _member(x))


class _Checking(Loader):
    def __init__(self, real: Loader):
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        check(module)


class _Finder(MetaPathFinder):
    def __init__(self, modules: tuple[str, ...]):
        self.modules = modules

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.modules else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Checking(spec.loader)
        return spec


def install(*modules: str) -> None:
    imported = [m for m in modules if m in sys.modules]
    if imported:
        raise RuntimeError(f"{', '.join(imported)}: to be checked, modules must not be imported yet")
    sys.meta_path.insert(0, _Finder(modules))
