"""The gradients of a step from its logits, against one plain backward pass for each objective and group."""

import pytest
import torch
from torch.nn import functional

from robustlayers.normalization import NormPolicy, Switch
from robustlayers.selection import Partition
from robustlayers.training import differentiation, parse_signal
from robustlayers.training.binding import Binding
from robustlayers.training.differentiation import differentiate
from robustlayers.training.tally import StepLog

SIGNALS = {
    "some": {"natural": 0.3, "adversarial": 0.7},
    "head": "adversarial",
    "norm": "frozen",
    "others": {"natural": 2.0},
}
GROUPS = {"some": "random(like='5', of='1', seed=1)", "head": "'6'", "norm": "norm", "others": "rest"}


@pytest.fixture
def bound():
    """Two passes of a net in evaluation mode, as one forward if `joint`, and what is needed to differentiate them."""

    def make(net, batch, *, joint=False):
        model = net("mlp", torch.float64).eval()
        partition = Partition(model, GROUPS)
        policy = NormPolicy(joint=Switch()) if joint else NormPolicy()
        binding = Binding(partition, {group: parse_signal(signal) for group, signal in SIGNALS.items()}, None, policy)
        tensors = dict(model.named_parameters())
        (x, y), (z, _) = batch(dtype=torch.float64), batch(seed=1, dtype=torch.float64)
        return model, partition, binding, tensors, {"clean": x, "adversarial": z}, y

    return make


def by_hand(model, partition, tensors, losses):
    """For each group and objective a backward pass of its own, masked and weighted."""
    found = {}
    for group, selection in partition.groups.items():
        for objective, weight in parse_signal(SIGNALS[group]).items():
            names = [name for name in selection.parts if name in tensors]
            slopes = torch.autograd.grad(losses()[objective], [tensors[name] for name in names])
            for name, slope in zip(names, slopes, strict=True):
                mask = selection.parts[name]
                part = weight * (slope if mask is None else slope * mask)
                found[name] = found.get(name, 0) + part
    return found


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("joint", [False, True])
def test_gradients_are_the_weighted_and_masked_sums(net, batch, bound, joint, limit):
    model, partition, binding, tensors, images, y = bound(net, batch, joint=joint)

    def logits():
        if joint:
            return dict(zip(images, model(torch.cat(list(images.values()))).chunk(2), strict=True))
        return {name: model(x) for name, x in images.items()}

    def losses():
        found = {}
        for objective, name in (("natural", "clean"), ("adversarial", "adversarial")):
            each = functional.cross_entropy(logits()[name], y, reduction="none")
            found[objective] = each.mean() if limit is None else torch.where(each < limit, each, 0).mean()
        return found

    log = StepLog()
    made = logits()
    found = differentiate(binding, binding.shares, made, y, tensors, log, limit=limit)
    wanted = by_hand(model, partition, tensors, losses)
    assert set(found) == set(wanted) and not any(name.startswith(("2.", "5.")) for name in found)
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=0, atol=1e-12) and not gradient.requires_grad, name
    assert log.backward_passes == 2
    whole = {name: functional.cross_entropy(made[name].detach(), y) for name in images}  # the log's know no limit
    found = [log.losses["natural"], log.losses["adversarial"]]
    assert torch.allclose(torch.stack(found), torch.stack([whole["clean"], whole["adversarial"]]), rtol=0, atol=1e-12)


def test_the_log_keeps_what_it_was_told_at_rest(net, batch, bound):
    model, _, binding, tensors, images, y = bound(net, batch)
    log = StepLog(losses={"natural": torch.tensor(7.0)})

    def logits():
        return {name: model(x) for name, x in images.items()}

    differentiate(binding, binding.shares, logits(), y, tensors, log, at_rest=False)
    assert set(log.losses) == {"natural"}
    differentiate(binding, binding.shares, logits(), y, tensors, log)
    assert set(log.losses) == {"natural", "adversarial"} and float(log.losses["natural"]) == 7


def test_planted_fault_a_graph_that_is_read_again_is_kept(net, batch, bound, monkeypatch):
    model, _, binding, tensors, images, y = bound(net, batch, joint=True)

    def take():
        logits = dict(zip(images, model(torch.cat(list(images.values()))).chunk(2), strict=True))
        return differentiate(binding, binding.shares, logits, y, tensors, StepLog())

    take()
    monkeypatch.setattr(differentiation, "_read_again", lambda *_: False)
    with pytest.raises(RuntimeError, match="second time"):
        take()


def test_an_objective_that_only_buffers_learn_from_costs_no_backward(net, batch):
    model = net("mlp")
    partition = Partition(model, {"statistics": "norm.statistics", "others": "rest"})
    signals = {"statistics": parse_signal("natural"), "others": parse_signal("adversarial")}
    binding = Binding(partition, signals, None, NormPolicy())
    x, y = batch()
    log = StepLog()
    logits = {"clean": model(x).detach(), "adversarial": model(x)}
    found = differentiate(binding, binding.shares, logits, y, dict(model.named_parameters()), log)
    assert log.backward_passes == 1 == binding.backwards and set(log.losses) == {"natural", "adversarial"}
    assert set(found) == set(dict(model.named_parameters()))
