"""Batches, selections and a comparison of models, for the tests of recalibration."""

import torch

from robustlayers.selection import Inventory
from robustlayers.selection.selectors import resolve


def some(batch, sizes=(6, 6, 6, 6), dtype=torch.float64):
    return [batch(n, seed, dtype) for seed, n in enumerate(sizes)]


def chosen(model, selector):
    return resolve(Inventory(model), selector)


def close(model, other):
    found, wanted = model.state_dict(), other.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-12, atol=1e-12), name
