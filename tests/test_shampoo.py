"""Shampoo against dense linear algebra, brute force over blocks and itself. Each test's docstring names the mistake it would catch."""
import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from inr_precond.curvature import Problem
from inr_precond.inr import INR, Gaussian
from inr_precond.optim.base import Adam
from inr_precond.optim.shampoo import ROOTS, Shampoo, blocks_of, coupled_newton, inverse_root

D = torch.float64
METHODS = list(ROOTS)
KINDS = [dict(graft="none", eps=1e-4), dict(graft="adam"), dict(graft="sgd", accumulate="sum", average="released", root="newton", vectors="plain"), dict(graft="adagrad", average="nesterov", vectors="diagonal", block_size=3),
         dict(graft="rmsprop", average="direction", vectors="matrix", block_size=None, relative=False)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def power(S, exponent):
    "S^exponent by eigenvalues."
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values**exponent) @ vectors.T


def spd(n, kappa=1e3, seed=0):
    "A matrix with eigenvalues from 1 to 1 / kappa."
    Q = torch.linalg.qr(normal(n, n, seed=seed))[0]
    return (Q * torch.logspace(0, -math.log10(kappa), n, dtype=D)) @ Q.T


def problem(dtype=D, seed=0):
    net = INR(1, 2, hidden_features=8, num_layers=3, activation=Gaussian(.4), generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)
    x = torch.linspace(-1, 1, 32, dtype=D)[:, None]
    return Problem(net, x.to(dtype), torch.cat([torch.sin(5 * x), torch.cos(3 * x)], 1).to(dtype))


def flat(tensors):
    return torch.cat([t.detach().flatten().to(D) for t in tensors])


def feed(opt, p, gradients):
    "Steps with given gradients; the changes of the parameter."
    changes = []
    for g in gradients:
        before, p.grad = p.detach().clone(), g.clone().to(p.dtype)
        opt.step()
        changes.append((p.detach() - before).to(D))
    return changes


def bare(p, **options):
    "Shampoo with nothing added: a step is -L^-1/4 G R^-1/4."
    return Shampoo(p if isinstance(p, list) else [p], **{**dict(lr=1., betas=(0., .9), graft="none", inverse_every=1), **options})


def cosine(a, b):
    return float(a.flatten() @ b.flatten() / a.norm() / b.norm())


# ---------------------------------------------------------------------------------------------- roots
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
def test_a_root_to_the_minus_p_is_the_statistic(p, method):
    "Another exponent, a wrong ridge, or a scale that is not undone."
    S = torch.stack([spd(12), 1e7 * spd(12, seed=1), 1e-9 * spd(12, 10, seed=2), torch.eye(12, dtype=D)])
    X = inverse_root(S, p, method=method)
    product = torch.linalg.matrix_power(X, p) @ S
    torch.testing.assert_close(product, torch.eye(12, dtype=D).expand(4, 12, 12), rtol=0, atol=1e-8)
    torch.testing.assert_close(X, X.mT, rtol=1e-9, atol=1e-9 * X.abs().max().item())
    for s, x in zip(S, X): torch.testing.assert_close(x, power(s, -1 / p), rtol=1e-8, atol=1e-8 * x.abs().max().item())


@pytest.mark.parametrize("kappa", [1., 1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_newton_and_eigenvalues_agree_with_the_truth(kappa, dtype):
    "An iteration that stops early, or whose coupling is lost."
    S = spd(24, kappa)
    X, error, steps = coupled_newton(S.to(dtype), 4)
    unit = torch.finfo(dtype).eps
    assert error <= 8 * unit and steps <= math.log(kappa) / math.log(1.25**4) + 8
    for root in (X, inverse_root(S.to(dtype), 4)): assert (root.to(D) - power(S, -.25)).norm() / power(S, -.25).norm() < 2 * kappa * unit + 20 * unit


def test_newton_treats_each_matrix_of_a_stack_alone():
    "Iterations that go on for a matrix that has converged, until rounding spoils it; a stop of all at the first."
    stack = torch.stack([spd(10, 10.**k, seed=k) for k in range(0, 9)]).float()
    together, errors, _ = coupled_newton(stack, 4)
    for S, X, e in zip(stack, together, errors):
        alone, error, _ = coupled_newton(S, 4)
        torch.testing.assert_close(X, alone, rtol=1e-3, atol=1e-5 * alone.abs().max().item())
        assert error <= 1e-6 and e <= 1e-6
    indefinite = torch.diag(torch.tensor([1., -.1]))
    X, error, _ = coupled_newton(torch.stack([indefinite, torch.eye(2)]), 4)
    assert X.abs().max() < 10 and error[0] > .5 and error[1] < 1e-6
    easy, hard = spd(10, 10.), spd(10, 1e8)
    assert torch.equal(coupled_newton(torch.stack([easy, easy]), 4)[0][0], coupled_newton(torch.stack([easy, hard]), 4)[0][0])


def test_negative_eigenvalues_count_as_zero():
    "A root of a negative number: NaN, where rounding left a statistic indefinite."
    torch.testing.assert_close(inverse_root(torch.diag(torch.tensor([1., -1e-3], dtype=D)), 4, 1e-8), torch.diag(torch.tensor([1., 100.], dtype=D)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_singular_zero_and_broken_statistics(method, dtype):
    "A division by a zero eigenvalue, by one that rounding made negative, or a LAPACK error for NaN."
    few = normal(20, 3) @ normal(20, 3).T
    S = torch.stack([few, 0 * few, few * math.nan, few * 1e-25, few / few.max()]).to(dtype)
    S[4, 0, 0] = math.inf
    for eps in (0., 1e-12, 1e-4):
        X = inverse_root(S, 4, eps=eps, method=method)
        most = (max(eps, 20**.5 * torch.finfo(dtype).eps) * torch.linalg.eigvalsh(few)[-1])**-.25
        gains = torch.linalg.eigvalsh(X[0].to(D))
        assert X[[0, 1, 3]].isfinite().all() and gains[0] > -.02 * most and gains[-1] < 1.2 * most
        assert torch.equal(X[1], torch.eye(20, dtype=dtype)) and X[2].isnan().all() and X[4].isnan().all()
    exact = power(few + 1e-4 * torch.linalg.eigvalsh(few)[-1] * torch.eye(20, dtype=D), -.25)
    assert (X[0].to(D) - exact).norm() / exact.norm() < (1e-2 if dtype == torch.float32 else 1e-2 if method == "newton" else 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_an_absolute_ridge_is_algorithm_4s_start(method):
    "A ridge in units of the scale by which the root is normalised."
    for S in (spd(6), 1e4 * spd(6), 1e-4 * spd(6), torch.zeros(6, 6, dtype=D)):
        torch.testing.assert_close(inverse_root(S, 4, eps=1e-3, relative=False, method=method), power(S + 1e-3 * torch.eye(6, dtype=D), -.25), rtol=1e-9, atol=1e-9)


def test_a_decomposition_that_fails_is_repeated_in_double(monkeypatch):
    "A training run that ends because LAPACK's float32 routine did not converge."
    eigh = torch.linalg.eigh
    def failing(A):
        if A.dtype == torch.float32: raise torch.linalg.LinAlgError("did not converge")
        return eigh(A)
    S = spd(8, 10.).float()
    expected = inverse_root(S, 4)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    torch.testing.assert_close(inverse_root(S, 4), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("args, words", [((torch.ones(3, 2), 4), "must be .*n, n"), ((torch.ones(3), 4), "must be .*n, n"), ((torch.eye(2), 0), "p is 0"), ((torch.eye(2), 2.5), "p is 2.5"), ((torch.eye(2), 2, -1.), "eps -1.0"),
                                         ((torch.eye(2), 2, 0., True, "qr"), "'eigh', 'newton'")])
def test_roots_refuse_what_they_cannot_take(args, words):
    with pytest.raises(ValueError, match=words): inverse_root(*args)


# ---------------------------------------------------------------------------------------------- the step
def by_hand(gradients, block, eps, beta=None, order=4):
    "The steps of the corrected Algorithm 4 in float64, block by block; `beta` for a bias-corrected average, eps then relative."
    stats, steps, k = {}, [], 0
    for g in gradients:
        view, k = g.reshape(len(g), -1), k + 1
        out = torch.zeros_like(view)
        for i in range(0, view.shape[0], block):
            for j in range(0, view.shape[1], block):
                G = view[i:i + block, j:j + block]
                L, R = stats.setdefault((i, j), [torch.zeros(len(G), len(G), dtype=D), torch.zeros(G.shape[1], G.shape[1], dtype=D)])
                for S, new in ((L, G @ G.T), (R, G.T @ G)):
                    if beta is None: S += new
                    else: S.mul_(beta).add_(new, alpha=1 - beta)
                fix = 1. if beta is None else 1 - beta**k
                ridge = (lambda S: eps) if beta is None else (lambda S: eps * torch.linalg.eigvalsh(S)[-1])
                a, b = (power(S / fix + ridge(S / fix) * torch.eye(len(S), dtype=D), -1 / order) for S in (L, R))
                out[i:i + block, j:j + block] = a @ G @ b
        steps.append(out.reshape(g.shape))
    return steps


SHAPES = [(1, 1), (1, 6), (6, 1), (4, 4), (7, 5), (6, 9), (5, 2, 3), (3, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [1, 2, 3, 4, 99])
@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_algorithm_4_block_by_block(shape, block, method):
    "Blocks that share a factor, an edge that is lost or counted twice, sides that are swapped, exponents that are."
    gradients = [normal(*shape, seed=s) for s in range(4)]
    p = nn.Parameter(torch.zeros(shape, dtype=D))
    for options, expected in ((dict(accumulate="sum", relative=False, eps=1e-2), by_hand(gradients, block, 1e-2)), (dict(accumulate="ema", eps=1e-2), by_hand(gradients, block, 1e-2, .9))):
        tolerance = 1e-9 if method == "eigh" or not options.get("relative", True) else 2e-2   # Newton takes the largest eigenvalue from the power method
        for change, step in zip(feed(bare(p, block_size=block, root=method, **options), p, gradients), expected): torch.testing.assert_close(-change, step, rtol=tolerance, atol=tolerance)


def test_erratum_21_the_printed_order_does_not_fit_and_is_another_step():
    "L = G^T G on the left: impossible for m != n, another matrix for m = n. As printed it is neither orthogonal nor covariant under rotations of the rows."
    G = normal(3, 5)
    with pytest.raises(RuntimeError): (G.T @ G) @ G
    G = normal(5, 5)
    U, _, Vt = torch.linalg.svd(G)
    p = nn.Parameter(torch.zeros(5, 5, dtype=D))
    step = -feed(bare(p, accumulate="sum", eps=0.), p, [G])[0]
    torch.testing.assert_close(step, U @ Vt, rtol=0, atol=1e-8)
    printed = power(G.T @ G, -.25) @ G @ power(G @ G.T, -.25)
    assert (printed - U @ Vt).norm() > .5
    Q = torch.linalg.qr(normal(5, 5, seed=3))[0]
    p = nn.Parameter(torch.zeros(5, 5, dtype=D))
    torch.testing.assert_close(-feed(bare(p, accumulate="sum", eps=0.), p, [Q @ G])[0], Q @ step, rtol=0, atol=1e-7)
    rotated = power((Q @ G).T @ (Q @ G), -.25) @ Q @ G @ power(Q @ G @ (Q @ G).T, -.25)
    assert (rotated - Q @ printed).norm() > .1


def test_statistics_are_not_the_gauss_newton_matrix():
    "The paper's name for L: at a perfect fit the gradient is zero, J^T J is not."
    x, w = normal(30, 4), normal(3, 4, seed=1)
    p = nn.Parameter(w.clone())
    opt = bare(p)
    opt.step(lambda: (x @ p.T - x @ w.T).square().mean())
    assert not opt.state[p]["left"].any() and torch.equal(p.detach(), w) and x.square().sum() > 1


def test_blocks_of_one_entry_are_adagrads_diagonal_and_vectors_are_its_full_matrix():
    "Exponents that do not add up to 1/2."
    gradients = [normal(4, 3, seed=s) for s in range(5)]
    p = nn.Parameter(torch.zeros(4, 3, dtype=D))
    for i, change in enumerate(feed(bare(p, block_size=1, accumulate="sum", eps=0.), p, gradients)): torch.testing.assert_close(-change, gradients[i] / sum(g**2 for g in gradients[:i + 1]).sqrt())
    v = nn.Parameter(torch.zeros(12, dtype=D))
    vectors = [g.flatten() for g in gradients]
    for i, change in enumerate(feed(bare(v, accumulate="sum", eps=1e-3, relative=False, vectors="matrix"), v, vectors)):
        full = 1e-3 * torch.eye(12, dtype=D) + sum(torch.outer(g, g) for g in vectors[:i + 1])
        torch.testing.assert_close(-change, power(full, -.5) @ vectors[i])
    for i, change in enumerate(feed(bare(v, accumulate="sum", eps=1e-3, vectors="diagonal"), v, vectors)):
        s = sum(g**2 for g in vectors[:i + 1])
        torch.testing.assert_close(-change, vectors[i] / (s + 1e-3 * s.max()).sqrt())
    s = torch.zeros(12, dtype=D)
    for i, change in enumerate(feed(bare(v, eps=1e-3, vectors="diagonal"), v, vectors)):
        s = .9 * s + .1 * vectors[i]**2
        torch.testing.assert_close(-change, vectors[i] / ((s + 1e-3 * s.max()) / (1 - .9**(i + 1))).sqrt())
    for i, change in enumerate(feed(bare(v, vectors="plain"), v, vectors)): torch.testing.assert_close(-change, vectors[i])


def test_how_a_parameter_is_cut():
    "A long vector with a matrix of its length squared; a scalar that crashes."
    kind = lambda shape, **k: (blocks_of(shape, **k).kind, blocks_of(shape, **k))
    assert kind((128,))[0] == "matrix" and kind((129,))[0] == "diagonal" and kind((129,), block_size=None)[0] == "matrix" and kind((9,), block_size=4, vectors="matrix")[1].grid == (3, 1)
    assert kind((), block_size=1)[1].order == 1 and kind((0, 3))[0] == kind((0,))[0] == "plain" and (kind((4, 2, 3))[1].m, kind((4, 2, 3))[1].n) == (4, 6)
    for shape in SHAPES:
        x = normal(*shape)
        for block in (1, 2, 3, 5): assert torch.equal((b := blocks_of(shape, block)).join(b.split(x), shape), x) and max(b.split(x).shape[1:]) <= block


def test_odd_parameters_take_steps():
    "A 0-dimensional, an empty, a 1 x 1 and a 1 x n parameter; one whose gradient is zero, and then is not."
    shapes = [(), (0,), (0, 3), (1, 1), (1, 5), (5, 1), (3,), (4, 3)]
    for options in KINDS:
        params = [nn.Parameter(torch.ones(s, dtype=D)) for s in shapes]
        opt = Shampoo(params, lr=.01, **options)
        still, grad = params[-1], [normal(*s, seed=i) for i, s in enumerate(shapes)]
        for t in range(4):
            for p, g in zip(params, grad): p.grad = torch.zeros_like(p) if p is still and t < 2 else g.clone()
            opt.step()
            assert all(torch.isfinite(p).all() for p in params), options
            assert torch.equal(still, torch.ones_like(still)) == (t < 2), options
        assert all((p != 1).any() for p in params if p.numel() > 0)
        assert opt.state[still]["root_left"].isfinite().all()


def test_a_layer_not_seen_yet_takes_the_plain_gradient():
    "No motion until the next inversion, or an infinite root, where the first gradient was zero."
    p = nn.Parameter(torch.zeros(3, 2, dtype=D))
    changes = feed(bare(p, stats_every=10, inverse_every=10), p, [torch.zeros(3, 2, dtype=D), normal(3, 2)])
    assert not changes[0].any()
    torch.testing.assert_close(-changes[1], normal(3, 2))
    for options in (dict(vectors="diagonal"), dict(vectors="matrix"), dict(vectors="diagonal", relative=False, eps=1e-4), dict(vectors="matrix", relative=False, eps=1e-4)):
        v = nn.Parameter(torch.zeros(6, dtype=D))
        changes = feed(bare(v, stats_every=10, inverse_every=10, **options), v, [torch.zeros(6, dtype=D), normal(6)])
        assert not changes[0].any()
        torch.testing.assert_close(-changes[1], normal(6) * options.get("eps", 1.)**-.5)


def test_a_rank_deficient_statistic_does_not_explode():
    "A gradient outside of what one batch has shown: its gain is bounded by eps^-1/2, in float32 too."
    for dtype in (torch.float32, D):
        p = nn.Parameter(torch.zeros(30, 20, dtype=dtype))
        first = (normal(30, 1) @ normal(1, 20)).to(dtype)
        changes = feed(bare(p, stats_every=100, inverse_every=100, eps=1e-4), p, [first, normal(30, 20, seed=5)])
        assert changes[0].norm() < 1.01 and changes[1].norm() <= 1.01 * 1e2 * normal(30, 20, seed=5).norm() / first.norm()


@pytest.mark.parametrize("vectors", ["diagonal", "matrix"])
def test_entries_of_a_vector_without_gradient_stay_without_a_ridge(vectors):
    "0 / 0 in a bias of which some units are dead."
    p = nn.Parameter(torch.zeros(4, dtype=D))
    change, = feed(bare(p, eps=0., vectors=vectors, block_size=2), p, [torch.tensor([3., 0., 0., -2.])])
    assert torch.equal(change[1:3], torch.zeros(2, dtype=D)) and change.isfinite().all() and change[0] < 0 < change[3]


def test_nan_shows():
    "A divergence that the root turns into a finite step, or into a crash."
    p = nn.Parameter(torch.zeros(3, 2))
    feed(bare(p), p, [torch.full((3, 2), math.nan)])
    assert p.isnan().any()


def test_a_kronecker_hessian_is_solved_by_the_order_2():
    "f = tr(W^T A W B) / 2: with all unit matrices seen, L = A^2 tr B^2 and R = B^2 tr A^2, so the step is A^1/2 W B^1/2, or W, up to a known factor."
    A, B = spd(4, 50.), spd(3, 20., seed=1)
    start = normal(4, 3, seed=2)
    for order, expected in ((None, power(A, .5) @ start @ power(B, .5)), (2, start)):
        p = nn.Parameter(torch.zeros(4, 3, dtype=D))
        opt = bare(p, lr=0., eps=0., accumulate="sum", root_order=order)
        feed(opt, p, [A @ e @ B for e in torch.eye(12, dtype=D).view(12, 4, 3)])
        factor = ((A @ A).trace() * (B @ B).trace())**(1 / (order or 4))
        torch.testing.assert_close(factor * opt.direction(opt._cohorts()[0], [A @ start @ B])[0], expected)


@pytest.mark.parametrize("options, power_of_c", [(dict(), 0), (dict(accumulate="sum"), 0), (dict(root="newton", block_size=3), 0), (dict(vectors="diagonal"), 0), (dict(average="nesterov"), 0), (dict(graft="adam", graft_eps=0.), 0),
                                                (dict(graft="rmsprop", graft_eps=0.), 0), (dict(graft="adagrad", graft_eps=0.), 0), (dict(graft="sgd"), 1), (dict(graft="sgd", average="released"), 1), (dict(root_order=2), -1)], ids=str)
def test_a_scaled_loss(options, power_of_c):
    "Exponents that do not sum to -1/2, a ridge or a graft that does not scale."
    gradients, steps = [[normal(5, 4, seed=s), normal(4, seed=s)] for s in range(4)], []
    if options.get("root_order"): gradients = [g[:1] for g in gradients]
    for c in (1., 64.):
        params = [nn.Parameter(torch.zeros_like(g)) for g in gradients[0]]
        opt = bare(params, **{"betas": (.9, .9), **options})
        for grads in gradients:
            for p, g in zip(params, grads): p.grad = c * g
            opt.step()
        steps.append(flat(params))
    torch.testing.assert_close(steps[1], 64.**power_of_c * steps[0], rtol=1e-8, atol=1e-12)


def test_an_absolute_ridge_is_invariant_up_to_it():
    "Documented as 'up to damping': the deviation vanishes with eps."
    gaps = []
    for eps in (1e-1, 1e-3, 1e-6):
        ends = []
        for c in (1., 10.):
            p = nn.Parameter(torch.zeros(5, 4, dtype=D))
            ends.append(sum(feed(bare(p, accumulate="sum", relative=False, eps=eps), p, [c * normal(5, 4, seed=s) for s in range(3)])))
        gaps.append(float((ends[1] - ends[0]).norm() / ends[0].norm()))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] and gaps[2] < 1e-4


# ---------------------------------------------------------------------------------------------- grafting and momentum
@pytest.mark.parametrize("graft", ["sgd", "adagrad", "rmsprop", "adam"])
def test_a_grafted_step_has_the_other_optimizers_length_and_shampoos_direction(graft):
    "A norm over all layers or over a block, a second moment of the direction, one step's delay."
    shapes = [(6, 5), (7,), (3, 2, 2)]
    gradients = [[normal(*s, seed=10 * t + i) for i, s in enumerate(shapes)] for t in range(5)]
    make = lambda **k: (p := [nn.Parameter(torch.zeros(s, dtype=D)) for s in shapes], Shampoo(p, lr=.1, betas=(.8, .9), block_size=4, inverse_every=2, graft_beta=.7, graft_eps=1e-3, **k))
    (a, ours), (b, alone) = make(graft=graft), make(graft="none")
    c = [nn.Parameter(torch.zeros(s, dtype=D)) for s in shapes]
    other = Adam(c, lr=.1, betas=(.8, .7), eps=1e-3)
    squares, m = [torch.zeros(s, dtype=D) for s in shapes], [torch.zeros(s, dtype=D) for s in shapes]
    for t, grads in enumerate(gradients):
        before = [[p.detach().clone() for p in params] for params in (a, b, c)]
        for params in (a, b, c):
            for p, g in zip(params, grads): p.grad = g.clone()
        ours.step(); alone.step()
        other.step()
        for i, g in enumerate(grads):
            m[i] = .8 * m[i] + .2 * g
            squares[i] = squares[i] + g**2 if graft == "adagrad" else .7 * squares[i] + .3 * g**2
            v = squares[i] / (1 - .7**(t + 1) if graft == "adam" else 1.)
            want = .1 / (1 - .8**(t + 1)) * (m[i] if graft == "sgd" else m[i] / (v.sqrt() + 1e-3))
            step, pure = a[i].detach() - before[0][i], b[i].detach() - before[1][i]
            assert step.norm().item() == pytest.approx(want.norm().item(), rel=1e-9)
            assert cosine(step, pure) == pytest.approx(1, abs=1e-9)
            if graft == "adam": assert step.norm().item() == pytest.approx((c[i].detach() - before[2][i]).norm().item(), rel=1e-9)


@pytest.mark.parametrize("average", ["gradient", "direction", "nesterov", "released"])
def test_the_four_averages(average):
    "A look-ahead from the wrong buffer; the released file leaves it in the buffer: decay beta^2, gain 1 + beta."
    gradients = [normal(4, 3, seed=s) for s in range(6)]
    p = nn.Parameter(torch.zeros(4, 3, dtype=D))
    opt = Shampoo([p], lr=1., betas=(.9, .5), graft="none", average=average, inverse_every=1)
    q = nn.Parameter(torch.zeros(4, 3, dtype=D))
    directions = [-c for c in feed(bare(q, betas=(0., .5)), q, gradients)]
    b, m = torch.zeros(4, 3, dtype=D), torch.zeros(4, 3, dtype=D)
    for t, (g, d) in enumerate(zip(gradients, directions)):
        change = feed(opt, p, [g])[0]
        if average == "gradient":
            m = .9 * m + .1 * g
            f = opt.factors()[p][0]
            expected = f.root_left @ m @ f.root_right / (1 - .9**(t + 1))
        elif average == "released": expected = b = .81 * b + 1.9 * d
        else: b = .9 * b + d; expected = b if average == "direction" else .9 * b + d
        torch.testing.assert_close(-change, expected)


# ---------------------------------------------------------------------------------------------- the two periods
def test_both_periods_follow_the_schedule():
    "t from 1, the two periods mixed up, a correction by all steps, roots of the statistic before the update."
    gradients = [normal(4, 3, seed=s) for s in range(20)]
    p = nn.Parameter(torch.zeros(4, 3, dtype=D))
    opt = bare(p, stats_every=3, inverse_every=4, warmup=2, betas=(0., .7), eps=1e-3)
    L, k, root = torch.zeros(4, 4, dtype=D), 0, None
    for t, g in enumerate(gradients):
        feed(opt, p, [g])
        if t < 2 or t % 3 == 0: L, k = .7 * L + .3 * g @ g.T, k + 1
        if t < 2 or t % 4 == 0: root = inverse_root(L / (1 - .7**k), 4, 1e-3)
        torch.testing.assert_close(opt.state[p]["left"][0], L)
        torch.testing.assert_close(opt.state[p]["root_left"][0], root)
        torch.testing.assert_close(opt.factors()[p][0].left, L / (1 - .7**k))
        assert opt.state[p]["updates"].item() == k and opt.state[p]["step"].item() == t + 1


def test_equal_blocks_of_all_layers_are_one_decomposition_and_none_is_repeated_in_vain(monkeypatch):
    "A decomposition for each block; one where the statistic is the old one."
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: (calls.append(tuple(A.shape)), eigh(A))[1])
    params = [nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.zeros(4))]
    opt = Shampoo(params, block_size=4, stats_every=5, inverse_every=1)
    for t in range(6):
        for p in params: p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        opt.step()
    assert sorted(calls) == sorted(2 * [(1, 4, 4), (2 * 4 + 2 * 2 + 2, 4, 4), (2, 2, 2)])   # the vector has order 2, the others 4; at t = 0 and 5 alone


def test_roots_are_kept_between_inversions_and_survive_a_checkpoint():
    "Roots of the loaded statistics instead of those that the run had."
    for options in KINDS:
        options = {**options, "stats_every": 2, "inverse_every": 5}
        whole = problem(); opt = Shampoo(whole.params, lr=.01, **options)
        for _ in range(13): opt.step(whole)
        for stop in (1, 7, 8):
            first = problem(); opt = Shampoo(first.params, lr=.01, **options)
            for _ in range(stop): opt.step(first)
            file = io.BytesIO(); torch.save({"model": first.model.state_dict(), "opt": opt.state_dict()}, file); file.seek(0)
            saved = torch.load(file, weights_only=True)
            second = problem(seed=5); second.model.load_state_dict(saved["model"])
            opt = Shampoo(second.params, block_size=7); opt.load_state_dict(saved["opt"])
            for _ in range(13 - stop): opt.step(second)
            assert torch.equal(flat(whole.params), flat(second.params)), (options, stop)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_rolling_back_copying_and_pickling_continue_alike(options):
    "Counters or cached cuts that survive a load or a copy."
    prob = problem()
    opt = Shampoo(prob.params, lr=.01, inverse_every=3, **options)
    for _ in range(4): opt.step(prob)
    saved = copy.deepcopy((prob.model.state_dict(), opt.state_dict()))
    twins = [copy.deepcopy((prob, opt)), pickle.loads(pickle.dumps((prob, opt)))]
    for p, o in [(prob, opt), *twins]:
        for _ in range(5): o.step(p)
    prob.model.load_state_dict(saved[0]); opt.load_state_dict(saved[1])
    for _ in range(5): opt.step(prob)
    assert torch.equal(flat(prob.params), flat(twins[0][0].params)) and torch.equal(flat(prob.params), flat(twins[1][0].params))


def test_state_is_tensors_updated_in_place():
    "State that is replaced at each step cannot be captured in a graph."
    for options in KINDS:
        prob = problem()
        opt = Shampoo(prob.params, inverse_every=2, **options)
        opt.step(prob)
        places = lambda: [(k, v.data_ptr()) for p in prob.params for k, v in sorted(opt.state[p].items())]
        before = places()
        for _ in range(5): opt.step(prob)
        assert places() == before and all(isinstance(v, torch.Tensor) for p in prob.params for v in opt.state[p].values())


def test_states_of_others_are_refused_and_of_another_precision_taken_over():
    "A shape error at the next step; state in the wrong precision."
    prob = problem()
    opt = Shampoo(prob.params); opt.step(prob)
    wider = INR(1, 2, hidden_features=9, num_layers=3, dtype=D)
    before = Shampoo(wider.parameters())
    with pytest.raises(ValueError, match="load the state of the same model"): before.load_state_dict(opt.state_dict())
    assert not before.state
    adam = Adam(prob.params); adam.step(prob)
    with pytest.raises(ValueError, match="load the state of the same optimizer"): opt.load_state_dict(adam.state_dict())
    cut = copy.deepcopy(opt.state_dict()); del cut["state"][0]["right"]
    with pytest.raises(ValueError, match="load the state of the same model"): opt.load_state_dict(cut)
    single = problem(torch.float32)
    new = Shampoo(single.params); new.load_state_dict(opt.state_dict())
    for _ in range(3): new.step(single)
    assert all(torch.isfinite(p).all() for p in single.params) and new.state[single.params[0]]["left"].dtype == torch.float32


def test_other_blocks_in_mid_run_are_refused():
    "A shape error from bmm, or statistics that are silently dropped."
    prob = problem()
    opt = Shampoo(prob.params); opt.step(prob)
    opt.param_groups[0]["block_size"] = 3
    with pytest.raises(ValueError, match="block_size is 3 .*make a new optimizer"): opt.step(prob)


# ---------------------------------------------------------------------------------------------- the family's services
@pytest.mark.parametrize("dtype", [torch.float32, D, torch.bfloat16])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_dtypes(options, dtype):
    "Statistics in bfloat16, whose rounding is larger than most eigenvalues."
    prob = problem(dtype)
    opt = Shampoo(prob.params, lr=1e-3, **options)
    first = prob().item()
    for _ in range(10): opt.step(prob.__call__)
    for p in prob.params:
        assert p.dtype == dtype and torch.isfinite(p).all()
        for key, value in opt.state[p].items(): assert value.dtype == (D if dtype == D and value.dim() else torch.float32), key
    assert prob().item() < 2 * first


def test_groups_have_their_own_options():
    "Options, or a schedule, read from the first group for all."
    a, b = (nn.Parameter(torch.zeros(3, 2, dtype=D)) for _ in range(2))
    opt = Shampoo([{"params": [a], "stats_every": 2, "graft": "none", "accumulate": "sum"}, {"params": [b], "lr": .5, "graft": "sgd", "inverse_every": 3}], lr=1., betas=(0., .9), eps=0., inverse_every=1)
    grads = [normal(3, 2, seed=s) for s in range(5)]
    for g in grads:
        before = a.detach().clone(), b.detach().clone()
        a.grad, b.grad = g.clone(), g.clone()
        opt.step()
        assert (b.detach() - before[1]).norm().item() == pytest.approx(.5 * g.norm().item())
    assert opt.state[a]["updates"].item() == 3 and opt.state[b]["updates"].item() == 5
    torch.testing.assert_close(opt.state[a]["left"][0], sum(g @ g.T for g in grads[::2]))


def test_frozen_unused_and_thawed_parameters():
    "Statistics of a frozen layer, or roots that a layer which begins later does not have."
    used, unused, frozen = (nn.Parameter(torch.ones(2, 2, dtype=D)) for _ in range(3))
    frozen.requires_grad_(False)
    opt = Shampoo([used, unused, frozen], lr=.01, stats_every=50, inverse_every=100)
    for _ in range(5): opt.step(lambda: (used**2 * frozen).sum())
    assert torch.equal(frozen, torch.ones_like(frozen)) and torch.equal(unused, torch.ones_like(unused)) and (used != 1).all() and not opt.state[frozen]
    frozen.requires_grad_(True); used.requires_grad_(False)
    kept = used.detach().clone()
    opt.step(lambda: (used**2 * frozen).sum())
    assert torch.equal(used, kept) and (frozen != 1).all() and opt.state[frozen]["step"].item() == 1 and opt.state[frozen]["root_left"].any()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_maximize_decay_clipping_and_warm_up(options):
    "A decay that goes through the preconditioner, statistics of the unclipped gradient, a sign that is lost."
    def run(steps=3, sign=1, **more):
        prob = problem(); start = flat(prob.params)
        opt = Shampoo(prob.params, lr=.01, **{**options, **more})
        for _ in range(steps): opt.step(lambda: sign * prob())
        return start, flat(prob.params), opt, prob
    torch.testing.assert_close(run(sign=-1, maximize=True)[1], run()[1], rtol=1e-9, atol=1e-11)
    start, plain, *_ = run(1)
    torch.testing.assert_close(run(1, weight_decay=.3)[1], plain - .01 * .3 * start, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(run(1, lr_warmup=4)[1] - start, (plain - start) / 4, rtol=1e-8, atol=1e-12)
    start, clipped, opt, prob = run(1, max_grad_norm=1e-3, block_size=None, vectors="matrix", accumulate="sum")
    trace = sum(opt.state[p]["left"].diagonal(dim1=1, dim2=2).sum().item() for p in prob.params)
    assert trace**.5 == pytest.approx(1e-3, rel=.02)


def test_the_three_calls_agree():
    "A Problem, a closure and `.grad` that give different statistics."
    ends = []
    for way in ("problem", "closure", "grad"):
        prob = problem()
        opt = Shampoo(prob.params, lr=.01, inverse_every=2)
        for _ in range(5):
            if way == "problem": opt.step(prob)
            elif way == "closure": opt.step(lambda: prob())
            else: opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()
        assert not opt.needs_graph()
        ends.append(flat(prob.params))
    torch.testing.assert_close(ends[0], ends[1]); torch.testing.assert_close(ends[1], ends[2])


@pytest.mark.parametrize("options, words", [
    (dict(lr=-1.), "lr is -1.0"), (dict(betas=(.9, 1.)), "betas is"), (dict(eps=-1e-3), "eps is"), (dict(block_size=0), "block_size is 0"), (dict(block_size=1.5), "block_size is 1.5"), (dict(stats_every=0), "stats_every is 0"),
    (dict(stats_every=True), "stats_every is True"), (dict(inverse_every=0), "inverse_every is 0"), (dict(warmup=-1), "warmup is -1"), (dict(accumulate="mean"), "'ema', 'sum'"), (dict(graft="lion"), "'none', 'sgd', 'adagrad', 'rmsprop', 'adam'"),
    (dict(graft_beta=1.), "graft_beta is 1.0"), (dict(graft_eps=-1.), "graft_eps is -1.0"), (dict(root="svd"), "'eigh', 'newton'"), (dict(root_order=0), "root_order is 0"), (dict(relative=1), "relative is 1"),
    (dict(vectors="full"), "'auto', 'matrix'"), (dict(average="none"), "'gradient', 'direction'"), (dict(max_grad_norm=0.), "max_grad_norm is 0.0")], ids=str)
def test_wrong_options_are_one_sentence(options, words):
    "An option that is accepted and fails, or is ignored, later."
    with pytest.raises(ValueError, match=words): Shampoo([nn.Parameter(torch.ones(1))], **options)
    if "max_grad_norm" not in options:
        with pytest.raises(ValueError, match=words): Shampoo([{"params": [nn.Parameter(torch.ones(1))], **options}])


def test_unknown_options_and_frozen_models():
    with pytest.raises(ValueError, match="'momentum' is not an option of Shampoo"): Shampoo([{"params": [nn.Parameter(torch.ones(1))], "momentum": .9}])
    p = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(RuntimeError, match="frozen"): Shampoo([p]).step(lambda: p.sum())


def test_a_thousand_steps_leak_nothing_and_train():
    "A list of blocks or roots that grows; a sign."
    prob = problem(torch.float32)
    opt = Shampoo(prob.params, lr=3e-3, inverse_every=10)
    first = prob().item()
    for _ in range(30): opt.step(prob)
    count = lambda: sum(v.numel() for s in opt.state.values() for v in s.values())
    before = count()
    for _ in range(500): opt.step(prob)
    assert count() == before and prob().item() < .05 * first


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_steps_between_inversions_do_not_wait_for_the_device(options):
    "An .item() or a mask on the host in every step."
    params = [nn.Parameter(torch.randn(40, 30, device="cuda")), nn.Parameter(torch.randn(40, device="cuda"))]
    opt = Shampoo(params, lr=1e-3, inverse_every=100, **options)
    for p in params: p.grad = torch.randn_like(p)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5): opt.step()
    finally: torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in params)
