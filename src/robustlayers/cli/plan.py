"""`robustlayers plan`: what a study would do: groups, runs, shared phases, cost; trains nothing, writes nothing."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from robustlayers.cli.arguments import Overrides, StudyFile, Trust
from robustlayers.cli.console import plain_console

if TYPE_CHECKING:
    from robustlayers.normalization import NormPolicy
    from robustlayers.study.plan import PhaseNode, Plan

__all__ = ["plan", "tell_starts"]


def plan(
    study: StudyFile,
    overrides: Overrides = (),
    trust: Trust = False,
    timing: Annotated[bool, tyro.conf.arg(help="measure a few passes to predict the time")] = True,
) -> int:
    """Print which tensors each group holds, the runs, the phases they share, and the cost; train nothing."""
    from rich.table import Table

    from robustlayers.study.definition import load_study
    from robustlayers.study.describe import describe_plan
    from robustlayers.study.plan import make_plan

    made = make_plan(load_study(Path(study), overrides, trust=trust))
    tell_starts(made)
    facts = describe_plan(made)
    console = plain_console()
    console.print(f"[bold]{facts['name']}[/bold]: {facts['question']}", markup=True)
    for key in ("data", "model", "threat", "training_attack", "selection"):
        extra = ""
        if key == "model":
            share = facts["norm_parameters"] / facts["model_parameters"]
            extra = f", {facts['model_parameters']:,} parameters, norm layers {share:.3%}"
        console.print(f"  {key.replace('_', ' '):<16} {facts[key]}{extra}", markup=False, soft_wrap=True)

    arms = Table(title="arms", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("arm", "run", "phases", "trained", "share", "forward", "backward"):
        arms.add_column(column, justify="right" if column in ("trained", "share", "forward", "backward") else "left")
    for arm in facts["arms"]:
        phases = " > ".join(f"{phase['name']} {phase['epochs']}" for phase in arm["phases"])
        arms.add_row(
            arm["name"],
            arm["run"][:8],
            phases,
            f"{arm['trained_parameters']:,}",
            f"{arm['trained_share']:.3%}",
            count_text(arm["forward_passes"]),
            count_text(arm["backward_passes"]),
        )
    console.print(arms)

    _print_phases(console, facts, made.nodes)
    groups = Table(title="groups of each phase", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("phase", "arms", "group", "signal", "parameters", "buffers", "share", "tensors"):
        groups.add_column(
            column, justify="right" if column in ("parameters", "buffers", "share") else "left", overflow="fold"
        )
    seen = set()
    for arm in facts["arms"]:
        for phase in arm["phases"]:
            if phase["id"] in seen:
                continue
            seen.add(phase["id"])
            who = "; ".join(made.nodes[phase["id"]].arms)
            for index, group in enumerate(phase["groups"]):
                groups.add_row(
                    phase["name"] if not index else "",
                    who if not index else "",
                    group["name"],
                    group["signal"],
                    f"{group['parameters']:,}",
                    f"{group['buffers']:,}",
                    f"{group['share']:.3%}",
                    tensors_text(group["tensors"]),
                )
    console.print(groups)
    _print_policies(console, made)

    saved = facts["trainings_unshared"] - facts["trainings"]
    console.print(
        f"{len(facts['arms'])} arms x {len(facts['seeds'])} seeds: {facts['trainings']} phase trainings"
        + (f" ({saved} fewer than without sharing)" if saved else "")
    )
    _print_measuring(console, made)
    _print_cost(console, made, timing)
    return 0


def tell_starts(made: Plan) -> None:
    """Print on standard error what files that phases start from lack and a person may not expect, once each."""
    from robustlayers.study.begin import start_notes

    notes = (note for node in made.nodes.values() for note in start_notes(node.recipe, node.phase))
    for note in dict.fromkeys(notes):
        print(note, file=sys.stderr)


def _print_measuring(console: Any, made: Plan) -> None:
    """Print what is measured, when, and what each part of it costs for one net."""
    from rich.table import Table
    from rich.text import Text

    from robustlayers.study.cost import measuring_parts, watching_part
    from robustlayers.study.semantics import data_of

    recipe = made.arms[0].recipe
    checkpoints = " and ".join(recipe.evaluate.checkpoints)
    title = f"measured of each net, on {len(data_of(recipe.data)[3]):,} test images"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("when", "what", "how"):
        table.add_column(column, overflow="fold")
    table.add_column("passes, at most", justify="right")
    watched = watching_part(recipe)
    table.add_row("after each epoch", watched.name, Text(watched.text), count_text(watched.passes))
    for index, part in enumerate(measuring_parts(recipe)):
        when = f"at {checkpoints}, each" if not index else ""
        table.add_row(when, part.name, Text(part.text), count_text(part.passes))
    console.print(table)


def _print_cost(console: Any, made: Plan, timing: bool) -> None:
    """Print what the whole study costs, by what it is spent on, in passes and, with `timing`, in time."""
    from robustlayers.study.cost import plan_cost

    cost = plan_cost(made)

    def parts(values: Mapping[str, float], text: Callable[[float], str]) -> str:
        total = max(sum(values.values()), 1e-9)
        return ", ".join(f"{name} {text(value)} ({value / total:.0%})" for name, value in values.items())

    spent = {"training": cost.training, "after its epochs": cost.watching, "measuring": cost.measuring}
    line = f"cost: at most {count_text(cost.total)} passes of one image: {parts(spent, count_text)}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    if timing:
        from robustlayers.study.estimate import estimate

        found = estimate(made)
        spent = {"training": found.training, "after its epochs": found.watching, "measuring": found.measuring}
        line = f"time: about {duration_text(found.seconds)} if all of them are made, with {found.workers} worker(s), "
        line += f"{found.threads} thread(s) each: "
        console.print(line + parts(spent, duration_text), markup=False, highlight=False, soft_wrap=True)
        for number, text in enumerate(found.lines()):
            console.print(f"{'' if number else 'timed:':<6} {text}", markup=False, highlight=False, soft_wrap=True)


def _print_phases(console: Any, facts: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
    """Print what each phase costs, a step and in all, and what it does beyond the ordinary."""
    from rich.table import Table

    phases = Table(title="phases", title_justify="left", box=None, pad_edge=False, header_style="bold")
    phases.add_column("phase")
    phases.add_column("arms", overflow="fold")
    for column in ("epochs", "forward/step", "backward/step", "forward", "backward"):
        phases.add_column(column, justify="right")
    phases.add_column("besides", overflow="fold")
    seen = set()
    for arm in facts["arms"]:
        for phase in arm["phases"]:
            if phase["id"] not in seen:
                seen.add(phase["id"])
                phases.add_row(
                    phase["name"],
                    "; ".join(nodes[phase["id"]].arms),
                    phase["length"],
                    *map(str, phase["step_passes"]),
                    count_text(phase["forward_passes"]),
                    count_text(phase["backward_passes"]),
                    "; ".join(phase["extras"]),
                )
    console.print(phases)


def _print_policies(console: Any, made: Plan) -> None:
    """Print the norm policy of each phase that trains: passes x switches, and how often a step updates statistics."""
    from rich.table import Table
    from rich.text import Text

    from robustlayers.normalization import policy_table
    from robustlayers.study.phases import build_policy

    found: dict[str, tuple[NormPolicy, list[tuple[str, str]]]] = {}
    for node in made.nodes.values():
        if node.phase.kind != "train":
            continue
        policy = build_policy(node.phase.normalization, node.recipe.groups)
        where = "" if len(node.arms) == len(made.arms) else f" ({'; '.join(node.arms)})"
        found.setdefault(str(policy), (policy, []))[1].append((node.phase.name + where, _updates(node, policy)))
    for policy, phases in found.values():
        title = f"norm layers, {policy.name or 'a policy of its own'}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        rows = policy_table(policy)
        columns = [name for name in rows[0] if name not in ("layers", "branch") or len({row[name] for row in rows}) > 1]
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(row[column]) for column in columns))
        console.print(table)
        console.print("updates of the running statistics of a layer in one step:", markup=False, soft_wrap=True)
        for name, updates in phases:
            console.print(f"  {name}: {updates}", markup=False, soft_wrap=True)


def _updates(node: PhaseNode, policy: NormPolicy) -> str:
    """Return in words how often a step of a phase updates the running statistics of a norm layer."""
    from robustlayers.study.phases import build_ascent, input_attack, phase_partition
    from robustlayers.study.semantics import data_of, model_for_checks
    from robustlayers.training import PartialStep

    phase, recipe = node.phase, node.recipe
    model = model_for_checks(recipe.model, data_of(recipe.data)[0])
    step = PartialStep(
        model,
        phase_partition(model, recipe, phase),
        phase.train,
        attack=input_attack(recipe, phase),
        optimizer=None,
        policy=policy,
        ascent=build_ascent(recipe, phase),
    )
    counts = Counter(step.statistics_updates().values())
    if len(counts) < 2:
        return str(next(iter(counts), "none, no layer has any"))
    return ", ".join(f"{count} in {n} layer{'s' if n > 1 else ''}" for count, n in sorted(counts.items(), reverse=True))


def tensors_text(tensors: list[tuple[str, str, float]], most: int = 3) -> str:
    """Return the first names of a group's tensors, with the share of those that it holds in part."""
    shown = [name if share == 1 else f"{name} ({share:.1%})" for name, _, share in tensors[:most]]
    return ", ".join(shown) + (f" and {len(tensors) - most} more" if len(tensors) > most else "")


def count_text(value: float) -> str:
    """Return a large count with a unit.

    >>> count_text(950), count_text(1_234_567)
    ('950', '1.23 M')
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration_text(seconds: float) -> str:
    """Return a duration as a person says it.

    >>> duration_text(42), duration_text(200), duration_text(7300)
    ('42 s', '3 min 20 s', '2 h 1 min')
    """
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 5400:
        return f"{seconds // 60} min {seconds % 60} s" if seconds < 600 else f"{round(seconds / 60)} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
