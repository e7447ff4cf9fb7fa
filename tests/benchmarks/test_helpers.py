"""The benchmarks' own arithmetic, and what stops a comparison that is not one."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import robustlayers as rl

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measuring")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers")


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def images(n: int = 16) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_every_contender_runs_once_in_a_round_in_a_rotating_order(measuring: ModuleType) -> None:
    ran: list[str] = []
    ticks = iter(range(100))
    runs = {name: lambda name=name: ran.append(name) for name in "abc"}
    spent = measuring.interleaved(runs, 2, clock=lambda: float(next(ticks)))
    assert "".join(ran) == "abc" + "bca" + "cab"  # the first round warms up
    assert spent == {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}


def test_spread_is_median_and_quartiles_and_ratios_are_taken_round_by_round(measuring: ModuleType) -> None:
    assert measuring.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == measuring.Spread(3.0, 2.0, 4.0)
    assert measuring.spread([7.0]) == measuring.Spread(7.0, 7.0, 7.0)
    # Another load doubles the second round of both: the ratio stays, which that of the medians would not.
    assert measuring.ratio([2.0, 8.0, 6.0], [1.0, 4.0, 2.0]) == measuring.Spread(2.0, 2.0, 2.5)


def test_images_outside_of_the_ball_or_short_of_it_stop_the_comparison(measuring: ModuleType) -> None:
    x, eps = torch.full((2, 1, 2, 2), 0.5), 0.1
    measuring.check("exact", x + eps, x, eps)
    for other in (x + 0.11, x + 0.05, x + torch.nan):
        with pytest.raises(ValueError, match="other: linf distance"):
            measuring.check("other", other, x, eps)
    with pytest.raises(ValueError, match="values from"):
        measuring.check("box", x + 0.6, x, 0.6)


def test_a_weaker_attack_stops_the_comparison_and_chance_does_not(measuring: ModuleType) -> None:
    strong = torch.arange(100) < 40
    measuring.agree("a", strong, "b", strong.roll(3))  # three images on each side
    measuring.agree("a", strong, "b", torch.arange(100) < 45)
    with pytest.raises(ValueError, match="0 images are broken by weak alone, 20 by strong alone"):
        measuring.agree("weak", torch.arange(100) < 60, "strong", strong)


def test_half_of_the_images_survive_at_the_eps_found(measuring: ModuleType) -> None:
    model, x = net(), images(64)
    with torch.no_grad():
        y = model(x).argmax(1)
    eps = measuring.half_broken(model, x, y)
    left = measuring.robust(model, rl.PGD(rl.Linf(eps), steps=5, keep="last")(model, x, y), y).sum()
    assert 0.3 * 64 <= left <= 0.7 * 64


def test_a_section_of_the_page_is_replaced_and_nothing_else(measuring: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end one -->\nbetween\n<!-- two -->\nkept\n<!-- end two -->\n")
    measuring.publish("one", measuring.table(["a"], [[1]]), write=True, page=page)
    assert page.read_text() == (
        "before\n<!-- one -->\n\n| a |\n| --- |\n| 1 |\n\n<!-- end one -->\nbetween\n<!-- two -->\nkept\n<!-- end two -->\n"
    )
    with pytest.raises(SystemExit, match="holds no lines <!-- three -->"):
        measuring.publish("three", "", write=True, page=page)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_every_section_that_a_script_writes_is_on_the_page(path: Path) -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    for line in path.read_text().splitlines():
        if "measuring.publish(" in line:
            name = line.split('"')[1]
            assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end {name} -->") == 1


def test_pgd_by_hand_is_ours_from_the_same_start(peers: ModuleType) -> None:
    model, x = net(), images()
    y = torch.arange(16) % 5
    eps, step = 8 / 255, 2 / 255
    theirs = peers.torchattacks_style_pgd(model, x, y, eps, step, 4, seed=torch.Generator().manual_seed(3))
    start = (x + torch.empty_like(x).uniform_(-eps, eps, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    # Ours from that start, with the same ball around x: what it adds to a start of its own is none here.
    ours = start
    for _ in range(4):
        moved = rl.PGD(rl.Linf(step), steps=1, step_size=step, random_start=False, keep="last")(model, ours, y)
        ours = rl.Linf(eps).project(moved, x)
    torch.testing.assert_close(theirs, ours)


def test_peers_craft_in_the_same_ball(peers: ModuleType, measuring: ModuleType) -> None:
    found = [name for name in ("torchattacks", "foolbox", "adv_lib") if importlib.util.find_spec(name)]
    if not found:
        pytest.skip("no peer is installed: pip install --no-deps -r benchmarks/requirements.txt")
    model, x, y = net(), images(), torch.arange(16) % 5
    crafts = peers.crafters(model, 8 / 255, 2 / 255, 5)
    assert len(crafts) == len(found)
    for name, craft in crafts.items():
        assert (craft(x, y) - x).abs().max() <= 8 / 255 + 1e-6, name


def test_operations_are_counted_as_on_paper(measuring: ModuleType) -> None:
    gpu = importlib.import_module("gpu")
    forward, both = gpu.operations(net(), images())
    convolution, linear = 2 * 36 * 4 * 9, 2 * 144 * 5
    assert forward == convolution + linear
    assert both == 2 * forward  # one more of each for the gradient of its input, none for weights


class Event:
    """What the profiler records of an operation, as far as the flame graph reads it."""

    def __init__(self, name: str, microseconds: float, *within: Event) -> None:
        self.name, self.cpu_time_total, self.cpu_children = name, microseconds, within


def test_a_flame_graph_puts_equal_paths_together_as_wide_as_they_take_long(measuring: ModuleType) -> None:
    flame = importlib.import_module("flame")
    root = flame.Frame()
    root.add([Event("a<b>", 60, Event("inner", 20)), Event("c", 30), Event("a<b>", 10, Event("inner", 10))])
    root.microseconds = 100
    picture = ElementTree.fromstring(flame.svg(root, width=1000))
    widths = {
        group[0].text: (float(group[1].attrib["x"]), float(group[1].attrib["width"])) for group in picture if len(group)
    }
    assert widths == {
        "a<b>: 0.1 ms, 70.0%": (0.0, 700.0),
        "inner: 0.0 ms, 30.0%": (0.0, 300.0),
        "c: 0.0 ms, 30.0%": (700.0, 300.0),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::convolution_backward", "convolution, backward"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "convolution, backward"),
        ("aten::mkldnn_convolution", "convolution, forward"),
        ("aten::threshold_backward", "ReLU"),
        ("aten::clamp_min_", "ReLU"),
        ("aten::clamp", "steps of the attack"),
        ("aten::addcmul", "normalization"),
        ("aten::add_", "additions of branches and gradients"),
        ("aten::addmm", "the head and the loss"),
    ],
)
def test_operations_are_of_the_right_kind(measuring: ModuleType, name: str, kind: str) -> None:
    assert importlib.import_module("flame").kind_of(name) == kind
