"""All families of the package, by name."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tests import families
from tests.families.family import Family


def all_families() -> dict[str, Family]:
    """Name -> family, in the order of modules and of their lists `FAMILIES` and `DESIGNS`.

    Raises:
        ValueError: two families have one name.
    """
    found: dict[str, Family] = {}
    for module in sorted(info.name for info in iter_modules(families.__path__)):
        loaded = import_module(f"{families.__name__}.{module}")
        for family in (*getattr(loaded, "FAMILIES", ()), *getattr(loaded, "DESIGNS", ())):
            if family.name in found:
                raise ValueError(f"two families are named {family.name!r}")
            found[family.name] = family
    return found
