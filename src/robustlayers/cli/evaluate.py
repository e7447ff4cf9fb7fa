"""`robustlayers evaluate`: how robust a model is, by AutoAttack or other attacks, with intervals and per class."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from robustlayers.cli.arguments import Trust

if TYPE_CHECKING:
    from robustlayers.attacks import Threat
    from robustlayers.cli.subject import Subject
    from robustlayers.evaluation import SanityReport
    from robustlayers.evaluation.cascade import Moment, Outcome
    from robustlayers.study.course import Course
    from robustlayers.study.schema import CorruptionsConfig

__all__ = ["evaluate"]

_FLAGGED = 100  # test images that the flags look at
_FINAL = ("AutoAttack", "APGD-CE+T")  # labels that no other attack should be able to beat
_FIRST_SECONDS, _LINE_SECONDS = 5.0, 20.0  # until the first line of progress where there is no terminal, and on

Assignments = tuple[str, ...]


def evaluate(
    model: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="MODEL",
            help="a study's folder, a result in it, an architecture, or an importable function MODULE:FUNCTION",
        ),
    ],
    attack: Annotated[
        Assignments,
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="NAME", help="autoattack (unless given), pgd-20, apgd-ce, square-1000; several times"),
    ] = (),
    eps: Annotated[str | None, tyro.conf.arg(help="in pixel units, as 8/255; that of the study unless given")] = None,
    norm: Annotated[str | None, tyro.conf.arg(help="linf, l2 or l1; linf unless given or the study's")] = None,
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="safetensors, or a state_dict (.pt)")] = None,
    data: Annotated[str | None, tyro.conf.arg(help="the data set; that of the study unless given")] = None,
    images: Annotated[int | None, tyro.conf.arg(help="only so many test images, the first ones")] = None,
    arm: Annotated[str | None, tyro.conf.arg(help="of a study: which arm")] = None,
    phase: Annotated[str | None, tyro.conf.arg(help="of a study: after which phase; the last unless given")] = None,
    checkpoint: Annotated[str | None, tyro.conf.arg(help="of a study: best (unless given) or last")] = None,
    run_seed: Annotated[int | None, tyro.conf.arg(help="of a study: trained from which seed; the first one")] = None,
    option: Annotated[
        Assignments,
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="NAME=VALUE", help="an option of the architecture or function, as in depth=20"),
    ] = (),
    rename: Annotated[
        Assignments,
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="OLD=NEW", help="a name, or the start of names, in the file of weights"),
    ] = (),
    corruptions: Annotated[
        Assignments,
        tyro.conf.UseAppendAction,
        tyro.conf.arg(
            metavar="NAME", help="also accuracy on corrupted images: all, noise, blur, fog, ...; several times"
        ),
    ] = (),
    sanity: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="also try every sign of a misleading number, on the first 100 images; pictures with --out"),
    ] = False,
    trust: Trust = False,
    seed: Annotated[int, tyro.conf.arg(help="of the attacks' random draws")] = 0,
    batch_size: Annotated[int | None, tyro.conf.arg(help="changes the time only")] = None,
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    threads: Annotated[int | None, tyro.conf.arg(help="torch threads")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help="keep results, and what a kill would lose")] = None,
) -> int:
    """Attack a model and print its accuracies; with --out it can be killed at any moment, the same command goes on."""
    import torch

    from robustlayers.cli.evaluated import rows_beside, rows_of, show, show_sanity, write, write_sanity
    from robustlayers.cli.subject import Asked, subject_of
    from robustlayers.core.device import pick_device
    from robustlayers.core.errors import Fault, UserError

    for name, value in (("--threads", threads), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(Fault(f"{value} is not allowed; allowed: at least 1", path=name))
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(Fault("is a file; name a folder", path="--out"))
    asked = Asked(
        model=model,
        weights=weights,
        data=data,
        images=images,
        arm=arm,
        phase=phase,
        checkpoint=checkpoint,
        run_seed=run_seed,
        options=_assigned(option, "--option"),
        rename=_renamed(rename),
        trust=trust,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    where = pick_device(device)
    subject = subject_of(asked)
    for note in subject.notes:
        print(note, file=sys.stderr)
    threat = _threat(norm, eps, subject)
    wanted = tuple(dict.fromkeys(attack)) or ("autoattack",)
    _check_attacks(wanted, threat)
    if sanity and threat.eps == 0:
        raise UserError(Fault("0 leaves nothing for --sanity to try; allowed: more than 0", path="--eps"))
    families = _families(corruptions, subject)
    subject.model.to(where)
    try:
        with _progress() as progress:
            outcomes = _outcomes(subject, wanted, threat, seed, batch_size, out, progress)
            course = _course(subject, families, sanity, progress(""))
            course.part("", "flags")("flags", 0, 1)
            raised = _flags(subject, outcomes, threat)
            beside = rows_beside(subject, families, batch_size, _beside(course, len(subject.test)))
            checked = _sanity(subject, threat, seed, course) if sanity else None
    except KeyboardInterrupt:
        if out is not None:
            raise
        print("stopped; nothing is kept without --out DIR", file=sys.stderr)
        sys.exit(130)
    raised += [text for text in (checked.flags if checked else ()) if text not in raised]
    rows = list(rows_of(subject, outcomes, beside, seed, raised))
    if out is not None:
        if checked is not None:
            write_sanity(out, checked)
        write(out, rows, outcomes, seed, raised)
    show(subject, rows, outcomes, raised)
    if checked is not None:
        show_sanity(checked)
    return 0


def _outcomes(
    subject: Subject,
    wanted: Sequence[str],
    threat: Threat,
    seed: int,
    batch_size: int | None,
    out: Path | None,
    progress: Callable[[str], Callable[[Moment], None]],
) -> dict[str, Outcome]:
    """Return what each attack that was asked for found, by the label that it earned."""
    from robustlayers.attacks import parse
    from robustlayers.evaluation.autoattack import autoattack
    from robustlayers.evaluation.cascade import cascade

    outcomes: dict[str, Outcome] = {}
    x, y = subject.test.images, subject.test.labels
    for name in wanted:
        directory = None if out is None else out / "shards" / name
        facts: dict[str, Any] = {"directory": directory, "batch_size": batch_size, "seed": seed}
        if name == "autoattack":
            found = autoattack(
                subject.model, x, y, threat=threat, whole=subject.whole, progress=progress(name), **facts
            )
        else:
            found = cascade(subject.model, x, y, {name: parse(name, threat)}, progress=progress(""), **facts)
        outcomes[found.label] = found
    return outcomes


def _flags(subject: Subject, outcomes: Mapping[str, Outcome], threat: Threat) -> list[str]:
    """Return the flags that the model raises on the first test images, and those of the attacks beside each other."""
    from robustlayers.attacks import parse
    from robustlayers.evaluation import beyond_final, flags
    from robustlayers.evaluation.flags import black_box

    test = subject.test
    raised = flags(subject.model, test.images[:_FLAGGED], test.labels[:_FLAGGED], threat)
    verdicts = {name: found.robust for name, found in outcomes.items()}
    raised += [text for name in verdicts if name.startswith(_FINAL) for text in beyond_final(verdicts, name)]
    single = {found.table[0].attack: found.robust for found in outcomes.values() if len(found.table) == 1}
    black = {name: robust for name, robust in single.items() if not parse(name, threat).backward_passes}
    white = {name: robust for name, robust in single.items() if parse(name, threat).backward_passes > 1}
    return raised + (black_box(white, black) if black and white else [])


def _sanity(subject: Subject, threat: Threat, seed: int, course: Course) -> SanityReport:
    from robustlayers.evaluation import sanity
    from robustlayers.study.course import turn_of_sanity

    images, labels = subject.test.images[:_FLAGGED], subject.test.labels[:_FLAGGED]
    progress = course.part("", "sanity", lambda what: len(images) * turn_of_sanity(what), prefix="sanity: ")
    return sanity(subject.model, images, labels, threat, seed=seed, progress=progress)


def _course(subject: Subject, families: CorruptionsConfig, sanity: bool, tell: Callable[[Moment], None]) -> Course:
    """Return how far is what is measured beside the attacks; it knows from its own pace how long that will take."""
    from robustlayers.evaluation.cascade import Moment
    from robustlayers.study.course import Course
    from robustlayers.study.extras import families_of

    began = time.monotonic()

    def told(what: str, done: int, of: int, share: float) -> None:
        seconds = time.monotonic() - began
        left = seconds * (1 - share) / share if share and seconds > 1 else None
        tell(Moment(what, done, of, -1, left))

    n = len(subject.test)
    cells = len(families_of(families, subject.test.shape[0])) * len(families.severities)
    passes = {"flags": 43 * min(_FLAGGED, n), "calibration": n, "corruptions": n * (cells + 1) if cells else 0}
    return Course(
        told, {("", name): size for name, size in {**passes, "sanity": sanity * 1600 * min(_FLAGGED, n)}.items()}
    )


def _beside(course: Course, images: int) -> Callable[[str, int, int], None]:
    """Return what is to be called for the calibration error, and then for each corruption."""
    calibrated = course.part("", "calibration")
    corrupted = course.part("", "corruptions", lambda what: float(images))
    calibrated("calibration", 0, images)
    return lambda what, done, of: (calibrated if what == "calibration" else corrupted)(what, done, of)


def _families(names: Sequence[str], subject: Subject) -> CorruptionsConfig:
    """Return the corruptions that were asked for; what is wrong with them is told before anything runs."""
    from robustlayers.core.errors import Fault, UserError
    from robustlayers.study.extras import families_of
    from robustlayers.study.schema import CorruptionsConfig

    config = CorruptionsConfig(families=[name for name in dict.fromkeys(names) if name != "none"])
    try:
        families_of(config, subject.test.shape[0])
    except UserError as error:
        raise UserError([Fault(fault.message, path="--corruptions") for fault in error.faults]) from None
    return config


def _check_attacks(wanted: Sequence[str], threat: Threat) -> None:
    """Raise for every attack that cannot run, before the first one does."""
    from robustlayers.core.errors import Fault, UserError
    from robustlayers.study.finals import also_nearest, named_attack

    faults: list[Fault] = []
    for name in wanted:
        try:
            if name != "autoattack":
                named_attack(name, threat)
        except UserError as error:
            faults += [Fault(fault.message, path="--attack") for fault in also_nearest(error, name).faults]
    if faults:
        raise UserError(faults)


def _threat(norm: str | None, eps: str | None, subject: Subject) -> Threat:
    from robustlayers.attacks import Linf, Threat
    from robustlayers.core.errors import Fault, UserError

    known = subject.threat
    if eps is None and (known is None or (norm is not None and norm != known.norm)):
        raise UserError(Fault("is missing: how far may a pixel move? write 8/255", path="--eps"))
    try:
        kind, radius = norm or (known.norm if known else "linf"), eps if eps is not None else known.eps if known else 0
        return Linf(radius) if kind == "linf" else Threat(kind, radius)
    except UserError as error:
        path = "--norm" if "norm" in error.faults[0].message else "--eps"
        raise UserError([Fault(fault.message, path=path) for fault in error.faults]) from None


def _assigned(texts: Sequence[str], name: str) -> dict[str, Any]:
    from robustlayers.core.errors import Fault, UserError
    from robustlayers.study.yaml import parse_value

    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key.isidentifier():
            raise UserError(Fault(f"{text!r} is not NAME=VALUE, such as depth=20", path=name))
        if key in values:
            raise UserError(Fault(f"{key!r} is given twice", path=name))
        values[key] = parse_value(value, f"{name} {key}")
    return values


def _renamed(texts: Sequence[str]) -> dict[str, str]:
    from robustlayers.core.errors import Fault, UserError

    names: dict[str, str] = {}
    for text in texts:
        old, equals, new = (part.strip() for part in text.partition("="))
        if not equals or not old or old in names:
            raise UserError(Fault(f"{text!r} is not OLD=NEW, such as backbone=, each once", path="--rename"))
        names[old] = new
    return names


@contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[Moment], None]]]:
    """Yield what makes a receiver of progress: a bar on a terminal, a line now and then elsewhere."""
    from rich.console import Console

    from robustlayers.cli.plan import duration_text
    from robustlayers.cli.progress import bars, fitting

    def text(name: str, moment: Moment) -> str:
        return f"{name}: {moment.attack}" if name else moment.attack

    def count(moment: Moment) -> str:
        """Return how many images are done and still right, and the time left."""
        said = [f"{moment.done} of {moment.of} images"] if moment.of > 1 else []
        said += [f"{moment.robust} still right"] if moment.robust >= 0 else []
        return ", ".join(said + ([] if moment.left is None else [f"about {duration_text(moment.left)} left"]))

    console = Console(stderr=True)
    if console.is_terminal:
        with bars(console) as progress:
            bar = progress.add_task("clean", total=1.0, note="")

            def move(name: str, moment: Moment) -> None:
                share = (moment.done + moment.begun) / max(1, moment.of)
                progress.update(
                    bar, description=text(name, moment), completed=share, note=fitting(count(moment), progress)
                )

            yield lambda name: lambda moment: move(name, moment)
        return
    due = [time.monotonic() + _FIRST_SECONDS]

    def line(name: str) -> Callable[[Moment], None]:
        def tell(moment: Moment) -> None:
            over = moment.done == moment.of and moment.robust >= 0
            if over or time.monotonic() >= due[0]:
                due[0] = time.monotonic() + _LINE_SECONDS
                print(f"{text(name, moment)}: {count(moment)}", file=sys.stderr, flush=True)

        return tell

    yield line
