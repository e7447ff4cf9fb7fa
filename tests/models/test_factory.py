"""Models from an importable function: what is checked before it is called, what decides its weights, its digest."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.models import (
    build,
    build_factory,
    check_factory,
    factory_digest,
    find_factory,
    fit_options,
    is_factory,
    names,
)

SOURCE = """
import functools
import random

import numpy
import torch
from torch import nn

from {package}.parts import DEPTH

def net(channels, classes=10, *, width: int = 4):
    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.Flatten(), nn.Linear(width * 9, classes))

def anything(**options):
    return nn.Linear(len(options), options["classes"])

def drawn():
    model = nn.Linear(1, 3, bias=False)
    model.weight.data[1] = random.random()
    model.weight.data[2] = numpy.random.rand()
    return model

def by_place(width, /):
    return nn.Linear(width, 1)

def late():
    import {package}.other
    return {package}.other.make()

def deep():
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(DEPTH)])

class Flat(nn.Linear):
    def __init__(self, width=2):
        super().__init__(width, 1)

class Maker:
    def __call__(self, width=2):
        return Flat(width)

@functools.wraps(net)
def wrapped(*args, **kwargs):
    return net(*args, **kwargs)

narrow, maker, seven, ready = functools.partial(net, width=2), Maker(), 7, Flat()
stopped = lambda: exit(3)
half = lambda: 0.5
elsewhere = {package}_elsewhere = nn.Linear
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Write the package above into the current folder, edited, and return the name of its module of factories."""
    monkeypatch.chdir(tmp_path)
    path, made = list(sys.path), []

    def write(*edits: tuple[str, str]) -> str:
        name = f"ournets{len(made)}"
        made.append(name)
        folder = tmp_path / name
        folder.mkdir()
        text = SOURCE.replace("{package}", name)
        for old, new in edits:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (folder / "__init__.py").touch()
        (folder / "nets.py").write_text(text)
        (folder / "parts.py").write_text("DEPTH = 2\n")
        (folder / "other.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(1, 1)\n")
        return f"{name}.nets"

    yield write
    assert sys.path == path
    for name in [name for name in sys.modules if name.partition(".")[0] in made]:
        del sys.modules[name]


def test_a_name_with_a_colon_is_a_factory_and_no_architecture_has_one() -> None:
    assert is_factory("a.b:c") and is_factory("a/b.py:c")  # malformed, which find_factory tells
    assert not any(map(is_factory, names()))


def test_the_model_is_what_the_function_returns_for_the_options(package: Callable[..., str]) -> None:
    nets = package()
    model = build_factory(f"{nets}:net", {"channels": 1, "width": 5})
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 1, 3, 3), (5,), (10, 45), (10,)]
    assert type(build_factory(f"{nets}:Flat")).__name__ == "Flat"
    assert build_factory(f"{nets}:maker", {"width": 3}).in_features == 3
    assert build_factory(f"{nets}:narrow", {"channels": 1})[0].out_channels == 2  # pyright: ignore
    assert build_factory(f"{nets}:late").in_features == 1  # imports from the current folder when it is called


@pytest.mark.parametrize(
    ("function", "options", "messages"),
    [
        ("net", {"channels": 1}, []),
        ("wrapped", {"channels": 1, "width": 2}, []),
        ("anything", {"classes": 1, "whatever": 2}, []),
        ("net", {"width": 1}, ["NETS:net needs channels"]),
        (
            "net",
            {"widht": 1, "channel": 2},  # a misspelt one is told once, not also as missing
            [
                "widht: unknown option of NETS:net 'widht'; nearest: width; allowed: channels, classes, width",
                "channel: unknown option of NETS:net 'channel'; nearest: channels; allowed: channels, classes, width",
            ],
        ),
        (
            "wrapped",
            {"channels": 1, "depth": 2},
            ["depth: unknown option of NETS:wrapped 'depth'; nearest: width; allowed: channels, classes, width"],
        ),
        ("drawn", {"width": 1}, ["width: NETS:drawn takes no options"]),
        ("by_place", {}, ["NETS:by_place takes width by position only; allowed: options with names"]),
        ("nett", {"a": 1}, ["name: unknown function of NETS 'nett'; nearest: net"]),
        ("seven", {}, ["name: NETS:seven is of type int; allowed: a function that returns an nn.Module"]),
        ("ready", {}, ["name: NETS:ready is of type Flat; allowed: a function that returns an nn.Module"]),
    ],
)
def test_options_are_compared_with_the_signature(
    package: Callable[..., str], function: str, options: dict[str, object], messages: list[str]
) -> None:
    nets = package()
    found = [str(fault).replace(nets, "NETS") for fault in check_factory(f"{nets}:{function}", options)]
    assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=True):
        assert line == message or (function == "nett" and line.startswith(message))
    if messages:
        with pytest.raises(UserError) as error:
            build_factory(f"{nets}:{function}", options)
        assert len(error.value.faults) == len(messages)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("half", "NETS:half() returned a value of type float; allowed: an nn.Module"),
        ("stopped", "NETS:stopped() failed: SystemExit: 3"),
    ],
)
def test_a_factory_that_fails_is_one_line(package: Callable[..., str], function: str, message: str) -> None:
    nets = package()
    with pytest.raises(UserError) as error:
        build_factory(f"{nets}:{function}")
    assert str(error.value).replace(nets, "NETS") == message
    with pytest.raises(UserError, match=r"net\(channels='x'\) failed: TypeError: "):
        build_factory(f"{nets}:net", {"channels": "x"})


def test_facts_go_only_where_the_signature_names_them(package: Callable[..., str]) -> None:
    nets, facts = package(), {"channels": 3, "classes": 7}
    assert fit_options(f"{nets}:net", facts, {"width": 2}) == {"channels": 3, "classes": 7, "width": 2}
    assert fit_options(f"{nets}:net", facts, {"channels": 1}) == {"channels": 1, "classes": 7}  # given ones win
    assert fit_options(f"{nets}:narrow", facts, {}) == {"channels": 3, "classes": 7}
    assert fit_options(f"{nets}:anything", facts, {"a": 1}) == {"a": 1}
    assert fit_options(f"{nets}:drawn", facts, {}) == {}


def test_weights_are_a_function_of_the_seed_and_no_global_state_moves(package: Callable[..., str]) -> None:
    text = f"{package()}:drawn"
    find_factory(text)
    numpy = sys.modules["numpy"]  # imported by the module of the factory
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
    one, again, other = (build_factory(text, seed=seed).state_dict()["weight"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert bool((one != other).all())  # what torch, random and numpy drew
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    with pytest.raises(UserError):
        build_factory(f"{text.partition(':')[0]}:stopped", seed=1)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_the_same_seed_draws_the_weights_that_an_architecture_gets() -> None:
    ours = build("small-cnn", seed=3, channels=1)
    theirs = build_factory("robustlayers.models:build", {"name": "small-cnn", "channels": 1}, seed=3)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_the_digest_is_of_source_options_and_tensors(package: Callable[..., str]) -> None:
    nets = package()
    digest = factory_digest(f"{nets}:net", {"channels": 1})
    assert len(digest) == 64 and digest == factory_digest(f"{nets}:net", {"channels": 1})
    assert digest != factory_digest(f"{nets}:net", {"channels": 1, "width": 5})
    assert digest != factory_digest(f"{nets}:narrow", {"channels": 1})
    # A change that no shape shows: the file counts.
    before = factory_digest(f"{nets}:deep")
    with open(f"{nets.replace('.', '/')}.py", "a") as file:
        file.write("# another activation\n")
    changed = factory_digest(f"{nets}:deep")
    assert before != changed
    # A change in another file that shapes show.
    sys.modules[nets].DEPTH = 3  # pyright: ignore
    assert factory_digest(f"{nets}:deep") != changed


def test_the_digest_of_what_is_defined_elsewhere_is_of_that_file(package: Callable[..., str]) -> None:
    nets = package()
    text = Path(f"{nets.replace('.', '/')}.py")
    before = factory_digest(f"{nets}:elsewhere", {"in_features": 1, "out_features": 1})
    maker = factory_digest(f"{nets}:maker")
    text.write_text(text.read_text() + "# more\n")
    assert factory_digest(f"{nets}:elsewhere", {"in_features": 1, "out_features": 1}) == before  # torch's file
    assert factory_digest(f"{nets}:maker") != maker  # an object's class


def test_what_cannot_be_named_is_told(package: Callable[..., str]) -> None:
    nets = package()
    with pytest.raises(UserError, match=r"ournets0\.nets:anything: options must be plain values \("):
        factory_digest(f"{nets}:anything", {"classes": 1, "a": nn.ReLU})
    module = sys.modules[nets]
    exec("def made():\n    return nn.Linear(1, 1)\n", vars(module))
    with pytest.raises(UserError, match=r"ournets0\.nets:made has no source file, by which its results could be named"):
        factory_digest(f"{nets}:made")
