"""K-FAC against exact Gauss-Newton blocks, closed forms and itself. Each test's docstring names the mistake it would catch."""
import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from inr_precond.curvature import Problem, _why_not, ggn_vp, value_and_grad, value_grad_layers
from inr_precond.inr import INR, GaborLayer, Gaussian, PositionalEncoding, ReLU, Sine, Wavelet
from inr_precond.optim.kfac import KFAC, damped_inverse, output_hessian, psd_root, split_damping, visible_layers

FISHERS = ("empirical", "exact", "sampled")
NETWORKS = {"gaussian": dict(activation=Gaussian(.4)), "relu": dict(activation=ReLU()), "sine": dict(activation=Sine(5.)), "wavelet": dict(activation=Wavelet(2., 1.)),
            "gabor": dict(layer=GaborLayer), "relu-pe": dict(activation=ReLU(), encoding=PositionalEncoding(1, 3))}


def problem(dtype=torch.float64, seed=0, loss="mse", rows=32, name="gaussian"):
    "A small network on a sine, as a Problem."
    gen = torch.Generator().manual_seed(seed)
    net = INR(1, 2, hidden_features=7, num_layers=3, generator=gen, dtype=torch.float64, **NETWORKS[name]).to(dtype)
    x = torch.linspace(-1, 1, rows, dtype=torch.float64)[:, None]
    return Problem(net, x.to(dtype), (.5 + .4 * torch.cat([torch.sin(5 * x), torch.cos(3 * x)], 1)).to(dtype), loss)


def linear_problem(m=3, n=4, rows=50, seed=0, bias=True, c=1.):
    "Linear least squares on one layer."
    torch.manual_seed(seed)
    net = nn.Linear(n, m, bias=bias).double()
    x, y = torch.randn(rows, n, dtype=torch.float64), torch.randn(rows, m, dtype=torch.float64)
    return Problem(net, x, y, lambda o, t: c * (o - t).square().mean())


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def dense_ggn(prob, params):
    "The Gauss-Newton matrix, one product a column."
    sizes = [p.numel() for p in params]
    return torch.stack([flat(ggn_vp(prob, params, [c.view(p.shape) for c, p in zip(e.split(sizes), params)])) for e in torch.eye(sum(sizes), dtype=params[0].dtype)], 1)


def augmented(m, n):
    "Places of row-wise [W b] in the order (W row-wise, then b)."
    return torch.cat([torch.cat([torch.arange(i * n, (i + 1) * n), torch.tensor([m * n + i])]) for i in range(m)])


def kfac(prob, **options):
    return KFAC(prob.model, **{**dict(lr=.05, damping=.1, stats_every=2, inverse_every=3, betas=(.9, .8)), **options})


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------------------------------------- the factors
@pytest.mark.parametrize("bias", [True, False])
def test_exact_factors_are_the_exact_block_of_linear_least_squares(bias):
    "The Kronecker order of (17) as printed, delta of the mean loss, or empirical factors taken for exact ones."
    prob = linear_problem(bias=bias)
    G = dense_ggn(prob, prob.params)
    order = augmented(3, 4) if bias else torch.arange(12)
    G = G[order][:, order]
    found = {}
    for fisher in ("exact", "empirical"):
        opt = KFAC(prob.model, lr=0., fisher=fisher)
        opt.step(prob)
        found[fisher] = opt.factors()[""]
    A, S = found["exact"]
    assert relative(torch.kron(S, A), G) < 1e-14
    assert relative(torch.kron(A, S), G) > .2       # printed order
    assert relative(torch.kron(found["empirical"][1], found["empirical"][0]), G) > .3


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("rows", [1, 7, 32])
def test_the_empirical_output_factor_is_made_of_gradients_per_sample(rows, loss):
    "The delta of the mean loss, 1/B of its sample's: S is 1/B^2 of what it should be; or B where B^2 belongs, which only a batch of one forgives."
    prob = problem(rows=rows, loss=loss)
    opt = KFAC(prob.model, lr=0.); opt.step(prob)
    layers, criterion = prob.model.layers, {"mse": lambda o, t: (o - t).square().mean(), "bce": nn.functional.binary_cross_entropy_with_logits}[loss]
    moments = [0.] * len(layers)
    for x, y in zip(prob.inputs, prob.targets):         # one sample's own loss, and its gradient in z = W phi + b
        h, z = x, []
        for k, layer in enumerate(layers):
            z.append(layer(h)); h = prob.model.activation(z[-1]) if k < len(layers) - 1 else z[-1]
        moments = [M + torch.outer(d, d) / rows for M, d in zip(moments, torch.autograd.grad(criterion(h, y), z))]
    for (_, S), M in zip(opt.factors().values(), moments, strict=True):
        torch.testing.assert_close(S, M, rtol=1e-10, atol=1e-16)
        if rows > 1: assert relative(S / rows, M) > .8 and relative(S / rows**2, M) > .97


def test_exact_kfac_is_the_gauss_newton_step_of_linear_least_squares():
    "A transposed or misplaced inverse, a bias left out, a factor of B or C: one step with rate 1 lands on the solution only if all is right."
    prob = linear_problem(bias=True)
    x1 = torch.cat([prob.inputs, torch.ones(50, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(x1, prob.targets).solution.T
    far = {}
    for fisher in ("exact", "empirical"):
        p = copy.deepcopy(prob)
        KFAC(p.model, lr=1., betas=(0., .95), damping=0., fisher=fisher).step(p)
        far[fisher] = relative(torch.cat([p.model.weight, p.model.bias[:, None]], 1).detach(), solution)
    assert far["exact"] < 1e-12 and far["empirical"] > .3


@pytest.mark.parametrize("ekfac", [False, True])
def test_the_step_is_the_dense_inverse_of_the_damped_factors(ekfac):
    "S and A exchanged, damping left out or added twice, a bias column treated as a row; whatever the direction, P times it is the momentum."
    prob = problem()
    start = [p.detach().clone() for p in prob.params]
    opt = kfac(prob, lr=1., betas=(0., .8), fisher="exact", ekfac=ekfac, damping=.03)
    opt.step(prob)
    moved = [s - p.detach() for s, p in zip(start, prob.params)]
    for i, (A, S) in enumerate(opt.factors().values()):
        m, n = len(S), len(A) - 1
        G = torch.cat([prob.params[2 * i].grad, prob.params[2 * i + 1].grad[:, None]], 1).flatten()
        D = torch.cat([moved[2 * i], moved[2 * i + 1][:, None]], 1).flatten()
        eye = lambda k: torch.eye(k, dtype=torch.float64)
        if ekfac:
            state = opt.state[prob.params[2 * i]]
            U = torch.kron(state["basis_outputs"], state["basis_inputs"])
            P = U @ torch.diag(state["scaling"].flatten()) @ U.T + .03 * eye(m * (n + 1))
        else:
            a, s = split_damping(A, S, .03)
            assert a * s == pytest.approx(.03)
            P = torch.kron(S + s * eye(m), A + a * eye(n + 1))
        torch.testing.assert_close(P @ D, G, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_ekfac_scaling_is_the_diagonal_of_the_exact_block_in_its_basis(fisher, loss):
    "Eigenvalue products (plain K-FAC), squares of means, or a missing B."
    prob = problem(loss=loss)
    params = prob.params
    opt = kfac(prob, lr=0., ekfac=True, fisher=fisher, stats_every=1, inverse_every=1)
    for _ in range(3): opt.step(prob)               # still parameters: averages change nothing
    if fisher == "exact": G = dense_ggn(prob, params)
    else:
        rows = [flat(torch.autograd.grad(Problem(prob.model, prob.inputs[i:i + 1], prob.targets[i:i + 1], loss)(), params)) for i in range(32)]
        G = torch.stack(rows).T @ torch.stack(rows) / 32
    start, differ = 0, []
    for i, (A, S) in enumerate(opt.factors().values()):
        m, n = len(S), len(A) - 1
        block = G[start:start + m * (n + 1), start:start + m * (n + 1)][augmented(m, n)][:, augmented(m, n)]
        start += m * (n + 1)
        state = opt.state[params[2 * i]]
        U = torch.kron(state["basis_outputs"], state["basis_inputs"])
        diagonal = torch.diagonal(U.T @ block @ U)
        torch.testing.assert_close(state["scaling"].flatten(), diagonal, rtol=1e-9, atol=1e-12 * float(diagonal.max()))
        differ.append(relative(torch.outer(torch.linalg.eigvalsh(S), torch.linalg.eigvalsh(A)).flatten(), diagonal))
    assert max(differ) > .05                        # the correction is not empty here


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("ekfac", [False, True])
def test_sampled_factors_are_the_exact_ones_in_expectation(loss, ekfac):
    "Probes without the root of the output Hessian, or that never change. Four standard errors over independent seeds."
    prob = problem(loss=loss)
    exact = kfac(prob, lr=0., fisher="exact")
    exact.step(prob)
    draws = {name: [] for name in exact.factors()}
    for seed in range(200):
        opt = kfac(prob, lr=0., fisher="sampled", seed=seed, ekfac=ekfac)
        opt.step(prob)
        for name, (A, S) in opt.factors().items():
            torch.testing.assert_close(A, exact.factors()[name][0])
            draws[name].append(S)
    for name, S in draws.items():
        S, truth = torch.stack(S), exact.factors()[name][1]
        error = (S.mean(0) - truth).abs() / (S.std(0) / len(S)**.5 + 1e-9 * truth.abs().max())
        assert error.max() < 4.5 and S.std(0).max() > 0, name


def test_statistics_are_a_bias_corrected_average():
    "An average from zero without correction, one corrected by all steps, or the last batch alone."
    prob = linear_problem()
    batches = [torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    opt = KFAC(prob.model, lr=0., betas=(.9, .7), stats_every=2)
    seen = []
    for t, x in enumerate(batches):
        opt.step(Problem(prob.model, x, torch.zeros(20, 3, dtype=torch.float64)))
        if t % 2 == 0: seen.append(x.T @ x / 20)
        k = len(seen)
        expected = sum(.3 * .7**(k - 1 - i) * M for i, M in enumerate(seen)) / (1 - .7**k)
        torch.testing.assert_close(opt.factors()[""][0][:4, :4], expected)


# ---------------------------------------------------------------------------------------------- schedule and scaling
def test_statistics_and_inverses_follow_their_own_periods():
    "One period for both, counting from 1, or a warm-up off by one."
    prob = problem()
    opt = kfac(prob, stats_every=3, inverse_every=4, warmup=2)
    p, stats, inverses = prob.params[0], [], []
    for t in range(13):
        before = {k: v.clone() for k, v in opt.state[p].items()}
        opt.step(prob)
        if not before or not torch.equal(before["outputs"], opt.state[p]["outputs"]): stats.append(t)
        if not before or not torch.equal(before["inverse_outputs"], opt.state[p]["inverse_outputs"]): inverses.append(t)
    assert stats == [0, 1, 3, 6, 9, 12] and inverses == [0, 1, 4, 8, 12]


@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("way", ["problem", "closure"])
def test_a_scaled_loss(way, ekfac):
    "The exact factors scale with the loss and the step does not; the empirical ones scale with its square, and the step with 1/c. Damping scaled alike."
    def move(c, fisher):
        prob = problem()
        start = flat(prob.params)
        scaled = Problem(prob.model, prob.inputs, prob.targets, (lambda o, y: c * (o - y).square().mean()))
        damping = 1e-3 * (c if fisher == "exact" else c * c)
        opt = kfac(prob, damping=damping, fisher=fisher, ekfac=ekfac)
        if way == "problem": opt.step(scaled)
        else: opt.step(lambda: scaled())
        return flat(prob.params) - start
    torch.testing.assert_close(move(1., "exact"), move(1000., "exact"), rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(move(1., "empirical"), 1000 * move(1000., "empirical"), rtol=1e-5, atol=1e-10)


def test_split_damping_by_hand():
    "pi upside down, traces without the dimensions, a division by a factor that is zero."
    A, S = torch.eye(2) * 8., torch.eye(5) * 2.
    assert split_damping(A, S, .09) == pytest.approx((.6, .15))     # pi = 2
    assert split_damping(A, S, .09, pi=False) == pytest.approx((.3, .3))
    assert split_damping(A, torch.zeros(3, 3), .09) == pytest.approx((.3, .3)) and split_damping(A, S, 0.) == (0., 0.)


# ---------------------------------------------------------------------------------------------- degenerate layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0., 1e-12, .1])
@pytest.mark.parametrize("ekfac", [False, True])
def test_a_rank_deficient_statistic_neither_crashes_nor_explodes(dtype, damping, ekfac):
    "A Cholesky factor of a singular matrix; 1/0 along its null space. Two rows for eight inputs, and two inputs that are copies."
    torch.manual_seed(0)
    net = nn.Linear(8, 3).to(dtype)
    x = torch.randn(2, 8, dtype=dtype); x[:, 1] = x[:, 0]
    y = torch.randn(2, 3, dtype=dtype)
    prob = Problem(net, x, y)
    for _ in range(3):
        before = flat(net.parameters())
        KFAC(net, lr=1., betas=(0., .9), damping=damping, fisher="exact", ekfac=ekfac).step(prob)
        assert torch.isfinite(flat(net.parameters())).all() and (flat(net.parameters()) - before).norm() < 50
    if damping < 1e-3 and not (ekfac and damping): assert prob().item() < 1e-3   # the rows are fitted though A is singular


def test_damped_inverse_of_a_singular_matrix_is_the_pseudo_inverse():
    "A Cholesky that succeeds on rounding errors and inverts them."
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 20, dtype=dtype, generator=torch.Generator().manual_seed(0))
        M = x.T @ x
        torch.testing.assert_close(damped_inverse(M), torch.linalg.pinv(M.double(), hermitian=True, rtol=1e-4).to(dtype), rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(damped_inverse(M, .5) @ (M + .5 * torch.eye(20, dtype=dtype)), torch.eye(20, dtype=dtype), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(damped_inverse(torch.diag(torch.tensor([2., torch.finfo(dtype).eps / 4], dtype=dtype))), torch.diag(torch.tensor([.5, 0.], dtype=dtype)))   # here Cholesky succeeds
        assert damped_inverse(torch.zeros(4, 4, dtype=dtype)).count_nonzero() == 0
        assert damped_inverse(torch.full((2, 2), torch.nan, dtype=dtype)).isnan().all()


@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 4)])
def test_a_layer_of_one_row_or_column(shape, fisher, ekfac):
    "A squeezed dimension."
    prob = linear_problem(m=shape[1], n=shape[0])
    opt = kfac(prob, fisher=fisher, ekfac=ekfac, lr=.5, damping=.01, stats_every=1, inverse_every=1)
    first = prob().item()
    for _ in range(30): opt.step(prob)
    assert prob().item() < first and all(torch.isfinite(p).all() for p in prob.params)


@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("damping", [0., .1])
def test_a_layer_without_gradient(damping, ekfac):
    "S = 0: a division by its trace, or 0 * inf."
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad(): net[0].bias.fill_(-100.)  # every unit is dead
    before = flat(net[0].parameters())
    opt = KFAC(net, damping=damping, ekfac=ekfac)
    for _ in range(3): opt.step(Problem(net, torch.rand(6, 2, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64)))
    assert torch.equal(flat(net[0].parameters()), before) and torch.isfinite(flat(net.parameters())).all()


def test_an_unused_layer_and_one_seen_later():
    "A crash, or a first average that is biased towards zero."
    net = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}).double()
    x = torch.rand(6, 2, dtype=torch.float64)
    opt = KFAC(net, betas=(0., .9), stats_every=1, inverse_every=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3): opt.step(lambda: net["a"](x).square().mean())
    assert list(opt.factors()) == ["a"]
    opt.step(lambda: (net["a"](x) + net["b"](x)).square().mean())
    torch.testing.assert_close(opt.factors()["b"][0][:2, :2], x.T @ x / 6)
    assert "inverse_outputs" in opt.state[net["b"].weight]


# ---------------------------------------------------------------------------------------------- ways of calling
def train(prob, way, steps=7, watch=None, **options):
    opt = kfac(prob, **options)
    own = Problem(prob.model, prob.inputs, prob.targets, lambda o, y: prob.cost(o))     # a loss of one's own: the general path
    for _ in range(steps):
        if way == "problem": opt.step(prob)
        elif way == "own loss": opt.step(own)
        elif way == "closure": opt.step(lambda: prob())
        elif way == "backward":
            def closure():
                opt.zero_grad(); loss = prob(); loss.backward(create_graph=opt.needs_graph()); return loss
            opt.step(closure)
        else: opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()
    return flat(prob.params)


@pytest.mark.parametrize("options", [dict(), dict(maximize=True, lr_warmup=3), dict(weight_decay=.1)])
def test_adam_of_the_natural_direction_in_one_pass(options, monkeypatch):
    "The kernel fed with the plain gradient, with statistics that are not updated before it, with the second moment's decay of Adam, or a clock that stands still."
    def ends():
        net = INR(1, 2, hidden_features=96, num_layers=4, activation=Gaussian(.4), generator=torch.Generator().manual_seed(0))
        x = torch.linspace(-1, 1, 64)[:, None]
        prob = Problem(net, x, torch.cat([torch.sin(5 * x), torch.cos(3 * x)], 1))
        opt = KFAC(net, lr=1e-3, then="adam", inverse_every=2, beta_square=.9, **options)
        for _ in range(5): opt.step(prob)
        state = opt.state[prob.params[0]]
        assert state["step"] == 5
        return flat(prob.params), state["square"], state["momentum"]
    fused = ends()
    monkeypatch.setattr("inr_precond.optim.kfac._one_pass", lambda *_: False)
    for a, b in zip(fused, ends()): assert (a - b).norm() < 1e-4 * b.norm()



@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name, loss, fisher, ekfac", [(n, "mse", "empirical", False) for n in NETWORKS] + [(n, "bce", "exact", False) for n in NETWORKS]
                         + [("gaussian", loss, f, e) for loss in ("mse", "bce") for f in FISHERS for e in (False, True)] + [("gabor", "bce", "sampled", True)])
def test_all_ways_to_call_step_agree_with_the_fast_path(name, loss, fisher, ekfac):
    "Deltas of another layer, sums instead of means, probes drawn in another order, a hook that misses GaborLayer's second map."
    assert _why_not(problem(name=name, loss=loss), problem().params) is None
    ends = {way: train(problem(name=name, loss=loss), way, fisher=fisher, ekfac=ekfac) for way in ("problem", "own loss", "closure", "backward", "idiom")}
    for way, end in ends.items(): torch.testing.assert_close(end, ends["problem"], rtol=1e-6, atol=1e-8, msg=lambda m, way=way: f"{way}: {m}")


@pytest.mark.parametrize("fisher", FISHERS)
def test_tiles_of_a_large_batch_add_up(fisher):
    "Statistics of the last tile alone, or scratch memory that the next tile overwrites."
    ends = [train(problem(rows=5000), way, steps=4, fisher=fisher) for way in ("problem", "closure")]
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


def test_what_layers_see_is_not_overwritten_and_its_sum_is_the_gradient():
    "Views of the sweeps' scratch memory."
    for name in NETWORKS:
        prob = problem(name=name)
        loss, grads, seen = value_grad_layers(prob, prob.params, FISHERS, torch.Generator().manual_seed(0))
        copies = [(phi.clone(), {k: [d.clone() for d in ds] for k, ds in deltas.items()}) for _, phi, deltas in seen]
        value_and_grad(prob, prob.params); value_grad_layers(prob, prob.params)
        assert torch.equal(loss, value_and_grad(prob, prob.params)[0])
        for (w, phi, deltas), (phi2, deltas2) in zip(seen, copies):
            assert torch.equal(phi, phi2) and all(torch.equal(d, e) for k in FISHERS for d, e in zip(deltas[k], deltas2[k])) and len(deltas["exact"]) == 2
            torch.testing.assert_close(deltas["empirical"][0].T @ phi, grads[next(i for i, p in enumerate(prob.params) if p is w)])
    with pytest.raises(ValueError, match="does not apply because the loss"): value_grad_layers(Problem(prob.model, prob.inputs, prob.targets, lambda o, y: o.sum()), prob.params)
    with pytest.raises(ValueError, match="'fisher'"): value_grad_layers(prob, prob.params, ["fisher"])


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradient_accumulation_and_two_forwards_in_one_closure():
    "Statistics of the last pass alone, or of passes without a backward."
    prob = problem()
    halves = [(prob.inputs[i::2], prob.targets[i::2]) for i in range(2)]
    part = lambda i: (prob.model(halves[i][0]) - halves[i][1]).square().mean() / 2
    whole = kfac(prob, lr=0.); whole.step(prob)
    for fisher in FISHERS[:2]:
        whole = kfac(prob, lr=0., fisher=fisher); whole.step(prob)
        a = kfac(prob, lr=0., fisher=fisher); a.step(lambda: part(0) + part(1))
        b = kfac(prob, lr=0., fisher=fisher); b.zero_grad()
        prob.model(prob.inputs)                         # looked at, not trained on
        for i in range(2): part(i).backward(create_graph=b.needs_graph())
        b.step()
        for opt in (a, b):
            for name, (A, S) in whole.factors().items(): torch.testing.assert_close(opt.factors()[name], (A, S))


def test_two_losses_of_one_forward_pass_add_up():
    "The gradient of the last loss alone."
    prob = problem()
    a, b = kfac(prob, lr=0.), kfac(prob, lr=0.)
    a.step(prob)
    b.zero_grad()
    error = (prob.model(prob.inputs) - prob.targets).square() / prob.targets.numel()
    error[:, 0].sum().backward(retain_graph=True); error[:, 1].sum().backward()
    b.step()
    for name, (A, S) in a.factors().items(): torch.testing.assert_close(b.factors()[name], (A, S))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_errors_are_one_sentence():
    prob = problem()
    with pytest.raises(TypeError, match="needs the module"): KFAC(prob.params)
    for options, words in (({"fisher": "true"}, "'empirical', 'exact', 'sampled'"), ({"damping": -1.}, "damping is -1.0"), ({"stats_every": 0}, "stats_every is 0"), ({"inverse_every": 1.5}, "inverse_every is 1.5"),
                           ({"ekfac": 1}, "ekfac is 1"), ({"then": "sgd"}, "'descend', 'adam'"), ({"beta_square": 1.}, "beta_square is 1.0"), ({"lr": -1.}, "lr is -1.0"),
                           ({"params": [{"params": [prob.params[0]], "rank": 1}]}, "'rank' is not an option"), ({"params": [{"params": [prob.params[0]], "stats_every": 0}]}, "stats_every is 0")):
        with pytest.raises(ValueError, match=words): KFAC(prob.model, **options)
    opt = kfac(prob, fisher="exact")
    prob().backward()
    with pytest.raises(RuntimeError, match=r"create_graph=opt.needs_graph\(\)"): opt.step()
    opt = kfac(prob, stats_every=1)
    opt.step(prob)                                  # the steps before were given a Problem: no hooks
    prob().backward()
    with pytest.raises(RuntimeError, match=r"call opt.watch\(\)"): opt.step()
    opt.zero_grad(); opt.watch(); prob().backward(); opt.step()
    two = nn.Linear(1, 2).double()
    class Pair(nn.Module):
        def __init__(self): super().__init__(); self.l = two
        def forward(self, x): return self.l(x), x
    pair = Pair()
    with pytest.raises(RuntimeError, match="return one tensor"): KFAC(pair, fisher="exact").step(lambda: pair(prob.inputs)[0].square().mean())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.)
    single = problem(torch.float32)
    opt = kfac(single)
    scaler.scale(single()).backward()
    with pytest.raises(RuntimeError, match="GradScaler"): scaler.step(opt)


def test_output_hessian_of_a_loss_of_ones_own():
    "Off-diagonal terms left out; the transpose; negative curvature whose root is NaN."
    gen = torch.Generator().manual_seed(0)
    out = torch.randn(5, 3, dtype=torch.float64, generator=gen, requires_grad=True) * 1.
    M = torch.randn(3, 3, dtype=torch.float64, generator=gen); M = M @ M.T
    loss = .5 * torch.einsum("bi,ij,bj->", out, M, out)
    g, = torch.autograd.grad(loss, out, create_graph=True)
    H = output_hessian(g, torch.autograd.graph.get_gradient_edge(out), 3)
    torch.testing.assert_close(H, M.expand(5, 3, 3))
    R = psd_root(H)
    torch.testing.assert_close(R @ R.transpose(1, 2), H)
    signed = torch.diag(torch.tensor([4., -1., 0.]))[None]
    assert torch.equal(psd_root(signed)[0], torch.diag(torch.tensor([2., 0., 0.])))
    D = psd_root(torch.tensor([[[0., 1.], [1., 0.]]])); torch.testing.assert_close(D @ D.transpose(1, 2), torch.full((1, 2, 2), .5))


# ---------------------------------------------------------------------------------------------- hooks
def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("fisher", FISHERS)
def test_hooks_are_on_only_where_statistics_are_due_in_the_idiom(fisher):
    "Hooks that stay, or slow every step."
    prob = problem()
    opt = kfac(prob, stats_every=3, fisher=fisher)
    on = []
    for _ in range(7):
        on.append(hooks(prob.model) > 0)
        assert _why_not(prob, prob.params) is None  # the fast path stays on
        opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()
    assert on == [True, False, False, True, False, False, True]
    for way in (prob, lambda: prob()):
        for _ in range(3): opt.step(way); assert hooks(prob.model) == 0
    opt.watch(); assert hooks(prob.model) == 3 + (fisher != "empirical")
    opt.remove_hooks(); assert hooks(prob.model) == 0


def test_a_hook_that_changes_something_still_turns_the_fast_path_off():
    "An exemption for all hooks."
    prob = problem()
    KFAC(prob.model)
    assert _why_not(prob, prob.params) is None
    prob.model.layers[0].register_forward_hook(lambda m, i, o: 2 * o)
    assert "hooks" in _why_not(prob, prob.params)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way, fisher", [("problem", "empirical"), ("closure", "exact"), ("idiom", "empirical"), ("idiom", "exact")])
def test_a_thousand_steps_leak_nothing(way, fisher):
    "A cycle record, graph, hook, record (the cycle collector is off here)."
    prob = problem(torch.float32, rows=8)
    opt = kfac(prob, lr=1e-3, fisher=fisher, stats_every=2, inverse_every=50)
    def step():
        if way == "problem": opt.step(prob)
        elif way == "closure": opt.step(lambda: prob())
        else:
            opt.zero_grad(); prob.model(prob.inputs)    # one forward pass without a backward
            prob().backward(create_graph=opt.needs_graph()); opt.step()
    for _ in range(40): step()
    gc.collect(); gc.disable()
    try:
        count = lambda: sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        before = count()
        for _ in range(1000): step()
        after = count()
    finally: gc.enable()
    assert after <= before + 5


def test_forward_passes_without_a_step_leave_nothing_behind():
    "Inputs of every forward pass kept until the next step."
    prob = problem(torch.float32)
    opt = kfac(prob)
    count = lambda: sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    prob.model(prob.inputs); gc.collect()
    before = count()
    for _ in range(50): prob.model(prob.inputs)
    assert count() <= before + 2 and not opt._watch.done


def test_a_copied_or_pickled_model_carries_no_optimizer():
    "A hook that drags the optimizer along, or cannot be pickled."
    prob = problem()
    opt = kfac(prob)
    assert hooks(prob.model) == 3
    for twin in (copy.deepcopy(prob.model), pickle.loads(pickle.dumps(prob.model))):
        assert all(hook.watch() is None for m in twin.modules() for hook in m._forward_hooks.values())
        assert torch.equal(twin(prob.inputs), prob.model(prob.inputs)) and hooks(twin) == 0
    del opt; gc.collect()
    prob.model(prob.inputs)
    assert hooks(prob.model) == 0


# ---------------------------------------------------------------------------------------------- layers it cannot see
class Scaled(nn.Module):
    "A linear layer and a learned scale."
    def __init__(self): super().__init__(); self.layer, self.scale = nn.Linear(2, 3, dtype=torch.float64), nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x): return self.layer(x) * self.scale


def test_a_parameter_outside_of_the_layers_is_said_once_and_takes_the_plain_gradient():
    "Silence; a warning at every step; damping as its P."
    torch.manual_seed(0)
    net = Scaled()
    x, y = torch.rand(10, 2, dtype=torch.float64), torch.rand(10, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="1 parameter outside of them take the plain gradient, P = I: scale"): opt = KFAC(net, lr=.5, betas=(0., .9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            before = net.scale.detach().clone()
            opt.step(lambda: (net(x) - y).square().mean())
            torch.testing.assert_close(net.scale.detach(), before - .5 * net.scale.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KFAC(problem().model)


def test_a_layer_whose_forward_does_not_run_is_said_once():
    "Linear layers whose parameters other code uses: no statistics, in silence."
    net = nn.Linear(2, 3, dtype=torch.float64)
    net = nn.Sequential(net, nn.Linear(3, 3, dtype=torch.float64))
    x = torch.rand(10, 2, dtype=torch.float64)
    opt = KFAC(net, lr=.5, betas=(0., .9), stats_every=1)
    loss = lambda: net[1](x @ net[0].weight.T).square().mean()
    with pytest.warns(UserWarning, match="has not seen layer '0'"): opt.step(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = net[0].weight.detach().clone(); opt.step(loss)
        torch.testing.assert_close(net[0].weight.detach(), before - .5 * net[0].weight.grad)
        opt.step(lambda: net(x).square().mean()); opt.step(loss)    # one that was seen keeps what it has, in silence
        fresh = KFAC(net, stats_every=1); fresh.step(lambda: net(x).square().mean()); fresh.step(loss)


def test_which_layers_are_visible():
    "Shared weights, parametrised layers and subclasses with another forward taken for plain ones."
    class Odd(nn.Linear):
        def forward(self, x): return 2 * super().forward(x)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    net = nn.ModuleDict(dict(a=a, b=b, odd=Odd(2, 2), norm=nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), plain=nn.Linear(2, 2), nobias=nn.Linear(2, 2, bias=False), conv=nn.Conv1d(1, 1, 1)))
    assert list(visible_layers(net)) == ["plain", "nobias"]
    assert list(visible_layers(INR(1, 1, 4, 3, layer=GaborLayer))) == ["layers.0.freqs", "layers.0.scales", "layers.1.freqs", "layers.1.scales", "layers.2"]


# ---------------------------------------------------------------------------------------------- parameters of every kind
@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_a_frozen_parameter_leaves_the_block_of_the_others(frozen, ekfac):
    "The rows and columns of the frozen one kept in the inverse; a moved frozen parameter."
    ends = []
    for way in ("problem", "closure"):
        prob = problem()
        prob.params[frozen].requires_grad_(False)
        frozen_value = [*prob.model.parameters()][frozen].detach().clone()
        train_ = train(prob, way, fisher="exact", ekfac=ekfac)
        assert torch.equal([*prob.model.parameters()][frozen], frozen_value)
        ends.append(train_)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)
    prob = linear_problem()
    prob.model.bias.requires_grad_(False)
    target = torch.linalg.lstsq(prob.inputs, prob.targets - prob.model.bias.detach()).solution.T
    KFAC(prob.model, lr=1., betas=(0., .9), damping=0., fisher="exact", ekfac=ekfac).step(prob)
    torch.testing.assert_close(prob.model.weight.detach(), target)
    prob = linear_problem()
    prob.model.weight.requires_grad_(False)
    KFAC(prob.model, lr=1., betas=(0., .9), damping=0., fisher="exact", ekfac=ekfac).step(prob)
    torch.testing.assert_close(prob.model.bias.detach(), (prob.targets - prob.inputs @ prob.model.weight.T).mean(0).detach())


@pytest.mark.parametrize("ekfac", [False, True])
def test_freezing_and_thawing_between_two_updates(ekfac):
    "An inverse made for the layer's other parameters, or a thawed one without statistics."
    prob = problem()
    opt = kfac(prob, ekfac=ekfac, stats_every=10, inverse_every=10, betas=(0., .9))
    everything = prob.params
    opt.step(prob)
    A, S = opt.factors()["layers.1"]
    everything[3].requires_grad_(False)             # the second layer's bias
    w, before = everything[2], everything[2].detach().clone()
    opt.step(prob)
    if not ekfac:
        a, s = split_damping(A[:-1, :-1], S, .1)
        expected = torch.linalg.inv(S + s * torch.eye(7, dtype=torch.float64)) @ w.grad @ torch.linalg.inv(A[:-1, :-1] + a * torch.eye(7, dtype=torch.float64))
        torch.testing.assert_close(before - w.detach(), .05 * expected)
    everything[3].requires_grad_(True)
    everything[2].requires_grad_(False)
    for _ in range(3): opt.step(prob)
    assert torch.isfinite(flat(everything)).all() and opt.state[everything[3]]["step"].item() == 5


def test_groups_have_their_own_options():
    "Options of the first group for all."
    prob = problem()
    layers = [[p for p in layer.parameters()] for layer in prob.model.layers]
    opt = KFAC(prob.model, betas=(0., .9), params=[{"params": layers[0], "lr": 0.}, {"params": layers[1], "stats_every": 3, "fisher": "exact"}, {"params": layers[2], "damping": 1e6, "fisher": "sampled"}])
    before = [flat(ps) for ps in layers]
    moments = []
    for _ in range(4):
        opt.step(prob)
        moments.append(opt.factors()["layers.1"][1].clone())
    assert torch.equal(flat(layers[0]), before[0]) and (flat(layers[1]) - before[1]).norm() > 1e-3 and 0 < (flat(layers[2]) - before[2]).norm() < 1e-5
    assert torch.equal(moments[0], moments[2]) and not torch.equal(moments[2], moments[3])
    assert opt.state[layers[0][0]]["updates"].item() == 4 and opt.state[layers[1][0]]["updates"].item() == 2


def test_weight_and_bias_in_two_groups():
    "A bias without its weight takes the block of the bias alone."
    prob = linear_problem()
    opt = KFAC(prob.model, lr=1., betas=(0., .9), damping=0., fisher="exact", params=[{"params": [prob.model.weight], "lr": 0.}, {"params": [prob.model.bias]}])
    opt.step(prob)
    torch.testing.assert_close(prob.model.bias.detach(), (prob.targets - prob.inputs @ prob.model.weight.T).mean(0).detach())


@pytest.mark.parametrize("then", ["descend", "adam"])
def test_weight_decay_is_decoupled(then):
    "Decay that goes through the preconditioner."
    net = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad(): net.weight.fill_(3.)
    KFAC(net, lr=.5, weight_decay=.1, then=then).step(lambda: 0 * net(torch.ones(2, 1, dtype=torch.float64)).sum())
    assert net.weight.item() == pytest.approx(3 * (1 - .5 * .1))


def test_then_adam_is_adam_on_the_natural_direction():
    "Momentum first and P^-1 after it, Adam's second beta for the statistics, or a learning rate that enters twice."
    a, b = problem(), problem()
    ours = kfac(a, lr=.01, then="adam", beta_square=.99)
    natural = kfac(b, lr=1., betas=(0., .8))
    adam = torch.optim.Adam(b.params, lr=.01, betas=(.9, .99))
    for _ in range(8):
        ours.step(a)
        start = [p.detach().clone() for p in b.params]
        natural.step(b)
        with torch.no_grad():
            for p, s in zip(b.params, start): p.grad = s - p; p.copy_(s)
        adam.step()
    torch.testing.assert_close(flat(a.params), flat(b.params), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype, fisher, ekfac):
    "Statistics in bfloat16."
    prob = problem(dtype)
    opt = kfac(prob, fisher=fisher, ekfac=ekfac, then="descend", lr=.02)
    first = prob().item()
    for _ in range(10): opt.step(prob)
    for p in prob.params:
        assert p.dtype == dtype and torch.isfinite(p).all()
        for key, value in opt.state[p].items(): assert value.dtype == (torch.float64 if dtype == torch.float64 and value.dim() else torch.float32), key
    assert prob().item() < 1.5 * first


# ---------------------------------------------------------------------------------------------- checkpoints
def roundtrip(state):
    "Through a file's bytes, as a checkpoint goes."
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


KINDS = [dict(), dict(fisher="exact"), dict(fisher="sampled"), dict(fisher="sampled", ekfac=True), dict(then="adam", lr=1e-3, pi=False, betas=(.9, 0.))]


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", ["problem", "idiom"])
@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_continue_is_bit_for_bit(options, stop, way, dtype):
    "A probe generator, counter, inverse or precision that is lost on the way."
    def go(steps, prob, opt):
        for _ in range(steps):
            if way == "problem": opt.step(prob)
            else: opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()
    whole = problem(dtype); go(9, whole, kfac(whole, **options))
    first = problem(dtype); opt = kfac(first, **options); go(stop, first, opt)
    saved = roundtrip({"model": first.model.state_dict(), "opt": opt.state_dict()})
    second = problem(dtype, seed=5); second.model.load_state_dict(saved["model"])
    opt = kfac(second, **options, seed=99); opt.load_state_dict(saved["opt"]); go(9 - stop, second, opt)
    assert torch.equal(flat(whole.params), flat(second.params))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("start", [0, 5])
def test_rolling_back_copying_and_pickling_continue_alike(options, start):
    "Counters on the host, cached layers or hooks that survive a load or a copy."
    prob = problem()
    opt = kfac(prob, **options)
    for _ in range(start): opt.step(prob)
    saved = copy.deepcopy((prob.model.state_dict(), opt.state_dict()))
    twins = [copy.deepcopy((prob, opt)), pickle.loads(pickle.dumps((prob, opt)))]
    for p, o in [(prob, opt), *twins]:
        for _ in range(5): o.step(p)
        assert hooks(p.model) == 0
    prob.model.load_state_dict(saved[0]); opt.load_state_dict(saved[1])
    end = flat(twins[0][0].params)
    for _ in range(5): opt.step(prob)
    assert torch.equal(flat(prob.params), end) and torch.equal(flat(twins[1][0].params), end)


def test_states_of_others_are_refused_and_of_another_precision_taken_over():
    prob = problem()
    opt = kfac(prob); opt.step(prob)
    other = torch.optim.Adam(prob.params); prob().backward(); other.step()
    with pytest.raises(ValueError, match="load the state of the same optimizer"): kfac(prob).load_state_dict(other.state_dict())
    wider = INR(1, 2, hidden_features=9, num_layers=3, dtype=torch.float64)
    with pytest.raises(ValueError, match="load the state of the same model"): KFAC(wider).load_state_dict(opt.state_dict())
    single = problem(torch.float32)
    new = kfac(single); new.load_state_dict(opt.state_dict())
    for _ in range(3): new.step(single)
    assert all(torch.isfinite(p).all() for p in single.params) and new.factors()["layers.1"][0].dtype == torch.float32


def test_state_is_updated_in_place():
    "State that is replaced at each step cannot be captured in a graph."
    for options in KINDS:
        prob = problem()
        opt = kfac(prob, **options)
        opt.step(prob)
        places = lambda: [(k, v.data_ptr()) for p in prob.params for k, v in sorted(opt.state[p].items())]
        before = places()
        for _ in range(7): opt.step(prob)
        assert places() == before


@pytest.mark.parametrize("fisher", FISHERS)
def test_the_seed_decides_the_probes_and_a_refused_step_restores_them(fisher):
    "A global generator: runs would depend on what ran before."
    def end(seed):
        prob = problem()
        torch.manual_seed(torch.seed() % 1000)
        return train(prob, "problem", fisher=fisher, seed=seed)
    assert torch.equal(end(1), end(1)) and torch.equal(end(1), end(2)) == (fisher != "sampled")
    prob = problem()
    opt = kfac(prob, fisher=fisher, stats_every=1)
    before = opt.state_dict()["generator"]
    with pytest.raises(ValueError): opt.step(Problem(prob.model, prob.inputs, prob.targets[:5]))
    after = opt.state_dict()["generator"]
    assert before is after is None if fisher != "sampled" else torch.equal(before, after)


# ---------------------------------------------------------------------------------------------- loops of one's own
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_batch_that_is_skipped_leaves_nothing_in_the_statistics(fisher):
    "What a backward pass without a step (its loss was NaN) left with the hooks: a NaN there stays for ever."
    ends = []
    for skip in (False, True):
        prob = problem()
        opt = kfac(prob, fisher=fisher)
        if skip: (prob.model(prob.inputs * float("nan")) - prob.targets).square().mean().backward(create_graph=opt.needs_graph())
        for _ in range(2): opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()
        ends.append(flat(prob.params))
    assert torch.equal(*ends)


def test_gradients_cleared_between_forward_and_backward():
    "The coming pass forgotten with the one before."
    a, b = problem(), problem()
    oa, ob = kfac(a, fisher="exact"), kfac(b, fisher="exact")
    oa.step(lambda: a())
    loss = b(); ob.zero_grad(); loss.backward(create_graph=True); ob.step()
    torch.testing.assert_close(flat(a.params), flat(b.params))


@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_layer_through_which_no_row_comes(fisher, ekfac):
    "0 / 0 in the statistics of an expert that was not chosen."
    class Experts(nn.Module):
        def __init__(self): super().__init__(); self.each = nn.ModuleList(nn.Linear(2, 1, dtype=torch.float64) for _ in range(2))
        def forward(self, x): return torch.cat([e(x[k]) for e, k in zip(self.each, (x[:, 0] < self.edge, x[:, 0] >= self.edge))])
    model = Experts(); model.edge = 9.
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    opt = KFAC(model, fisher=fisher, ekfac=ekfac)
    before = model.each[1].weight.detach().clone()
    opt.step(lambda: (model(x) - 1).square().mean())
    assert flat(model.parameters()).isfinite().all() and torch.equal(model.each[1].weight, before)
    model.edge = 0.
    opt.step(lambda: (model(x) - 1).square().mean())
    assert flat(model.parameters()).isfinite().all() and not torch.equal(model.each[1].weight, before) and set(opt.factors()) == {"each.0", "each.1"}


@pytest.mark.parametrize("way", ["problem", "closure"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_maximizing_minus_the_loss_is_minimizing_the_loss(fisher, way):
    "The curvature of the loss in place of minus the loss: what is left of a concave one is the damping alone, and the step explodes."
    ends = []
    for sign in (1, -1):
        prob = problem()
        prob = Problem(prob.model, prob.inputs, prob.targets, lambda out, y, sign=sign: sign * (out - y).square().mean())
        opt = KFAC(prob.model, lr=.1, damping=1e-3, fisher=fisher, maximize=sign < 0)
        for _ in range(3): opt.step(prob if way == "problem" else lambda prob=prob: prob())
        ends.append(flat(prob.params))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("added", [{}, {"fisher": "exact"}])
def test_a_group_that_is_added_in_mid_run_is_watched(added):
    "Hooks that stay off at its first step, or that do not see the outputs which it needs."
    prob = problem()
    one, two = list(prob.model.layers[0].parameters()), list(prob.model.layers[1].parameters())
    opt = kfac(prob, params=one, stats_every=5)
    for _ in range(2): opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()
    opt.add_param_group({"params": two, **added})
    opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()
    assert len(opt.factors()) == 2 and hooks(prob.model) == 0


def test_maximizing_on_the_fast_path_is_the_same():
    "The curvature of -loss in the hooks and that of the loss in the sweeps."
    ends = []
    for fast in (True, False):
        prob = problem()
        opt = KFAC(prob.model, lr=1e-3, fisher="exact", maximize=True)
        opt.step(prob if fast else lambda prob=prob: prob())
        ends.append(flat(prob.params))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_a_layer_that_is_thawed_in_mid_run_is_watched(fisher):
    "Hooks that stay off at the first step of a parameter that was frozen."
    prob = problem()
    prob.model.layers[1].requires_grad_(False)
    opt = kfac(prob, stats_every=5, fisher=fisher)
    for step in range(4):
        if step == 2: prob.model.layers[1].requires_grad_(True)
        opt.zero_grad(); assert (hooks(prob.model) > 0) == (step in (0, 2))
        prob().backward(create_graph=opt.needs_graph()); opt.step()
    assert len(opt.factors()) == 3


def test_frozen_parameters_ask_for_no_hooks():
    "Hooks on at every step for a group that stopped where its statistics were due."
    prob = problem()
    one, two = list(prob.model.layers[0].parameters()), list(prob.model.layers[1].parameters())
    opt = kfac(prob, params=[{"params": one}, {"params": two}], stats_every=2)
    for step in range(4):
        if step == 2: prob.model.layers[1].requires_grad_(False)
        opt.zero_grad(); assert (hooks(prob.model) > 0) == (step % 2 == 0)
        prob().backward(); opt.step()


@pytest.mark.parametrize("options", [{}, {"fisher": "exact"}, {"ekfac": True}], ids=str)
def test_a_layer_without_inputs(options):
    "Rows that cannot be counted where there are no columns."
    layer = nn.Linear(0, 3, dtype=torch.float64)
    before = layer.bias.detach().clone()
    KFAC(layer, **options).step(lambda: (layer(torch.zeros(2, 0, dtype=torch.float64)) - 9).square().mean())
    assert layer.bias.isfinite().all() and not torch.equal(layer.bias, before)


def test_a_basis_is_not_made_anew_from_the_same_factors():
    "Inverses due more often than statistics come. Catches EKFAC that falls back to plain K-FAC's scaling until the next statistics."
    prob = problem()
    opt = KFAC(prob.model, lr=0., ekfac=True, fisher="exact", stats_every=10, inverse_every=5)
    directions = []
    for _ in range(10): opt.step(prob); directions.append([opt.state[p]["scaling"].clone() for p in prob.params if "scaling" in opt.state[p]])
    assert directions[0] and all(torch.equal(a, b) for later in directions[1:] for a, b in zip(directions[0], later))
    opt.step(prob)
    kept = KFAC(prob.model, lr=0., ekfac=True, fisher="exact", stats_every=10, inverse_every=5); kept.load_state_dict(opt.state_dict())
    for _ in range(7): opt.step(prob); kept.step(prob)
    assert all(torch.equal(opt.state[p][name], kept.state[p][name]) for p in prob.params for name in opt.state[p] if torch.is_tensor(opt.state[p][name]))


def test_a_buffer_that_is_filled_again_before_the_step_is_noticed():
    "A static input buffer: catches statistics of another batch, in silence."
    torch.manual_seed(0)
    net, buffer = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 2)
    opt = KFAC(net)
    net(buffer).square().mean().backward()
    buffer.copy_(torch.randn(8, 2))
    with pytest.raises(RuntimeError, match="changed in place after its forward pass"): opt.step()
    opt = KFAC(net)
    net(buffer).square().mean().backward(); opt.step(); opt.zero_grad(); buffer.copy_(torch.randn(8, 2))


@pytest.mark.parametrize("ekfac", [False, True])
def test_a_layer_without_outputs_is_left_alone(ekfac):
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 0)])
    with pytest.warns(UserWarning, match="outside of them"): opt = KFAC(net, ekfac=ekfac)
    x = torch.randn(8, 2)
    opt.step(lambda: net[0](x).square().mean() + net[1](x).sum())
