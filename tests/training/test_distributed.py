"""Two processes that share batches: they compute what one does, or what is written down, and planted faults are seen.

Both processes run once, `together.py` under gloo; the tests look at what they wrote.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustlayers.attacks import PGD, Linf, Threat, WorstOf
from robustlayers.attacks._draws import Part, normal, spawn, uniform
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors
from robustlayers.core.random import stream
from robustlayers.core.ranks import ALONE, Ranks
from robustlayers.data import Augment, batches
from robustlayers.normalization import NormPolicy, Switch
from robustlayers.selection import Partition
from robustlayers.training import PartialStep, PhaseTrainer, Shards
from robustlayers.training.distributed import check_shared, shard_sizes

_FILE = Path(__file__).with_name("together.py")
_spec = importlib.util.spec_from_file_location("together", _FILE)
assert _spec is not None and _spec.loader is not None
together = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(together)

TWO = Ranks(0, 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes wrote: tensors by name, and facts."""
    out = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(_FILE), str(out)]
    running = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(index)}, stderr=subprocess.PIPE, text=True)
        for index in (0, 1)
    ]
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    return [(read_tensors(out / f"{index}.safetensors"), read_json(out / f"{index}.json")) for index in (0, 1)]


@pytest.fixture(scope="module")
def one():
    """The same, computed by one process."""
    return together.cases(ALONE)


def under(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def distance(found, expected):
    """Largest relative distance between tensors of the same name; of those that are rounding noise, from their kind's norm."""
    assert found.keys() == expected.keys()
    whole = {}
    for name, tensor in expected.items():
        kind = name.split("/")[0]
        whole[kind] = max(whole.get(kind, 0.0), float(tensor.double().norm()))
    return max(
        float((found[name].double() - tensor.double()).norm())
        / max(float(tensor.double().norm()), 1e-3 * whole[name.split("/")[0]], 1e-30)
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("case", together.GRADIENTS)
def test_gradients_of_two_processes_are_those_of_one(case, two, one):
    found, expected = (under(f"gradients/{case}/", tensors) for tensors in (two[0][0], one[0]))
    assert any(name.startswith("grad/") for name in found)
    assert (
        distance(found, expected) < 1e-6
    )  # gradients, statistics, losses and right answers, and weights after updates


@pytest.mark.parametrize("fault", together.FAULTY)
def test_planted_faults_are_far_from_one_process(fault, two, one):
    found, expected = (under(f"faulty/{fault}/", tensors) for tensors in (two[0][0], one[0]))
    assert distance(found, expected) > 1e-2


def test_both_processes_hold_the_same_bits(two):
    (first, _), (second, _) = two
    faulty = ("faulty/forgetful/", "faulty/local/")
    assert first.keys() == second.keys()
    assert [name for name in first if not name.startswith(faulty) and not torch.equal(first[name], second[name])] == []
    assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith(faulty))


def by_hand(n=7, *, statistics="none", bright=None, **options):
    """Two parts of a batch, each by a step of its own on a model of its own; gradients and statistics of both."""
    x, y = together.batch(n)
    if bright is not None:
        x[bright] = 1.0
    sizes = [4, 3]
    found = []
    for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
        made = together.net(options.get("model", "mlp"))
        attack = options.get("attack", together.ATTACK)
        step = PartialStep(made, Partition(made, {"all": "all"}), options["signals"], attack=attack, optimizer=None)
        found.append((step.gradients(part, labels, generator=stream(0, "unused")).by_name, dict(made.named_buffers())))
    shares = [size / n for size in sizes]
    names = found[0][0].keys() | found[1][0].keys()
    gradients = {
        name: sum(share * own[name] for share, (own, _) in zip(shares, found, strict=True) if name in own)
        for name in names
    }
    means = shares if statistics == "mean" else [1.0, 0.0]
    buffers = {
        name: value if not value.is_floating_point() else means[0] * value + means[1] * found[1][1][name]
        for name, value in found[0][1].items()
    }
    return {f"grad/{name}": value for name, value in gradients.items()} | {
        f"buffer/{name}": value for name, value in buffers.items()
    }


@pytest.mark.parametrize("case", together.GHOSTS)
def test_ghost_batch_norm_is_what_each_part_gives_alone(case, two):
    found = under(f"ghosts/{case}/", two[0][0])
    found = {name: value for name, value in found.items() if name.startswith(("grad/", "buffer/"))}
    assert distance(found, by_hand(**together.GHOSTS[case])) < 1e-9


def test_statistics_that_nothing_moves_stay_bit_for_bit(two):
    found, expected = under("untouched/", two[0][0]), dict(together.net(dtype=torch.float32).named_buffers())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_updates_in_half_precision_agree_within_its_rounding(two, one):
    found, expected = under("rough/", two[0][0]), under("rough/", one[0])
    assert 0 < distance(under("grad/", found), under("grad/", expected)) < 0.3
    names = sorted(under("grad/", expected))
    whole = [torch.cat([part[f"grad/{name}"].flatten() for name in names]) for part in (found, expected)]
    assert float(torch.cosine_similarity(*whole, dim=0)) > 0.98  # bf16 itself is about as far from float32


def test_a_tensor_without_a_gradient_anywhere_has_none(two):
    found = under("ghosts/a gradient in one process only/grad/", two[0][0])
    assert sorted(found) == ["bright.bias", "bright.weight", "usual.bias", "usual.weight"]
    assert float(found["bright.weight"].norm()) > 0


@pytest.mark.parametrize("case", ["sync", "average", "steps"])
def test_a_phase_of_two_processes_is_that_of_one(case, two, one):
    found, expected = (under(f"trained/{case}/", tensors) for tensors in (two[0][0], one[0]))
    assert torch.equal(found["passes"], expected["passes"]) and torch.equal(found["place"], expected["place"])
    assert distance(found, expected) < 1e-3  # in single precision, after eight steps with signs in them
    assert distance(under("result/", found), under("result/", expected)) < 1e-5


def test_layer_rates_are_measured_together(two, one):
    found, expected = (under("trained/layer rates/result/", tensors) for tensors in (two[0][0], one[0]))
    assert distance(found, expected) < 1e-2  # relative gradient norms of biases that have none are rounding noise


@pytest.mark.parametrize("case", together.TRAINED)
def test_a_resume_ends_with_the_same_bits(case, two):
    whole, resumed = (under(f"{kind}/{case}/", two[1][0]) for kind in ("trained", "resumed"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert all(bool(value) for name, value in whole.items() if name.startswith("kept/"))


@pytest.mark.parametrize("statistics", ["none", "mean"])
def test_ghost_batch_norm_is_another_training(statistics, two, one):
    found, expected = (under(f"trained/{statistics}/result/", tensors) for tensors in (two[0][0], one[0]))
    assert distance(found, expected) > 1e-2


def test_verdicts_are_those_of_one_process(two, one):
    found, expected = under("verdicts/", two[1][0]), under("verdicts/", one[0])
    assert found.keys() == {"clean", "weak", "strong", "robust"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert 0 < int(found["robust"].sum()) < int(found["clean"].sum())


def test_all_processes_hear_of_a_divergence_and_of_what_the_main_one_tells(two, one):
    (_, main), (_, other) = two
    assert main["diverged"] == other["diverged"] == one[1]["diverged"] != "did not diverge"
    assert main["told"] == other["told"] == {"by": 0}
    assert (main["index"], other["index"]) == (0, 1) and main["first"] != other["first"]


# -- without a second process --------------------------------------------------------------------------------------


@given(st.integers(2, 300), st.integers(1, 40))
def test_parts_are_complete_and_of_at_least_two_images(n, count):
    sizes = shard_sizes(n, count)
    assert len(sizes) == count and sum(sizes) == n
    held = [size for size in sizes if size]
    assert min(held) >= 2 and max(held) - min(held) <= 1 and sizes == sorted(sizes, reverse=True)


@given(st.integers(2, 30), st.integers(1, 5))
def test_parts_of_batches_are_the_batches(n, count):
    whole = torch.arange(n)
    parts = []
    for index in range(count):
        shards = Shards(nn.Linear(1, 1), ranks=Ranks(index, count))
        rows = shards.rows(n)
        if shards.share:
            parts.append(whole[rows])
        else:
            assert whole[rows].tolist() == [0, 1]  # something to compute with, at weight 0
    assert torch.equal(torch.cat(parts), whole)


def test_parts_of_an_epoch_are_those_of_one_process():
    images = together.images()
    settings = {"seed": 1, "epoch": 2, "augment": Augment(crop=2, flip=True)}
    whole = list(batches(images, 6, **settings))
    parts = [
        list(batches(images, 6, **settings, part=Shards(nn.Linear(1, 1), ranks=Ranks(index, 2)).rows))
        for index in (0, 1)
    ]
    assert [len(x) for x, _ in whole] == [6, 6, 6, 3]
    for (x, y), (first, labels), (second, others) in zip(whole, *parts, strict=True):
        if len(x) == 3:  # two images and one, which is too few
            assert torch.equal(first, x) and torch.equal(second, x[:2])
            continue
        assert torch.equal(torch.cat([first, second]), x) and torch.equal(torch.cat([labels, others]), y)


def test_draws_of_a_part_are_those_of_the_whole():
    def made():
        return torch.Generator().manual_seed(5)

    part, whole = Part.of_batch(made(), slice(2, 5), 7), made()
    for draw in (uniform, normal, uniform):  # one after another: the stream goes on as that of the whole
        assert torch.equal(draw((3, 2, 2), part), draw((7, 2, 2), whole)[2:5])
    seeds = [generator.initial_seed() for generator in spawn(7, whole)]
    assert [generator.initial_seed() for generator in spawn(3, part)] == seeds[2:5]


def test_layers_that_draw_from_torch_draw_for_themselves():
    drawn = []
    for index in (0, 1):
        trainer = together.trainer(Ranks(index, 2))
        with trainer._own_draws(0, 0):
            drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)  # importing it would fail
    one = together.trained(ALONE)
    model = together.net()
    shards = Shards(model, "none", ranks=ALONE)
    assert not shards.several and "state" not in one
    gradients = {"a": torch.ones(2)}
    assert shards(gradients, gradients) == gradients


@pytest.mark.parametrize(
    ("attack", "policy", "model", "text"),
    [
        (PGD(Linf(0.1), early_exit=True), together.BY_BATCH, "mlp", "pgd-10 drops images that are done with"),
        (WorstOf([together.ATTACK, together.STILL]), together.BY_BATCH, "mlp", "drops images that are done with"),
        (
            together.ATTACK,
            NormPolicy(adversarial=Switch(by="mixture", update=False, alpha="0.5")),
            "mlp",
            "sync has no mixture",
        ),
        (together.ATTACK, None, "no-track", "1 has no running statistics"),
    ],
)
def test_what_a_shared_batch_cannot_do_is_told(attack, policy, model, text):
    made = together.net(model)
    step = PartialStep(
        made, Partition(made, {"all": "all"}), {"all": "adversarial"}, attack=attack, optimizer=None, policy=policy
    )
    with pytest.raises(UserError, match=f"^statistics: sync.*{text}|^statistics: {text}"):
        check_shared(step, "sync")
    check_shared(step, "mean")


def test_attacks_that_drop_images_may_craft_by_running_statistics():
    made = together.net()
    step = PartialStep(
        made,
        Partition(made, {"all": "all"}),
        {"all": "adversarial"},
        attack=PGD(Threat("linf", 0.1), early_exit=True),
        optimizer=None,
    )
    check_shared(step, "sync")


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"statistics 'sink'.*sync"):
        Shards(nn.Linear(1, 1), "sink")
    with pytest.raises(UserError, match="statistics 'batch'"):
        PhaseTrainer(
            together.net(), {"all": "all"}, {"all": "natural"}, together.images(), epochs=1, statistics="batch"
        )
