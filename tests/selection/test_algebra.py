import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustlayers.selection import Inventory, Selection, resolve


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.bn = nn.BatchNorm1d(2)
        self.empty = nn.Parameter(torch.zeros(0, 3))


INVENTORY = Inventory(_Tiny())
SIZES = {entry.name: entry.size for entry in INVENTORY}
EVERYTHING = frozenset((name, index) for name, size in SIZES.items() for index in range(size)) | {("empty", None)}


def entries(selection):
    """The selection as a plain set of (tensor, index); a tensor without entries counts as one."""
    found = set()
    for name, mask in selection.parts.items():
        size = SIZES[name]
        indices = range(size) if mask is None else mask.flatten().nonzero().flatten().tolist()
        found |= {(name, index) for index in indices} if size else {(name, None)}
    return frozenset(found)


@st.composite
def selections(draw):
    parts = {}
    for entry in INVENTORY:
        kind = draw(st.sampled_from(["absent", "whole", "masked"]))
        if kind == "whole" or (kind == "masked" and not entry.size):
            parts[entry.name] = None
        elif kind == "masked":
            bits = draw(st.lists(st.booleans(), min_size=entry.size, max_size=entry.size))
            parts[entry.name] = torch.tensor(bits).view(entry.tensor.shape)
    return Selection(INVENTORY, parts)


@given(selections(), selections())
def test_the_operators_are_those_of_sets_of_entries(one, other):
    a, b = entries(one), entries(other)
    assert entries(one | other) == a | b
    assert entries(one & other) == a & b
    assert entries(one - other) == a - b
    assert entries(~one) == EVERYTHING - a
    assert bool(one) == bool(a)
    assert (one == other) == (a == b)
    for selection in (one | other, one & other, one - other, ~one, one):
        assert list(selection) == [name for name in SIZES if name in selection.parts]  # in registration order
        assert all(
            mask is None or (mask.any() and not mask.all() and mask.dtype == torch.bool)
            for mask in selection.parts.values()
        )


@given(selections(), selections(), selections())
def test_laws_of_set_algebra(a, b, c):
    everything, nothing = Selection(INVENTORY, list(SIZES)), Selection(INVENTORY, [])
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert a - b == a & ~b
    assert a - (b | c) == (a - b) & (a - c)
    assert a & (b | c) == (a & b) | (a & c)
    assert (a | b) | c == a | (b | c)
    assert a | b == b | a and a & b == b & a
    assert ~~a == a
    assert a | ~a == everything and not a & ~a
    assert a & everything == a == a | nothing and not nothing


@given(selections(), selections())
def test_counts_add_up(a, b):
    def size(selection, buffer):
        return sum(index is not None and INVENTORY[name].buffer == buffer for name, index in entries(selection))

    for selection in (a, b, a | b, a & b, ~a):
        assert selection.parameters == size(selection, False) and selection.buffers == size(selection, True)
        assert selection.share == selection.parameters / 10
        for name, shape, share in selection.describe():
            assert shape == ("x".join(map(str, INVENTORY[name].tensor.shape)) or "scalar")
            assert share == (selection.count(name) / SIZES[name] if SIZES[name] else 1.0)
    assert (a | b).parameters + (a & b).parameters == a.parameters + b.parameters
    assert (a | b).buffers + (a & b).buffers == a.buffers + b.buffers
    assert a.parameters + (~a).parameters == 10 == INVENTORY.parameters
    assert all(a.count(name) + (~a).count(name) == size for name, size in SIZES.items())


@given(selections(), selections())
def test_operators_leave_their_operands_alone(a, b):
    before = entries(a), entries(b)
    _ = a | b, a & b, a - b, ~a, a == b
    assert (entries(a), entries(b)) == before


def test_selections_are_compared_by_content_and_not_hashed():
    a = Selection(INVENTORY, ["a.weight"])
    assert a == Selection(INVENTORY, {"a.weight": torch.ones(2, 2, dtype=torch.bool)})
    assert a != Selection(INVENTORY, {"a.weight": torch.tensor([[True, True], [True, False]])})
    assert a != ["a.weight"]
    with pytest.raises(TypeError):
        hash(a)


ATOMS = ["all", "norm", "linear", "bias", "a.weight", "random(like=bn, seed=1)", "~bias"]


@st.composite
def trees(draw, depth=3):
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(ATOMS))
    operator = draw(st.sampled_from("|&-~"))
    return (operator, *(draw(trees(depth=depth - 1)) for _ in range(1 if operator == "~" else 2)))


BINDS = {"|": 1, "-": 1, "&": 2, "~": 3}


def written(tree, least=0, right=False):
    """The tree as text with no parenthesis more than the documented precedence needs."""
    if isinstance(tree, str):
        return tree
    operator, *operands = tree
    binds = BINDS[operator]
    if operator == "~":
        text = f"~{written(operands[0], 3)}"
    else:
        text = f"{written(operands[0], binds)} {operator} {written(operands[1], binds, right=True)}"
    return f"({text})" if binds < least or (right and binds == least) else text


def meant(tree):
    if isinstance(tree, str):
        return entries(resolve(INVENTORY, tree))
    operator, first, *rest = tree
    if operator == "~":
        return EVERYTHING - meant(first)
    a, b = meant(first), meant(rest[0])
    return a | b if operator == "|" else a & b if operator == "&" else a - b


@given(trees())
def test_a_written_expression_means_what_its_tree_means(tree):
    # An empty result is an error, so everything is taken from the complement where the expression picks nothing.
    expected = meant(tree)
    if expected:
        assert entries(resolve(INVENTORY, written(tree))) == expected
    else:
        assert entries(resolve(INVENTORY, f"~({written(tree)})")) == EVERYTHING
