"Each registered claim on tables in which its sentence is true, false and open: what a margin of the wrong sign, or methods exchanged in the registry, would change."
import numpy as np
import pandas as pd
import pytest
from test_claims import rows

from inr_precond import claims
from inr_precond.claims import REJECTED, REPRODUCED, UNDECIDED

WARM, SPLIT = claims.WARM_RELEASED, np.array([-1., 1., -1., 1., -1.])


def table(runs):
    "Runs by method: (PSNR, steps to the target, ms per step), each a number or one a seed."
    data = rows({m: 1. for m in runs})
    for m, (values, steps, ms) in runs.items():
        mine = data.method == m
        data.loc[mine, "psnr"] = np.broadcast_to(values, 5).astype(float)
        data.loc[mine, "steps_to_target"] = np.broadcast_to(steps, 5).astype(float) * (1 + .01 * np.arange(5))
        data.loc[mine, "ms_per_step"], data.loc[mine, "seconds_to_target"] = ms, data.loc[mine, "steps_to_target"] * ms / 1000
    data["difference"] = data.psnr - data.seed.map(data[data.method == "Adam"].set_index("seed").psnr) if "Adam" in runs else 0.
    return data


def race(esgd=2000., j=1000., e=1500., j_ms=30., lead=2., how="released"):
    return table(runs={"Adam": (30., 5000., 10.), f"ESGD {how}": (30. + lead, esgd, 11.), "AdaHessian(J) released": (30., j, j_ms), "AdaHessian(E) released": (30., e, 30.), "K-FAC released": (30., 9000., 12.), "Shampoo released": (30., 9000., 12.)})


def psnr(**values): return table(runs={k.replace("_", " "): (v, 100., 10.) for k, v in values.items()})


CASES = [
    *[("jacobi-vs-equilibrated", "printed", race(**c), v) for c, v in (({}, REPRODUCED), ({"j": 1900.}, REJECTED), ({"j_ms": 15.}, REJECTED), ({"esgd": 900.}, REJECTED), ({"j": 1500. + 400. * SPLIT}, UNDECIDED))],
    *[(name, "printed", race(**c), v) for name in ("esgd-image", "esgd-image-sine", "esgd-image-wavelet") for c, v in (({}, REPRODUCED), ({"esgd": 6000.}, REJECTED), ({"esgd": 3500. + 2500. * SPLIT}, UNDECIDED))],
    *[("relu-pe-image", form, psnr(**{"Adam_1e-3": 31., f"ESGD_{how}": x}), v) for form, how in (("printed", "released"), ("corrected", "mended")) for x, v in ((30., REPRODUCED), (32., REJECTED), (31. + SPLIT, UNDECIDED))],
    *[("hidden-schedule", "ours", psnr(ESGD_released=r, ESGD_mended=m, Adam=28.), v) for r, m, v in ((33., 29.5, REPRODUCED), (33., 32., REJECTED), (27., 20., REJECTED), (33., 30.5 + SPLIT, UNDECIDED))],
    *[("hidden-schedule-warm", "ours", table(runs={WARM: (r, 1., 1.), claims.WARM_MENDED: (m, 1., 1.), "Adam": (28., 1., 1.)}), v) for r, m, v in ((33., 29.5, REPRODUCED), (33., 32., REJECTED), (33., 30.5 + SPLIT, UNDECIDED))],
    *[("relu-pe-warm", "ours", table(runs={WARM: (x, 1., 1.), "Adam 1e-3": (31., 1., 1.)}), v) for x, v in ((30., REPRODUCED), (32., REJECTED), (31. + SPLIT, UNDECIDED))],
    *[("esgd-start", "ours", table(runs={WARM: (x, s, 10.), "Adam": (30., 5000., 10.)}), v) for x, s, v in ((32., 2000., REPRODUCED), (29., 6000., REJECTED), (30.3 + SPLIT, 2000., UNDECIDED))],
]


@pytest.mark.parametrize("name, form, data, verdict", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_registered_races_from_runs(name, form, data, verdict):
    "A claim whose methods are turned, or whose part cannot become true: each registered comparison on tables in which its sentence is true, false and open."
    if name == "esgd-image-sine": data = pd.concat([data, data[data.method == "Adam"].assign(method="Adam 5e-5")])
    assert claims.judge(name, claims.from_rows(name, data, "Adam 1e-3" if "relu" in name else "Adam")[name][form], form=form).verdict == verdict


def density(name, form, gaussian, sine, relu, pe):
    parts = claims.claim(name).forms[form]; sign = 1 if form == "printed" else -1
    return {"parts": {p.name: {"differences": d} for p, d in zip(parts, ([-gaussian] * 5, [-sine] * 5, [sign * x for x in relu], [sign * x for x in pe]))}}


NONE, SOME, OPEN = [0.] * 5, [.1, .12, .11, .1, .13], [0., .004, 0., .003, 0.]


@pytest.mark.parametrize("form, given, verdict", [
    ("printed", (0., 0., SOME, SOME), REPRODUCED), ("printed", (0., 0., NONE, NONE), REJECTED), ("printed", (.3, 0., SOME, SOME), REJECTED), ("printed", (0., 0., OPEN, SOME), UNDECIDED),
    ("corrected", (0., 0., NONE, NONE), REPRODUCED), ("corrected", (0., 0., SOME, NONE), REJECTED), ("corrected", (0., .3, NONE, NONE), REJECTED), ("corrected", (0., 0., OPEN, NONE), UNDECIDED)], ids=str)
def test_density_claim_from_fractions(form, given, verdict):
    "A margin that a fraction between 0 and 1 cannot pass."
    assert claims.judge("hvp-density", density("hvp-density", form, *given), form=form).verdict == verdict


@pytest.mark.parametrize("name", ["conditioning", "lbfgs-stochastic", "fair-tuning"])
def test_three_verdicts_of_claims_that_notebooks_measure(name):
    "A margin of the wrong sign: each part alone at zero, clear of either sign and scattered, the others clear."
    for form, parts in claims.claim(name).forms.items():
        for one in parts:
            for d, verdict in (([1., 1.2, .9, 1.1, .8], REPRODUCED), ([-1., -1.2, -.9, -1.1, -.8], REJECTED), ([0.] * 5, REJECTED), ([1., -1., .5, -.5, .2], UNDECIDED)):
                assert claims.judge(name, {"parts": {p.name: {"differences": d if p is one else [1., 1.2, .9, 1.1, .8]} for p in parts}}, form=form).verdict == verdict, one.name


def test_every_claim_is_met_by_a_test_of_three_verdicts():
    "A claim that is registered without such a test."
    assert {c[0] for c in CASES} | {"hvp-density", "conditioning", "lbfgs-stochastic", "fair-tuning"} | set(claims.OWN) | {"esgd-start-others", "adam-beats-sgd", "esgd-occupancy", "adam-beats-sgd-nerf", "esgd-nerf", "relu-pe-nerf"} >= set(claims.CLAIMS)  # two in test_occupancy, three in test_radiance
