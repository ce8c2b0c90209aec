"""A journal of changes goes back to the very objects, last first."""

import types

import pytest
import torch
from torch import nn

from dax.edits import Edits
from dax.errors import DaxError


class Owner:
    shared = "class"

    def __init__(self):
        self.own = "instance"


def test_attributes_come_back():
    owner, edits = Owner(), Edits()
    assert edits.set_attribute(owner, "own", 1) == "instance"
    edits.set_attribute(owner, "own", 2)
    edits.set_attribute(owner, "shared", 3)
    assert (owner.own, owner.shared, len(edits)) == (2, 3, 3)
    edits.undo()
    assert vars(owner) == {"own": "instance"} and owner.shared == "class" and len(edits) == 0


def test_undo_twice_is_harmless():
    owner, edits = Owner(), Edits()
    edits.set_attribute(owner, "own", 1)
    edits.undo()
    owner.own = "later"
    edits.undo()
    assert owner.own == "later"


def test_modules_come_back_in_order():
    root = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    before = [(name, id(module)) for name, module in root.named_modules()]
    edits, new = Edits(), nn.Linear(2, 3)
    old = edits.swap_module(root, "1.0", new)
    edits.set_attribute(root[0], "weight", nn.Parameter(torch.zeros(2, 2)))
    weight = root[0].weight
    assert root[1][0] is new and old is not new and not weight.any()
    edits.undo()
    assert [(name, id(module)) for name, module in root.named_modules()] == before and root[0].weight is not weight


def test_hooks_are_removed_and_others_stay():
    module, edits, seen = nn.Linear(2, 2), Edits(), []
    module.register_forward_hook(lambda *_: seen.append("theirs"))
    edits.hook(module.register_forward_pre_hook, lambda module, args, kwargs: seen.append("ours"), with_kwargs=True)
    module(torch.ones(2))
    assert seen == ["ours", "theirs"] and len(edits) == 1
    edits.undo()
    module(torch.ones(2))
    assert seen == ["ours", "theirs", "theirs"]


@pytest.mark.parametrize("owner", [Owner, types.ModuleType("some")])
def test_shared_owners_are_refused(owner):
    owner.own = 0
    try:
        with pytest.raises(DaxError, match="only instances"):
            Edits().set_attribute(owner, "own", 1)
    finally:
        del owner.own


def test_a_failing_change_is_not_remembered():
    edits = Edits()
    with pytest.raises(ZeroDivisionError):
        edits.call(lambda: 1 / 0, lambda: None)
    assert len(edits) == 0


def test_a_failing_undo_does_not_stop_the_others():
    done, edits = [], Edits()
    edits.call(lambda: None, lambda: done.append("first"))
    edits.call(lambda: None, lambda: 1 / 0)
    edits.call(lambda: None, lambda: done.append("last"))
    with pytest.raises(ZeroDivisionError):
        edits.undo()
    assert done == ["last", "first"]
