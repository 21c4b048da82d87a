"Preconditioning: each printed statement of Section 3.1-3.2 against its corrected form, condition numbers against numpy in float64, variances against exact expectations, bad input."
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inr_precond.conditioning import (
    KINDS,
    condition_number,
    damp,
    effective_rank,
    equilibration_factor,
    gej_bound,
    precondition,
    preconditioner,
    probe_variance,
    spectrum,
)
from inr_precond.curvature import Problem, equilibration, hessian, hutchinson_diagonal
from inr_precond.inr import INR, Gaussian, Sine
from inr_precond.optim import ESGD, AdaHessian

torch.set_num_threads(1)
seeded = lambda seed=0: torch.Generator().manual_seed(seed)
DOUBLE = torch.float64


def normal(*shape, seed=0): return torch.randn(*shape, generator=seeded(seed), dtype=DOUBLE)


def symmetric(n, seed=0):
    A = normal(n, n, seed=seed)
    return A + A.T


def with_spectrum(values, seed=0):
    "A symmetric matrix with these eigenvalues in a random basis, and the basis."
    values = torch.as_tensor(values, dtype=DOUBLE)
    Q = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    M = (Q * values) @ Q.T
    return (M + M.T) / 2, Q


def quartic(seed=0, n=6):
    "A smooth non-quadratic function of n variables, a point and a positive diagonal."
    A, x = symmetric(n, seed), normal(n, seed=seed + 1)
    return lambda z: .5 * z @ A @ z + (z**4).sum() / 12 + torch.sin(z).sum(), x, torch.rand(n, generator=seeded(seed + 2), dtype=DOUBLE) * 4 + .2


# ---- (1)-(5) and Algorithm 1

def test_the_function_in_new_variables():
    "(1): f~(x~) = f(x). Printed f(x~) = f(x), which is another number."
    f, x, D = quartic()
    f_tilde = lambda z: f(z / D.sqrt())
    torch.testing.assert_close(f_tilde(D.sqrt() * x), f(x))
    assert abs(f(D.sqrt() * x) - f(x)) > .1


@pytest.mark.parametrize("seed", range(3))
def test_the_step_has_the_full_inverse(seed):
    "(5), Alg. 1: descent on f~ mapped back is a step with D^-1; the printed D^-1/2 misses it. Catches a root where none belongs."
    f, x, D = quartic(seed)
    g = torch.func.grad(f)(x)
    f_tilde = lambda z: f(z / D.sqrt())
    back = (D.sqrt() * x - .05 * torch.func.grad(f_tilde)(D.sqrt() * x)) / D.sqrt()
    torch.testing.assert_close(back, x - .05 * g / D, rtol=1e-13, atol=1e-14)
    assert (back - (x - .05 * g / D.sqrt())).norm() > 1e-2


def test_the_gradient_and_the_hessian_in_new_variables():
    "(2), (3): both hold as printed; precondition is (3). Catches D^-1 H D^-1 and a root on one side only."
    f, x, D = quartic(4)
    f_tilde = lambda z: f(z / D.sqrt())
    torch.testing.assert_close(torch.func.grad(f_tilde)(D.sqrt() * x), torch.func.grad(f)(x) / D.sqrt())
    torch.testing.assert_close(precondition(torch.func.hessian(f)(x), D), torch.func.hessian(f_tilde)(D.sqrt() * x))


def test_the_hessian_in_new_variables_of_a_full_matrix():
    "(3) with a matrix D whose symmetric root is taken: against the Hessian of f~ by autograd, and D^-1 H against a solve."
    f, x, _ = quartic(5)
    D = symmetric(6, 9); D = D @ D + .3 * torch.eye(6, dtype=DOUBLE)
    d, Q = np.linalg.eigh(D.numpy())
    inverse_root = torch.as_tensor(Q @ np.diag(d**-.5) @ Q.T)
    H = torch.func.hessian(f)(x)
    torch.testing.assert_close(precondition(H, D), torch.func.hessian(lambda z: f(inverse_root @ z))(torch.linalg.solve(inverse_root, x)))
    torch.testing.assert_close(precondition(H, D, "left"), torch.linalg.solve(D, H))


def test_the_one_sided_matrix():
    "D^-1 H: rows are divided, not columns; same eigenvalues as (3), other singular values. Catches H D^-1."
    H, D = symmetric(5, 1) , torch.tensor([1., 2., 4., 8., 16.], dtype=DOUBLE)
    left = precondition(H, D, "left")
    torch.testing.assert_close(left, torch.linalg.inv(D.diag()) @ H)
    torch.testing.assert_close(torch.linalg.eigvals(left).real.sort()[0], torch.linalg.eigvalsh(precondition(H, D)))
    assert abs(condition_number(left) / condition_number(precondition(H, D)) - 1) > .01


def test_newton_in_one_step():
    "On a quadratic with an indefinite H the step with the exact D and rate 1 lands on the stationary point where H > 0 and doubles the distance where H < 0."
    H, Q = with_spectrum([5., .1, -2.])
    x = normal(3, seed=3)
    new = Q.T @ (x - torch.linalg.solve(preconditioner(H, "exact"), H @ x))
    torch.testing.assert_close(new, (Q.T @ x) * torch.tensor([0., 0., 2.], dtype=DOUBLE), atol=1e-12, rtol=1e-10)


# ---- D

def test_the_four_preconditioners():
    "Closed forms on a matrix with a negative and a small diagonal entry; Jacobi without its absolute value, row sums for row norms and a forgotten root would show."
    H = torch.tensor([[-3., 4.], [4., .5]])
    for kind, expected in (("identity", [1., 1.]), ("jacobi", [3., .5]), ("equilibration", [5., math.sqrt(16.25)])):
        torch.testing.assert_close(preconditioner(H, kind), torch.tensor(expected, dtype=DOUBLE))
    exact = preconditioner(H, "exact")
    torch.testing.assert_close(exact @ exact, H.double() @ H.double())                         # |H|^2 = H^2
    assert torch.linalg.eigvalsh(exact).min() > 0


def test_damping_is_relative_to_the_largest_singular_value():
    "D + damping * sigma_max, sigma_max the absolute largest eigenvalue (here a negative one); the identity stays. Catches the largest entry, the largest D, the largest signed eigenvalue."
    H, _ = with_spectrum([-10., 3., 1e-3, 0.])
    for kind in ("jacobi", "equilibration"): torch.testing.assert_close(preconditioner(H, kind, .01), preconditioner(H, kind) + .1)
    torch.testing.assert_close(preconditioner(H, "exact", .01), preconditioner(H, "exact") + .1 * torch.eye(4, dtype=DOUBLE), atol=1e-12, rtol=0)
    assert (preconditioner(H, "identity", .01) == 1).all()


def test_row_norms_do_not_underflow():
    "Rows of 1e-200, whose squares are zero in float64, keep their norms: a dead-looking parameter is not divided by zero."
    H = torch.diag(torch.tensor([1., 3e-200], dtype=DOUBLE))
    torch.testing.assert_close(preconditioner(H, "equilibration"), torch.tensor([1., 3e-200], dtype=DOUBLE), rtol=1e-12, atol=0)
    torch.testing.assert_close(precondition(H, preconditioner(H, "equilibration")), torch.eye(2, dtype=DOUBLE))


def test_a_decomposition_that_gives_up(monkeypatch):
    "LAPACK's iterations can fail on Hessians whose entries span a hundred powers of ten; entries far below rounding error are then set to zero, and the result is the same to rounding."
    H = symmetric(6, 7); H[4], H[:, 4] = 0., 0.; H[4, 4] = 2e-150; H[4, 0] = H[0, 4] = 1e-90
    calls = {"damp": lambda: damp(H, .1), "exact": lambda: preconditioner(H, "exact", .1), "jacobi": lambda: preconditioner(H, "jacobi", .1), "spectrum": lambda: spectrum(H),
             "kappa": lambda: torch.tensor(condition_number(H, .1)), "rank": lambda: torch.tensor(effective_rank(H)), "scaled": lambda: precondition(H, torch.eye(6, dtype=DOUBLE) + damp(H @ H) * 1.)}
    before, refused = {name: call() for name, call in calls.items()}, []
    def refusing(real):
        def lapack(M):
            if ((M != 0) & (M.abs() < 1e-60)).any(): refused.append(1); raise torch.linalg.LinAlgError("failed to converge")
            return real(M)
        return lapack
    for name in ("eigh", "eigvalsh", "svdvals"): monkeypatch.setattr(torch.linalg, name, refusing(getattr(torch.linalg, name)))
    for name, call in calls.items(): torch.testing.assert_close(call(), before[name], rtol=1e-9, atol=1e-12, msg=name)
    assert len(refused) >= 6


@pytest.mark.parametrize("definite", [True, False])
def test_jacobi_scaling_has_no_units(definite):
    "S H S has the Jacobi-scaled matrix of H, whatever the diagonal S; the equilibrated one changes. Catches a scaling on one side."
    H = symmetric(7, 2); H = H @ H if definite else H
    S = torch.logspace(-2, 2, 7, dtype=DOUBLE)
    other = S[:, None] * H * S
    torch.testing.assert_close(precondition(other, preconditioner(other, "jacobi")), precondition(H, preconditioner(H, "jacobi")))
    assert abs(condition_number(precondition(other, preconditioner(other, "equilibration"))) / condition_number(precondition(H, preconditioner(H, "equilibration"))) - 1) > .01


# ---- (6)-(9)

def expectation(function, n, distribution):
    "The exact expectation over independent Rademacher probes (all signs), or Gaussian ones (Gauss-Hermite, 5 points: exact for polynomials of degree 9 in each v_j)."
    if distribution == "rademacher": points, weights = np.array([-1., 1.]), np.array([.5, .5])
    else: points, weights = np.polynomial.hermite_e.hermegauss(5); weights = weights / weights.sum()
    total = 0.
    for index in itertools.product(range(len(points)), repeat=n):
        total = total + float(np.prod(weights[list(index)])) * function(torch.as_tensor(points[list(index)]))
    return total


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_estimators_and_variances_are_exact(distribution):
    "Mean and variance of v * Hv and of (Hv)^2 over all probes of a 4 x 4 matrix, to rounding: (9), (6) corrected, and the closed forms. The printed (6), without the square, is off by the norm."
    H, n = symmetric(4, 6) * 3, 4
    row = H.norm(dim=1)
    mean_j, mean_e = (expectation(f, n, distribution) for f in (lambda v: v * (H @ v), lambda v: (H @ v) ** 2))
    torch.testing.assert_close(mean_j, H.diagonal()); torch.testing.assert_close(mean_e, row**2)
    assert ((mean_e / row) / row - 1).abs().max() < 1e-12 and (mean_e / row - 1).abs().min() > .5      # printed: ratio to norm, which carries the units of H
    second = [expectation(f, n, distribution) for f in (lambda v: (v * (H @ v)) ** 2, lambda v: (H @ v) ** 4)]
    torch.testing.assert_close(probe_variance(H, "jacobi", distribution), second[0] - mean_j**2)
    torch.testing.assert_close(probe_variance(H, "equilibration", distribution), second[1] - mean_e**2)


def test_rademacher_probes_are_exact_on_a_diagonal_and_never_worse():
    "Both variances vanish on a diagonal matrix with Rademacher probes, and are at most the Gaussian ones elsewhere. Catches the two distributions swapped."
    D = torch.tensor([1., -2., 5.]).diag()
    for estimator in ("jacobi", "equilibration"):
        assert probe_variance(D, estimator, "rademacher").abs().max() < 1e-12 and probe_variance(D, estimator, "gaussian").min() > .5
        for seed in range(5): assert (probe_variance(symmetric(6, seed), estimator, "rademacher") <= probe_variance(symmetric(6, seed), estimator, "gaussian") + 1e-12).all()


def tiny_problem(seed=0):
    x = torch.linspace(-1, 1, 20, dtype=DOUBLE)[:, None]
    return Problem(INR(1, 1, hidden_features=3, num_layers=3, activation=Sine(3.), generator=seeded(seed), dtype=DOUBLE), x, torch.sin(4 * x))


def test_the_library_estimates_with_the_predicted_errors():
    "Errors of hutchinson_diagonal and equilibration in units of their predicted standard errors: rms within [.7, 1.4]. Catches a probe of another variance, a missing root, a wrong variance."
    problem, n = tiny_problem(), 1000
    flat = lambda ts: torch.cat([t.reshape(-1) for t in ts])
    H = hessian(problem, problem.params)
    score = (flat(hutchinson_diagonal(problem, problem.params, n, seeded(1))) - H.diagonal()) / (probe_variance(H, "jacobi") / n).sqrt()
    assert .7 < score.square().mean().sqrt() < 1.4
    for distribution in ("gaussian", "rademacher"):
        found = flat(equilibration(problem, problem.params, n, seeded(2), distribution)) ** 2
        score = (found - H.square().sum(1)) / (probe_variance(H, "equilibration", distribution) / n).sqrt()
        assert .7 < score.square().mean().sqrt() < 1.4


def test_the_average_of_squares_equilibrates():
    "(8): E[(v * Hv)^2] is the squared row norm, exactly, for Rademacher probes; it is not H_ii^2, as 'AdaHessian uses the Jacobi preconditioner' has it."
    H = symmetric(5, 3)
    mean = expectation(lambda v: (v * (H @ v)) ** 2, 5, "rademacher")
    torch.testing.assert_close(mean, H.square().sum(1))
    assert (mean / H.diagonal().square()).median() > 2


def test_the_library_averages_accordingly():
    "AdaHessian('equilibration') tends to the row norms and AdaHessian('jacobi') to the absolute diagonal, at fixed parameters. Catches the absolute value before the average."
    problem = tiny_problem(1)
    H = hessian(problem, problem.params)
    for estimator, truth, error in (("equilibration", H.norm(dim=1), "equilibration"), ("jacobi", H.diagonal().abs(), "jacobi")):
        opt = AdaHessian(problem.params, lr=0., betas=(0., .9995), eps=0., estimator=estimator)
        for _ in range(1000): opt.step(problem)
        P = torch.cat([opt.preconditioner()[p].reshape(-1) for p in problem.params])
        spread = (probe_variance(H, error) / 900).sqrt() / (2 * truth if error == "equilibration" else 1.)
        assert ((P - truth).abs() < 5 * spread + 1e-9).all()


@pytest.mark.parametrize("t", [1, 10, 3000])
def test_the_sums_need_their_weights(t):
    "(8): with a constant D the weighted sum gives D, the printed unweighted one sqrt((1 - beta) t / (1 - beta^t)) D, which grows without limit."
    beta, D = .999, 2.5
    weight = (1 - beta) / (1 - beta**t)
    corrected = math.sqrt(weight * sum(beta ** (t - i) * D * D for i in range(1, t + 1)))
    printed = math.sqrt(weight * sum(D * D for _ in range(t)))
    assert abs(corrected - D) < 1e-9
    assert abs(printed - D) < 1e-9 if t == 1 else printed > D * (1 + 1e-4 * t / 10)
    assert t < 3000 or printed > 1.5 * D


def test_algorithm_2_as_printed_divides_by_zero():
    "Alg. 2: from D_0 = 0 the first printed step is not finite and later ones decay as 1 / sqrt(t); ESGD(accumulate='mean'), the source's form, steps by 1 / h at once and for good."
    h = 4.
    D, printed = torch.zeros((), dtype=DOUBLE), []
    for _ in range(50): old, D = D, D + h; printed.append(old**-.5)
    assert not torch.isfinite(printed[0]) and abs(printed[40] / printed[10] - .5) < 1e-12
    p = torch.nn.Parameter(torch.tensor([1.], dtype=DOUBLE))
    opt = ESGD([p], lr=.5, betas=(0., .999), eps=0., accumulate="mean", update_every=1)
    for step in range(1, 20):
        opt.step(lambda: .5 * h * (p**2).sum())
        assert abs(p.item() - .5**step) < 1e-12


# ---- (10)

@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(-8, 8))
def test_condition_number_is_numpys(n, seed, scale):
    "Against numpy.linalg.cond in float64, at any scale; singular values descending."
    M = normal(n, n, seed=seed) * 10**scale
    expected = np.linalg.cond(M.numpy())
    assert condition_number(M) == pytest.approx(expected, rel=1e-9 * max(1., expected * 1e-6))
    sigma = np.linalg.svd(M.numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum(M), sigma, rtol=1e-9, atol=1e-12 * sigma[0])


def test_condition_number_at_damping_and_rank():
    "sigma_1 / sigma_r and (sigma_1 + lambda) / (sigma_n + lambda), lambda relative to sigma_1, on a known spectrum with a negative eigenvalue. Catches an absolute damping, one added to the numerator or denominator alone, an index off by one."
    H, _ = with_spectrum([-8., 4., 1., .01])
    assert condition_number(H) == pytest.approx(800) and condition_number(H, rank=3) == pytest.approx(8) and condition_number(H, rank=1) == 1
    assert condition_number(H, damping=.1) == pytest.approx(8.8 / .81) and condition_number(H, damping=.1, rank=2) == pytest.approx(8.8 / 4.8)
    assert condition_number(H, np.float32(.5), np.int64(2)) == condition_number(H, .5, 2)  # as tables and arrays give them
    assert condition_number(1e5 * H, damping=.1) == pytest.approx(8.8 / .81)
    assert [effective_rank(H, t) for t in (.6, .3, .01, 1e-12)] == [1, 2, 3, 4]


def test_a_singular_matrix():
    "An exactly zero singular value gives inf; at a damping d it gives 1 + 1/d; the rank leaves it out; a float32 matrix is not measured in float32."
    H = torch.diag(torch.tensor([2., 1., 0.]))
    assert condition_number(H) == math.inf and condition_number(H, damping=1e-3) == pytest.approx(1001) and condition_number(H, rank=2) == 2 and effective_rank(H) == 2
    assert condition_number(torch.diag(torch.tensor([1., 1e-12]))) == pytest.approx(1e12, rel=1e-6)
    assert effective_rank(torch.zeros(3, 3)) == 0


def small_hessian(sigma=.05, seed=0):
    "The Hessian of Sec. 7.4's network at its start."
    x = torch.linspace(-1, 1, 256, dtype=DOUBLE)[:, None]
    problem = Problem(INR(1, 1, hidden_features=16, num_layers=3, activation=Gaussian(sigma), generator=seeded(seed), dtype=DOUBLE), x, torch.sin(2 * math.pi * x) + torch.sin(6 * math.pi * x))
    H = hessian(problem, problem.params)
    return (H + H.T) / 2


def test_the_printed_condition_number_is_rounding_error():
    "Fig. 1: the smallest singular value of the 321 x 321 Hessian changes by powers of ten in an orthogonal basis, which changes no singular value; the damped number does not change."
    H = small_hessian()
    Q = torch.linalg.qr(normal(321, 321, seed=1))[0]
    turned = Q @ H @ Q.T
    assert len(H) == 321 and 200 < effective_rank(H) < 250
    assert condition_number(H) > 1e3 * condition_number(turned) > 1e16
    assert condition_number(H, damping=1e-6) == pytest.approx(condition_number(turned, damping=1e-6), rel=1e-6)


def test_damping_after_scaling_says_nothing():
    "Scaled and then damped, three different matrices have the condition number 1 + 1e6; damped and then scaled they differ, and the exact preconditioner reaches 1."
    H = small_hessian(seed=1)
    after = [condition_number(precondition(H, preconditioner(H, kind, 1e-6)), damping=1e-6) for kind in KINDS]
    before = {kind: condition_number(precondition(damp(H, 1e-6), preconditioner(H, kind, 1e-6))) for kind in KINDS}
    np.testing.assert_allclose(after, 1e6 + 1, rtol=1e-3)
    assert before["identity"] == pytest.approx(1e6 + 1, rel=1e-3) and before["exact"] == pytest.approx(1, rel=1e-6)
    assert before["equilibration"] < before["identity"] / 10 and before["jacobi"] < before["identity"] / 2


def test_the_undamped_jacobi_matrix_collapses():
    "Without damping, diagonal entries near the underflow leave the Jacobi-scaled Hessian with a rank of a few; with damped D it keeps the rank of H."
    H = small_hessian()
    assert effective_rank(precondition(H, preconditioner(H, "jacobi"))) < 50
    assert effective_rank(precondition(H, preconditioner(H, "jacobi", 1e-6))) > 200


def test_damp_moves_each_eigenvalue_away_from_zero():
    "Eigenvalues e + sign(e) lambda in the same basis, a zero to +lambda, H + lambda I for a semi-definite H, nothing at 0. Catches H + lambda I, which moves negative eigenvalues towards zero."
    H, Q = with_spectrum([-10., 3., -.5, 0.])
    expected = torch.tensor([-11., 4., -1.5, 1.], dtype=DOUBLE)
    torch.testing.assert_close(Q.T @ damp(H, .1) @ Q, expected.diag(), atol=1e-12, rtol=1e-12)
    S, _ = with_spectrum([4., 1., 0.])
    torch.testing.assert_close(damp(S, .5), S + 2 * torch.eye(3, dtype=DOUBLE))
    torch.testing.assert_close(damp(H, 0.), H)
    torch.testing.assert_close(spectrum(damp(H, .1)), spectrum(H) + 1.)


# ---- (11)

@pytest.mark.parametrize("scale", [.5, 1., 10.])
def test_the_bound_needs_its_exponent(scale):
    "(11): the corrected bound holds for each of 300 random matrices of each scale; the printed one is broken by many, and by all of scale 10."
    R = normal(300, 4, 4, seed=4) * scale
    kappa = np.linalg.cond(R.numpy())
    corrected, printed = (np.array([gej_bound(r, printed=p) for r in R]) for p in (False, True))
    assert (kappa < corrected).all() and (kappa >= printed).sum() > (299 if scale == 10 else 30)
    det, norm = np.abs(np.linalg.det(R.numpy())), np.linalg.norm(R.numpy(), axis=(1, 2))
    np.testing.assert_allclose(corrected, 2 / det * (norm / 2) ** 4, rtol=1e-9)
    np.testing.assert_allclose(printed, 2 / det * norm / 2, rtol=1e-9)


def test_the_bound_of_a_multiple_of_the_identity():
    "10 I: kappa 1, corrected 2, printed .2; the corrected bound does not change with the scale; the logarithm serves where the bound overflows."
    M = 10 * torch.eye(2)
    assert gej_bound(M) == pytest.approx(2) and gej_bound(M, printed=True) == pytest.approx(.2) and condition_number(M) == 1
    assert gej_bound(1e-3 * symmetric(5)) == pytest.approx(gej_bound(symmetric(5)))
    small = torch.full((400,), 1e-9, dtype=DOUBLE); small[0] = 1
    assert gej_bound(small.diag()) == math.inf and math.isfinite(gej_bound(small.diag(), log=True)) and gej_bound(torch.diag(torch.tensor([1., 0.]))) == math.inf


def test_the_bound_is_tight():
    "Largest singular value sqrt 2 times the equal others, smallest near zero: bound / kappa tends to 1. A stray factor in the bound would show."
    sigma = torch.ones(30, dtype=DOUBLE); sigma[0], sigma[-1] = math.sqrt(2), 1e-4
    assert 1 < gej_bound(sigma.diag()) / condition_number(sigma.diag()) < 1 + 1e-6


@pytest.mark.parametrize("n", [2, 5, 9])
def test_equilibration_tightens_the_bound_by_the_corrected_factor(n):
    "After (11): bound(D^-1 H) / bound(H) = det(D^E) (norm / sqrt N)^-N <= 1; the printed exponent +N misses it; two-sided, the bound falls at least as far."
    for seed in range(20):
        H = 3 * symmetric(n, seed); r = H.norm(dim=1)
        ratio = gej_bound(precondition(H, r, "left")) / gej_bound(H)
        corrected, printed = (float(r.prod() * (H.norm() / math.sqrt(n)) ** (s * n)) for s in (-1, 1))
        assert ratio == pytest.approx(corrected, rel=1e-9) and equilibration_factor(H) == pytest.approx(corrected, rel=1e-9) and corrected <= 1
        assert abs(math.log(ratio / printed)) > .5
        assert gej_bound(precondition(H, r)) <= gej_bound(precondition(H, r, "left")) * (1 + 1e-12)
    assert equilibration_factor(torch.eye(n)) == pytest.approx(1)
    assert max(equilibration_factor(c * torch.eye(k), log) - (not log) for k in range(2, 8) for c in (.1, .3, .7, 1.7, 3.3, 1e-3, 1e5) for log in (False, True)) <= 0, "rounding may not lift it above 1"


def test_the_public_names():
    "The interface's address of both functions is inr_precond.curvature; they are the same objects."
    from inr_precond import conditioning, curvature
    assert curvature.condition_number is conditioning.condition_number and curvature.precondition is conditioning.precondition


# ---- input

BAD = [
    (lambda f: f(torch.ones(2, 3)), "square"),
    (lambda f: f(torch.ones(3)), "square"),
    (lambda f: f(torch.ones(0, 0)), "square"),
    (lambda f: f(torch.tensor([[1., math.nan], [math.nan, 1.]])), "not finite"),
    (lambda f: f(torch.tensor([[1., 2.], [math.inf, 1.]])), "not finite"),
    (lambda f: f(torch.eye(2, dtype=torch.complex64)), "complex"),
]
FUNCTIONS = {"condition_number": condition_number, "spectrum": spectrum, "effective_rank": effective_rank, "damp": damp, "gej_bound": gej_bound, "equilibration_factor": equilibration_factor,
             "precondition": lambda H: precondition(H, torch.ones(2)), "preconditioner": lambda H: preconditioner(H, "jacobi"), "probe_variance": lambda H: probe_variance(H, "jacobi")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_matrices_end_in_one_sentence(name):
    "Each function names itself and says what is wrong with the matrix."
    for call, words in BAD:
        with pytest.raises(ValueError, match=words) as error: call(FUNCTIONS[name])
        assert str(error.value).startswith(name) and "\n" not in str(error.value)


@pytest.mark.parametrize("call, words", [
    (lambda: condition_number(torch.zeros(3, 3)), "zeros"),
    (lambda: gej_bound(torch.zeros(3, 3)), "zeros"),
    (lambda: gej_bound(torch.ones(1, 1)), "2 x 2"),
    (lambda: equilibration_factor(torch.diag(torch.tensor([1., 0.]))), "rows of zeros"),
    (lambda: condition_number(torch.eye(3), rank=0), "rank=0"),
    (lambda: condition_number(torch.eye(3), rank=4), "1 to 3"),
    (lambda: condition_number(torch.eye(3), rank=2.5), "rank=2.5"),
    (lambda: condition_number(torch.eye(3), damping=-1e-6), "damping=-1e-06"),
    (lambda: condition_number(torch.eye(3), damping=math.nan), "damping=nan"),
    (lambda: damp(torch.tensor([[1., 2.], [0., 1.]])), "transpose"),
    (lambda: preconditioner(torch.tensor([[1., 2.], [0., 1.]]), "jacobi"), "transpose"),
    (lambda: preconditioner(torch.eye(2), "Jacobi"), "'jacobi'"),
    (lambda: precondition(torch.eye(2), torch.ones(2), side="right"), "side"),
    (lambda: precondition(torch.eye(2), torch.ones(3)), "shape"),
    (lambda: precondition(torch.eye(2), torch.tensor([1., 0.])), "1 of 2 entries.*damp"),
    (lambda: precondition(torch.eye(2), torch.tensor([1., math.nan])), "1 of 2 entries"),
    (lambda: precondition(torch.eye(2), torch.tensor([math.inf, 1.])), "1 of 2 entries"),
    (lambda: precondition(torch.eye(2), torch.tensor([[1., 0.], [0., -1.]])), "1 of 2 eigenvalues"),
    (lambda: probe_variance(torch.eye(2), "diagonal"), "estimator"),
    (lambda: probe_variance(torch.eye(2), "jacobi", "uniform"), "distribution"),
])
def test_bad_arguments_end_in_one_sentence(call, words):
    "What was given, what is accepted, in one line."
    with pytest.raises(ValueError, match=words) as error: call()
    assert "\n" not in str(error.value)


def test_arguments_are_not_changed():
    "Neither the matrix nor D is written to, a graph is not kept, numpy arrays and float32 are welcome and come back as float64."
    H, D = symmetric(4), torch.rand(4, generator=seeded(), dtype=DOUBLE) + .5
    before = H.clone(), D.clone()
    for f in (lambda: precondition(H, D), lambda: damp(H), lambda: preconditioner(H, "exact", .1), lambda: condition_number(H, .1), lambda: equilibration_factor(H)): f()
    assert torch.equal(H, before[0]) and torch.equal(D, before[1])
    assert precondition(H.numpy().astype(np.float32), D.numpy()).dtype == DOUBLE
    assert not precondition(H.clone().requires_grad_(), D).requires_grad


# ---- the experiment

def test_the_experiment_resumes_and_mistrusts_its_files(tmp_path, repository):
    "Fig. 1's paths: a second execution computes nothing; a damaged file, and one with other settings, are computed again. Run from the notebook's own cells at smoke scale."
    pytest.importorskip("IPython")
    cells = json.loads((Path(repository) / "nbs/experiments/fig01_condition_number.ipynb").read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    ahead = code[:next(i for i, c in enumerate(code) if "paths = follow(plan)" in c) + 1]
    space = {}
    for source in ahead:
        exec(compile(source, "fig01", "exec"), space)
        if 'scale = "quick"' in source: space.update(scale="smoke", out=str(tmp_path))
    calls, compute = [], space["compute"]
    def counting(setting): calls.append(setting["seed"]); return compute(setting)
    space["compute"] = counting
    files = sorted((tmp_path / "paths").glob("*.json"))
    assert len(files) == len(space["plan"]) > 1
    first = space["follow"](space["plan"])
    assert calls == []
    files[0].write_bytes(files[0].read_bytes()[:100])
    other = json.loads(files[1].read_text()); other["settings"]["sigma"] = 7.; files[1].write_text(json.dumps(other))
    again = space["follow"](space["plan"])
    assert len(calls) == 2 and json.dumps(again) == json.dumps(first)


@pytest.mark.parametrize("unit", [1e-170, 1e-5, 1., 1e160])
def test_the_bound_has_no_units(unit):
    "Squares of very small or large entries under- or overflow: a bound of inf, or a bare error of math."
    H = np.array([[2., .5, 0.], [.5, 1., .3], [0., .3, 3.]])
    assert gej_bound(unit * H) == pytest.approx(gej_bound(H), rel=1e-9) and gej_bound(unit * H, log=True) == pytest.approx(gej_bound(H, log=True), rel=1e-9)
    assert equilibration_factor(unit * H) == pytest.approx(equilibration_factor(H), rel=1e-9)
    assert gej_bound(unit * H, log=True, printed=True) == pytest.approx(gej_bound(H, log=True, printed=True) - 2 * math.log(unit), rel=1e-9)
