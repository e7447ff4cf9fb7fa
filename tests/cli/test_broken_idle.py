"""Settings that do nothing in a phase without training: one line each where they were written, nothing where inherited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

# The second phase of the base study begins at line 18; what it does stands on line 19 from here on.
WHOLE = "    epochs: 1\n    train:\n      norm: adversarial\n      rest: frozen\nfactors:"
RECALIBRATE = "recalibrate: {on: adversarial}"
SET = "set: {norm: {from: pretrain}}"
TAKES = {
    RECALIBRATE: "does nothing in a phase with recalibrate; allowed: name, epochs, recalibrate, batch_size, attack",
    SET: "does nothing in a phase with set; allowed: name, epochs, set",
}

SETTINGS = [
    "optimizer: {lr: 0.1, momentum: 0}",
    "optimizer: {groups: {norm: {scale: 0.1}}}",
    "schedule: {warmup: 0.1}",
    "normalization: rice",
    "normalization: {evaluate: {by: batch}}",
    "crafting: bf16",
    "crafting: fp32",
    "precision: bf16",
    "statistics: mean",
    "steps: 4",
    "start: {norm: keep}",
    "windows: {norm: [0, 0.5]}",
    "perturbation: ramp",
    "ascent: awp",
    "average: ema",
    "stop: {patience: 2}",
    "keep: 1",
]
ONLY_BATCHES = ["batch_size: 32", "attack: fgsm"]  # of which recalibrating makes something


def one_arm(text: str) -> str:
    return text[: text.index("factors:")] + text[text.index("seeds:") : text.index("claims:")]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [(kind, setting) for kind in TAKES for setting in SETTINGS] + [(SET, setting) for setting in ONLY_BATCHES],
)
def test_what_does_nothing_there_is_one_line_at_its_place(
    kind: str, setting: str, edited: Callable[..., str], refused: Callable[..., list[str]]
) -> None:
    Path("s.yaml").write_text(one_arm(edited((WHOLE, f"    {kind}\n    epochs: 1\n    {setting}\nfactors:"))))
    key = setting.partition(":")[0]
    assert refused("run", "s.yaml", "--out", "out") == [f"s.yaml:21: phases.1.{key}: {TAKES[kind]}"]


@pytest.mark.parametrize("kind", TAKES)
def test_what_a_phase_inherits_and_what_says_nothing_is_no_mistake(
    kind: str, edited: Callable[..., str], call: Callable[..., tuple[int, str, str]]
) -> None:
    shared = "  optimizer: {lr: 0.05}\n  schedule: {name: cosine}\n  normalization: rice\n  crafting: bf16\n"
    own = "".join(f"    {setting}\n" for setting in (ONLY_BATCHES if kind == RECALIBRATE else ()))
    phase = f"    {kind}\n{own}    optimizer: {{}}\n    stop: null\nfactors:"
    Path("s.yaml").write_text(one_arm(edited(("  optimizer: {lr: 0.05}\n", shared), (WHOLE, phase))))
    more = ("training.optimizer.momentum=0.5", "training.precision=bf16", "training.statistics=mean", "attack=fgsm")
    code, _, err = call("plan", "s.yaml", "--no-timing", *(word for path in more for word in ("--set", path)))
    assert (code, err) == (0, "")


# The second phase with an optimizer of its own on line 20; two factors, from line 22 on.
PATCHED = f"""\
    {RECALIBRATE}
    optimizer: {{lr: 0.1}}
factors:
  momentum:
    low: {{phases.adapt.optimizer.momentum: 0.5}}
    none: {{}}
  rate:
    own: {{phases.adapt.schedule: {{name: cosine, warmup: 0.1}}}}
    same: {{}}
seeds: 1
"""


def test_it_is_told_wherever_it_was_written_and_once_for_all_arms(
    edited: Callable[..., str], refused: Callable[..., list[str]]
) -> None:
    """In an override, in the file, in a patch of a key that the file has too, and in a patch of the whole."""
    text = edited((WHOLE, "factors:"))
    Path("s.yaml").write_text(text[: text.index("factors:")] + PATCHED)
    assert refused("plan", "s.yaml", "--set", "phases.adapt.precision=bf16") == [
        f"--set phases.adapt.precision: {TAKES[RECALIBRATE]}",
        f"s.yaml:20: phases.1.optimizer: {TAKES[RECALIBRATE]}",
        f's.yaml:23: factors.momentum.low."phases.adapt.optimizer.momentum": {TAKES[RECALIBRATE]}',
        f's.yaml:26: factors.rate.own."phases.adapt.schedule": {TAKES[RECALIBRATE]}',
    ]


def test_it_is_told_beside_mistakes_of_other_kinds(
    edited: Callable[..., str], refused: Callable[..., list[str]]
) -> None:
    phase = f"    {SET}\n    keep: 1\nfactors:"
    Path("s.yaml").write_text(one_arm(edited((WHOLE, phase), ("width: 8", "widht: 8"), ("images: 50}", "imags: 50}"))))
    lines = refused("plan", "s.yaml")
    assert [line.split(": ")[1] for line in lines] == [
        "model.widht",
        "phases.1.keep",
        "evaluate.monitor.imags",
    ], lines


# The optimizer of all phases stands on line 13, one of the second phase on line 20.
ADAM = (
    "does nothing in an optimizer adam; "
    "allowed: name, lr, weight_decay, betas, decay, clip, rates, rates_batches, groups"
)
SGD = (
    "does nothing in an optimizer sgd; "
    "allowed: name, lr, momentum, weight_decay, nesterov, decay, clip, rates, rates_batches, groups"
)


@pytest.mark.parametrize(
    ("shared", "own", "lines"),
    [
        ("lr: 0.05", "name: adam, momentum: 0.9", [f"20: phases.1.optimizer.momentum: {ADAM}"]),
        ("lr: 0.05", "name: sgd, betas: [0.9, 0.99]", [f"20: phases.1.optimizer.betas: {SGD}"]),
        ("name: adam", "momentum: 0.9", [f"20: phases.1.optimizer.momentum: {ADAM}"]),
        (
            "name: adam, momentum: 0.9, nesterov: true",
            "lr: 0.1",
            [f"13: training.optimizer.{key}: {ADAM}" for key in ("momentum", "nesterov")],
        ),
        ("momentum: 0.9", "name: adam", []),
        ("name: sgd, momentum: 0.9", "name: adam, betas: [0.9, 0.99]", []),
        ("name: adam, betas: [0.9, 0.99]", "name: sgd, momentum: 0.5", []),
    ],
)
def test_constants_of_another_kind_of_optimizer_do_nothing(
    shared: str,
    own: str,
    lines: list[str],
    edited: Callable[..., str],
    refused: Callable[..., list[str]],
    call: Callable[..., tuple[int, str, str]],
) -> None:
    phase = (
        f"    epochs: 1\n    optimizer: {{{own}}}\n    train:\n      norm: adversarial\n      rest: frozen\nfactors:"
    )
    text = edited((WHOLE, phase), ("  optimizer: {lr: 0.05}\n", f"  optimizer: {{{shared}}}\n"))
    Path("s.yaml").write_text(one_arm(text))
    if lines:
        assert refused("run", "s.yaml", "--out", "out") == [f"s.yaml:{line}" for line in lines]
    else:
        assert call("groups", "s.yaml")[::2] == (0, "")


def test_a_factor_may_make_another_kind_of_an_optimizer_and_its_own_constants_have_to_fit(
    edited: Callable[..., str], refused: Callable[..., list[str]], call: Callable[..., tuple[int, str, str]]
) -> None:
    text = edited(("  optimizer: {lr: 0.05}\n", "  optimizer: {name: sgd, lr: 0.05, momentum: 0.5}\n"))
    level = "    norm: {{training.optimizer.name: adam{}}}\n"
    Path("s.yaml").write_text(text.replace("    norm: {}\n", level.format("")))
    assert call("groups", "s.yaml")[::2] == (0, "")
    Path("s.yaml").write_text(text.replace("    norm: {}\n", level.format(", training.optimizer.momentum: 0.8")))
    (line,) = refused("run", "s.yaml", "--out", "out")
    assert line.endswith(ADAM) and "training.optimizer.momentum" in line
    name, momentum = "training.optimizer.name=adam", "training.optimizer.momentum=0.8"
    Path("s.yaml").write_text(one_arm(text))
    assert refused("run", "s.yaml", "--set", name, "--set", momentum) == [f"--set training.optimizer.momentum: {ADAM}"]
