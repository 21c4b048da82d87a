"Claims: the interval, what a run that never arrives tells, conjunctions, every verdict from synthetic evidence, and the collection of a batch's verdicts."
import json
import math

import numpy as np
import pandas as pd
import pytest

from inr_precond import claims
from inr_precond.claims import NOT_RUN, REJECTED, REPRODUCED, UNDECIDED, Claim, Part

INF = math.inf


@pytest.fixture
def made_up(monkeypatch):
    "A registry with two claims of the test's own: one of a single part (margin .3 dB), one of two races."
    monkeypatch.setattr(claims, "CLAIMS", {})
    claims.register(Claim("one", "A above B", "nowhere", {"printed": (Part("above", "A - B > .3 dB", "dB", .3),)}, "home"))
    claims.register(Claim("two", "A first", "nowhere", {form: tuple(claims.race_part("A", x) for x in "BC") for form in ("printed", "corrected")}, "home"))
    return claims


def rows(times, seeds=5, steps=10_000, image="lion", **more):
    "A table of runs as `figures.measure` gives it: {method: seconds to the target (None: never), or a list with one a seed}."
    out = []
    for method, given in times.items():
        for seed in range(seeds):
            t = given[seed] if isinstance(given, list) else given
            t = math.nan if t is None else t * (1 + .01 * ((seed * 7 + len(method)) % 5))
            out.append({"method": method, "image": image, "seed": seed, "steps": steps, "image_size": 256, "status": "finished", "psnr": 30., "target_psnr": 30., "difference": 0., "common_step": steps,
                        "ms_per_step": 10., "seconds_to_target": t, "steps_to_target": 100 * t, **more})
    return pd.DataFrame(out)


# The interval


def test_limits_are_students():
    "Against the closed form with quantiles from a printed table. Catches a normal quantile, n instead of n - 1, or the wrong tail."
    for n, quantile in ((5, 2.776445), (6, 2.570582), (12, 2.200985)):
        d = np.random.default_rng(n).normal(1, 2, n)
        half = quantile * d.std(ddof=1) / math.sqrt(n)
        assert np.allclose(claims.limits([(x, x) for x in d]), (d.mean() - half, d.mean() + half), rtol=1e-5)
    assert np.isclose(claims.limits([(x, x) for x in d], high_tail=.005)[1], d.mean() + 3.105807 * d.std(ddof=1) / math.sqrt(12))


@pytest.mark.parametrize("n", [5, 8])
def test_coverage(n):
    "In 3,000 simulated experiments the interval contains the true mean in 95 % (2.4 standard errors aside). Catches a bootstrap, which reaches 82 % at five pairs."
    rng = np.random.default_rng(n)
    inside = np.mean([low <= 3 <= high for low, high in (claims.limits([(x, x) for x in rng.normal(3, 1, n)]) for _ in range(3000))])
    assert abs(inside - .95) < .01


def test_limit_where_a_difference_has_no_lower_end():
    "The order statistic against exact binomial tails by hand: none for n = 5, the smallest for 6 to 8, the second smallest from 9. Catches a rank off by one."
    for n, rank in ((5, 0), (6, 1), (8, 1), (9, 2), (11, 2), (12, 3)):
        values = [-INF, *np.arange(1., n)]
        tail = sum(math.comb(n, k) for k in range(rank)) / 2 ** n
        assert tail <= claims.TAIL < tail + math.comb(n, rank) / 2 ** n
        assert claims.lower_limit(values) == (sorted(values)[rank - 1] if rank else -INF)


def test_bounds_are_on_the_safe_side():
    "A lower bound in place of a value can only lower the lower limit's verdict, and takes the upper limit away. Catches the run's end counted as an arrival in both directions."
    values = [.5, .7, .6, .8, .9]
    low, high = claims.limits([(x, x) for x in values])
    bounded = [(.5, .5), (.7, .7), (.6, INF), (.8, INF), (.9, .9)]
    assert claims.limits(bounded) == (low, INF) and low < high < INF
    assert claims.limits([(-b, -a) for a, b in bounded]) == (-INF, -low)


def cut_off(rng, n, a_end, b_end):
    "Arrival times of two equally fast methods, their runs cut off at a_end and b_end: the times, and what is known of each ln(t_B / t_A)."
    ta, tb = np.exp(rng.normal(0, .25, (2, n)))
    known = [(math.log(min(b, b_end) / a) if a <= a_end else -INF, math.log(b / min(a, a_end)) if b <= b_end else INF) for a, b in zip(ta, tb)]
    return ta, tb, [pair for pair in known if pair != (-INF, INF)]


@pytest.mark.parametrize("ends", [(1., 9.), (9., 1.)], ids=["A", "B"])
def test_bounds_from_a_table_of_runs(ends):
    "What `faster` makes of a table equals what is known by hand, for 20 tables with runs that were cut off."
    rng, n = np.random.default_rng(3), 8
    for _ in range(20):
        ta, tb, known = cut_off(rng, n, *ends)
        data, times, stops = rows({"A": None, "B": None}, n), np.r_[ta, tb], np.repeat(ends, n)
        data["steps_to_target"], data["steps"] = np.where(times <= stops, times * 1000, np.nan), stops * 1000
        found = [claims._ends(d) for d in claims.faster(data, "A", "B", "steps")["differences"]]
        assert np.allclose([pair for pair in found if pair], known)


@pytest.mark.parametrize("ends", [(1., 9.), (9., 1.)], ids=["A", "B"])
def test_false_verdicts_with_runs_that_do_not_arrive(ends):
    "2,000 races whose truth lies at the margin, in which slow runs of one method are cut off: each wrong verdict stays below 3.5 %. Leaving these pairs out gives over 10 %."
    rng, wrong, left_out = np.random.default_rng(4), np.zeros(2), np.zeros(2)
    for _ in range(2000):
        known = cut_off(rng, 8, *ends)[2]
        low, high = claims.limits(known)
        wrong += (low > 0, high < 0)
        both = [x for x, y in known if x == y]
        if len(both) > 1: left_out += (claims.lower_limit(both) > 0, claims.lower_limit([-x for x in both]) > 0)
    assert (wrong / 2000).max() < .035 and (left_out / 2000).max() > .1


# One part


@pytest.mark.parametrize("differences, verdict, words", [
    ([1., 1.2, .9, 1.1, .8], REPRODUCED, "above"), ([-1., -1.2, -.9, -1.1, -.8], REJECTED, "below"), ([.1, .12, .09, .11, .08], REJECTED, "below"), ([1., -1., .5, -.5, .2], UNDECIDED, "contains"),
    ([1., 1.2, .9, 1.1], UNDECIDED, "4 pairs, 5 are needed"), ([1., 1.2, .9, 1.1, None], UNDECIDED, "1 more tell nothing"), ([1., 1.2, .9, 1.1, math.nan], UNDECIDED, "4 pairs"), ([], UNDECIDED, "0 pairs"), ([9.], UNDECIDED, "1 pair, 5"),
    ([.3] * 5, UNDECIDED, "contains"), ([.3 + 1e-9] * 5, REPRODUCED, "above"), ([1., 1.2, .9, 1.1, [.8, None]], REPRODUCED, "above"), ([1., 1.2, .9, 1.1, [None, 5.]], UNDECIDED, ""),
    ([[None, -1. - .1 * i] for i in range(5)], REJECTED, "below"), ([[1. + .1 * i, None] for i in range(5)], REPRODUCED, "above"), ([*[1. + .1 * i for i in range(9)], [None, 0.]], REPRODUCED, "above"),
    ([[1., None], [None, 0.], [1., None], [None, 0.], [.9, None]], UNDECIDED, "did not arrive")], ids=str)
def test_each_verdict(made_up, differences, verdict, words):
    "Clear, borderline, lost, diverged and censored evidence. Catches >= at the margin, NaN as a pair, a bound as a value, four pairs as enough, or an effect below the margin as undecided."
    found = made_up.judge("one", {"differences": differences}, True, ["lion"])
    assert found.verdict == verdict and words in found.reason and found.signals == ("lion",)
    assert json.dumps(claims._row(claims.claim("one"), "printed", "laptop", found), allow_nan=False)


def test_pairs_in_which_neither_arrived_count_against_a_verdict(made_up):
    "Five clear arrivals among thirteen pairs, the others without one. Catches a method that is called faster because its failures, where the other failed too, are left out."
    clear, neither = [[.6 + .02 * i, None] for i in range(5)], [[None, None]] * 8
    assert made_up.judge("one", {"differences": clear}).verdict == REPRODUCED
    found = made_up.judge("one", {"differences": clear + neither})
    assert found.verdict == UNDECIDED and found.parts[0].n == 5 and found.parts[0].silent == 8 and "did not arrive" in found.reason and found.effect == pytest.approx(.64)
    assert made_up.judge("one", {"differences": [1. + .01 * i for i in range(19)] + [[None, None]]}).verdict == REPRODUCED    # one of twenty does not undo it


def test_the_method_is_named_by_the_limits(made_up):
    "Upper ends that are unknown leave the lower limit to Student's t. Catches a label that says otherwise."
    assert made_up.judge("one", {"differences": [[1. + .1 * i, None] for i in range(5)]}).method == "Student's t"
    assert made_up.judge("one", {"differences": [*[1. + .1 * i for i in range(9)], [None, 0.]]}).method == "order statistics"


def test_margin_is_the_registrys(made_up):
    "A notebook's own margin does not count: it could be chosen after the runs."
    found = made_up.judge("one", {"differences": [.1, .12, .09, .11, .08], "margin": 0., "unit": "dB"})
    assert found.verdict == REJECTED and found.margin == .3 and found.unit == "dB" and found.effect == pytest.approx(.1) and found.n == 5


@pytest.mark.parametrize("short, reason", [(False, "too short"), ("24 steps rank nothing", "24 steps")])
def test_short_runs_decide_nothing(made_up, short, reason):
    "Whatever the evidence, in the call, in the whole, or in a part of it."
    good = {"differences": [1., 1.2, .9, 1.1, .8]}
    for found in (made_up.judge("one", good, short), made_up.judge("one", {**good, "short": "too short" if short is False else short}), made_up.judge("one", {**good, "long_enough": False, "short": "" if short is False else short})):
        assert found.verdict == UNDECIDED and reason in found.reason
    claims.register(Claim("mathematics", "A", "", {"printed": (Part("a", "a > .3", "dB", .3),)}, trained=False))
    assert made_up.judge("mathematics", good, short).verdict == REPRODUCED  # its samples are no runs


@pytest.mark.parametrize("wrong, words", [
    ({}, "no list of differences"), ([1.], "type list"), (None, "NoneType"), ({"differences": 5}, "no list"), ({"differences": ["1"]}, "'1'"), ({"differences": [True]}, "True"), ({"differences": [[2., 1.]]}, "no interval"),
    ({"differences": [[1., 2., 3.]]}, "[1.0, 2.0, 3.0]"), ({"differences": [1.], "unit": "percent"}, "'percent'"), ({"differences": [1.], "pairs": []}, "name one pair"), ({"differences": [1.], "pairs": 3}, "name one pair"),
    ({"differences": [1., 2.], "pairs": [["lion", 0], ["lion", 0]]}, "stands twice"), ({"parts": {"other": [1.]}}, "has no part 'other'"), ({"parts": 5}, "type int"), ({"parts": {"above": 5}}, "no list of differences"), ({"parts": [5]}, "type list")], ids=str)
def test_evidence_that_cannot_be_used(made_up, wrong, words):
    "One sentence that says what is wrong; in a batch it is the reason of an undecided verdict, and no crash."
    with pytest.raises(claims.EvidenceError, match=".") as error: made_up.judge("one", wrong)
    assert words in str(error.value) and "\n" not in str(error.value)
    found = claims.collect([{"name": "home", "record": {"metrics": {"claims": {"one": {"printed": wrong}}}}}], "laptop")[0]
    assert found["verdict"] == (UNDECIDED if wrong is not None else NOT_RUN) and (wrong is None or words in found["reason"])


def test_wrong_names(made_up):
    with pytest.raises(ValueError, match="did you mean 'one'"): made_up.judge("ones", {"differences": []})
    with pytest.raises(ValueError, match="has no form 'corrected'; it has printed"): made_up.judge("one", {"differences": []}, form="corrected")
    with pytest.raises(ValueError, match="'parts'.*'A before B, seconds'"): made_up.judge("two", {"differences": [1.]})


@pytest.mark.parametrize("changes, words", [({"name": "one"}, "exists already"), ({"forms": {}}, "forms none"), ({"forms": {"nice": ()}}, "forms nice"), ({"forms": {"printed": ()}}, "no part"), ({"pairs": 4}, "at least 5"),
                                            ({"forms": {"printed": (Part("a", "a > 0", "dB", INF),)}}, "margin inf"), ({"forms": {"printed": (Part("a", "", "dB"),)}}, "neither inequality nor unit")], ids=str)
def test_a_claim_that_could_not_be_judged(made_up, changes, words):
    with pytest.raises(ValueError, match=words): claims.register(Claim(**{"name": "new", "statement": "s", "reference": "r", "forms": {"printed": (Part("a", "a > 0", "dB"),)}, **changes}))
    assert "new" not in claims.CLAIMS


# Conjunctions

GOOD, BAD, OPEN = [1., 1.2, .9, 1.1, .8], [-1., -1.2, -.9, -1.1, -.8], [1., -1., .5, -.5, .2]


@pytest.mark.parametrize("b, c, verdict, decides", [(GOOD, GOOD, REPRODUCED, None), (GOOD, OPEN, UNDECIDED, "C"), (BAD, GOOD, REJECTED, "B"), (OPEN, BAD, REJECTED, "C"), (GOOD, None, UNDECIDED, "C"), (BAD, None, REJECTED, "B"), (GOOD, [x / 4 for x in GOOD], REPRODUCED, None)], ids=str)
def test_conjunction(made_up, b, c, verdict, decides):
    "All parts for reproduced, any part for not reproduced; a part without evidence leaves it open. The numbers shown are those of the part that decides."
    parts = {f"A before {x}, seconds": {"differences": d} for x, d in (("B", b), ("C", c)) if d is not None}
    found = made_up.judge("two", {"parts": parts})
    assert found.verdict == verdict and len(found.parts) == 2
    if decides: assert f"A before {decides}" in found.reason and found.parts[found.decisive].name == f"A before {decides}, seconds"


def test_weakest_part_is_shown(made_up):
    "Of two parts that hold the one nearer to its margin, in half widths of its interval."
    near = [.1, .12, .11, .09, .13]
    found = made_up.judge("two", {"parts": {"A before B, seconds": GOOD, "A before C, seconds": [10 + x for x in near]}})
    assert found.verdict == REPRODUCED and found.effect == pytest.approx(1.) and "A before B" in found.reason


def test_reasons_of_an_undecided_conjunction(made_up):
    "Each reason once with its parts; the numbers are of a part that has some. Catches 'no evidence' on one part that hides what is known of the others."
    found = made_up.judge("two", {"parts": {"A before C, seconds": GOOD[:3]}})
    assert found.verdict == UNDECIDED and found.reason == "A before C, seconds: 3 pairs, 5 are needed; A before B, seconds: no evidence" and found.n == 3
    assert made_up.judge("two", {"parts": {f"A before {x}, seconds": GOOD[:3] for x in "BC"}}).reason == "2 of 2 parts: 3 pairs, 5 are needed"


def test_multiplicity():
    "The upper limit of each of k parts is taken at 2.5 %/k, the lower at 2.5 %. Catches an uncorrected rejection, and a correction where none is due."
    part, d = Part("a", "a > 0", "dB"), [-1., -2., -.6, -1.2, -.3]
    alone, fifth = claims.judge_part(part, d), claims.judge_part(part, d, parts=5)
    assert alone.verdict == REJECTED and fifth.verdict == UNDECIDED and fifth.low == alone.low and fifth.high > 0 > alone.high
    mirrored = [claims.judge_part(part, [-x for x in d], parts=k).verdict for k in (1, 5)]
    assert mirrored == [REPRODUCED, REPRODUCED]


def test_false_verdicts_of_a_conjunction():
    "Four parts, all exactly at the margin: wrongly rejected in at most 2.5 % (and 1 % for chance) of 1,500 experiments; without the correction in over 6 %."
    rng, part = np.random.default_rng(0), Part("a", "a > 0", "dB")
    rejected = np.zeros(2)
    for _ in range(1500):
        d = rng.normal(0, 1, (4, 6)).tolist()
        rejected += [any(claims.judge_part(part, v, k).verdict == REJECTED for v in d) for k in (4, 1)]
    assert rejected[0] / 1500 < .035 and rejected[1] / 1500 > .06


# Evidence from runs


def test_faster_by_hand():
    "ln(t_B / t_A), positive where A is faster; in steps and in seconds. Catches a swapped quotient or unit."
    data = rows({"A": [10, 20, 30, 40, 50], "B": [20, 30, 40, 50, 60]})
    t = {m: data[data.method == m].seconds_to_target.to_numpy() for m in "AB"}
    piece = claims.faster(data, "A", "B")
    assert piece["differences"] == pytest.approx(np.log(t["B"] / t["A"])) and piece["pairs"] == [["lion", s] for s in range(5)] and piece["short"] == ""
    assert claims.faster(data, "B", "A", "steps")["differences"] == pytest.approx(-np.log(t["B"] / t["A"]))
    with pytest.raises(ValueError, match="'hours'"): claims.faster(data, "A", "B", "hours")


def test_faster_where_runs_do_not_arrive():
    "The four cases of the table. A run ends at 100 s (10,000 steps of 10 ms). Catches NaN dropped silently, an end taken for an arrival, or two failures as a tie."
    data = rows({"A": [40, 40, None, None, 40], "B": [80, None, 80, None, 80]})
    t = data.seconds_to_target.to_numpy().reshape(2, 5)
    exact, lower, upper, nothing, _ = claims.faster(data, "A", "B")["differences"]
    assert exact == pytest.approx(math.log(t[1, 0] / t[0, 0])) and lower == [pytest.approx(math.log(100 / t[0, 1])), None] and upper == [None, pytest.approx(math.log(t[1, 2] / 100))] and nothing == [None, None]
    assert claims._ends(nothing) == (-math.inf, math.inf) and claims._ends(None) is None


def test_a_run_stopped_early_is_not_slower():
    "B was stopped at 30 s, before A arrived at 40: nothing says which is faster. Catches 'never arrived, so slower'."
    data = pd.concat([rows({"A": 40}), rows({"B": None}, steps=3_000)])
    low, high = claims.faster(data, "A", "B")["differences"][0]
    assert low == pytest.approx(math.log(30 / data.seconds_to_target.iloc[0])) and low < 0 and high is None
    assert claims.faster(data, "A", "B", "steps")["differences"][0][0] < 0


def test_a_target_that_does_not_exist_tells_nothing():
    "Where the reference diverged there is no target, so nobody failed to reach it."
    data = rows({"A": None, "B": 50}, target_psnr=math.nan)
    assert claims.faster(data, "A", "B")["differences"] == [None] * 5


def test_diverged_runs_count():
    "A diverged run never arrives (bound: its planned length) and ends at 0 dB. Catches a method that profits from its failures being left out."
    data = pd.concat([rows({"Adam": 50}), rows({"A": [40, 40, 40, 40, None]})])
    data.loc[(data.method == "A") & (data.seed == 4), ["status", "psnr", "difference", "ms_per_step"]] = ["diverged", math.nan, math.nan, math.nan]
    assert claims.faster(data, "A", "Adam")["differences"][4][0] is None and claims.faster(data, "A", "Adam", "steps")["differences"][4] == [None, pytest.approx(math.log(data.steps_to_target.iloc[4] / 10_000))]
    assert claims.ends_above(data, "A", "Adam")["differences"] == [0., 0., 0., 0., -30.] and claims.ends_above(data, "Adam", "A")["differences"][4] == 30.


def test_to_diverge_is_never_the_better_end():
    "A run that finished at -8.65 dB against one that diverged. Catches a floor under the diverged alone."
    data = pd.concat([rows({"Adam": 50}), rows({"A": [40] * 5})])
    bad = (data.method == "A") & (data.seed == 4)
    data.loc[bad, "psnr"] = -8.65
    finished = claims.ends_above(data, "A", "Adam")["differences"]
    data.loc[bad, ["status", "psnr"]] = ["diverged", math.nan]
    assert finished == claims.ends_above(data, "A", "Adam")["differences"] == [0., 0., 0., 0., -30.]


def test_ends_above_at_the_last_common_step():
    "Runs of unequal length are compared by the difference that `measure` interpolated, not by their ends."
    data = pd.concat([rows({"Adam": 50}, psnr=31.), rows({"A": 50}, steps=8_000, psnr=30., difference=.7), rows({"B": 50}, steps=9_000, psnr=30.)])
    assert claims.ends_above(data, "A", "Adam")["differences"] == [.7] * 5 and claims.ends_above(data, "Adam", "A")["differences"] == [-.7] * 5
    with pytest.raises(claims.EvidenceError, match="8,000 and 9,000 steps"): claims.ends_above(data, "A", "B")


def test_half_of_the_lead():
    "(R - M) - (R - A) / 2 by hand: R 33, M 29.5, A 28 gives 3.5 - 2.5."
    data = pd.concat([rows({"R": 1}, psnr=33.), rows({"M": 1}, psnr=29.5), rows({"Adam": 1}, psnr=28.)])
    assert claims.more_than_half(data, "R", "M")["differences"] == [1.] * 5


def test_short_runs_are_named():
    "Below the ranking length, or on a small picture; the length that counts in a race is the reference's, which sets the target."
    short = rows({"Adam": 50, "A": 40}, steps=2_560)
    assert "2,560 steps" in claims.faster(short, "A", "Adam")["short"] and "2,560" in claims.ends_above(short, "A", "Adam")["short"]
    assert "32 x 32" in claims.faster(rows({"Adam": 50, "A": 40}, image_size=32), "A", "Adam")["short"]
    stopped = pd.concat([rows({"Adam": 50}), rows({"A": 10}, steps=2_560)])
    assert claims.faster(stopped, "A", "Adam")["short"] == "" and claims.ends_above(stopped, "A", "Adam")["short"]


def test_pairs_are_matched_by_image_and_seed():
    "Catches differences taken by position: B has its rows in another order, and lacks one seed."
    data = pd.concat([rows({"A": [10, 20, 30, 40, 50]}), rows({"B": [10, 20, 30, 40, 50]}).iloc[[4, 0, 3, 1]]])
    data["seconds_to_target"] = (data.seed + 1) * 10.
    piece = claims.faster(data, "A", "B")
    assert piece["differences"] == [0.] * 4 and piece["pairs"] == [["lion", s] for s in (0, 1, 3, 4)]
    with pytest.raises(claims.EvidenceError, match="two runs of one image and seed"): claims.faster(pd.concat([data, data]), "A", "B")


def test_methods_by_label():
    "Exact label first, then the only one with options of its own, then alternatives in order; ESGD is not ESGD mended."
    data = rows({"ESGD released": 1, "ESGD released, lr 0.3": 2, "Shampoo released, lr 0.01": 3, "AdaHessian(E) released": 4})
    pick = lambda m: sorted(set(claims._pick(data, m)["method"]))
    assert pick("ESGD released") == ["ESGD released"] and pick("Shampoo released") == ["Shampoo released, lr 0.01"] and pick("ESGD") == [] and pick("Shampoo") == []
    assert pick(claims.E) == ["AdaHessian(E) released"] and pick(("none", "ESGD released")) == ["ESGD released"]
    with pytest.raises(claims.EvidenceError, match="several methods"): claims._pick(rows({"A, lr 1": 1, "A, lr 2": 1}), "A")


RIVALS = {"Adam": 60, "ESGD released": 30, "AdaHessian(E) released": 50, "AdaHessian(J) released": 45, "K-FAC released": None, "Shampoo released": None}


@pytest.mark.parametrize("changes, verdict", [({}, REPRODUCED), ({"Adam": 25}, REJECTED), ({"ESGD released": None}, REJECTED), ({"K-FAC released": 29}, REJECTED), ({"K-FAC released": [29, 40, 25, 31, 35]}, UNDECIDED), ({"Adam": 29.7}, REJECTED), ({"Shampoo released": "absent"}, UNDECIDED)], ids=str)
def test_esgd_image_from_runs(changes, verdict):
    "The registered claim on synthetic tables of runs: faster than all, than all but one, equal within the margin, one method missing."
    times = {k: v for k, v in {**RIVALS, **changes}.items() if v != "absent"}
    given = claims.from_rows("esgd-image", rows(times))["esgd-image"]["printed"]
    assert claims.judge("esgd-image", given).verdict == verdict
    assert json.loads(json.dumps(given, allow_nan=False)) == given


def test_evidence_survives_the_record(tmp_path):
    "Through `Experiment.finish`, which writes JSON without NaN, to the verdict. Catches bounds or lost pairs that the record turns into something else."
    from inr_precond import figures, report
    found = claims.from_rows(["esgd-image", "jacobi-vs-equilibrated"], rows({**RIVALS, "K-FAC released": [29, None, 40, None, 31]}))
    found["relu-pe-image"] = {"printed": claims.evidence("relu-pe-image", np.array([1., math.nan, 1.2, 1.1, .9, 1.3]), [["lion", s] for s in range(6)])}
    figures.Experiment("fig05_image_gaussian", "T", "P", "laptop", tmp_path).finish({"claims": found})
    entry = {"name": "fig05_image_gaussian", "record": report.read_record(tmp_path, "fig05_image_gaussian"), "status": "ran"}
    after = {(r["claim"], r["form"]): r for r in claims.collect([entry], "laptop")}
    assert after["relu-pe-image", "printed"]["verdict"] == REPRODUCED and after["relu-pe-image", "printed"]["n"] == 5 and after["relu-pe-image", "printed"]["parts"][0]["silent"] == 1
    for name in ("esgd-image", "jacobi-vs-equilibrated"):
        before = claims.judge(name, found[name]["printed"])
        row = after[name, "printed"]
        assert (before.verdict, before.effect) == (row["verdict"], row["effect"]) and row["reason"].removesuffix(" (the experiment esgd_start shows why)") == before.reason


# The registry

NAMES = {"conditioning", "estimators", "bound", "adam-gauss-newton", "hvp-density", "esgd-image", "esgd-image-sine", "esgd-image-wavelet", "jacobi-vs-equilibrated", "relu-pe-image", "lbfgs-stochastic", "fair-tuning", "hidden-schedule", "esgd-start", "esgd-start-others", "relu-pe-warm", "hidden-schedule-warm"}


def test_registry():
    "The names of the interface; every corrected form differs from the printed one; every claim that needs runs names the experiment that makes them."
    assert set(claims.CLAIMS) >= NAMES
    for known in claims.CLAIMS.values():
        assert set(known.forms) in ({"printed"}, {"printed", "corrected"}, {"ours"})
        if len(known.forms) == 2: assert known.says("printed") != known.says("corrected") and known.forms["printed"] != known.forms["corrected"]
        assert known.reference and known.statement and bool(known.home) == known.trained and (known.trained or known.name in claims.OWN)
    assert all(part.margin == math.log(1.05) for known in claims.CLAIMS.values() for parts in known.forms.values() for part in parts if part.unit.startswith("ln ratio of"))


@pytest.mark.parametrize("name", ["estimators", "bound", "adam-gauss-newton"])
def test_mathematical_claims(name):
    "The printed form is rejected and the corrected one reproduced, each part of it, from ten samples."
    for form, given in claims.own_evidence(name).items():
        found = claims.judge(name, given, form=form)
        assert found.verdict == (REJECTED if form == "printed" else REPRODUCED) and found.n == 10
        if form == "printed": assert all(p.verdict == REJECTED for p in found.parts)


def test_a_wrong_formula_is_rejected(monkeypatch):
    "The samples notice it where the corrected formula itself is changed: the equilibrated bound with a wrong exponent."
    made = claims.bound_samples()
    made["corrected"]["the factor"] = [x - 1e-3 for x in made["corrected"]["the factor"]]
    assert claims.judge("bound", claims.evidence("bound", form="corrected", parts=made["corrected"]), form="corrected").verdict == REJECTED


# A batch


def entry(name, blocks, **more): return {"name": name, "status": "ran", "provenance": {"git_commit": name}, "record": {"metrics": {"claims": blocks}, "data": [{"name": "lion", "sha256": "00", "source": "x"}], "runs": [], **more}}


def test_collect_every_verdict(made_up):
    "Each form of each claim has one row with all that a machine needs."
    made_up.register(Claim("three", "s", "r", {"ours": (Part("a", "a > 0", "dB"),)}, "elsewhere"))
    made_up.register(Claim("four", "s", "r", {"printed": (Part("a", "a > 0", "dB"),)}, "home"))
    parts = lambda d: {"parts": {f"A before {x}, seconds": d for x in "BC"}}
    found = claims.collect([entry("home", {"one": {"printed": {"differences": GOOD}}, "two": {"printed": parts(BAD), "corrected": parts(OPEN)}}), {"name": "elsewhere", "status": "failed", "record": None}], "laptop")
    assert [(r["claim"], r["form"], r["verdict"]) for r in found] == [("one", "printed", REPRODUCED), ("two", "printed", REJECTED), ("two", "corrected", UNDECIDED), ("three", "ours", NOT_RUN), ("four", "printed", NOT_RUN)]
    assert "failed" in found[3]["reason"] and "carries no evidence" in found[4]["reason"]
    one = found[0]
    assert (one["effect"], one["n"], one["margin"], one["unit"], one["scale"], one["experiment"], one["signals"], one["data"], one["provenance"]) == (1., 5, .3, "dB", "laptop", "home", ["lion"], [{"name": "lion", "sha256": "00"}], {"git_commit": "home"})
    assert one["low"] < 1 < one["high"] and one["coverage"] == .95 and found[1]["coverage"] == pytest.approx(.9625)
    json.dumps(found, allow_nan=False)


def test_smoke_decides_no_claim_on_runs(made_up):
    "Even five clear pairs."
    assert [r["verdict"] for r in claims.collect([entry("home", {"one": {"printed": {"differences": GOOD}}})], "smoke")] == [UNDECIDED, NOT_RUN, NOT_RUN]


def test_which_evidence_counts(made_up):
    "The home's, though another has more pairs and another outcome; without it the one with most pairs; the others are named. Catches pooling and picking by outcome."
    small, large = entry("home", {"one": {"printed": {"differences": BAD}}}), entry("a_large", {"one": {"printed": {"differences": GOOD * 2}}})
    other = entry("b_other", {"one": {"printed": {"differences": GOOD}}})
    first = claims.collect([other, large, small], "laptop")[0]
    assert (first["experiment"], first["also"], first["verdict"], first["n"]) == ("home", ["a_large", "b_other"], REJECTED, 5)
    second = claims.collect([other, large], "laptop")[0]
    assert (second["experiment"], second["also"], second["verdict"], second["n"]) == ("a_large", ["b_other"], REPRODUCED, 10)


def test_own_samples_give_way_to_an_experiment():
    "A mathematical claim is decided by its own samples unless an experiment carries evidence."
    own = {r["claim"]: r for r in claims.collect([], "laptop") if r["form"] == "printed"}
    assert own["bound"]["experiment"] == claims.CHAPTER and own["bound"]["verdict"] == REJECTED and own["esgd-image"]["verdict"] == NOT_RUN
    given = claims.evidence("adam-gauss-newton", [0., 0., 0., 0., 0.])
    assert next(r for r in claims.collect([entry("x", {"adam-gauss-newton": {"printed": given}})], "quick") if r["claim"] == "adam-gauss-newton")["experiment"] == "x"
    few = claims.evidence("adam-gauss-newton", [0., 0., 0., 0.])  # too few to decide: they do not displace ten that do
    assert next(r for r in claims.collect([entry("x", {"adam-gauss-newton": {"printed": few}})], "quick") if r["claim"] == "adam-gauss-newton")["experiment"] == claims.CHAPTER


@pytest.mark.parametrize("block", [None, 5, [], "x", {"one": 5}, {"one": {"printed": 5}}, {"one": {"printed": {"parts": {"above": {"differences": 5, "pairs": 5}}}}}, {"one": {"printed": {"differences": [1], "pairs": 7}}}, {"one": {"printed": {"differences": None}}}, {"one": {"corrected": {"differences": GOOD}}}, {"one": {"differences": GOOD}}], ids=str)
def test_odd_blocks_do_not_stop_a_batch(made_up, block):
    "Whatever an experiment puts there, the other verdicts are made. A claim of one form takes its evidence under any name."
    found = claims.collect([entry("home", block), {"name": "other", "record": None}], "laptop")
    assert len(found) == 3 and found[0]["verdict"] in (UNDECIDED, NOT_RUN, REPRODUCED)
    if isinstance(block, dict) and GOOD in (block["one"].get("differences") if isinstance(block["one"], dict) else None, (block["one"].get("corrected") or {}).get("differences") if isinstance(block["one"], dict) else None): assert found[0]["verdict"] == REPRODUCED
    claims.table_text(found); claims.unregistered([entry("home", block)])


def test_recorded_evidence_has_its_own_verdict(made_up):
    "Judged beside the batch's and not pooled with it, also at smoke, whose own runs rank nothing. Catches recorded pairs that decide for the batch."
    four = {"one": {"printed": {"differences": GOOD[:4]}}}
    found = claims.collect([{**entry("home", four), "record": {"metrics": {"claims": four, "recorded_claims": {"one": {"printed": {"differences": BAD}}, "new": {}}}}}], "smoke")
    assert [(r["claim"], r["basis"], r["verdict"], r["n"], r["scale"]) for r in found][:2] == [("one", "runs of this batch", UNDECIDED, 4, "smoke"), ("one", "recorded runs", REJECTED, 5, "recorded")]
    assert len(found) == 4 and claims.unregistered([{"record": {"metrics": {"recorded_claims": {"new": {}}}}}]) == ["new"]
    assert "printed, recorded runs  not reproduced" in claims.table_text(found)


def test_what_records_leave_undecided_is_not_so_at_this_scale(made_up):
    "Catches `undecided at this scale` beside a verdict on runs of another scale, and the batch's own without it."
    both = {"metrics": {"claims": {"one": {"printed": {"differences": OPEN}}}, "recorded_claims": {"one": {"printed": {"differences": OPEN}}}}}
    batch, kept = claims.collect([{**entry("home", {}), "record": both}], "quick")[:2]
    assert (claims.verdict_words(batch), claims.verdict_words(kept), claims.verdict_words(kept, NOT_RUN)) == (UNDECIDED, "undecided", NOT_RUN)
    lines = claims.table_text([batch, kept], 200).splitlines()
    assert f"printed                 {UNDECIDED}" in lines[1] and "printed, recorded runs  undecided    " in lines[2] and claims.verdict_words({**kept, "basis": claims.SAMPLES}) == "undecided"


@pytest.mark.parametrize("effect, low, high, unit, words", [
    (0., 0., -0., "fraction", "0 [0, 0] fraction"),  # was +0 [+0, -0]
    (.0004, .0002, .0006, "ln ratio of steps", "factor 1.0004 [1.0002, 1.0006] in steps"),  # was factor 1 [1, 1]
    (1., .99999, 1.00001, "dB", "+1 [+0.99999, +1.00001] dB"), (-1e-13, -2.04e-13, -2.01e-13, "dB", "-1.00e-13 [-2.04e-13, -2.01e-13] dB"),
    (1., 1., 1., "dB", "+1 [+1, +1] dB"), (.5, .25, .75, "dB", "+0.5 [+0.25, +0.75] dB"), (0., None, 0., "ln ratio of steps", "factor 1 [?, 1] in steps")], ids=str)
def test_an_interval_looks_like_a_point_only_where_it_is_one(effect, low, high, unit, words):
    "Catches a zero with a sign, and rounding that hides the width of an interval."
    assert claims.effect_text({"effect": effect, "low": low, "high": high, "unit": unit, "n": 5}) == f"{words}, 5 pairs"


def test_an_end_without_a_limit_is_explained(made_up):
    "Catches a `?` in the table that no line of it explains, and the explanation where there is no `?`."
    explained = lambda differences: "A ? in an interval" in " ".join(claims.table_text(claims.collect([entry("home", {"one": {"printed": {"differences": differences}}})], "laptop"), 100).split())
    assert explained([1., 1.2, .9, 1.1, [.8, None]]) and not explained(GOOD)


def test_relu_pe_from_runs():
    "Its Adam has another rate, and its ESGD an option of its own: the labels of that experiment are found."
    data = pd.concat([rows({"Adam 1e-3": 1}, psnr=31.), rows({"ESGD released, lr 0.1": 1}, psnr=30.), rows({"ESGD mended, lr 0.1": 1}, psnr=32.)])
    given = claims.from_rows("relu-pe-image", data, "Adam 1e-3")["relu-pe-image"]
    assert [claims.judge("relu-pe-image", given[form], form=form).verdict for form in ("printed", "corrected")] == [REPRODUCED, REJECTED]


def test_an_undecided_claim_names_its_study(made_up, monkeypatch):
    "Only where long runs left it undecided: a quick run is undecided because it is one, and a verdict needs no excuse."
    known = claims.CLAIMS["one"]
    monkeypatch.setitem(claims.CLAIMS, "one", claims.replace(known, study="why_so"))
    said = lambda differences, scale: claims.collect([entry("home", {"one": {"printed": {"differences": differences}}})], scale)[0]["reason"]
    assert "(the experiment why_so shows why)" in said(GOOD[:4], "laptop")
    for differences, scale in ((GOOD[:4], "quick"), (GOOD[:4], "smoke"), (GOOD, "laptop"), (BAD, "laptop")): assert "why_so" not in said(differences, scale)


def test_recorded_runs_are_counted(made_up):
    "From the record's own count, or from its runs."
    blocks = {"one": {"printed": {"differences": GOOD}}}
    count = lambda **more: claims.collect([entry("home", blocks, **more)], "laptop")[0]["recorded"]
    assert count(recorded=3) == 3 and count(runs=[{"key": "a", "recorded": True}, {"key": "b", "recorded": False}]) == 1 and count() == 0


def test_table(made_up):
    "A factor for times, a number with sign else; open ends as '?'; claims that were not run on one line; nothing wider than asked."
    parts = {"parts": {"A before B, seconds": {"differences": [math.log(2)] * 5}, "A before C, seconds": {"differences": [[math.log(3), None]] * 5}}}
    made_up.register(Claim("three", "s", "r", {"ours": (Part("a", "a > 0", "dB"),)}, "elsewhere"))
    text = claims.table_text(claims.collect([entry("home", {"one": {"printed": {"differences": GOOD}}, "two": {"printed": parts}})], "laptop"), 100)
    assert "+1 [+0.804, +1.2] dB, 5 pairs" in " ".join(text.split()) and "factor 2 [2, 2] in seconds, 5 pairs" in " ".join(text.split()) and "not run: three" in text
    assert all(len(line) <= 100 for line in text.splitlines()) and text.startswith("Claims\n")
    assert claims.effect_text(claims.collect([entry("home", {"two": {"printed": {"parts": {"A before C, seconds": parts["parts"]["A before C, seconds"]}}}})], "laptop")[1]["parts"][1]) == "at least factor 3 [3, ?] in seconds, 5 pairs"


# Two kinds of limits


@pytest.mark.parametrize("sign", [1, -1])
def test_median_and_mean_that_contradict_each_other_decide_nothing(made_up, sign):
    "Fifteen clear pairs and five lost ones: by order statistics above the margin, by Student's t below. Catches the verdict that is looked for first."
    differences = [sign * (1 + .01 * i) for i in range(15)] + [[None, -50.] if sign > 0 else [50., None]] * 5
    found = made_up.judge("one", {"differences": differences})
    assert found.high < .3 < found.low and found.verdict == UNDECIDED and "disagree" in found.reason


def test_the_effect_is_what_the_interval_is_of(made_up):
    "Eleven pairs above the margin and a lost one. Catches a mean of -3 dB beside an interval of the median, and a median where Student's t limits the mean."
    found = made_up.judge("one", {"differences": [1 + .01 * i for i in range(11)] + [[None, -5.]]})
    assert found.verdict == REPRODUCED and found.low <= found.effect <= found.high and found.effect == pytest.approx(1.045)
    assert made_up.judge("one", {"differences": [1., 1., 1., 1., 6.]}).effect == 2
    assert made_up.judge("one", {"differences": [[None, -d] for d in (1., 1., 1., 1., 6.)]}).effect == -2


def test_a_target_that_is_met_at_the_start_was_met_within_a_step():
    "A method whose first picture reaches the target. Catches the logarithm of zero."
    found = claims.faster(rows({"A": 0., "B": 20., "Adam": 40.}), "A", "B")
    assert np.allclose(found["differences"], [math.log(20 * (1 + .01 * ((seed * 7 + 1) % 5)) / .01) for seed in range(5)])


def test_half_of_a_lead_over_a_short_run_ranks_nothing():
    "Released and mended trained in full, Adam for 100 steps. Catches the length of one comparison alone."
    table = rows({"ESGD released": 1., "ESGD mended": 2., "Adam": 3.})
    assert claims.more_than_half(table, "ESGD released", "ESGD mended")["short"] == ""
    table.loc[table["method"] == "Adam", "steps"] = 100
    assert "100 steps" in claims.more_than_half(table, "ESGD released", "ESGD mended")["short"]


def test_a_diverged_run_of_another_length_counts_as_0_dB():
    "Catches a failure that is left out because it was planned for fewer steps than Adam's run: its difference at their last common step does not exist."
    table = rows({"ESGD mended": 1., "Adam": 3.})
    table.loc[table["method"] == "ESGD mended", ["steps", "status", "psnr", "difference"]] = [5_000, "diverged", math.nan, math.nan]
    assert claims.ends_above(table, "ESGD mended", "Adam")["differences"] == [-30.] * 5


def test_a_run_that_diverged_before_its_speed_was_known_bounds_nothing():
    "Catches an invented speed: a second a step would put its end hours after the other's arrival."
    table = rows({"A": 100., "B": None, "Adam": 200.})
    table.loc[table["method"] == "B", ["status", "ms_per_step"]] = ["diverged", math.nan]
    for low, high in claims.faster(table, "A", "B")["differences"]: assert low < -10 and high is None


def test_knowing_less_decides_no_more(made_up):
    "A claim is about the mean. Catches a verdict above the margin where the one lost pair alone puts the mean below it, whatever its unknown end is."
    known, unknown = [.5] * 15 + [-20.] * 3, [.5] * 15 + [[None, -20.]] * 3
    assert made_up.judge("one", {"differences": known}).verdict != REPRODUCED and made_up.judge("one", {"differences": unknown}).verdict == UNDECIDED
    assert made_up.judge("one", {"differences": [-d for d in known[:15]] + [[20., None]] * 3}).verdict == UNDECIDED


@pytest.mark.parametrize("n", [5, 13, 15, 19, 20, 21, 29])
def test_at_the_margin_rounding_does_not_decide(made_up, n):
    "The standard deviation of equal numbers is 1e-17 and not 0 for some n."
    assert made_up.judge("one", {"differences": [.3] * n}).verdict == UNDECIDED
    assert made_up.judge("one", {"differences": [.3 + 1e-9] * n}).verdict == REPRODUCED and made_up.judge("one", {"differences": [.3 - 1e-9] * n}).verdict == REJECTED


@pytest.mark.parametrize("pairs", [[["a", 1], ["a", 1.0]], [["a", 1], ["a", "1"]], [["a", 1], ["a", True]], [["a", 1], ["a.png", 1]], [["a", 1], ["x/y/a.png", 1]], [["a", 1], ["a", 1, None]]])
def test_a_pair_under_two_names_is_one_pair(made_up, pairs):
    with pytest.raises(claims.EvidenceError, match="stands twice"):
        made_up.judge("one", {"differences": [.5] * 5, "pairs": pairs + [["b", k] for k in range(3)]})
    made_up.judge("one", {"differences": [.5] * 5, "pairs": [["ESGD, lr 0.15", 0], ["ESGD, lr 0.25", 0], ["a", 0], ["a", 1], ["b", 0]]})


def test_a_part_given_twice_is_refused(made_up):
    "Catches a verdict that hangs on which of two contradicting parts comes last."
    with pytest.raises(claims.EvidenceError, match="'A before B.*' stands twice"):
        made_up.judge("two", {"parts": [{"name": "A before B, seconds", "differences": [1.] * 5}, {"name": "A before B, seconds", "differences": [-1.] * 5}]})


def test_evidence_that_tells_nothing_displaces_none(made_up):
    "Ten pairs of which none is known, beside six known ones in another experiment."
    known, empty = {"one": {"printed": {"differences": [1.] * 6}}}, {"one": {"printed": {"differences": [None] * 10}}}
    rows = {r["claim"]: r for r in claims.collect([entry("b_none", empty), entry("a_good", known)], "laptop")}
    assert rows["one"]["experiment"] == "a_good" and rows["one"]["verdict"] == REPRODUCED and claims._count(empty["one"]["printed"]) == 0 == claims._count({"differences": [[None, None]]})


def test_two_runs_that_diverged_tell_nothing():
    "Catches differences of 0 dB with no spread, from which a method that never trained was called no worse than another that never did."
    data = rows({"A": 10., "B": 20.})
    data.loc[data.seed < 4, ["status", "psnr", "difference"]] = ["diverged", math.nan, math.nan]
    found = claims.ends_above(data, "A", "B", "B")["differences"]
    assert found[:4] == [[None, None]] * 4 and isinstance(found[4], float)
    data["status"] = "diverged"
    lost = claims.from_rows(["relu-pe-image"], data.replace({"method": {"A": "Adam 1e-3", "B": "ESGD released"}}), "Adam 1e-3")
    assert claims.judge("relu-pe-image", lost["relu-pe-image"]["printed"], form="printed").verdict == UNDECIDED
    three = claims.more_than_half(pd.concat([data, data[data.method == "A"].assign(method="C")]), "A", "C", "B")
    assert three["differences"] == [[None, None]] * 5
