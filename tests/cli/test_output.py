"""What the commands print: help without torch, plans and groups that write nothing, rows with their columns."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from robustlayers.cli import plan as plan_command
from robustlayers.cli.main import main

Call = Callable[..., tuple[int, str, str]]

COMMANDS = ["plan", "run", "groups", "report", "rows", "verify", "data"]
COLUMNS = ["study", "arm", "factor:group", "run", "seed", "checkpoint", "metric", "value", "count", "total", "split"]
COLUMNS += ["attack", "normalization", "epoch", "flags", "phase", "group", "hash_before", "hash_after"]
FAST = """\
question: Does it run?
data: {name: fashion-mnist-mini, validation: 0.01, train_images: 40, test_images: 20}
model: {name: small-cnn, width: 2, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
attack: pgd-1
phases: [{name: adapt, epochs: 1, train: {norm: adversarial, rest: frozen}}]
factors: {group: {norm: {}, all: {phases.adapt.train: {all: adversarial}}}}
seeds: 2
evaluate: {attacks: [pgd-1, fgsm], monitor: {attack: pgd-1, images: 10}}
claims: [{say: nothing is gained, that: "robust[norm] <= robust[all]"}]
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that was run from the command line."""
    place = tmp_path_factory.mktemp("ran")
    (place / "fast.yaml").write_text(FAST)
    with pytest.raises(SystemExit) as stop:
        main(["run", str(place / "fast.yaml"), "--out", str(place / "out"), "--workers", "1", "--threads", "1"])
    assert stop.value.code == 0
    return place / "out"


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom robustlayers.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "slow = {'torch', 'numpy', 'scipy', 'matplotlib', 'pydantic', 'pyarrow'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        done = _python(code, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert "robustlayers" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, call: Call) -> None:
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "") and f"robustlayers {command}" in out and "help" in out
    assert command in call("--help")[1]


def test_the_version_is_the_package_s(call: Call) -> None:
    import robustlayers

    assert call("--version") == (0, f"robustlayers {robustlayers.__version__}\n", "")


def test_plan_prints_groups_runs_shared_phases_and_cost_and_writes_nothing(
    base: str, call: Call, tmp_path: Path
) -> None:
    Path("s.yaml").write_text(base)
    code, out, err = call("plan", "s.yaml")
    assert (code, err) == (0, "") and [path.name for path in tmp_path.iterdir()] == ["s.yaml"]
    assert out.startswith("base: Do norm layers alone gain robustness?\n")
    assert "fashion-mnist-mini: 200 train, 1000 validation, 50 test images, 28x28x1, 10 classes" in out
    assert "small-cnn width=8, 2,034 parameters, norm layers 3.147%" in out
    assert "pgd-3, linf 8/255" in out and "best iterate" in out
    arms = [line.split() for line in out.splitlines() if " > adapt 1 " in line or "pretrain 1 " in line]
    assert [(arm[0], arm[-4], arm[-3]) for arm in arms] == [
        ("none", "0", "0.000%"),
        ("norm", "64", "3.147%"),
        ("head", "170", "8.358%"),
    ]
    assert "3 arms x 2 seeds: 6 phase trainings (4 fewer than without sharing)" in out
    # Images x (clean) for pretraining, and x (2 to craft, 1 to learn) x 2 for each of two arms; both directions, 2 seeds.
    assert f" passes of one image: training {200 * (2 + 2 * 6) * 2 / 1000:.3g} k (" in out
    assert re.search(
        r"^time: about .+ if all of them are made, with \d+ worker\(s\), .+: training .+%\), after its epochs .+, measuring ",
        out,
        re.M,
    )
    assert re.search(r"^timed: .+ in fp32, small-cnn width=8: [\d.e+-]+ ms for \d+ images", out, re.M)


def test_plan_says_what_is_measured_and_when(base: str, call: Call) -> None:
    Path("s.yaml").write_text(base.replace("attacks: [pgd-3]", "attacks: [pgd-3, autoattack]\n  sanity: true"))
    code, out, err = call("plan", "s.yaml", "--no-timing", "--set", "evaluate.corruptions=noise")
    assert (code, err) == (0, "")
    table = out[out.index("\nmeasured of each net, on 50 test images ") : out.index("\ncost: ")].splitlines()[2:]
    assert [re.split("  +", line.strip())[:2] for line in table[:2]] == [
        ["when", "what"],
        ["after each epoch", "learning curve"],
    ]
    rest = "\n".join(table[2:])
    assert rest.startswith("at best and last, each  pgd-3 ")
    for words in ("apgd-ce-t-fab-t-square", "gaussian-noise, shot-noise, impulse-noise at severities 1, 2, 3, 4, 5"):
        assert words in rest
    assert "sanity" in rest and "50 images" in rest and "calibration; flags on 50 images; norm layers on 128" in rest
    shares = [int(share) for share in re.findall(r"\((\d+)%\)", out)]
    assert len(shares) == 3 and 99 <= sum(shares) <= 101 and shares[2] > 95  # of AutoAttack


def test_plan_without_timing_is_deterministic(base: str, call: Call) -> None:
    Path("s.yaml").write_text(base)
    first = call("plan", "s.yaml", "--no-timing")
    assert first == call("plan", "s.yaml", "--no-timing") and "time: " not in first[1] and "timed: " not in first[1]


def test_groups_prints_every_tensor_once_for_each_arm_and_writes_nothing(base: str, call: Call, tmp_path: Path) -> None:
    from robustlayers import models

    Path("s.yaml").write_text(base)
    code, out, err = call("groups", "s.yaml")
    assert (code, err) == (0, "") and [path.name for path in tmp_path.iterdir()] == ["s.yaml"]
    tensors = list(models.build("small-cnn", seed=0, width=8, channels=1).state_dict())
    sections = re.split(r"^arm (\w+) *$", out, flags=re.MULTILINE)[1:]
    assert sections[::2] == ["none", "norm", "head"]
    for section in sections[1::2]:
        words = [word for line in section.splitlines() for word in line.split()]
        assert sorted(word for word in words if word in tensors) == sorted(tensors)
    assert re.search(r" bn1\.weight +BatchNorm2d .* all: natural +norm: adversarial", sections[3])
    assert re.search(r" bn1\.weight +BatchNorm2d .* all: natural +rest: frozen", sections[5])
    assert call("groups", "s.yaml", "--arm", "head")[1] == "arm head" + sections[5]


def test_groups_select_shows_what_a_selector_picks(base: str, call: Call) -> None:
    Path("s.yaml").write_text(base)
    code, out, _ = call("groups", "s.yaml", "--select", "norm.weight & stem | linear.bias")
    assert code == 0
    assert "norm.weight & stem | linear.bias: 18 parameters (0.885%), 0 buffer entries" in out
    assert "bn1.weight" in out and "linear.bias" in out and "conv1.weight" not in out
    _, out, _ = call("groups", "s.yaml", "--select", "random(like=norm, of=conv, seed=0)")
    assert ": 64 parameters (3.147%), 0 buffer entries" in out


def test_data_list_names_every_kind(call: Call) -> None:
    code, out, err = call("data", "list")
    assert (code, err) == (0, "")
    assert "fashion-mnist-mini   10000 train, 2000 test, 1x28x28, 10 classes\n" in out
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["fashion-mnist-mini", "fashion-mnist", "parquet:FOLDER", "idx:FOLDER", "npz:FILE"]


def test_a_run_tells_its_progress_and_ends_with_the_report(ran: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text(FAST)
    code, out, err = call("run", "fast.yaml", "--set", "seeds=1", "--workers", "1", "--threads", "1")
    lines = out.splitlines()
    assert (code, err) == (0, "") and lines[0] == "fast: 4 jobs" and lines[-1] == "report: runs/fast/report/report.html"
    shares = [int(match[1]) for match in re.finditer(r"\[(\d+)%", out)]
    assert len(shares) == 4 and shares == sorted(shares) and shares[-1] <= 100
    assert [line.partition(": epoch ")[0] for line in lines if ": epoch " in line] == [
        "norm, seed 0, adapt",
        "all, seed 0, adapt",
    ]
    assert sum(": test clean " in line for line in lines) == 2
    page = Path("runs/fast/report/report.html").read_text()
    assert "Does it run?" in page and "nothing is gained" in page
    code, out, err = call("run", "fast.yaml", "--set", "seeds=1", "--workers", "1", "--threads", "1")
    assert (code, err) == (0, "") and out.startswith("fast: all results are there, nothing to train\n")
    assert out.endswith("report: runs/fast/report/report.html\n") and ": epoch " not in out
    more = call("run", "fast.yaml", "--workers", "1", "--threads", "1")[1]
    assert re.match(r"fast: \d\d% is there already, 4 jobs left\n", more)


def test_a_run_with_a_failure_is_code_1_and_says_which(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustlayers.study import measure

    Path("fast.yaml").write_text(FAST)

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(measure, "flags", broken)
    code, out, err = call("run", "fast.yaml", "--set", "seeds=1", "--workers", "1", "--threads", "1")
    assert code == 1
    assert err.splitlines() == [f"failed: {arm}, seed 0, measuring: RuntimeError: planted" for arm in ("norm", "all")]
    assert out.endswith("report: runs/fast/report/report.html\n")  # of what there is


def test_a_run_that_diverges_is_code_0_and_says_so_each_time(call: Call) -> None:
    Path("fast.yaml").write_text(FAST)
    command = [
        "run",
        "fast.yaml",
        "--set",
        "seeds=1",
        "--set",
        "training.optimizer.lr=1e9",
        "--workers",
        "1",
        "--threads",
        "1",
    ]
    command += [
        "--set",
        "factors={}",
        "--set",
        "claims=[]",
        "--set",
        "phases.adapt.train={all: natural}",
        "--set",
        "phases.adapt.epochs=4",
    ]
    out = ""
    for _ in range(2):
        code, out, err = call(*command)
        assert code == 0 and re.fullmatch(r"diverged: fast, seed 0, adapt: .+ epoch \d.*\n", err), err
    assert "nothing to train" in out


def test_rows_have_the_documented_columns_and_one_line_for_each_number(ran: Path, call: Call) -> None:
    code, out, err = call("rows", ran)
    assert (code, err) == (0, "")
    table = list(csv.DictReader(io.StringIO(out)))
    assert out.splitlines()[0].split(",") == COLUMNS
    ledger = [row for row in table if row["phase"]]
    norms = [row for row in table if row["metric"].startswith("norm_")]
    table = [row for row in table if row not in ledger and row not in norms]
    assert {row["hash_before"] == row["hash_after"] for row in ledger if row["group"] == "rest"} == {True}
    assert {row["metric"] for row in ledger} >= {"moved_parameters", "relative_l2", "effective_lr", "gradient_passes"}
    assert {row["metric"] for row in norms} >= {"norm_dead_share", "norm_kl_mean_clean", "norm_kl_mean_adversarial"}
    keys = {(row["run"], row["seed"], row["checkpoint"], row["metric"]) for row in table}
    metrics = [
        "clean",
        "pgd-1",
        "fgsm",
        "robust",
        "clean_lowest_class",
        "robust_lowest_class",
        "ece",
        "train_clean",
        "train_robust",
        "validation_clean",
        "validation_robust",
    ]
    facts = ["trained_share", "trained_parameters", "forward_passes", "backward_passes"]
    assert len(keys) == len(table) == 2 * 2 * (2 * len(metrics) + len(facts))
    assert {row["metric"] for row in table} == {*metrics, *facts}
    for row in table:
        assert row["study"] == "fast" and row["factor:group"] == row["arm"] and re.fullmatch("[0-9a-f]{16}", row["run"])
        value = float(row["value"])
        assert repr(value) == row["value"] or str(int(value)) == row["value"]
        if row["total"]:
            assert value == int(row["count"]) / int(row["total"]) and row["split"] == "test"
        assert bool(row["attack"]) == (
            row["metric"] in {"pgd-1", "fgsm", "robust", "robust_lowest_class", "train_robust", "validation_robust"}
        )
    assert (ran / "report" / "rows.csv").read_text() == out


def test_rows_go_on_to_head_without_a_complaint(ran: Path) -> None:
    code = "from robustlayers.cli.main import main; main()"
    pipeline = f'"{sys.executable}" -c "{code}" rows "{ran}" | head -1'
    done = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, check=True)
    assert done.stdout.strip().split(",") == COLUMNS and done.stderr == ""
    # The reader is gone before the first line is written.
    process = subprocess.Popen(
        [sys.executable, "-c", code, "rows", str(ran)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), error) == (141, b"")


def test_report_is_drawn_again_and_changes_no_result(ran: Path, call: Call) -> None:
    before = {path: path.read_bytes() for path in ran.rglob("*") if path.is_file() and "report" not in path.parts}
    (ran / "report" / "report.html").unlink()
    assert call("report", ran) == (0, f"report: {ran / 'report' / 'report.html'}\n", "")
    assert (ran / "report" / "report.html").exists()
    assert {
        path: path.read_bytes() for path in ran.rglob("*") if path.is_file() and "report" not in path.parts
    } == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (90, "1 min 30 s"),
        (599, "9 min 59 s"),
        (600, "10 min"),
        (5400, "1 h 30 min"),
        (86400, "24 h 0 min"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert plan_command.duration_text(seconds) == text


def test_plan_tells_arms_apart_whose_names_hold_a_comma(base: str, call: Call) -> None:
    statistics = "  statistics: {rice: {phases.adapt.normalization: rice}, standard: {}}\n"
    text = base.replace("seeds: 2", f"{statistics}seeds: 2")
    Path("s.yaml").write_text(text[: text.index("claims:")])
    code, out, err = call("plan", "s.yaml", "--no-timing")
    assert (code, err) == (0, "")
    assert "norm, rice; norm, standard; head, rice; head, standard" in out  # who share the first phase
    assert "norm, rice, " not in out


def test_plan_and_run_say_once_what_a_file_lacks_that_phases_start_from(base: str, call: Call) -> None:
    from robustlayers import models
    from robustlayers.core.files import write_tensors

    state = models.build("small-cnn", seed=0, width=8, channels=1).state_dict()
    write_tensors(Path("w.safetensors"), {name: value for name, value in state.items() if "normalize." not in name})
    text = base.replace(
        "    train: {all: natural}\n", "    train: {all: natural}\n    start: {all: {load: w.safetensors}}\n"
    )
    Path("s.yaml").write_text(text.replace("train_images: 200", "train_images: 64").replace("seeds: 2", "seeds: 1"))
    note = "phase pretrain, group all: w.safetensors has no normalize.mean, normalize.std; the model's own are used; "
    note += "give them as options of the model\n"
    assert call("plan", "s.yaml", "--no-timing")[::2] == (0, note)
    assert call("run", "s.yaml", "--out", "out", "--workers", "1", "--threads", "1")[::2] == (0, note)
