"""`launcher find`: real trainings on real ranks, and what they say."""

from __future__ import annotations

import json
import math
import os
import re
import signal

import pytest
from support import ROOT, Commands, read_lines

from launcher.analysis.loader_throughput import MOST_PREFETCH, queue_to_bridge

LR = ("launcher", "find", "lr", "digits", "--from", "1e-4", "--steps", "60")


@pytest.fixture(scope="module")
def alone(module_run: Commands) -> dict[str, object]:
    """Return what one process finds."""
    done = module_run(*LR, "-n", "1", "--json", "--out", "alone")
    assert done.exit_code == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_lr_is_found(run: Commands) -> None:
    """It draws the curve, names the rules, prints the lines to paste and leaves an image."""
    done = run(*LR, "-n", "2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    for rule in ("valley", "steep", "minimum", "slide"):
        assert f"\n  {rule}" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("lr: "))
    assert 0.01 < float(line.split()[1]) < 1
    assert "# launcher find lr, valley: " in line
    assert (run.folder / "out/lr.png").read_bytes().startswith(b"\x89PNG")
    (run.folder / "found.yaml").write_text(line)
    taken = run("launcher", "plan", "digits", "--config", "found.yaml")
    assert taken.exit_code == 0, "the line is one that --config takes"
    assert f"lr={float(line.split()[1])}" in taken.stdout


def test_what_a_rule_suggests_is_tried(run: Commands) -> None:
    """Whole trainings in few steps go up or down from the valley until the best is between two."""
    done = run(*LR, "-n", "1", "--try", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    trials = sorted(found["trials"], key=lambda trial: trial["lr"])
    best = min(trials, key=lambda trial: trial["loss"] or math.inf)
    assert found["settings"]["lr"] == pytest.approx(best["lr"])
    assert 0 < trials.index(best) < len(trials) - 1
    assert best["loss"] < 1.0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_the_curve_is_that_of_one_process(
    run: Commands, alone: dict[str, object], strategy: str
) -> None:
    """Two ranks see the losses of one under every strategy, and suggest the same."""
    done = run(*LR, "-n", "2", f"strategy={strategy}", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    wanted = json.loads(json.dumps(alone))
    assert found["curve"]["lrs"] == pytest.approx(wanted["curve"]["lrs"])
    before = 35  # rounding grows where the loss is about to break
    assert found["curve"]["losses"][:before] == pytest.approx(
        wanted["curve"]["losses"][:before], rel=1e-4
    )
    assert found["settings"]["lr"] == pytest.approx(wanted["settings"]["lr"], rel=0.1)


def test_the_suggestion_is_stated_at_the_recipes_batch(run: Commands) -> None:
    """At twice the batch of the recipe the line to paste has half of what was found."""
    done = run(*LR, "-n", "1", "batch_size=256", "--json", "--out", "out")
    found = json.loads(done.stdout)
    assert found["batch_size"] == 256
    assert found["settings"] == {"lr": pytest.approx(found["suggestions"]["valley"] / 2)}


def test_a_range_that_breaks_stops_early(run: Commands) -> None:
    """A loss that is not finite ends the test on all ranks; what came before it counts."""
    command = ("launcher", "find", "lr", "digits", "--from", "0.01", "--to", "1e6", "--steps")
    done = run(*command, "400", "-n", "2", "max_grad_norm=none", "--json", "--out", "out")
    found = json.loads(done.stdout)
    assert len(found["curve"]["losses"]) < 400
    assert all(map(math.isfinite, found["curve"]["losses"]))
    assert done.exit_code == 0, done.stderr


def test_nothing_to_suggest_is_said(run: Commands) -> None:
    """Where the loss never falls there is no line to paste, a reason, and exit code 1."""
    command = ("launcher", "find", "lr", "digits", "--from", "1e-9", "--to", "1e-8", "--steps")
    done = run(*command, "20", "-n", "1", "--out", "out")
    assert done.exit_code == 1
    assert "No learning rate is suggested: the loss does not fall at any learning rate" in (
        done.stdout
    )
    assert "lr: " not in done.stdout


def test_a_range_has_to_rise(run: Commands) -> None:
    """A range that falls is refused before anything starts."""
    done = run("launcher", "find", "lr", "digits", "--from", "1", "--to", "0.1")
    assert done.exit_code == 2
    assert "the learning rate has to rise" in done.stderr
    assert not list(run.folder.iterdir())


NOISE = ("launcher", "find", "noise")
KNOWN = ROOT / "tests/recipes/known_noise.py"
B_SIMPLE = (2.0 / 0.16) ** 2
"""Of that recipe."""


@pytest.mark.parametrize(
    ("ranks", "strategy", "settings"),
    [
        (1, "ddp", ()),
        (2, "ddp", ()),
        (2, "fsdp", ()),
        (2, "zero2", ("precision=bf16",)),
        (2, "zero3", ()),
    ],
)
def test_a_known_noise_scale_is_recovered(
    run: Commands, ranks: int, strategy: str, settings: tuple[str, ...]
) -> None:
    """Where tr(S) / |G|^2 is known it is found within 10 %, wherever the gradients lie."""
    done = run(
        *NOISE,
        KNOWN,
        *("-n", str(ranks), f"strategy={strategy}", *settings, "--json", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"]["measurements"] >= 312, "all but the last of an epoch, at least"
    assert found["whole"]["b_simple"] == pytest.approx(B_SIMPLE, rel=0.1)
    # The data are a sample, whose own noise scale is off by a few percent.
    assert 0.95 * found["whole"]["low"] < B_SIMPLE < 1.05 * found["whole"]["high"]


def test_the_same_parts_have_the_same_norms(run: Commands) -> None:
    """On one process and on two ranks the parts of a batch are the same, and so are their norms."""
    measured = {}
    for ranks in (1, 2):
        done = run(
            *NOISE,
            *("digits", "-n", str(ranks), "--steps", "40", "--json", "--out", f"on{ranks}"),
        )
        whole = [
            each for each in json.loads(done.stdout)["measurements"] if each["big_items"] == 128
        ]
        measured[ranks] = whole
    for one, other in zip(measured[1][:20], measured[2][:20], strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def test_the_noise_says_what_a_batch_is_worth(run: Commands) -> None:
    """The table compares batches, marks those that cost more than they save, and counts ranks."""
    done = run(*NOISE, KNOWN, "-n", "2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    rows = {
        int(line.split()[0].replace(",", "")): line
        for line in done.stdout.splitlines()
        if re.match(r" +[\d,]+ +x", line)
    }
    assert "x1.00   x1.00" in rows[256]
    assert [size for size, line in rows.items() if "more than it is worth" in line] == [
        512,
        1024,
        2048,
        4096,
    ]
    assert "Worth it: batches up to 2 x B_simple = 3" in done.stdout
    assert "which is 2 ranks at the 128 that each takes now." in done.stdout
    assert (run.folder / "out/noise.png").is_file()


def test_the_noise_scale_as_a_metric(run: Commands) -> None:
    """With noise_scale=true a run writes it every twentieth step, and takes the same steps."""
    for name, settings in (("plain", ()), ("measured", ("noise_scale=true",))):
        done = run("launcher", "run", KNOWN, "-n", "2", "epochs=8", *settings, "--out", name)
        assert done.exit_code == 0, done.stderr
    rows = read_lines(run.folder / "measured/metrics.jsonl")
    scales = [(row["step"], row["noise_scale"]) for row in rows if "noise_scale" in row]
    assert [step for step, _ in scales] == list(range(1, 632, 20))
    assert scales[-1][1] == pytest.approx(B_SIMPLE, rel=0.4)
    losses = [
        [row["loss"] for row in read_lines(run.folder / name / "metrics.jsonl") if "loss" in row]
        for name in ("plain", "measured")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "where"),
    [(("-n", "1"), "on 1 rank"), (("-n", "2", "strategy=fsdp"), "under strategy=fsdp")],
)
def test_one_part_has_no_noise(run: Commands, settings: tuple[str, ...], where: str) -> None:
    """A run whose batches have one part refuses to measure it, and says what makes several."""
    done = run("launcher", "run", KNOWN, "noise_scale=true", *settings)
    assert done.exit_code == 2
    assert f"{where} without accumulation there is one part" in done.stderr
    assert not (run.folder / "runs").exists()


BATCH = ("launcher", "find", "batch")
HEAVY = ROOT / "tests/recipes/heavy.py"


def test_the_batch_that_fits_is_found(run: Commands) -> None:
    """Under a limit that is enforced sizes fit until they do not; the answer is kept."""
    env = {"XDG_CACHE_HOME": str(run.folder / "cache")}
    command = (*BATCH, HEAVY, "-n", "2", "--memory", "800MiB", "--json")
    done = run(*command, "--out", "out", env=env)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    fits = {trial["size"]: trial["fits"] for trial in found["trials"]}
    assert fits[min(fits)]
    assert not fits[max(fits)], "a sample takes 50 MiB"
    assert sorted(fits.values(), reverse=True) == [fits[size] for size in sorted(fits)]
    for trial in found["trials"]:
        if trial["fits"]:
            assert trial["peak_bytes"] > trial["size"] * 25 * 2**20
    size = found["settings"]["micro_batch_size"]
    plan = run("launcher", "plan", HEAVY, f"micro_batch_size={size}", "-n", "2", "--json")
    values = json.loads(plan.stdout)
    assert (values["micro_batch_size"], values["batch_size"]) == (size, 128)
    again = run(*command, env=env)
    assert "measured before" in again.stderr
    assert json.loads(again.stdout) == found


def test_a_recipe_that_fails_is_not_taken_for_a_large_one(run: Commands) -> None:
    """An error of another kind ends the search, and is shown."""
    env = {"XDG_CACHE_HOME": str(run.folder / "cache")}
    recipe = ROOT / "tests/recipes/failing.py"
    done = run(*BATCH, recipe, "how=raise", "rank=0", "-n", "2", "--out", "out", env=env)
    assert done.exit_code == 1
    assert "the recipe failed, and not for want of memory" in done.stderr
    assert "ValueError: the loss of rank one" in done.stderr
    assert not (run.folder / "cache/launcher").exists()


def test_not_one_sample_fits(run: Commands) -> None:
    """Too little memory for anything is said; what is no size is refused."""
    env = {"XDG_CACHE_HOME": str(run.folder / "cache")}
    done = run(*BATCH, HEAVY, "-n", "1", "--memory", "200MiB", "--out", "out", env=env)
    assert done.exit_code == 1
    assert "Not one sample fits into the memory of a rank (180 MiB)." in done.stdout
    assert run(*BATCH, "digits", "--memory", "much", env=env).exit_code == 2


LOADER = ("launcher", "find", "loader", ROOT / "tests/recipes/slow.py", "--seconds", "1")


def test_the_workers_hide_latency(run: Commands) -> None:
    """A store that is slow to answer is worth more workers than there are cores."""
    done = run(*LOADER, "how=waits", "milliseconds=5", "-n", "2", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cost"]["reading"] == pytest.approx(0.005, rel=0.5)
    assert found["cost"]["reading_cpu"] < 0.5 * found["cost"]["reading"]
    assert found["predicted"] >= 8
    chosen = found["settings"]["num_workers"]
    assert found["best"]["workers"] == chosen >= 8
    rates = {each["workers"]: each["samples_per_second"] for each in found["readings"]}
    assert rates[chosen] > 4 * rates[0], "what does not work can wait together"
    waits = {each["workers"]: each["wait_seconds_per_step"] for each in found["readings"]}
    assert waits[chosen] < waits[0] / 4
    assert all(each["worker_bytes"] > 0 for each in found["readings"] if each["workers"])


def test_a_longer_queue_bridges_stalls(run: Commands) -> None:
    """Where some samples take very long, more batches ready are predicted and measured."""
    done = run(*LOADER, "how=stalls", "milliseconds=600", "-n", "1", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["slowest_batch_seconds"] > 0.6
    workers = found["settings"]["num_workers"]
    first = next(each for each in found["readings"] if each["workers"] == workers > 0)
    needed = queue_to_bridge(found["slowest_batch_seconds"], workers, first["step_seconds"])
    # On a busy machine steps can be so slow that the queue there is bridges them.
    measured = [each["prefetch_factor"] for each in found["readings"] if each["workers"] == workers]
    assert measured == [2, min(needed, MOST_PREFETCH)] if needed > 2 else measured == [2]
    taken = found["settings"].get("prefetch_factor", 2)
    assert found["best"]["prefetch_factor"] == taken


def test_the_workers_do_not_oversubscribe_cores(run: Commands) -> None:
    """A data set that is work is worth no more workers than there are cores."""
    done = run(*LOADER, "how=works", "milliseconds=2", "-n", "2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    predicted = re.search(r"predicted: (\d+) workers per rank", done.stdout)
    assert predicted is not None
    assert int(predicted[1]) <= max(cores // 2, 1)
    assert "most of it work, which takes cores" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("num_workers: "))
    (run.folder / "found.yaml").write_text(line)
    plan = run("launcher", "plan", LOADER[3], "--config", "found.yaml")
    assert f"workers     {int(line.split()[1])} per rank (as asked)" in plan.stdout


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_finder_is_ended_at_once(run: Commands, number: signal.Signals, exit_code: int) -> None:
    """It has nothing to save: a signal ends all of it, in a line, and nothing is left."""
    process = run.start(*LR[:4], "-n", "2", "--steps", "20000", "--out", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if "samples/s" in line:
            break
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert stderr.strip() == f"launcher: stopped by {number.name}"
