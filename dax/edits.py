"""Changes to a live model that can be taken back.

Every change DAX makes to someone's model goes through one journal, on instances only: never a class, never a module's
global. `undo()` walks it backwards, so that the model is the very objects it was before.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from dax.errors import DaxError


class Edits:
    """A journal of reversible changes. `len()` counts those that stand."""

    def __init__(self):
        self._undo: list[Callable[[], None]] = []
        self.sealed: str | None = None  # why nothing can be taken back any more

    def seal(self, reason: str) -> None:
        """Say that from now on `undo()` must refuse, and why: something original is gone."""
        self.sealed = reason

    def __len__(self) -> int:
        return len(self._undo)

    def call(self, do: Callable[[], Any], undo: Callable[[], Any]) -> None:
        """Call `do` and remember `undo` as its inverse. If `do` raises, nothing is remembered."""
        do()
        self._undo.append(undo)

    def set_attribute(self, owner: Any, name: str, new: Any) -> Any:
        """owner.name = new, on an instance; returns what it was. An attribute that only its class had is deleted again.

        DaxError("bug") for a class or a module as owner: others would see the change.
        """
        if isinstance(owner, type | ModuleType):
            raise DaxError("bug", f"edit of {owner!r}.{name}: only instances may be edited")
        old = getattr(owner, name)
        own = name in vars(owner) or name in children(owner)
        self.call(lambda: setattr(owner, name, new), lambda: setattr(owner, name, old) if own else delattr(owner, name))
        return old

    def swap_module(self, root: Any, path: str, new: Any) -> Any:
        """Put `new` where `root` has the submodule `path` ("blocks.0.ffn.net.2"); returns the one it replaces."""
        parent, _, name = path.rpartition(".")
        return self.set_attribute(root.get_submodule(parent), name, new)

    def hook(self, register: Callable, *args: Any, **options: Any) -> None:
        """Call one of a torch module's register_..._hook methods; undone by removing the hook."""
        handles = []
        self.call(lambda: handles.append(register(*args, **options)), lambda: handles.pop().remove())

    def undo(self, anyway: bool = False) -> None:
        """Take everything back, last change first. Twice is harmless. A failure is raised once all were tried.

        anyway   although sealed: all but what is gone
        DaxError("bad_request"), with nothing taken back, once sealed.
        """
        if self.sealed and not anyway:
            raise DaxError("bad_request", f"undo: {self.sealed}")
        failure = None
        while self._undo:
            step = self._undo.pop()
            try:
                step()
            except Exception as error:  # keep going: half an undo is worse
                failure = failure or error
        if failure is not None:
            raise failure


def children(owner: Any) -> set[str]:
    """What a torch module keeps outside its __dict__: parameters, buffers, submodules."""
    return {name for kind in ("_parameters", "_buffers", "_modules") for name in vars(owner).get(kind, ())}
