"""Has a module of ours imported right after a library that it extends, whichever of the two comes first.

PEFT opens a folder by looking its type up in tables that a type's own module fills. `import align` alone must be
enough for ours to be in them, and must stay light: so the module follows when, and only if, somebody imports PEFT.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(library: str, follower: str) -> None:
    """Imports the module `follower` once `library` is imported: at once if it is already."""
    if sys.modules.get(library) is not None:
        import_module(follower)
        return
    finder = _Finder(library, follower)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)


@dataclass(frozen=True)
class _Finder(MetaPathFinder):
    """Finds the library as the other finders do, and gives its loader a follower."""

    library: str
    follower: str

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        if fullname != self.library or self not in finders:
            return None
        later = finders[finders.index(self) + 1 :]  # the earlier ones have been asked
        found = (finder.find_spec(fullname, path, target) for finder in later if hasattr(finder, "find_spec"))
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """The library's own loader, but for what follows its first successful run.

    To look for a library is not to import it (transformers asks whether there is PEFT): the finder stays until then.
    """

    def __init__(self, own: Loader, finder: _Finder):
        self.own, self.finder = own, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own  # from here on nothing tells the module from one that was imported without us
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        import_module(self.finder.follower)
