import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.analysis import robust_criticality, sharpness
from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import inference
from robustlayers.selection import select

ATTACK = PGD(Linf(0.15), steps=3)


class Linear(nn.Module):
    """Two logits of two pixels, x W^T: only W may move."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def test_a_linear_model_with_one_image_has_the_closed_form():
    # The loss log(1 + exp(-m)) falls with the margin m = (w_y - w_other) . x, which a d of norm r lowers by at most
    # r |(x, -x)| = r sqrt(2) |x|.
    model = Linear([[1.0, -0.5], [0.25, 2.0]])
    x, y = torch.tensor([[[[0.75, 0.5]]]]), torch.tensor([1])
    radius = 0.1 * math.sqrt(1 + 0.25 + 0.0625 + 4)
    margin = float((torch.tensor([0.25, 2.0]) - torch.tensor([1.0, -0.5])) @ x.flatten())
    worst = margin - radius * math.sqrt(2 * (0.75**2 + 0.5**2))
    expected = math.log1p(math.exp(-worst)) - math.log1p(math.exp(-margin))
    (row,) = robust_criticality(model, {"all": "all"}, x, y, None).results
    assert row.radius == pytest.approx(radius, rel=1e-6) and row.distance == pytest.approx(radius, rel=1e-5)
    assert row.rise == pytest.approx(expected, rel=1e-5)
    assert sharpness(model, "all", x, y, size=0.1).results[0].rise == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
def test_the_rise_is_that_of_brute_force_over_the_whole_ball(eps):
    # Only the first column of W may move: two numbers, of which every direction and length can be tried.
    class Column(Linear):
        def __init__(self):
            super().__init__([1.0, -0.7])
            self.register_buffer("other", torch.tensor([-0.4, 0.6]))

        def forward(self, x):
            return x.flatten(1) @ torch.stack([self.weight, self.other]).float()

    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(30, 1, 1, 2, generator=generator), torch.randint(0, 2, (30,), generator=generator)
    model = Column()
    found = robust_criticality(model, "weight", x, y, None, eps=eps, steps=40, batch_size=7)
    radius = eps * math.sqrt(1 + 0.49)
    angles = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    best = -math.inf
    for length in (0.25, 0.5, 0.75, 1.0):
        moves = length * radius * torch.stack([angles.cos(), angles.sin()], 1)
        columns = torch.tensor([1.0, -0.7], dtype=torch.float64) + moves
        first, second = x.flatten(1).double()[:, 0], x.flatten(1).double()[:, 1]
        logits = first[None, :, None] * columns[:, None, :] + second[None, :, None] * model.other.double()
        losses = functional.cross_entropy(logits.flatten(0, 1), y.repeat(len(angles)), reduction="none")
        best = max(best, float(losses.view(len(angles), -1).mean(1).max()))
    with torch.no_grad():
        start = functional.cross_entropy(model(x), y).item()
    (row,) = found.results
    assert row.loss == pytest.approx(best, rel=2e-3) and row.loss <= best * (1 + 1e-3)
    assert found.loss == pytest.approx(start, rel=1e-6) and row.rise == pytest.approx(row.loss - found.loss)
    assert row.distance <= radius * (1 + 1e-6)


def test_the_best_point_on_the_way_counts_and_no_rise_is_negative():
    class Hump(Linear):
        def forward(self, x):
            height = 1 - 400 * (self.weight - 1.02).square().sum()  # highest at 1.02
            return torch.stack([height.expand(len(x)), torch.zeros(len(x))], 1)

    x, y = torch.rand(4, 1, 1, 1), torch.ones(4, dtype=torch.int64)
    over = robust_criticality(Hump([1.0]), {"all": "all"}, x, y, None, steps=1, step_size=1).results[0]
    assert over.rise == over.distance == 0
    found = robust_criticality(Hump([1.0]), {"all": "all"}, x, y, None, steps=4, step_size=0.2).results[0]
    assert found.distance == pytest.approx(0.02, rel=1e-4)  # the first step; the second one overshoots and comes back
    assert found.loss == pytest.approx(math.log1p(math.exp(1)), rel=1e-5)


def test_the_images_are_fixed_and_crafted_against_the_model_as_it_is(learned):
    model, _, x, y = learned
    found = robust_criticality(model, {"head": "'7'"}, x, y, ATTACK, steps=1, step_size=1, seed=2, batch_size=40)
    adversarial = []
    with inference(model):
        for first in range(0, 120, 40):
            part = slice(first, first + 40)
            draws = stream(2, "analysis", "pgd-3", first)
            adversarial.append(ATTACK(model, x[part] / 255, y[part], generator=draws))
        images = torch.cat(adversarial)
        assert found.loss == pytest.approx(functional.cross_entropy(model(images), y).item(), rel=1e-4)
        # One step of the whole radius: the point of sharpness-aware minimization.
        head = list(model[7].parameters())
        slopes = torch.autograd.grad(functional.cross_entropy(model(images), y), head)
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in head))
        slope = math.sqrt(sum(float(s.square().sum()) for s in slopes))
        with torch.no_grad():
            for parameter, step in zip(head, slopes, strict=True):
                parameter += 0.1 * norm / slope * step
            logits = model(images)
    (row,) = found.results
    assert row.loss == pytest.approx(functional.cross_entropy(logits, y).item(), rel=1e-4)
    assert row.accuracy == int((logits.argmax(1) == y).sum()) / 120
    assert found.attack.startswith("pgd-3, linf 0.15")


def test_a_dead_layer_is_the_least_critical_and_norm_layers_count_too(learned):
    model, _, x, y = learned
    with torch.no_grad():
        model[0].bias.zero_()
    found = robust_criticality(
        model, {"zeros": '"0.bias"', "norms": "norm", "first": "'0'", "head": "'7'"}, x, y, ATTACK
    )
    rows = {row.group: row for row in found.results}
    assert rows["zeros"].radius == rows["zeros"].rise == 0 and found.least.group == "zeros"
    assert all(rows[name].rise > 0.01 for name in ("norms", "first", "head"))
    assert rows["norms"].parameters == 24 and found.most.rise == max(row.rise for row in found.results)


def test_a_part_of_a_tensor_moves_alone(learned):
    model, _, x, y = learned
    whole, part = (
        robust_criticality(model, {"g": selector}, x, y, None, steps=3).results[0]
        for selector in ("'3'", "channels('3', share=0.5) & conv")
    )
    assert part.rise > 0 and part.norm < whole.norm
    assert part.names == () and part.parameters < whole.parameters


def test_more_steps_and_a_larger_ball_find_no_less(learned):
    model, _, x, y = learned
    one = robust_criticality(model, "conv | norm", x, y, ATTACK, steps=2)
    more = robust_criticality(model, "conv | norm", x, y, ATTACK, steps=12)
    larger = robust_criticality(model, "conv | norm", x, y, ATTACK, steps=12, eps=0.3)
    for few, many, wide in zip(one.results, more.results, larger.results, strict=True):
        assert 0 <= few.rise <= many.rise * 1.02 and many.rise < wide.rise
        assert many.distance <= many.radius * (1 + 1e-6)


def test_nothing_is_left_behind(learned, no_trace):
    model, _, x, y = learned
    with no_trace(model):
        first = robust_criticality(model, "all - norm.statistics", x[:30], y[:30], ATTACK, steps=2)

    def stop(what, done, total):
        if what == "3":
            raise KeyboardInterrupt

    with no_trace(model), pytest.raises(KeyboardInterrupt):
        robust_criticality(model, "all - norm.statistics", x[:30], y[:30], ATTACK, progress=stop)
    with no_trace(model), torch.inference_mode():
        again = robust_criticality(model, "all - norm.statistics", x[:30], y[:30], ATTACK, steps=2)
    assert again == first


def test_progress_ends_at_its_total(learned):
    model, _, x, y = learned
    seen = []
    robust_criticality(model, "conv", x, y, ATTACK, steps=2, batch_size=50, progress=lambda *what: seen.append(what))
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and seen[-1][1] == seen[-1][2] == 120 * (1 + 1 + 2 * 3)


def test_a_loss_that_overflows_is_the_worst_of_all():
    class Fragile(Linear):
        def forward(self, x):
            return super().forward(x) + (self.weight.abs().max() > 1.01) * torch.inf

    x, y = torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1])
    found = robust_criticality(Fragile([[1.0, 0.0], [0.0, 1.0]]), {"all": "all"}, x, y, None)
    assert not math.isfinite(found.results[0].rise)
    assert json.loads(json.dumps(found.rows(), allow_nan=False))[0]["rise"] is None
    assert found.plot().get_xlim()[1] < 1


def test_scores_rank_groups_for_the_selectors(learned, tmp_path):
    model, _, x, y = learned
    found = robust_criticality(model, "conv | linear | norm.affine", x, y, ATTACK, steps=2)
    path = found.to_scores(tmp_path / "mrc.csv")
    names = select(model, f'top("{path}", count=1)')
    assert names and set(names) <= set(select(model, found.most.selector))
    assert select(model, found.least.selector)


def test_user_errors(learned):
    model, _, x, y = learned
    for options, text in (
        ({"eps": 0}, "eps: 0"),
        ({"eps": "a"}, "eps: 'a' is not a number"),
        ({"steps": 0}, "steps: 0"),
        ({"step_size": -1}, "step_size: -1"),
        ({"batch_size": 0}, "batch_size: 0"),
    ):
        with pytest.raises(UserError, match=text):
            robust_criticality(model, "conv", x, y, None, **options)
    with pytest.raises(UserError, match="s: has no parameters to perturb"):
        robust_criticality(model, {"s": "norm.statistics"}, x, y, None)
    with pytest.raises(UserError, match="one integer label per image"):
        robust_criticality(model, "conv", x, y[:3], None)


def test_the_plot_names_groups_and_the_ball(learned):
    model, _, x, y = learned
    axes = robust_criticality(model, "conv | norm.affine", x[:20], y[:20], ATTACK, steps=1).plot()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1", "3", "4"]
    assert "adversarial images, nats,\nwithin 10 %" in axes.get_xlabel()
