"""All families of the package, by name."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules

from tests import families
from tests.families.family import Family


def all_families() -> dict[str, Family]:
    """Name -> family, in the order of modules (designs last) and of their lists `FAMILIES`; one of a name that is taken has its source behind it.

    Raises:
        ValueError: two families have one name and one source.
    """
    found: dict[str, Family] = {}
    modules = [info.name for info in iter_modules(families.__path__) if not info.name.startswith("test_")]
    for module in sorted(modules, key=lambda name: (name.startswith("design"), name)):
        for family in getattr(import_module(f"{families.__name__}.{module}"), "FAMILIES", ()):
            title = f"{family.name} ({family.source})" if family.name in found else family.name
            if title in found:
                raise ValueError(f"two families are named {title!r}")
            found[title] = replace(family, name=title)
    return found
