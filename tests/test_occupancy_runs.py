"The plan of the runs on shapes, and from which step on an order is settled."
import dataclasses
import math
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inr_precond import figures, occupancy
from inr_precond.runs import RunConfig


def made(recipe, seed, values, shape="trefoil", status="finished"):
    "A stand-in for a run with these BCEs at steps 100, 200, ..."
    steps = [100 * (k + 1) for k in range(len(values))]
    config = RunConfig(task="occupancy", shape=shape, recipe=recipe, steps=steps[-1], seed=seed)
    return SimpleNamespace(config=config, status=status, evals=pd.DataFrame({"step": steps, "bce": values}))


@given(st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.4]), min_size=4, max_size=4), min_size=1, max_size=4))
def test_settled_is_the_first_step_from_which_on_all_pairs_agree(values):
    "Catches a step after which the order still changes, a tie that counts as an order, and pairs that agree only in their mean."
    groups = {"Adam": [made("adam/released", k, [0.2] * 4) for k in range(len(values))], "SGD": [made("sgd/released", k, v) for k, v in enumerate(values)]}
    found = occupancy.settled(figures.differences(groups))
    expected = math.nan
    for first in reversed(range(4)):
        signs = {(v > 0.2) - (v < 0.2) for row in values for v in row[first:]}
        if signs in ({1}, {-1}):
            expected = 100 * (first + 1)
    assert found == expected or math.isnan(found) and math.isnan(expected)


def test_differences_are_those_of_the_tables_at_the_end():
    "Catches another sign, another reference, or pairs that are not of one shape and seed."
    groups = {"Adam": [made("adam/released", 0, [0.6, 0.3]), made("adam/released", 1, [0.6, 0.2], "armadillo")], "SGD": [made("sgd/released", 1, [0.6, 0.4], "armadillo"), made("sgd/released", 0, [0.6, 0.1]), made("sgd/released", 7, [0.1, 0.1])]}
    rows = figures.differences(groups)
    assert [(r.seed, r.step, pytest.approx(r.difference)) for r in rows.itertuples()] == [(1, 100, 0.0), (1, 200, math.log(0.2 / 0.4)), (0, 100, 0.0), (0, 200, math.log(3))]


def test_a_shorter_or_diverged_run_is_compared_where_it_can_be():
    "Catches a method with a third of the steps that is held against the end of a longer run, and a diverged run that is left out, which would reward it."
    groups = {"Adam": [made("adam/released", 0, [0.5, 0.4, 0.3])], "SGD": [made("sgd/released", 0, [0.6])], "ESGD mended": [made("esgd/mended", 0, [0.1, 0.1, 0.1], status="diverged")]}
    rows = figures.differences(groups)
    assert list(rows[rows.method == "SGD"]["step"]) == [100]
    assert list(rows[rows.method == "ESGD mended"]["difference"] < 0) == [True] * 3
    assert occupancy.order_table({"Adam": groups["Adam"]}).empty
    assert len(occupancy.order_figure({"Adam": groups["Adam"]}, "alone").axes) == 1


def test_the_study_is_the_laptops_plan_at_twice_its_length():
    "Catches a study of other settings than those that it justifies."
    study = occupancy.study()
    plan = {dataclasses.replace(c, steps=occupancy.STUDY) for c in occupancy.configs("laptop", occupancy.CHEAP, [("armadillo", k) for k in range(5)])}
    assert set(study) == plan and len(study) == 20 and occupancy.STUDY == 2 * occupancy.SETTINGS["laptop"].steps >= 2 * figures.RANKING["occupancy"][0]
    assert not figures.too_short(occupancy.SETTINGS["laptop"].steps, 8_192, "occupancy") and figures.too_short(occupancy.SETTINGS["quick"].steps, 8_192, "occupancy")


def test_the_notebooks_share_their_runs():
    "Catches a plan in which Figure 4 trains what Figure 6 has, under another name, and two pairs with one seed."
    pairs = occupancy.pairs_of("laptop", list(occupancy.PAPER))
    six = set(occupancy.configs("laptop", occupancy.COSTS, pairs))
    assert set(occupancy.configs("laptop", ("adam/released", "sgd/released"), pairs[:5])) < six and len(six) == len(occupancy.COSTS) * len(pairs)
    assert len({seed for _, seed in pairs}) == len(pairs)
    assert [c.steps for c in occupancy.configs("laptop", ("adam/released", "adahessian-e/released"), pairs[:1])] == [occupancy.SETTINGS["laptop"].steps, occupancy.SETTINGS["laptop"].steps // 3]


def test_only_what_costs_three_steps_is_too_short_to_rank_at_laptop():
    "Catches an optimizer that a claim compares at Adam's end and that is trained for less."
    short = {name for name in occupancy.COSTS if figures.too_short(occupancy.steps_of(name, "laptop"), occupancy.SETTINGS["laptop"].batch_size, "occupancy")}
    assert short == {name for name in occupancy.COSTS if name.startswith("adahessian")} == {name for name, cost in occupancy.COSTS.items() if cost >= occupancy.DEAR}


def test_quick_leaves_out_what_is_expensive_and_full_is_the_papers():
    "Catches a method of three times the cost in a batch of minutes, and a full scale that is not 120,000 steps of 50,000 points."
    assert {c.recipe for c in occupancy.configs("quick", occupancy.COSTS, [("trefoil", 0)])} == set(occupancy.CHEAP)
    assert {(c.steps, c.batch_size, c.points) for c in occupancy.configs("full", occupancy.COSTS, [("trefoil", 0)])} == {(120_000, 50_000, 12_000_000)}
    table = occupancy.table_of()
    assert table.loc["steps, adahessian-e/released", "quick"] == 0 and list(table.columns) == list(figures.SCALES)


def test_shapes_of(monkeypatch):
    "Catches four names on a machine that has no scan, a named shape that is left out without a word, and a blank after a comma."
    monkeypatch.delenv("INR_PRECOND_DATA", raising=False)
    assert occupancy.shapes_of("laptop") == ["trefoil"]
    assert occupancy.shapes_of("quick", "a.obj, b.obj") == ["a.obj", "b.obj"] and occupancy.shapes_of("laptop", "a.obj, b.obj") == ["a.obj", "b.obj"]


def _few(pairs, length=12):  # SGD is ahead at step 100 only; evaluations every hundred steps
    return {"Adam": [made("adam/released", k, [0.2] * length) for k in range(pairs)], "SGD": [made("sgd/released", k, [0.1, *[0.4] * (length - 1)]) for k in range(pairs)]}


def test_an_order_of_few_pairs_is_not_called_settled():
    "Catches one pair of runs that is said to have settled anything, and runs below the length of the ranking that are."
    words = lambda *given: occupancy.order_table(_few(*given)).loc["SGD", "order against Adam"]
    assert words(1) == "no change from step 200 on, in 1 pair" and words(4).endswith("in 4 pairs") and words(5) == "settled from step 200"
    assert words(5, 3) == "too short to rank" and "too short to rank" in occupancy.order_figure(_few(5, 3), "").axes[0].get_title()


def test_a_quarter_of_a_run_is_a_quarter_of_it():
    "Catches the evaluation nearest to a quarter, or the reference's last one before the end, in the place of that step of the run itself."
    groups = {"Adam": [made("adam/released", 0, [0.2] * 12)], "SGD": [made("sgd/released", 0, [0.4, 0.2, 0.4, 0.8, 0.1])]}
    row = occupancy.order_table(groups).loc["SGD"]
    expected = [math.log(0.2 / v) for v in (0.35, 0.3, 0.1)]  # steps 125, 250, 500
    assert row.filter(like="mean").tolist() == pytest.approx(expected)
    groups["Adam"][0].evals = groups["Adam"][0].evals.drop(index=4)  # no evaluation of Adam's at 500
    assert figures.differences(groups)["step"].max() == 500
