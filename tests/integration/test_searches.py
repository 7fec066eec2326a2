"""`launcher find`: searches for settings with real trainings on real ranks."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from typing import Any

import pytest
import yaml
from support import ROOT, Commands, Finished, read_lines

from launcher.analysis.loader_throughput import MAX_PREFETCH_FACTOR, prefetch_factor_to_hide
from launcher.analysis.lr_trials import for_length
from launcher.runs.rundir import RunDir

LR = ("launcher", "find", "lr", "digits", "--from", "1e-4", "--steps", "60")


RANGE_TEST = (*LR, "--rule", "lowest")


@pytest.fixture(scope="module")
def one_rank(module_run: Commands) -> dict[str, Any]:
    """Return the result of a range test on one rank."""
    done = module_run(*RANGE_TEST, "-n", "1", "--json", "--out", "alone")
    assert done.exit_code == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def searched(module_run: Commands) -> Finished:
    """Return what a search on two ranks printed, whose files are in the folder `searched`."""
    done = module_run(*LR, "-n", "2", "--out", "searched")
    assert done.exit_code == 0, done.stderr
    return done


def test_find_lr_prints_a_setting_that_a_plan_takes(
    run: Commands, module_run: Commands, searched: Finished
) -> None:
    """The output has both rules, an lr for --config and for the command line, and an image."""
    for rule in ("trainings", "lowest"):
        assert f"\n  {rule}" in searched.stdout
    (line,) = (line for line in searched.stdout.splitlines() if line.startswith("lr: "))
    assert 0.01 < float(line.split()[1]) < 3
    assert "--rule trainings" in line
    assert (module_run.folder / "searched/lr.png").read_bytes().startswith(b"\x89PNG")
    (run.folder / "found.yaml").write_text(line)
    (assignment,) = (line for line in searched.stdout.splitlines() if line.startswith("lr="))
    for arguments in (("--config", "found.yaml"), (assignment,)):
        plan = run("launcher", "plan", "digits", *arguments)
        assert plan.exit_code == 0, plan.stderr
        assert f"lr={float(line.split()[1])}" in plan.stdout


def test_short_trainings_bracket_the_best_lr(module_run: Commands, searched: Finished) -> None:
    """The best trial has a worse one on both of its sides, and its lr is lowered for the length.

    Each trial takes the steps of --steps, and the recipe 240.
    """
    out = RunDir(module_run.folder / "searched")
    result = json.loads(out.lr_search.read_text())
    trials = sorted(result["trials"], key=lambda trial: trial["lr"])
    best = min(trials, key=lambda trial: trial["loss"] or math.inf)
    assert (result["trial_steps"], result["whole_steps"]) == (60, 240)
    lowered = for_length(best["lr"], 60, 240)
    found = result["suggestions"]["trainings"]
    assert 2 ** (-1 / 6) - 1e-6 <= found / lowered <= 2**0.5
    (line,) = (line for line in searched.stdout.splitlines() if line.startswith("lr: "))
    assert float(line.split()[1]) == pytest.approx(found, rel=0.01)
    assert 0 < trials.index(best) < len(trials) - 1
    assert best["loss"] < 1.5
    folder = out.path / f"trainings/lr-{best['lr']:.3g}"
    curve = json.loads((folder / "curve.json").read_text())
    assert best["loss"] == curve["held_out"]
    assert len(curve["losses"]) == 60
    assert yaml.safe_load((folder / "run.yaml").read_text())["plan"]["total_steps"] == 60


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_two_ranks_have_the_curve_of_one(
    run: Commands, one_rank: dict[str, Any], strategy: str
) -> None:
    """Under every strategy two ranks have the losses and the suggested lr of one rank."""
    done = run(*RANGE_TEST, "-n", "2", f"strategy={strategy}", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["trials"] == []
    assert result["curve"]["lrs"] == pytest.approx(one_rank["curve"]["lrs"])
    num_stable = 35  # rounding differences grow where the loss is about to break
    assert result["curve"]["losses"][:num_stable] == pytest.approx(
        one_rank["curve"]["losses"][:num_stable], rel=1e-4
    )
    assert result["settings"]["lr"] == pytest.approx(one_rank["settings"]["lr"], rel=0.4)


def test_the_lr_is_stated_at_the_reference_batch(run: Commands) -> None:
    """At twice the recipe's lr_batch_size the recommended lr is half of the suggestion."""
    done = run(*RANGE_TEST, "-n", "1", "batch_size=256", "--json", "--out", "out")
    result = json.loads(done.stdout)
    assert result["batch_size"] == 256
    assert result["settings"] == {"lr": pytest.approx(result["suggestions"]["lowest"] / 2)}


def test_a_range_test_stops_at_divergence(run: Commands) -> None:
    """A loss that is not finite ends the test early on all ranks and is not in the curve."""
    command = ("launcher", "find", "lr", "digits", "--from", "0.01", "--to", "1e6", "--steps")
    options = ("--rule", "lowest", "-n", "2", "max_grad_norm=none", "--json", "--out", "out")
    done = run(*command, "400", *options)
    result = json.loads(done.stdout)
    assert len(result["curve"]["losses"]) < 400
    assert all(map(math.isfinite, result["curve"]["losses"]))
    assert done.exit_code == 0, done.stderr


def test_a_flat_curve_ends_with_exit_code_1(run: Commands) -> None:
    """If the loss never falls, the output has a reason but no setting, and the exit code is 1."""
    command = ("launcher", "find", "lr", "digits", "--from", "1e-9", "--to", "1e-8", "--steps")
    done = run(*command, "20", "-n", "1", "--out", "out")
    assert done.exit_code == 1
    assert "does not fall" in done.stdout
    assert "lr: " not in done.stdout


def test_a_falling_range_is_refused(run: Commands) -> None:
    """A range whose lr falls is refused before anything starts."""
    done = run("launcher", "find", "lr", "digits", "--from", "1", "--to", "0.1")
    assert done.exit_code == 2
    assert "--from 1 --to 0.1" in done.stderr
    assert not list(run.folder.iterdir())


NOISE = ("launcher", "find", "noise")
KNOWN = ROOT / "tests/recipes/known_noise.py"
B_SIMPLE = (2.0 / 0.16) ** 2
"""The true noise scale of the recipe KNOWN."""


@pytest.fixture(scope="module")
def known_noise(module_run: Commands) -> dict[str, dict[str, Any]]:
    """Return the measured noise scale of KNOWN on one rank, on two, and on two under FSDP."""
    results = {}
    for name, ranks, strategy in (("one", "1", "ddp"), ("two", "2", "ddp"), ("fsdp", "2", "fsdp")):
        settings = ("-n", ranks, f"strategy={strategy}", "--json", "--out", f"known-{name}")
        done = module_run(*NOISE, KNOWN, *settings)
        assert done.exit_code == 0, done.stderr
        results[name] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("name", ["one", "two", "fsdp"])
def test_a_known_noise_scale_is_recovered(
    known_noise: dict[str, dict[str, Any]], name: str
) -> None:
    """A known tr(S) / |G|^2 is measured to 10 %, also under FSDP, where the parts are others."""
    scale = known_noise[name]["whole"]
    assert scale["measurements"] >= 312, "all but the last batch of each epoch, at least"
    assert scale["b_simple"] == pytest.approx(B_SIMPLE, rel=0.1)
    # The noise scale of the finite data set is off by a few percent.
    assert 0.95 * scale["low"] < B_SIMPLE < 1.05 * scale["high"]


@pytest.mark.parametrize(
    ("strategy", "precision", "tolerance"), [("zero2", "bf16", 0.02), ("zero3", "fp32", 1e-3)]
)
def test_zero_measures_the_same_norms(
    run: Commands,
    known_noise: dict[str, dict[str, Any]],
    strategy: str,
    precision: str,
    tolerance: float,
) -> None:
    """Under ZeRO the norms of gradients are those under DDP."""
    settings = (f"strategy={strategy}", f"precision={precision}")
    done = run(*NOISE, KNOWN, "-n", "2", *settings, "--steps", "40", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    measurements = json.loads(done.stdout)["measurements"]
    assert len(measurements) >= 20
    for one, other in zip(known_noise["two"]["measurements"][:20], measurements[:20], strict=True):
        assert other == pytest.approx(one, rel=tolerance)


def test_the_norms_do_not_depend_on_the_ranks(run: Commands) -> None:
    """On one and on two ranks the parts of a batch have the same gradient norms."""
    measurements = {}
    for ranks in (1, 2):
        done = run(
            *NOISE,
            *("digits", "-n", str(ranks), "--steps", "40", "--json", "--out", f"on{ranks}"),
        )
        measurements[ranks] = [
            measurement
            for measurement in json.loads(done.stdout)["measurements"]
            if measurement["big_items"] == 128
        ]
    for one, two in zip(measurements[1][:20], measurements[2][:20], strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_find_noise_compares_batches(run: Commands) -> None:
    """The table has steps and samples by batch and marks the inefficient ones."""
    done = run(*NOISE, KNOWN, "-n", "2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    rows = {
        int(line.split()[0].replace(",", "")): line
        for line in done.stdout.splitlines()
        if re.match(r" +[\d,]+ +x", line)
    }
    assert "x1.00   x1.00" in rows[256]
    inefficient = [size for size, line in rows.items() if "2 x B_crit" in line]
    assert inefficient == [512, 1024, 2048, 4096]
    advice = done.stdout[done.stdout.index("Batches up to") :]
    assert re.search(r"2 x B_crit = 3\d\d\b", advice)
    assert re.search(r"\b2 ranks\b.*\b128\b", advice)
    assert (run.folder / "out/noise.png").is_file()


def test_a_run_records_the_noise_scale(run: Commands) -> None:
    """With noise_scale=true a run records it every 20 steps, and its losses do not change."""
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
    [(("-n", "1"), "1 rank"), (("-n", "2", "strategy=fsdp"), "strategy=fsdp")],
)
def test_noise_scale_needs_several_parts(
    run: Commands, settings: tuple[str, ...], where: str
) -> None:
    """A run whose batches have a single part refuses noise_scale=true before it starts."""
    done = run("launcher", "run", KNOWN, "noise_scale=true", *settings)
    assert done.exit_code == 2
    assert "noise_scale" in done.stderr
    assert where in done.stderr
    assert not (run.folder / "runs").exists()


BATCH = ("launcher", "find", "batch")
HEAVY = ROOT / "tests/recipes/heavy.py"


def test_the_largest_micro_batch_that_fits_is_found(run: Commands) -> None:
    """Sizes fit up to the memory limit, and a second search reads the result from the cache."""
    env = {"XDG_CACHE_HOME": str(run.folder / "cache")}
    command = (*BATCH, HEAVY, "-n", "2", "--memory", "600MiB", "--json")
    done = run(*command, "--out", "out", env=env)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    fits = {trial["size"]: trial["fits"] for trial in result["trials"]}
    assert fits[min(fits)]
    assert not fits[max(fits)], "a sample takes 17 MiB"
    assert sorted(fits.values(), reverse=True) == [fits[size] for size in sorted(fits)]
    for trial in result["trials"]:
        if trial["fits"]:
            assert trial["peak_bytes"] > trial["size"] * 8 * 2**20
    size = result["settings"]["micro_batch_size"]
    plan = run("launcher", "plan", HEAVY, f"micro_batch_size={size}", "-n", "2", "--json")
    values = json.loads(plan.stdout)
    assert (values["micro_batch_size"], values["batch_size"]) == (size, 128)
    again = run(*command, env=env)
    assert "--fresh" in again.stderr
    assert json.loads(again.stdout) == result


def test_a_failing_recipe_is_not_out_of_memory(run: Commands) -> None:
    """An error other than out of memory ends the search, is shown, and is not cached."""
    env = {"XDG_CACHE_HOME": str(run.folder / "cache")}
    recipe = ROOT / "tests/recipes/failing.py"
    done = run(*BATCH, recipe, "how=raise", "rank=0", "-n", "2", "--out", "out", env=env)
    assert done.exit_code == 1
    assert "micro_batch_size=" in done.stderr
    assert "ValueError: the loss of rank one" in done.stderr
    assert not (run.folder / "cache/launcher").exists()


def test_too_little_memory_for_one_sample_is_an_error(run: Commands) -> None:
    """If not one sample fits, the exit code is 1; a --memory that is not a size is refused."""
    env = {"XDG_CACHE_HOME": str(run.folder / "cache")}
    done = run(*BATCH, HEAVY, "-n", "1", "--memory", "200MiB", "--out", "out", env=env)
    assert done.exit_code == 1
    assert "(180 MiB)" in done.stdout
    assert "micro_batch_size:" not in done.stdout
    assert run(*BATCH, "digits", "--memory", "much", env=env).exit_code == 2
    slow = (ROOT / "tests/recipes/slow.py", "milliseconds=0", "num_workers=2")
    done = run(*BATCH, *slow, "-n", "1", "--memory", "50MiB", env=env)
    assert done.exit_code == 1
    assert "(45 MiB)" in done.stdout, done.stderr


LOADER = ("launcher", "find", "loader", ROOT / "tests/recipes/slow.py", "--seconds", "0.2")


def test_workers_hide_latency(run: Commands) -> None:
    """Storage with a high latency gets more workers than there are cores."""
    recipe = ("how=waits", "milliseconds=5", "step_milliseconds=16")
    done = run(*LOADER, *recipe, "-n", "1", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    readings = result["readings"]
    assert result["cost"]["reading"] == pytest.approx(0.005, rel=0.5)
    assert result["cost"]["reading_cpu"] < 0.5 * result["cost"]["reading"]
    assert result["predicted"] >= 8
    best, alone = result["best"], readings[0]
    assert best["workers"] == result["settings"]["num_workers"]
    assert best["worker_threads"] == result["settings"].get("worker_threads", 1)
    assert max(best["workers"], 1) * best["worker_threads"] > 4
    rate = best["samples_per_second"]
    assert rate > 4 * alone["samples_per_second"], "readers that wait do not compete for cores"
    assert best["wait_seconds_per_step"] < alone["wait_seconds_per_step"] / 4
    assert {reading["worker_threads"] for reading in readings} > {1}
    assert all(reading["worker_bytes"] > 0 for reading in readings if reading["workers"])


def test_a_longer_queue_hides_stalls(run: Commands) -> None:
    """If some samples take very long to read, a larger prefetch_factor is measured."""
    recipe = ("how=stalls", "milliseconds=500", "step_milliseconds=25")
    done = run(*LOADER[:-1], "0.4", *recipe, "-n", "1", "--json", "--out", "out")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    slowest = result["slowest_batch_seconds"]
    assert slowest > 0.5
    workers = result["settings"]["num_workers"]
    readings = [reading for reading in result["readings"] if reading["workers"] == workers > 0]
    needed = prefetch_factor_to_hide(slowest, workers, readings[0]["step_seconds"])
    prefetch_factors = [reading["prefetch_factor"] for reading in readings]
    # On a busy machine steps can be so slow that the default queue hides the stalls.
    assert prefetch_factors[0] == 2
    assert needed <= 2 or min(needed, MAX_PREFETCH_FACTOR) in prefetch_factors
    chosen = result["settings"].get("prefetch_factor", 2)
    assert result["best"]["prefetch_factor"] == chosen


def test_workers_do_not_oversubscribe_cores(run: Commands) -> None:
    """A data set whose reading is CPU-bound gets at most as many workers as there are cores."""
    done = run(
        *(*LOADER[:-1], "0.1", "how=works", "milliseconds=1", "batch_size=16", "-n", "2"),
        *("--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    predicted = re.search(r"(\d+) workers per rank", done.stdout)
    assert predicted is not None
    assert int(predicted[1]) <= max(cores // 2, 1)
    assert "CPU time" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("num_workers: "))
    (run.folder / "found.yaml").write_text(line)
    plan = run("launcher", "plan", LOADER[3], "--config", "found.yaml")
    assert re.search(rf"\bworkers +{int(line.split()[1])} per rank\b", plan.stdout)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_search_at_once(
    run: Commands, number: signal.Signals, exit_code: int
) -> None:
    """A search, which has nothing to save, ends at once with one line that names the signal."""
    process = run.start(*LR[:4], "-n", "2", "--steps", "20000", "--out", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if "samples/s" in line:
            break
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    (line,) = stderr.strip().splitlines()
    assert number.name in line
