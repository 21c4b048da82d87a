"Tuning under one budget: halving against known objectives, equal budgets, determinism, resumption, statistics against closed forms, the record, bad input."
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from inr_precond import claims, figures, runs, tuning
from inr_precond.tuning import Contestant, Plan, bootstrap, budget_of, config_of, digest, race_rows, speedups, spent, steps_for, tune

PAIRS = (("astronaut", 0), ("astronaut", 1))
GRID = {"lr": tuple(2.0**k for k in range(-6, 3)), "schedule": ("constant", "cosine")}
TINY = {"image_size": 16, "hidden_features": 8, "num_layers": 3, "batch_size": 64}


def objective(optimum=0.5, calls=None, fail=()):
    "A trainer without training: PSNR falls with the distance of the rate from the optimum and rises with the steps; cosine is worth half a dB."
    def train(configs):
        if calls is not None:
            calls.extend(configs)
        made = []
        for c in configs:
            psnr = 30 - (math.log2(c.options["lr"]) - math.log2(optimum)) ** 2 + 0.5 * (c.schedule == "cosine") - 20 / c.steps + 0.01 * c.seed
            diverged = c.options["lr"] in fail
            made.append(SimpleNamespace(status="diverged" if diverged else "finished", final={"psnr": None if diverged else psnr}))
        return made
    return train


def contestant(name="A", cost=1.0, grid=None, recipe="adam/released"):
    return Contestant(name, recipe, cost, grid or GRID)


@pytest.mark.parametrize("optimum", GRID["lr"])
def test_halving_finds_the_best_wherever_it_lies(optimum):
    "Ranking upside down, the wrong survivors, or scores that are dealt to the wrong candidates."
    plan = Plan(400, (contestant("A"), contestant("B", 2.0)), PAIRS, ((0.25, 18, 1), (0.5, 5, 1), (1.0, 2, 2)))
    found = tune(plan, objective(optimum))
    assert found.chosen == {"A": {"lr": optimum, "schedule": "cosine"}, "B": {"lr": optimum, "schedule": "cosine"}}


def test_each_contestant_is_scored_by_its_own_runs():
    "Scores of one contestant handed to the next, which equal objectives would hide."
    def train(configs): return [SimpleNamespace(status="finished", final={"psnr": -abs(math.log2(c.options["lr"]) - (1 if "esgd" in c.recipe else -5))}) for c in configs]
    plan = Plan(100, (contestant("A"), contestant("B", recipe="esgd/mended")), PAIRS, ((0.5, 18, 2), (1.0, 3, 1)))
    found = tune(plan, train)
    assert found.chosen["A"]["lr"] == 2.0**-5 and found.chosen["B"]["lr"] == 2.0


def test_the_mean_over_the_pairs_decides():
    "Ranking by the first pair alone: there .25 leads, on the mean of both 1 does."
    value = {(0.25, 0): 30, (0.25, 1): 10, (1.0, 0): 25, (1.0, 1): 24}
    def train(configs): return [SimpleNamespace(status="finished", final={"psnr": value[c.options["lr"], c.seed]}) for c in configs]
    plan = Plan(100, (contestant(grid={"lr": (0.25, 1.0)}),), PAIRS, ((1.0, 2, 2),))
    assert tune(plan, train).chosen["A"] == {"lr": 1.0}


def test_a_diverged_trial_never_wins_and_ties_go_to_the_first():
    "None or NaN compared with numbers, or an order that depends on the sorting."
    plan = Plan(100, (contestant(),), PAIRS, ((0.5, 18, 1), (1.0, 4, 1)))
    assert tune(plan, objective(0.5, fail=(0.5,))).chosen["A"]["lr"] in (0.25, 1.0)
    flat = lambda configs: [SimpleNamespace(status="finished", final={"psnr": 20.0}) for _ in configs]
    assert tune(plan, flat).chosen["A"] == contestant().candidates()[0]
    assert tuning.score(SimpleNamespace(status="diverged", final={"psnr": 31.0})) == tuning.score(SimpleNamespace(status="finished", final={"psnr": None})) == figures.DIVERGED_PSNR


def test_it_spends_the_stated_budget_and_the_same_for_everyone():
    "Rungs of the wrong length or count, a step's cost that is ignored, or a contestant that gets more trials."
    contestants = (contestant("Adam"), contestant("E", 3.0), contestant("N", 1.05), contestant("S", 0.9))
    plan = Plan(2560, contestants, PAIRS, ((0.25, 18, 1), (0.5, 6, 1), (1.0, 2, 2)))
    calls = []
    tune(plan, objective(calls=calls))
    assert budget_of(plan) == 2560 * (0.25 * 18 + 0.5 * 6 + 1.0 * 2 * 2)
    assert len(calls) == 4 * (18 + 6 + 4)
    position, used = 0, dict.fromkeys((c.name for c in contestants), 0.0)
    for count, pairs in ((18, 1), (6, 1), (2, 2)):
        for c in contestants:
            used[c.name] += sum(config.steps * c.cost for config in calls[position : position + count * pairs])
            position += count * pairs
    for c in contestants:
        assert used[c.name] == pytest.approx(spent(plan, c)) and 0.99 * budget_of(plan) < used[c.name] <= budget_of(plan)


@pytest.mark.parametrize("budget, cost, steps", [(2560, 1.0, 2560), (2560, 3.0, 853), (7680, 1.05, 7314), (2100, 1.05, 2000), (0.3, 0.1, 3), (1, 3.0, 1)])
def test_steps_never_cost_more_than_the_budget(budget, cost, steps):
    "Rounding up, or losing a step to floating point (.3 / .1)."
    assert steps_for(budget, cost) == steps and (steps == 1 or steps * cost <= budget + 1e-6)


def test_every_rung_has_a_schedule_and_a_warmup_of_its_own_length():
    "A cosine that ends after the run, or a warm-up in steps of another rung."
    calls = []
    grid = {"lr": (0.25, 0.5, 1.0), "schedule": ("cosine",), "lr_warmup": (1 / 8,)}
    tune(Plan(800, (contestant(grid=grid),), PAIRS, ((0.25, 3, 1), (1.0, 2, 1))), objective(calls=calls))
    assert [(c.steps, c.schedule, c.options["lr_warmup"]) for c in calls] == [(200, "cosine", 25)] * 3 + [(800, "cosine", 100)] * 2
    assert len({runs.RunConfig(**{**c.to_dict(), **TINY}).key for c in calls}) == 5


def test_a_candidate_becomes_the_run_that_it_names():
    "beta2 in the place of beta1, a knob that is dropped, or one that reaches the wrong option."
    c = contestant("E", 1.05, {"lr": (0.5,), "beta2": (0.95,), "eps": (1e-3,)}, "esgd/mended")
    config = config_of(c, {"lr": 0.5, "beta2": 0.95, "eps": 1e-3, "lr_warmup": 0.1, "schedule": "cosine"}, 1050, "astronaut", 4, **TINY)
    assert dict(config.options) == {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-3, "lr_warmup": 100}
    assert (config.recipe, config.steps, config.schedule, config.seed, config.image_size) == ("esgd/mended", 1000, "cosine", 4, 16)
    plain = config_of(c, {}, 1050, "astronaut", 4)
    assert plain == runs.RunConfig(recipe="esgd/mended", steps=1000, image="astronaut", seed=4)
    momentum = config_of(contestant(recipe="esgd/algorithm2", grid={"beta2": (0.9,)}), {"beta2": 0.9}, 10, "astronaut", 0)
    assert momentum.options["betas"] == (0.0, 0.9)
    assert config_of(contestant(), {"beta2": 0.9}, 10, "astronaut", 0).options["betas"] == (0.9, 0.9)  # the optimizer's default beta1


def test_the_builtin_grids_are_equal_in_size_and_can_be_run():
    "A new line with another number of trials, or a knob that its optimizer does not have."
    plan = Plan(2560, tuning.CONTESTANTS, PAIRS)
    assert plan.trials == 48
    for c in tuning.CONTESTANTS:
        assert len(plan.candidates(c)) == 48 and {"lr", "schedule", "lr_warmup"} <= set(dict(c.grid))
        assert ("beta2" in dict(c.grid)) == (c.recipe.split("/")[0] not in ("adam", "sgd"))
        for candidate in c.candidates():
            config_of(c, candidate, 640, "astronaut", 0)


def test_a_larger_grid_is_thinned_by_a_fixed_draw():
    "A draw that changes from process to process (hash(), a global generator), that repeats a candidate, or that is the head of the list."
    plan = Plan(100, (contestant(),), PAIRS, ((0.5, 6, 1), (1.0, 2, 1)))
    drawn, points = plan.candidates(plan.contestants[0]), contestant().candidates()
    assert len(drawn) == 6 and all(c in points for c in drawn) and len({json.dumps(c) for c in drawn}) == 6
    assert drawn == [c for c in points if c in drawn] != points[:6]
    assert drawn == replace(plan).candidates(contestant()) != replace(plan, draw=1).candidates(contestant())
    assert [points.index(c) for c in drawn] == DRAWN


DRAWN = [6, 7, 9, 11, 13, 16]  # what SHA-256 gives, in every process and version


def test_the_digest_stands_for_everything_that_the_plan_says():
    "A frozen grid that can be changed without anyone noticing."
    plan = Plan(400, (contestant(), contestant("B", 2.0)), PAIRS, ((0.5, 18, 1), (1.0, 2, 1)))
    others = [replace(plan, budget=401), replace(plan, draw=1), replace(plan, pairs=PAIRS[:1]), replace(plan, rungs=((0.5, 18, 1), (1.0, 3, 1))), replace(plan, common={"image_size": 128}),
              replace(plan, contestants=(contestant(), contestant("B", 2.1))), replace(plan, contestants=(contestant(grid={**GRID, "lr_warmup": (0.0,)}), contestant("B", 2.0)))]
    assert len({digest(p) for p in (plan, *others)}) == 1 + len(others)
    assert digest(plan) == digest(replace(plan)) and digest(replace(plan, pairs=(("/one/lion.png", 0),))) == digest(replace(plan, pairs=(("/two/lion.png", 0),)))
    with pytest.raises(TypeError):
        plan.common["image_size"] = 3


def test_the_same_plan_gives_the_same_tuning_and_trains_nothing_twice(tmp_path):
    "Trials that are not cached, or a choice that depends on the order of the processes."
    plan = Plan(64, (contestant(grid={"lr": (1e-3, 1e-2, 1e-1)}), contestant("E", 3.0, {"lr": (0.1, 1.0, 2.0)}, "adahessian-e/released")), PAIRS, ((0.5, 3, 1), (1.0, 1, 2)), common=TINY)
    missing = []
    def train(configs):
        missing.extend(c.key for c in configs if runs.damage(tmp_path / c.key))
        return [runs.run(c, tmp_path) for c in configs]
    first = tune(plan, train)
    assert len(missing) == 2 * (3 + 2) and len(set(missing)) == len(missing)
    assert tune(plan, train) == first and len(missing) == 10
    interrupted = tmp_path / missing[-1] / "metrics.json"
    interrupted.unlink()
    assert tune(plan, train) == first
    assert missing[10:] == [missing[9]]
    best = max((t for t in first.trials if t["rung"] == 0 and t["contestant"] == "A"), key=lambda t: t["score"])
    assert first.chosen["A"] == best["candidate"] and tuning.trial_table(first).kept.sum() == 2 * (1 + 1)


def chance_median_at_most(k, n):
    "Of the bootstrap's median of n sorted values being at most the k-th: #{drawn <= x_k} is Binomial(n, k/n); n odd."
    return sum(math.comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in range((n + 1) // 2, n + 1))


@pytest.mark.parametrize("n, level", [(5, 0.95), (9, 0.95), (9, 0.8), (15, 0.95), (21, 0.9)])
def test_bootstrap_of_the_median_against_the_binomial(n, level):
    "Draws without replacement, one tail for two, or a level that is not used. The ends are quantiles of the exact distribution, up to four standard errors of 20,000 draws."
    values = np.random.default_rng(n).normal(size=n)
    found, ranks = bootstrap(values, level=level), {v: k + 1 for k, v in enumerate(np.sort(values))}
    assert found["value"] == np.median(values) and found["n"] == n
    for end, q in (("low", (1 - level) / 2), ("high", (1 + level) / 2)):
        error = 4 * math.sqrt(q * (1 - q) / 20_000)
        assert chance_median_at_most(ranks[found[end]], n) >= q - error and chance_median_at_most(ranks[found[end]] - 1, n) <= q + error


def test_bootstrap_of_the_mean():
    "Of two values the means are a, (a + b) / 2, b with chances 1/4, 1/2, 1/4; of many, the interval is the normal one."
    assert bootstrap([1.0, 3.0], np.mean)["low"] == 1 and bootstrap([1.0, 3.0], np.mean)["high"] == 3
    half = bootstrap([1.0, 3.0], np.mean, level=0.4)
    assert (half["low"], half["high"]) == (2.0, 2.0)  # the quantiles at .3 and .7 both fall on the middle value
    values = np.random.default_rng(0).normal(size=400)
    found, width = bootstrap(values, np.mean), 1.96 * values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - width, abs=0.03 * width * 2) and found["high"] == pytest.approx(values.mean() + width, abs=0.03 * width * 2)
    assert bootstrap(values, np.mean) == found != bootstrap(values, np.mean, seed=1)


def test_bootstrap_of_little():
    "An interval made of one pair."
    assert bootstrap([2.0])["value"] == 2 and math.isnan(bootstrap([2.0])["low"]) and bootstrap([])["n"] == 0 and math.isnan(bootstrap([])["value"])


def line(name, seed, rate, status="finished", steps=100, ms=10.0, recipe="adam/released", image="astronaut"):
    "A run whose PSNR rises linearly, `rate` dB a step."
    at = np.arange(10, steps + 1, 10)
    config = SimpleNamespace(task="image", signal=image, recipe=recipe, options={}, image=image, seed=seed, steps=steps, image_size=256)
    final = {"psnr": rate * steps if status == "finished" else None, "best_psnr": rate * steps, "mse": 1e-2}
    return SimpleNamespace(config=config, status=status, diverged_at=None if status == "finished" else 55, ms_per_step=ms, state_floats_per_parameter=2.0, final=final, evals=pd.DataFrame({"step": at, "seconds": at * ms / 1000, "psnr": rate * at.astype(float)}),
                           provenance={"cpu": "some", "torch": "2", "finished": "2026-01-01", "git_commit": None})


RACE = Plan(100, (contestant("Adam"), contestant("X", 2.0, recipe="esgd/mended")), PAIRS, ((1.0, 2, 1),))


def race(seeds=4):
    "X takes 50 steps of 20 ms: at .8 dB a step it reaches Adam's 20 dB at step 25; at .1 never; once it diverges."
    rates = (0.8, 0.8, 0.1, 0.8)
    return {"Adam": [line("Adam", s, 0.2) for s in range(seeds)], "X": [line("X", s, rates[s], "diverged" if s == 3 else "finished", 50, 20.0, "esgd/mended") for s in range(seeds)]}


def test_race_rows_and_speedups():
    "A step counted as Adam's, seconds for units, pairs that are mixed up, or a method that never arrives left out of its own average."
    groups = race()
    groups["X"][3].evals = groups["X"][3].evals.iloc[:0]
    rows = race_rows(RACE, groups)
    x = rows[rows.method == "X"]
    assert x.difference.tolist() == pytest.approx([20.0, 20.0, -15.0, -20.0]) and x.value.tolist()[3] == 0
    assert x.units_to_target.tolist()[:2] == pytest.approx([50.0, 50.0]) and x.units_to_target.isna().tolist() == [False, False, True, True]
    assert [r for _, r in speedups(rows, "X")] == pytest.approx([2, 2, 0, 0]) and [r for _, r in speedups(rows, "X", "steps")] == pytest.approx([4, 4, 0, 0])
    assert [r for _, r in speedups(rows, "X", "seconds")] == pytest.approx([2, 2, 0, 0]) and [p for p, _ in speedups(rows, "X")] == [["astronaut", s] for s in range(4)]
    table = tuning.race_table(rows)
    assert table.loc["X", "speed-up, units"].endswith("2 of 4 arrived") and table.loc["X", "cost, measured"] == "2.00" and table.loc["X", "diverged"] == 1


def test_a_pair_whose_reference_diverged_gives_no_speedup_but_a_difference():
    "A target of NaN that counts as never reached, against the contestant."
    groups = {"Adam": [line("Adam", 0, 0.2, "diverged"), line("Adam", 1, 0.2)], "X": [line("X", s, 0.8, steps=50, recipe="esgd/mended") for s in range(2)]}
    rows = race_rows(RACE, groups)
    assert [p for p, _ in speedups(rows, "X")] == [["astronaut", 1]] and rows[rows.method == "X"].difference.tolist() == pytest.approx([40.0, 20.0])


def test_race_configs_are_paired():
    "Contestants on different pictures or seeds, or with steps that ignore their cost."
    chosen = {"Adam": {"lr": 0.5}, "X": {"lr": 1.0, "schedule": "cosine"}}
    made = tuning.race_configs(RACE, chosen, (("astronaut", 7), ("astronaut", 8)), **TINY)
    assert [(c.seed, c.steps) for c in made["Adam"]] == [(7, 100), (8, 100)] and [(c.seed, c.steps, c.schedule) for c in made["X"]] == [(7, 50, "cosine"), (8, 50, "cosine")]
    assert all(c.evaluations == 12 and c.hidden_features == 8 for group in made.values() for c in group)


def test_hours():
    "A price without the cost of a step, the pairs of a rung, or the races."
    plan = Plan(1200, (contestant("Adam"), contestant("X", 3.0)), PAIRS, ((0.5, 6, 1), (1.0, 2, 2)))
    price = tuning.hours([plan, plan], 5, ms_per_step=10.0, workers=2, evaluation_s=2.0, race_evaluations=12)
    steps = 2 * 2 * (1200 * (0.5 * 6 + 4) + 5 * 1200)
    assert price == {"adam_steps": steps, "runs": 2 * 2 * (6 + 4 + 5), "evaluations": 2 * 2 * (6 + 4 + 60), "hours": pytest.approx((steps * 0.01 + 2 * 280) / 7200)}


def test_a_chosen_rate_at_the_end_of_its_grid_is_told():
    "A tuned rate that is only the largest that was tried."
    plan = Plan(100, (contestant("A"), contestant("B"), contestant("C", grid={"lr": (1.0, 2.0), "schedule": ("constant", "cosine")})), PAIRS, ((1.0, 4, 1),))
    found = tuning.Tuning(plan, [], {"A": {"lr": 4.0}, "B": {"lr": 0.5}, "C": {"lr": 1.0}})
    told = tuning.at_the_edge(found)
    assert len(told) == 2 and "A at 100: the chosen rate 4 is the highest" in told[0] and "C at 100: the chosen rate 1 is the lowest" in told[1]


def test_a_contestant_whose_every_trial_diverged_is_told():
    "The first of sixteen diverged trials sold as the best, and its rate called too low or too high."
    plan = Plan(100, (contestant("A"), contestant("B")), PAIRS, ((0.5, 18, 1), (1.0, 4, 1)))
    lost = lambda configs: [SimpleNamespace(status="diverged" if c.recipe == plan.contestants[0].recipe else "finished", final={"psnr": 31.0}) for c in configs]
    told = tuning.at_the_edge(tune(plan, lost))
    assert len(told) == 2 and all("every trial of the last rung diverged" in t for t in told)
    assert not any("diverged" in t for t in tuning.at_the_edge(tune(plan, objective(0.5, fail=(0.5,)))))
    assert tuning.score(SimpleNamespace(status="finished", final={"psnr": float("nan")})) == figures.DIVERGED_PSNR


def test_the_record_reads_back_and_refuses_what_was_altered(tmp_path):
    "Numbers lost on the way, NaN in JSON, or a record that was edited by hand."
    found, groups = tune(RACE, objective()), race()
    rows = race_rows(RACE, groups)
    block = {"fair-tuning": {"ours": claims.evidence("fair-tuning", [1.0, 2.0, -1.0, 0.5, 0.2], [["a", i] for i in range(5)])}}
    file = tuning.record_result([found], {100: rows}, groups["X"], block, file=tmp_path / "deep" / "r.json")
    back = tuning.read_result(file)
    assert back["chosen"]["100"]["X"]["candidate"] == found.chosen["X"] and back["plans"][0]["digest"] == digest(RACE) and back["claims"] == block
    assert speedups(back["race"][100], "X") == speedups(rows, "X") and tuning.race_table(back["race"][100]).equals(tuning.race_table(rows))
    assert claims.judge("fair-tuning", back["claims"]["fair-tuning"]["ours"], True).verdict == claims.UNDECIDED
    assert tuning.read_result(tmp_path / "none.json") is None and str(tmp_path) not in file.read_text()
    text = file.read_text()
    for bad, words in ((text.replace('"cost": 2.0', '"cost": 1.0', 1), "was altered"), (text[:50], "cannot be read"), ("[]", "cannot be read"), (text.replace('"format": 1', '"format": 2'), "was altered")):
        assert bad != text
        file.write_text(bad)
        with pytest.raises(ValueError, match=words):
            tuning.read_result(file)
    values = {**json.loads(text), "format": 2}
    values["digest"] = tuning._seal({k: v for k, v in values.items() if k != "digest"})
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has the format 2 and this version reads the format 1"):
        tuning.read_result(file)


@pytest.mark.parametrize("make, words", [
    (lambda: Contestant("A", "adam/relesed", 1.0, GRID), "is not a recipe"),
    (lambda: Contestant("A", "adam/released", float("nan"), GRID), "the cost of 'A' is nan"),
    (lambda: Contestant("A", "adam/released", True, GRID), "the cost of 'A' is True"),
    (lambda: Contestant("A", "adam/released", 1.0, {}), "no knob"),
    (lambda: Contestant("A", "adam/released", 1.0, {"lr": ()}), "no value, or one value twice, for 'lr'"),
    (lambda: Plan(100, (contestant(), contestant()), PAIRS, ((1.0, 2, 1),)), "each a name of its own"),
    (lambda: Plan(100, (), PAIRS, ((1.0, 2, 1),)), "the contestants are none"),
    (lambda: Plan(100, (contestant(),), (), ((1.0, 2, 1),)), "no .image, seed. pair"),
    (lambda: Plan(100, (contestant(),), PAIRS + PAIRS[:1], ((1.0, 2, 1),)), "one of them twice"),
    (lambda: Plan(2.5, (contestant(),), PAIRS, ((1.0, 2, 1),)), "the budget is 2.5"),
    (lambda: Plan(100, (contestant(),), PAIRS, ()), "the rungs are"),
    (lambda: Plan(100, (contestant(),), PAIRS, ((1.0, 2, 3),)), "pairs from 1 to 2"),
    (lambda: Plan(100, (contestant(),), PAIRS, ((0.5, 4, 1), (0.25, 3, 1), (1.0, 2, 1))), "must not fall"),
    (lambda: Plan(100, (contestant(),), PAIRS, ((1.0, 19, 1),)), "18 points and the plan asks for 19 trials"),
    (lambda: bootstrap([1.0, math.inf]), "NaN or infinite"),
    (lambda: bootstrap([1.0, 2.0], level=95), "level is 95"),
    (lambda: speedups(race_rows(RACE, race()), "X", "hours"), "unit 'hours' does not exist"),
])
def test_bad_input(make, words):
    "Tunings that are unequal or cannot be run, found hours later."
    with pytest.raises(ValueError, match=words):
        make()


def test_to_diverge_is_never_chosen_over_having_finished():
    "Rates whose runs diverge score 0 dB and those that finish -2 dB: catches the choice of one that diverged, and the sentence that all did where all finished at 0 dB."
    def train(configs): return [SimpleNamespace(status="diverged" if c.options["lr"] < .1 else "finished", final={"psnr": None if c.options["lr"] < .1 else -2.}) for c in configs]
    plan = Plan(100, (contestant(grid={"lr": (1e-3, 1e-2, .1, 1.), "schedule": ("constant",)}),), PAIRS, ((.5, 4, 1), (1., 2, 1)))
    found = tune(plan, train)
    assert found.chosen["A"]["lr"] in (.1, 1.) and not any("diverged" in t for t in tuning.at_the_edge(found))
    assert not any("diverged" in t for t in tuning.at_the_edge(tune(plan, lambda configs: [SimpleNamespace(status="finished", final={"psnr": 0.}) for _ in configs])))
    assert any("diverged" in t for t in tuning.at_the_edge(tune(plan, lambda configs: [SimpleNamespace(status="diverged", final={"psnr": None}) for _ in configs])))


@pytest.mark.parametrize("change,words", [({"rungs": ((.5, 4.5, 1), (1., 2, 1))}, "the rungs are"), ({"pairs": (("a", 0), ("x/a.png", 0))}, "twice"), ({"contestants": (contestant(cost=60.),)}, "first rung has 50; give a larger budget")])
def test_plans_that_would_not_be_equal_for_everyone(change, words):
    with pytest.raises(ValueError, match=words): Plan(**{"budget": 100, "contestants": (contestant(),), "pairs": PAIRS, "rungs": ((.5, 4, 1), (1., 2, 1)), **change})
