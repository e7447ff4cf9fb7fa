"""Attacks in turn: who goes on, what is kept, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlayers.attacks import APGD, FGSM, L2, PGD, Linf, Square, is_correct
from robustlayers.core.errors import UserError
from robustlayers.core.ranks import Ranks
from robustlayers.evaluation.cascade import Moment, Outcome, cascade
from robustlayers.normalization.layers import RandomNorm

EPS = Linf(0.12)
ATTACKS = {"pgd-5": PGD(EPS, steps=5), "apgd-ce-6": APGD(EPS, 6, early_exit=True), "square-40": Square(EPS, 40)}


def _same(one: Outcome, other: Outcome) -> bool:
    tensors = zip((one.clean, one.robust, one.x_adv), (other.clean, other.robust, other.x_adv), strict=True)
    plain = (one.broken_by, one.table, one.label, one.notes) == (other.broken_by, other.table, other.label, other.notes)
    return plain and all(torch.equal(left, right) for left, right in tensors)


def test_only_survivors_go_on_and_the_verdict_is_the_models(trained, bits):
    model, x, y = trained
    model.train()
    before = bits(model)
    found = cascade(model, x, y, ATTACKS)
    assert model.training and bits(model) == before
    model.eval()
    pixels = x.float() / 255
    with torch.no_grad():
        assert torch.equal(found.clean, is_correct(model(pixels), y))
        assert torch.equal(found.robust, is_correct(model(found.x_adv), y))
    EPS.check(found.x_adv, pixels)
    assert torch.equal(found.x_adv[found.robust], pixels[found.robust])
    assert found.disagreements == 0 and found.label == "pgd-5+apgd-ce-6+square-40"
    standing = int(found.clean.sum())
    assert standing == 115
    for turn, attack in zip(found.table, ATTACKS.values(), strict=True):
        assert turn.attacked == standing and turn.robust == standing - turn.broken
        assert turn.broken == found.broken_by.count(turn.attack)
        assert turn.forwards <= attack.forward_passes * standing
        assert turn.backwards <= attack.backward_passes * standing
        standing = turn.robust
    assert 0 < standing < 110 and standing == int(found.robust.sum())
    assert found.accuracy == standing / 120
    assert [name == "clean" for name in found.broken_by] == (~found.clean).tolist()
    assert f"pgd-5            {found.table[0].robust / 120:7.2%}" in str(found)


def test_batches_order_and_company_do_not_change_an_image(trained):
    model, x, y = trained
    found = cascade(model, x, y, ATTACKS)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for size in (7, 120):
        other = cascade(model, x[order], y[order], ATTACKS, batch_size=size)
        assert torch.equal(other.robust, found.robust[order])
        assert other.broken_by == tuple(found.broken_by[place] for place in order.tolist())
    some = cascade(model, x[30:42], y[30:42], ATTACKS, batch_size=1)
    assert torch.equal(some.robust, found.robust[30:42])
    assert not torch.equal(cascade(model, x, y, ATTACKS, seed=1).x_adv, found.x_adv)


def test_more_attacks_and_a_larger_eps_never_leave_more(trained):
    model, x, y = trained
    one = cascade(model, x, y, {"fgsm": FGSM(EPS)})
    two = cascade(model, x, y, {"fgsm": FGSM(EPS), **ATTACKS})
    assert not (two.robust & ~one.robust).any() and two.robust.sum() < one.robust.sum()


def test_a_function_gets_the_same_verdict_as_its_module(trained):
    model, x, y = trained
    model.eval()
    assert torch.equal(
        cascade(lambda images: model(images), x, y, ATTACKS).robust, cascade(model, x, y, ATTACKS).robust
    )


def test_a_second_call_takes_everything_from_the_folder(trained, tmp_path: Path, monkeypatch):
    model, x, y = trained
    moments: list[Moment] = []
    first = cascade(model, x, y, ATTACKS, directory=tmp_path / "a", batch_size=30, progress=moments.append)
    assert moments[-1].done == moments[-1].of and moments[-1].robust == int(first.robust.sum())
    assert [moment.attack for moment in moments] == sorted((m.attack for m in moments), key=list(ATTACKS).index)
    assert _same(first, cascade(model, x, y, ATTACKS, batch_size=30))
    for attack in (PGD, APGD, Square):
        monkeypatch.setattr(attack, "__call__", None)
    assert _same(first, cascade(model, x, y, ATTACKS, directory=tmp_path / "a", batch_size=50))


def test_what_is_missing_or_damaged_is_made_again(trained, tmp_path: Path):
    model, x, y = trained
    first = cascade(model, x, y, ATTACKS, directory=tmp_path, batch_size=30)
    shards = sorted(tmp_path.glob("0*/*.safetensors"))
    assert len(shards) > 8
    shards[1].write_bytes(shards[1].read_bytes()[:-3])
    flipped = bytearray(shards[4].read_bytes())
    flipped[-1] ^= 1
    shards[4].write_bytes(flipped)
    for path in shards[-3:]:
        path.unlink()
    (tmp_path / ".tmp-1-a").write_bytes(b"half")
    again = cascade(model, x, y, ATTACKS, directory=tmp_path, batch_size=30)
    assert torch.equal(again.x_adv, first.x_adv) and again.broken_by == first.broken_by
    assert len(list(tmp_path.glob("0*/*.damaged"))) == 2 and not list(tmp_path.glob(".tmp-*"))


class Shaky(nn.Module):
    """A random norm before a net that has learned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm, self.model = RandomNorm(nn.BatchNorm2d(1), kinds="batch+layer"), model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(0.9 * x + 0.02 * self.norm(x))


@pytest.mark.parametrize("random", [False, True], ids=["plain", "random norm"])
@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a folder"])
def test_processes_that_share_the_batches_find_what_one_finds(
    trained, together, random: bool, kept: bool, tmp_path: Path
):
    model, x, y = trained
    net = Shaky(model).eval() if random else model
    alone = cascade(copy.deepcopy(net), x, y, ATTACKS, batch_size=16)
    made: list[list[Moment]] = [[], [], []]

    def work(ranks: Ranks) -> Outcome:
        directory = tmp_path / "shards" if kept else None
        told = made[ranks.index].append
        own = copy.deepcopy(net)
        return cascade(own, x, y, ATTACKS, batch_size=16, directory=directory, progress=told, ranks=ranks)

    for found in together(3, work):
        assert _same(found, alone) and found.disagreements == alone.disagreements
    shares = [next(moment.of for moment in moments if moment.attack == "pgd-5") for moments in made]
    assert sum(shares) == alone.table[0].attacked and max(shares) - min(shares) <= 32
    assert all(moments[-1].done == moments[-1].of for moments in made)
    if kept:
        assert _same(cascade(copy.deepcopy(net), x, y, ATTACKS, batch_size=16, directory=tmp_path / "shards"), alone)


def test_processes_go_on_from_what_others_have_kept(trained, together, tmp_path: Path):
    model, x, y = trained
    alone = cascade(model, x, y, ATTACKS, batch_size=16, directory=tmp_path)
    shards = sorted(tmp_path.glob("0*/*.safetensors"))
    for path in (shards[2], shards[3], *tmp_path.glob("02*/*.safetensors")):
        path.unlink()
    shards[5].write_bytes(b"damaged")
    made: list[list[str]] = [[], []]

    def work(ranks: Ranks) -> Outcome:
        def told(moment: Moment) -> None:
            made[ranks.index].append(moment.attack)

        return cascade(
            copy.deepcopy(model), x, y, ATTACKS, batch_size=16, directory=tmp_path, progress=told, ranks=ranks
        )

    for found in together(2, work):
        assert torch.equal(found.x_adv, alone.x_adv) and found.broken_by == alone.broken_by
    assert len(list(tmp_path.glob("0*/*.damaged"))) == 1
    assert "square-40" in made[0] and "square-40" in made[1]


def test_what_one_process_fails_of_is_raised_there(trained, together):
    model, x, y = trained

    def work(ranks: Ranks) -> Outcome:
        own = copy.deepcopy(model)
        if ranks.index:
            own.register_forward_hook(lambda *_: 1 / 0)
        return cascade(own, x, y, ATTACKS, batch_size=16, ranks=ranks)

    with pytest.raises(ZeroDivisionError):
        together(2, work)


def test_a_folder_is_for_one_evaluation(trained, tmp_path: Path):
    model, x, y = trained
    fgsm = {"fgsm": FGSM(EPS)}
    cascade(model, x, y, fgsm, directory=tmp_path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(25, 4))
    for arguments, what in (
        ((other, x, y, fgsm), "model"),
        ((model, x[1:], y[1:], fgsm), "images"),
        ((model, x, y, {"fgsm": FGSM(Linf(0.1))}), "attacks"),
    ):
        with pytest.raises(UserError, match=rf"evaluation.json: holds another evaluation: {what} differ"):
            cascade(*arguments, directory=tmp_path)
    cascade(lambda images: model(images), x, y, fgsm, directory=tmp_path / "f")
    with pytest.raises(UserError, match="holds another function's evaluation"):
        cascade(lambda images: other(images), x, y, fgsm, directory=tmp_path / "f")


class _Wobbly(nn.Module):
    """Random output: every image is right in one forward and wrong in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        own = torch.zeros(len(x), 2)
        own[:, self.calls % 2] = 1
        return own + x.mean((1, 2, 3))[:, None]


def test_a_random_model_is_noticed_when_it_is_judged_again():
    x, y = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(6, dtype=torch.long)
    model = _Wobbly()
    counts = set()
    for forward in (model, lambda images: model(images)):
        for start in (0, 1):
            model.calls = start
            found = cascade(forward, x, y, {"square-3": Square(EPS, 3)})
            counts.add(found.disagreements)
            said = any("the output is random" in note for note in found.notes)
            assert said == (found.disagreements > 0)
    assert counts - {0}


class _Leaves(PGD):
    def __call__(self, forward, x, y, *, generator=None):  # pyright: ignore
        return x + 1


def test_mistakes(trained, monkeypatch, tmp_path: Path):
    model, x, y = trained
    for attacks, said in (
        ({}, "one threat is needed for all of them; got: there is no attack"),
        ({"a": FGSM(EPS), "b": FGSM(L2(1))}, "one threat is needed for all of them; got: linf 0.12; l2 1"),
        ({"leaves": _Leaves(EPS)}, "leaves is not one of this package"),
    ):
        with pytest.raises(UserError, match=said):
            cascade(model, x, y, attacks)
    for size in (0, True, 1.5):
        with pytest.raises(UserError, match="batch_size"):
            cascade(model, x, y, ATTACKS, batch_size=size)  # pyright: ignore
    with pytest.raises(UserError, match="no image"):
        cascade(model, x[:0], y[:0], ATTACKS)
    monkeypatch.setattr(FGSM, "__call__", _Leaves.__call__)
    with pytest.raises(UserError, match=r"fgsm: the attack left the ball"):
        cascade(model, x, y, {"fgsm": FGSM(EPS)})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written into"):
        cascade(model, x, y, ATTACKS, directory=tmp_path / "file" / "below")
