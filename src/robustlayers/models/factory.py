"""Models from anywhere: an importable function `package.module:function` that returns an `nn.Module`.

Naming a factory runs its code, so nothing here is called for a name that the user has not given or trusted.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustlayers.core.errors import Fault, UserError, nearest, one_of
from robustlayers.core.identity import canonical
from robustlayers.core.random import stream_seed

__all__ = ["build_factory", "check_factory", "factory_digest", "find_factory", "fit_options", "is_factory"]

_NAME = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def is_factory(name: str) -> bool:
    """Tell whether a model's name means a factory: it has a colon, as no architecture's name does.

    Whether it is well-formed and can be imported is for `find_factory` to say.

    >>> is_factory("mypackage.models:resnet"), is_factory("resnet")
    (True, False)
    """
    return ":" in name


def find_factory(text: str) -> Callable[..., Any]:
    """Import `package.module:function`, with the current folder on the path, and return the function (or class).

    >>> find_factory("torch.nn:Linear")
    <class 'torch.nn.modules.linear.Linear'>

    Raises `UserError` for a malformed name, a module that is not there or fails, an unknown function (with the nearest
    ones), and for what cannot be called.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} is not MODULE:FUNCTION, such as mypackage.models:resnet")
    module_name, function_name = match.groups()
    with _current_folder() as here:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise UserError(f"{module_name} cannot be imported: {_said(error)}") from None
            raise UserError(f"there is no module {error.name!r} in {here} or on Python's path") from None
        except (Exception, SystemExit) as error:
            raise UserError(f"{module_name} cannot be imported: {_said(error)}") from None
    factory = getattr(module, function_name, None)
    if factory is None:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(one_of(f"function of {module_name}", function_name, known))
    if isinstance(factory, nn.Module) or not callable(factory):
        raise UserError(f"{text} is of type {type(factory).__name__}; allowed: a function that returns an nn.Module")
    return factory


def check_factory(text: str, options: Mapping[str, Any]) -> list[Fault]:
    """Return what is wrong with a factory's name (path `name`) or its options (path: the option); nothing is built.

    The function is imported, which runs its module. Options are compared with its signature: unknown ones, and those
    without a default that are missing. A function with `**options` of its own takes any name.

    >>> [str(fault) for fault in check_factory("torch.nn:Linear", {"in_features": 2})]
    ['torch.nn:Linear needs out_features']
    """
    try:
        factory = find_factory(text)
    except UserError as error:
        return [fault.at(path="name") for fault in error.faults]
    parameters = _parameters(factory)
    if parameters is None:
        return []
    known = {parameter.name: parameter for parameter in parameters if parameter.kind in _NAMED}
    faults = []
    missing = [
        name for name, parameter in known.items() if parameter.default is parameter.empty and name not in options
    ]
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        for name in options:
            if name not in known:
                sentence = one_of(f"option of {text}", str(name), known) if known else f"{text} takes no options"
                faults.append(Fault(sentence, path=str(name)))
                close = nearest(str(name), missing, 1)
                missing = [other for other in missing if other not in close]  # misspelt, and told already
    if missing:
        faults.append(Fault(f"{text} needs {', '.join(missing)}"))
    unnamed = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed:
        faults.append(Fault(f"{text} takes {', '.join(unnamed)} by position only; allowed: options with names"))
    return faults


def fit_options(text: str, facts: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the facts of the data, such as `channels` and `classes`, that the function asks for.

    A fact is filled in only where the signature names it and no option of that name is given: `**options` of the function
    gets none.

    >>> fit_options("torch.nn:Linear", {"in_features": 4, "classes": 10}, {"out_features": 2})
    {'in_features': 4, 'out_features': 2}
    """
    named = {p.name for p in _parameters(find_factory(text)) or () if p.kind in _NAMED}
    return {**{name: value for name, value in facts.items() if name in named}, **options}


def build_factory(text: str, options: Mapping[str, Any] | None = None, *, seed: int | None = None) -> nn.Module:
    """Call `package.module:function` with the options by name and return the model.

    With a `seed`, torch's default generator on the CPU and the generators of `random` and numpy start from it, and all
    of them are put back afterwards: a factory that draws from these makes weights that are a function of options and
    seed. One that seeds itself, or loads weights, makes the same for every seed.

    >>> build_factory("torch.nn:Linear", {"in_features": 2, "out_features": 3}, seed=0)
    Linear(in_features=2, out_features=3, bias=True)

    Raises `UserError` for everything `check_factory` finds, for an exception of the factory, and for a result that is
    no `nn.Module`.
    """
    options = dict(options or {})
    faults = check_factory(text, options)
    if faults:
        raise UserError([Fault(fault.message) for fault in faults])
    factory = find_factory(text)
    try:
        with _current_folder(), _drawn_from(seed):
            model = factory(**options)
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise UserError(f"{text}({given}) failed: {_said(error)}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"{text}() returned a value of type {type(model).__name__}; allowed: an nn.Module")
    return model


def factory_digest(text: str, options: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 by which results of a factory's model are named: 64 hexadecimal digits.

    It covers the bytes of the file that the function is written in, the options, and name, shape and dtype of every
    tensor of the model as built from seed 0. It does not cover other files that this one imports, nor weights that the
    factory loads from elsewhere, beyond what the tensors show of them.

    Raises `UserError` as `build_factory` does, and for a function without a source file.
    """
    options = dict(options or {})
    model = build_factory(text, options, seed=0)
    tensors = [
        [name, list(value.shape), str(value.dtype)] if isinstance(value, torch.Tensor) else [name, type(value).__name__]
        for name, value in model.state_dict().items()
    ]
    try:
        described = canonical({"factory": text, "options": options, "tensors": tensors})
    except (TypeError, ValueError) as error:
        raise UserError(f"{text}: options must be plain values ({error})") from None
    source = hashlib.sha256(_source(text).read_bytes()).hexdigest()
    return hashlib.sha256(f"{source}\n{described}".encode()).hexdigest()


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Return the parameters of a function; None where Python does not know them, as for some built-in ones."""
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return None


def _source(text: str) -> Path:
    written = find_factory(text)
    while isinstance(written, functools.partial):
        written = written.func
    written = inspect.unwrap(written)
    if not (inspect.isclass(written) or inspect.isroutine(written)):  # an object that can be called
        written = type(written)
    try:
        path = Path(inspect.getfile(written))
    except (TypeError, OSError):  # built-in, or of a module without a file
        path = Path()
    if not path.is_file():
        raise UserError(f"{text} has no source file, by which its results could be named")
    return path


@contextmanager
def _current_folder() -> Iterator[str]:
    """Put the current folder first on Python's path, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield here
    finally:
        if here in sys.path:
            sys.path.remove(here)


@contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """Seed the global generators of the CPU and put them back; without a seed, leave them be."""
    if seed is None:
        yield
        return
    start = stream_seed(seed, "initialization")
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy is not None else None
    # Only the CPU's generator is forked and seeded: torch.manual_seed would also reseed every accelerator.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(start)
        random.seed(start)
        if numpy is not None:
            numpy.random.seed(start % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
