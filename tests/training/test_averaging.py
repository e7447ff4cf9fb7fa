import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_tensors, write_tensors
from robustlayers.core.random import stream
from robustlayers.normalization import inference
from robustlayers.normalization.recalibration import recalibrate
from robustlayers.selection import Inventory, select
from robustlayers.selection.selectors import resolve
from robustlayers.training.averaging import Average, AverageSettings


def settings(name="ema", **options):
    return AverageSettings(name, **{"start": 0, "every": "step", "statistics": "live"} | options)


def train(model, steps, seed=0):
    """Move every tensor of a model `steps` times, yielding after each: weights, statistics and counters."""
    for step in range(steps):
        generator = stream(seed, "averaging", step)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.mul_(0.9).add_(noise.to(tensor.dtype) * 0.2)
                else:
                    tensor += 1
        yield step


def close(found, wanted, within):
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=within, atol=within), name


ORACLES = {
    "ema": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.7)),
    "ema of lists": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7)),
    "ema of all": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.7), use_buffers=True),
    "swa": lambda model: AveragedModel(model),
}


@pytest.mark.parametrize("name", ["mlp", "resnet"])
@pytest.mark.parametrize("oracle", ORACLES)
def test_it_is_torchs_averaged_model(net, name, oracle):
    model = net(name, torch.float64)
    reference = ORACLES[oracle](model)
    how = settings("swa") if oracle == "swa" else settings(decay=0.7)
    if oracle == "ema of all":
        how = settings(decay=0.7, statistics="average")
    average = Average(Inventory(model), how)
    for step in train(model, 5):
        assert average.update(step / 5, epoch_ended=False)
        reference.update_parameters(model)
        wanted, live = reference.module.state_dict(), model.state_dict()
        # Torch would average counters and constants such as the input's mean too; they are the live model's here.
        others = {key: live[key] for key in live if "num_batches" in key or key.startswith("normalize.")}
        assert others
        close(average.tensors(), wanted | others, 1e-12)


def test_in_float32_it_is_torchs_bit_for_bit(net, bits):
    model = net("resnet")
    reference, average = ORACLES["ema of lists"](model), Average(Inventory(model), settings(decay=0.7))
    for _ in train(model, 5):
        average.update(1, epoch_ended=True)
        reference.update_parameters(model)
    model.load_state_dict(average.tensors())
    assert bits(model) == bits(reference.module)


def test_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    ema, swa = (Average(Inventory(layer), how) for how in (settings(decay=0.75), settings("swa")))
    for value in (4.0, 8.0, 0.0):
        nn.init.constant_(layer.weight, value)
        ema.update(1, epoch_ended=False)
        swa.update(1, epoch_ended=False)
    assert ema.tensors()["weight"].item() == 0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 0
    assert swa.tensors()["weight"].item() == pytest.approx((4 + 8 + 0) / 3)


def test_what_does_not_move_stays_bit_equal_and_halves_are_not_lost():
    layer = nn.Linear(50, 50)
    average = Average(Inventory(layer), settings(decay=0.9))
    half = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(half.weight, 1.0)
    slow = Average(Inventory(half), settings(decay=0.999))
    for _ in range(300):
        average.update(1, epoch_ended=False)
        slow.update(1, epoch_ended=False)
        nn.init.constant_(half.weight, 2.0)
    assert torch.equal(average.tensors()["weight"], layer.weight)
    assert slow.tensors()["weight"].dtype == torch.bfloat16
    assert slow.tensors()["weight"].item() == pytest.approx(2 - 0.999**299, abs=0.005)  # in bfloat16 it would stay 1


@pytest.mark.parametrize(("name", "taken"), [("ema", list(range(1, 13))), ("swa", [6, 9, 12])])
def test_defaults_say_when(net, name, taken):
    model = net()
    average = Average(Inventory(model), AverageSettings(name))
    steps = range(1, 13)  # 4 epochs of 3 steps
    assert [step for step in steps if average.update(step / 12, epoch_ended=step % 3 == 0)] == taken
    assert average.updates == len(taken)
    late = Average(Inventory(model), AverageSettings(name, start="3/4", every="step"))
    assert [step for step in steps if late.update(step / 12, epoch_ended=step % 3 == 0)] == [9, 10, 11, 12]


@pytest.mark.parametrize("statistics", ["live", "average", "recalibrate"])
@pytest.mark.parametrize("selector", ["norm.affine", "linear", "layer1", "random(like=norm, of=conv, seed=0)", "all"])
def test_selected_parameters_are_averaged_and_others_are_live(net, batch, selector, statistics):
    model = net("resnet", torch.float64)
    whole = Average(Inventory(model), settings(decay=0.5, statistics="average"))
    average = Average(Inventory(model), settings(decay=0.5, select=selector, statistics=statistics))
    for _ in train(model, 3):
        average.update(1, epoch_ended=False)
        whole.update(1, epoch_ended=False)
    if statistics == "recalibrate":
        average.recalibrate([batch(dtype=torch.float64)])
    selection, live, averaged, found = (
        resolve(Inventory(model), selector),
        *map(dict, (model.state_dict(), whole.tensors(), average.tensors())),
    )
    floats = {name for name in select(model, "norm.statistics") if live[name].is_floating_point()}
    for name in found:
        if name in floats and statistics == "average":
            assert torch.equal(found[name], averaged[name])
        elif name in select(model, "norm.statistics"):
            assert torch.equal(found[name], live[name]) == (statistics != "recalibrate")
        else:
            wanted = torch.where(selection._mask(name), averaged[name], live[name])
            assert torch.equal(found[name], wanted), name


# -- statistics --------------------------------------------------------------------------------------------------------


def test_recalibrated_statistics_are_those_of_torchs_update_bn(net, batch, bits):
    model = net("resnet", torch.float64)
    reference, average = ORACLES["ema"](model), Average(Inventory(model), settings(decay=0.7, statistics="recalibrate"))
    for _ in train(model, 4):
        average.update(1, epoch_ended=False)
        reference.update_parameters(model)
    batches = [batch(6, seed, torch.float64) for seed in range(3)]
    before = bits(model)
    assert average.recalibrate(batches) == 3
    assert bits(model) == before
    update_bn(batches, reference)
    close(average.tensors(), reference.module.state_dict(), 1e-12)


def test_adversarial_recalibration_meets_averaged_statistics(net, batch):
    model = net("resnet", torch.float64)
    average = Average(Inventory(model), settings(decay=0.7, statistics="recalibrate", on="adversarial"))
    twin = Average(Inventory(model), settings(decay=0.7, statistics="average"))
    for _ in train(model, 4):
        average.update(1, epoch_ended=False)
        twin.update(1, epoch_ended=False)
    attack, batches = PGD(Linf("8/255"), steps=2), [batch(6, seed, torch.float64) for seed in range(3)]
    streams = {"generator_of": lambda k: stream(1, "t", k)}
    with pytest.raises(UserError, match="needs an attack"):
        average.recalibrate(batches)
    average.recalibrate(batches, attack=attack, **streams)
    reference = copy.deepcopy(model)
    reference.load_state_dict(twin.tensors())
    recalibrate(reference, batches, attack=attack, **streams)
    close(average.tensors(), reference.state_dict(), 1e-9)
    clean = copy.deepcopy(model)
    clean.load_state_dict(twin.tensors())
    recalibrate(clean, batches)
    with pytest.raises(AssertionError):
        close(average.tensors(), clean.state_dict(), 1e-6)


def test_statistics_of_other_weights_are_an_error(net, batch):
    model = net()
    average = Average(Inventory(model), AverageSettings())
    assert not average.stale and average.tensors().keys() == model.state_dict().keys()  # the live model
    for k in range(2):
        average.update(0.5, epoch_ended=False)
        assert average.stale
        for call in (average.tensors, average.applied().__enter__):
            with pytest.raises(UserError, match="its statistics belong to other weights; call recalibrate"):
                call()
        average.recalibrate([batch(seed=k)])
        assert not average.stale and average.tensors()
    without = Average(Inventory(nn.Linear(2, 2)), AverageSettings())
    without.update(0.5, epoch_ended=False)
    assert not without.stale


# -- the published fault: an average that shares tensors with the live model ------------------------------------------


class Aliasing(Average):
    """The published fault: buffers of the averaged model are the live model's own, not copies."""

    def tensors(self):
        return super().tensors() | dict(self.inventory.model.named_buffers())


class AliasingFirst(Average):
    """The same for weights: the first update keeps the live tensors."""

    def update(self, progress, *, epoch_ended):
        taken = super().update(progress, epoch_ended=epoch_ended)
        if self.updates == 1:
            self._averages = {name: self.inventory.entries[name].tensor.detach() for name in self._averages}
        return taken


def shares_nothing(kind, model, statistics):
    """An average that was read must not follow the live model, nor the live model a writer of the average."""
    average = kind(Inventory(model), settings(statistics=statistics))
    average.update(0.1, epoch_ended=True)
    if statistics == "recalibrate":
        average.recalibrate([torch.rand(5, 1, 8, 8, generator=stream(0, "x"))])
    read, again, state = average.tensors(), average.tensors(), average.state()
    lists = [read, again, state, average.state(), model.state_dict()]
    spaces = [{t.untyped_storage().data_ptr() for t in tensors.values()} for tensors in lists]
    if any(one & other for place, one in enumerate(spaces) for other in spaces[:place]):
        return False
    copies = {name: tensor.clone() for name, tensor in read.items()}
    kept = {name: tensor.clone() for name, tensor in average.state().items()}
    for _ in train(model, 1):
        pass
    return all(torch.equal(read[name], copies[name]) for name in read) and all(
        torch.equal(tensor, kept[name]) for name, tensor in average.state().items()
    )


@pytest.mark.parametrize("statistics", ["live", "average", "recalibrate"])
def test_nothing_is_shared_with_the_live_model(net, statistics):
    assert shares_nothing(Average, net("resnet"), statistics)
    assert not shares_nothing(Aliasing, net("resnet"), statistics)
    assert not shares_nothing(AliasingFirst, net("resnet"), statistics)


def test_tied_tensors_are_averaged_once_and_listed_under_all_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    reference, average = ORACLES["ema"](model), Average(Inventory(model), settings(decay=0.7))
    for step in range(3):
        nn.init.constant_(model[0].weight, step)
        average.update(1, epoch_ended=False)
        reference.update_parameters(model)
    close(average.tensors(), reference.module.state_dict(), 1e-6)
    assert average.tensors().keys() == model.state_dict().keys()
    model.load_state_dict(average.tensors())
    assert model[2].weight is model[0].weight


# -- applied -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_applied_is_the_averaged_model_and_leaves_no_trace(net, batch, bits, fails):
    model = net("resnet")
    average = Average(Inventory(model), settings(decay=0.5, statistics="average"))
    for _ in train(model, 3):
        average.update(1, epoch_ended=False)
    with torch.no_grad():
        model.linear.bias[0], model.linear.bias[1] = -0.0, torch.nan  # which a sum would not bring back
    model.linear.bias.grad = torch.ones(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, objects = bits(model), {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    reference = copy.deepcopy(model)
    reference.load_state_dict(average.tensors())
    x, _ = batch()
    try:
        with average.applied() as applied, inference(model), inference(reference):
            assert applied is model
            assert bits(model) == bits(reference) != before
            assert torch.equal(model(x), reference(x))
            with average.applied():
                assert bits(model) == bits(reference)
            optimizer.step()  # what a block should not do is undone
            with pytest.raises(UserError, match="no update while the average is applied"):
                average.update(1, epoch_ended=True)
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert bits(model) == before
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == objects
    assert model.linear.bias.grad is not None and model.linear.weight.grad is None
    assert average.update(1, epoch_ended=True)


def test_a_recalibration_that_fails_leaves_model_and_average_as_they_were(net, batch, bits):
    model = net()
    average = Average(Inventory(model), settings(decay=0.5, statistics="recalibrate"))
    for _ in train(model, 2):
        average.update(1, epoch_ended=False)
    average.recalibrate([batch()])
    before, state = bits(model), average.state()
    with pytest.raises(UserError, match="batch 2 is empty"):
        average.recalibrate([batch(seed=1), batch(0)])
    assert bits(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in average.state().items())


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [settings(decay=0.7), settings("swa", statistics="average"), settings(statistics="recalibrate", on="adversarial")],
)
def test_a_resume_after_every_update_gives_the_same_bits(net, batch, tmp_path, how):
    attack = PGD(Linf("8/255"), steps=1)

    def run(stop=None):
        model = net("resnet")
        average = Average(Inventory(model), how)
        for step in train(model, 5):
            if step == stop:  # into a file and a fresh object
                path = write_tensors(tmp_path / f"{stop}.safetensors", average.state())
                average = Average(Inventory(model), how)
                average.load_state(read_tensors(path))
            average.update(1, epoch_ended=False)
        if how.statistics == "recalibrate":
            average.recalibrate([batch()], attack=attack)
        again = Average(Inventory(model), how)
        again.load_state(average.state())
        return average.state(), again.tensors()

    whole, averaged = run()
    for stop in range(5):
        state, tensors = run(stop)
        assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
        assert all(torch.equal(tensors[name], averaged[name]) for name in averaged)


def test_states_of_different_moments_differ(net):
    model = net()
    average = Average(Inventory(model), settings())
    states = [average.state()]
    for _ in train(model, 3):
        average.update(1, epoch_ended=False)
        states.append(average.state())
    for one, other in pairwise(states[1:]):
        assert all(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_model_that_was_moved_since_is_followed(net):
    model, reference = net(), net(dtype=torch.float64)
    average = Average(Inventory(model), settings(statistics="average"))
    twin = Average(Inventory(reference), settings(statistics="average"))
    model.double()  # puts other tensors in the place of the buffers
    for _ in zip(train(model, 3), train(reference, 3), strict=True):
        average.update(1, epoch_ended=False)
        twin.update(1, epoch_ended=False)
    close(average.tensors(), twin.tensors(), 1e-6)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "emma"}, "unknown average 'emma'; nearest: ema"),
        ({"decay": 1}, "decay: 1.0 is not allowed; allowed: more than 0, less than 1"),
        ({"decay": 0}, "decay: 0.0 is not allowed"),
        ({"name": "swa", "decay": 0.9}, "decay: only ema has one, and this is swa"),
        ({"start": 1.5}, "start: 1.5 is not allowed; allowed: 0 to 1"),
        ({"every": "steps"}, "unknown every 'steps'; nearest: step"),
        ({"statistics": "recalibrated"}, "unknown statistics 'recalibrated'; nearest: recalibrate"),
        ({"on": "noise"}, "unknown inputs to recalibrate on 'noise'"),
        ({"on": "adversarial", "statistics": "live"}, "on: adversarial inputs are for statistics: recalibrate"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        AverageSettings(**options)


def test_other_mistakes_are_told(net, batch):
    model = net()
    with pytest.raises(UserError, match=r"selector 'norm.statistics' picks no parameter"):
        Average(Inventory(model), settings(select="norm.statistics"))
    with pytest.raises(UserError, match="set to live, not to recalibrate"):
        Average(Inventory(model), settings()).recalibrate([batch()])
    average, averaged = (Average(Inventory(model), settings(statistics=how)) for how in ("live", "average"))
    states = [Average(Inventory(net("resnet")), settings()), averaged]
    for each in (average, *states):
        each.update(1, epoch_ended=False)
    state = average.state()
    for wrong in [
        {},
        *(each.state() for each in states),
        {**state, "average/more": torch.ones(1)},
        {"updates": state["updates"]},
    ]:
        with pytest.raises(UserError, match="the state is not one of this average"):
            average.load_state(wrong)
    assert all(torch.equal(tensor, state[name]) for name, tensor in average.state().items())
