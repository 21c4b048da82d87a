"The Gauss-Newton diagonal against dense matrices, closed forms and itself. Each test's docstring names the mistake it would catch."
import copy
import gc
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inr_precond.curvature import Problem, _why_not, ggn_vp, hessian
from inr_precond.inr import INR, GaborLayer, Gaussian, ReLU, Sine
from inr_precond.optim import Adam, GaussNewton
from inr_precond.recipes import recipe

F64 = torch.float64
WAYS = ("problem", "closure", "idiom")
pytestmark = pytest.mark.filterwarnings("ignore:Using backward")


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def problem(loss="mse", activation=None, rows=24, dtype=F64, seed=0, **options):
    "A small network with three outputs on random data."
    gen = torch.Generator().manual_seed(seed)
    act = {} if "layer" in options else {"activation": activation or Gaussian(.4)}
    net = INR(2, 3, hidden_features=6, num_layers=3, generator=gen, dtype=F64, **act, **options).to(dtype)
    return Problem(net, (torch.rand(rows, 2, generator=gen, dtype=F64) * 2 - 1).to(dtype), torch.rand(rows, 3, generator=gen, dtype=F64).to(dtype), loss)


def dense(model, inputs, output_hessian):
    "J^T H_c J by brute force: one row of the Jacobian an output, H_c (BC, BC) given."
    params, out = list(model.parameters()), model(inputs)
    J = torch.stack([flat(g if g is not None else torch.zeros_like(p) for g, p in zip(torch.autograd.grad(o, params, retain_graph=True, allow_unused=True), params)) for o in out.flatten()])
    return J.T @ output_hessian @ J


def mse_hessian(out): return torch.eye(out.numel(), dtype=F64) * 2 / out.numel()


def take(opt, prob, way):
    "One step, called in one of the three ways."
    if way == "problem": return opt.step(prob)
    if way == "closure": return opt.step(lambda: prob())
    opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()


def seen(model, prob, way="problem", **options):
    "The diagonal of one step, flat."
    opt = GaussNewton(model, lr=0., damping=0., **options); take(opt, prob, way)
    P = opt.preconditioner()
    return flat(P[p] for p in model.parameters())


class Odd(nn.Module):
    "A convolution, a normalisation, a weight used twice, a linear layer by functional call, and a free parameter."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.twice, self.called, self.head, self.scale = nn.Conv1d(1, 2, 2), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2), nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x):
        h = self.norm(self.conv(x[:, None]).flatten(1))
        h = torch.tanh(F.linear(torch.tanh(self.twice(h)), self.twice.weight))
        return self.head(torch.tanh(F.linear(h, self.called.weight, self.called.bias))) * self.scale


# ---------------------------------------------------------------------------------------------- (12) to (14), printed and corrected
def off(a, b): return ((a - b).norm() / b.norm()).item()


def residuals(count, rows=1):
    "f, its Jacobian, and the Hessians of a sum of squares and of each residual, by autograd."
    net = INR(2, count, hidden_features=5, num_layers=3, activation=Gaussian(.5), generator=torch.Generator().manual_seed(1), dtype=F64)
    gen = torch.Generator().manual_seed(2)
    x, y = torch.rand(rows, 2, generator=gen, dtype=F64), torch.rand(rows, count, generator=gen, dtype=F64)
    params = tuple(net.parameters())
    f = (net(x) - y).flatten()
    J = torch.stack([flat(torch.autograd.grad(c, params, retain_graph=True)) for c in f])
    return f.detach(), J, hessian(lambda: (net(x) - y).square().sum(), params), [hessian(lambda i=i: (net(x) - y).flatten()[i], params) for i in range(len(f))]


@pytest.mark.parametrize("count, rows", [(1, 1), (3, 1), (2, 4)])
def test_12_the_hessian_of_a_sum_of_squares(count, rows):
    "The second term without its residuals, or left out."
    f, J, H, each = residuals(count, rows)
    second = 2 * sum(r * h for r, h in zip(f, each))
    assert off(2 * J.T @ J + second, H) < 1e-13
    assert off(2 * J.T @ J, H) > .01 and off(2 * J.T @ J + 2 * sum(each), H) > .01


@pytest.mark.parametrize("count, rows", [(1, 1), (3, 1), (2, 4)])
def test_13_holds_for_a_single_residual_alone(count, rows):
    "J_L^T J_L / 2L, as (13) prints it, in place of 2 J_f^T J_f; corrected, the residuals' direction is projected out."
    f, J, _, _ = residuals(count, rows)
    JL, L = 2 * f @ J, f @ f
    printed, gn, corrected = torch.outer(JL, JL) / (2 * L), 2 * J.T @ J, 2 * J.T @ (torch.outer(f, f) / L) @ J
    assert off(corrected, printed) < 1e-13 and torch.linalg.matrix_rank(printed) == 1
    assert off(printed, gn) < 1e-13 if len(f) == 1 else off(printed, gn) > .3 and torch.linalg.matrix_rank(gn) > 1
    parallel = torch.outer(f, torch.linspace(-1, 1, J.shape[1], dtype=F64))     # every column a multiple of f: there it holds for any number of residuals
    JL = 2 * f @ parallel
    assert off(torch.outer(JL, JL) / (2 * L), 2 * parallel.T @ parallel) < 1e-13


def test_14_what_adam_averages():
    "Diag(J^T J) of the residuals, as (14) is read, in place of the squared gradient of the mean loss; a batch's mean of squares in place of the square of its mean."
    prob = problem(rows=8)
    opt, found = Adam(prob.params, lr=1e-3, betas=(.9, .99)), {"square of the mean": 0., "mean of squares": 0., "Gauss-Newton": 0.}
    for _ in range(4):
        each = torch.stack([flat(torch.autograd.grad(Problem(prob.model, prob.inputs[i:i + 1], prob.targets[i:i + 1])(), prob.params)) for i in range(8)])
        new = each.mean(0).square(), each.square().mean(0), seen(prob.model, prob)
        found = {name: .99 * v + .01 * s for (name, v), s in zip(found.items(), new)}
        opt.step(prob)
    v = flat(opt.state[p]["curvature"] for p in prob.params)
    assert off(found["square of the mean"], v) < 1e-13
    assert off(found["mean of squares"], v) > .1 and off(found["Gauss-Newton"], v) > .1


@pytest.mark.parametrize("rows, count", [(1, 1), (2, 1), (1, 3)])
def test_14_up_to_the_residual_for_one_sample_and_one_output(rows, count):
    "g * g proportional to the Gauss-Newton diagonal for any batch or number of outputs."
    full = problem(rows=rows); net = INR(2, count, hidden_features=6, num_layers=3, activation=Gaussian(.4), generator=torch.Generator().manual_seed(4), dtype=F64)
    prob = Problem(net, full.inputs, full.targets[:, :count])
    gn, g = seen(net, prob), flat(torch.autograd.grad(prob(), prob.params))
    spread = off(g.square(), 2 * prob().item() * gn)                            # 2 r^2 times the diagonal 2 (df)^2
    assert spread < 1e-13 if rows * count == 1 else spread > .1


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_14_corrected_is_mean_and_variance(batch):
    "The variance over B for draws without replacement, too large by (n - 1) / (n - B); every batch of 8 samples is enumerated, so nothing is left to chance."
    prob = problem(rows=8)
    each = torch.stack([flat(torch.autograd.grad(Problem(prob.model, prob.inputs[i:i + 1], prob.targets[i:i + 1])(), prob.params)) for i in range(8)])
    mean, variance = each.mean(0), each.var(0, unbiased=False)
    without = torch.stack([each[list(rows)].mean(0).square() for rows in itertools.combinations(range(8), batch)]).mean(0)
    assert off(without, mean**2 + variance / batch * (8 - batch) / 7) < 1e-13
    assert off(without, mean**2 + variance / batch) < 1e-13 if batch == 1 else off(without, mean**2 + variance / batch) > .02
    if batch == 3:
        independent = torch.stack([each[list(rows)].mean(0).square() for rows in itertools.product(range(8), repeat=3)]).mean(0)
        assert off(independent, mean**2 + variance / 3) < 1e-13 and off(independent, mean**2) > .1


# ---------------------------------------------------------------------------------------------- the diagonal
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("network", [{}, {"activation": Sine(3.)}, {"activation": ReLU()}, {"layer": GaborLayer}], ids=["gaussian", "sine", "relu", "gabor"])
def test_exact_is_the_diagonal_of_the_dense_matrix(network, loss, way):
    "A factor 1/B or 1/C too many, outputs added before they are squared, a bias summed wrongly, H_c of the other loss."
    prob = problem(loss, **network)
    out = prob.model(prob.inputs).detach()
    H = mse_hessian(out) if loss == "mse" else torch.diag((out.sigmoid() * (1 - out.sigmoid())).flatten() / out.numel())
    G = dense(prob.model, prob.inputs, H)
    assert (_why_not(prob, prob.params) is None)
    torch.testing.assert_close(seen(prob.model, prob, way), G.diagonal(), rtol=1e-10, atol=1e-16)
    if way == "problem": torch.testing.assert_close(G @ torch.ones(len(G), dtype=F64), flat(ggn_vp(prob, prob.params, [torch.ones_like(p) for p in prob.params])), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["closure", "idiom"])
def test_a_loss_whose_outputs_are_coupled(way):
    "A Hessian in the outputs that is taken for a diagonal."
    couple = torch.tensor([[2., 1., 0.], [1., 3., -1.], [0., -1., 1.]], dtype=F64)
    prob = problem(loss=lambda o, t: .5 * torch.einsum("bi,ij,bj->", o - t, couple, o - t) / len(o))
    G = dense(prob.model, prob.inputs, torch.block_diag(*[couple / 24] * 24))
    torch.testing.assert_close(seen(prob.model, prob, way), G.diagonal(), rtol=1e-9, atol=1e-14)


def test_tiles_of_a_large_batch_add_up():
    "A diagonal of the last tile alone."
    prob = problem(rows=5000)
    torch.testing.assert_close(seen(prob.model, prob), seen(prob.model, prob, "closure"), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("way", ["problem", "closure"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_sampled_is_the_diagonal_in_expectation(loss, way):
    "Signs shared by all samples or by all outputs, or a root that is missing; four standard errors, and six for the largest of all."
    prob = problem(loss)
    truth = seen(prob.model, prob)
    found = torch.stack([seen(prob.model, prob, way, fisher="sampled", seed=s) for s in range(300)])
    error = (found.mean(0) - truth).abs() / (found.std(0) / len(found)**.5 + 1e-9 * truth.max())
    assert (error < 4).double().mean() > .99 and error.max() < 6
    assert (found.std(0) / truth).median() > .01


@pytest.mark.parametrize("way", ["closure", "idiom"])
def test_parameters_of_any_kind_are_estimated_without_bias(way):
    "Parameters outside of the linear layers, shared ones, or those of a layer called by its function, with no curvature (they would take a huge step), or with a biased one."
    model = Odd()
    x, y = torch.randn(12, 3, dtype=F64, generator=torch.Generator().manual_seed(1)), torch.randn(12, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    prob = Problem(model, x, y)
    truth = dense(model, x, mse_hessian(y)).diagonal()
    found = torch.stack([seen(model, prob, way, seed=s) for s in range(400)])
    sizes = dict(zip([n for n, _ in model.named_parameters()], found.split([p.numel() for p in model.parameters()], 1)))
    assert sizes["head.weight"].std(0).max() < 1e-14 < sizes["conv.weight"].std(0).min() and sizes["called.weight"].std(0).min() > 0  # exact where a layer was seen
    known = [i for i, n in enumerate(n for n, p in model.named_parameters() for _ in range(p.numel())) if not n.startswith("twice")]
    error = ((found.mean(0) - truth).abs() / (found.std(0) / len(found)**.5 + 1e-9 * truth.max()))[known]
    assert error.max() < 5


def test_a_weight_used_twice_by_modules_is_seen_as_a_whole():
    "Tied layers counted as two diagonals, which leaves out the products between them."
    class Tied(nn.Module):
        def __init__(self):
            super().__init__(); torch.manual_seed(0)
            self.a, self.b, self.head = nn.Linear(2, 2).double(), nn.Linear(2, 2).double(), nn.Linear(2, 1).double(); self.b.weight = self.a.weight
        def forward(self, x): return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))
    model, x = Tied(), torch.randn(10, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    prob = Problem(model, x, x[:, :1])
    truth = dense(model, x, mse_hessian(x[:, :1])).diagonal()
    found = torch.stack([seen(model, prob, seed=s) for s in range(600)])
    error = (found.mean(0) - truth).abs() / (found.std(0) / len(found)**.5 + 1e-9 * truth.max())
    assert error.max() < 4.5


def test_tied_weights_of_an_inr_do_not_take_the_fast_path():
    "The sweeps, which look at one layer at a time, for a weight that two layers share."
    gen = torch.Generator().manual_seed(0)
    net = INR(2, 3, hidden_features=4, num_layers=4, activation=Gaussian(.6), generator=gen, dtype=F64)
    net.layers[2].weight = net.layers[1].weight
    prob = Problem(net, torch.rand(16, 2, generator=gen, dtype=F64), torch.rand(16, 3, generator=gen, dtype=F64))
    truth = dense(net, prob.inputs, mse_hessian(prob.targets)).diagonal()
    found = torch.stack([seen(net, prob, seed=s) for s in range(400)])
    error = (found.mean(0) - truth).abs() / (found.std(0) / len(found)**.5 + 1e-9 * truth.max())
    assert error.max() < 5


def test_two_forward_passes_in_one_closure_add_up():
    "The diagonal of the last pass alone."
    model = Odd(); gen = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 3, dtype=F64, generator=gen), torch.randn(12, 2, dtype=F64, generator=gen)
    def both(seed):
        opt = GaussNewton(model, lr=0., damping=0., seed=seed)
        opt.step(lambda: .5 * ((model(x[:4]) - y[:4]).square().sum() + (model(x[4:]) - y[4:]).square().sum()))
        P = opt.preconditioner(); return flat(P[p] for n, p in model.named_parameters() if not n.startswith("twice"))
    truth = dense(model, x, torch.eye(24, dtype=F64)).diagonal()
    truth = torch.cat([t for n, t in zip([n for n, _ in model.named_parameters()], truth.split([p.numel() for p in model.parameters()])) if not n.startswith("twice")])
    found = torch.stack([both(s) for s in range(300)])
    error = (found.mean(0) - truth).abs() / (found.std(0) / len(found)**.5 + 1e-9 * truth.max())
    assert error.max() < 5


# ---------------------------------------------------------------------------------------------- the step
def test_the_step_by_hand():
    "A root, the damping inside the average, a bias correction by steps instead of updates, a decay of the first value."
    prob, twin = problem(), problem()
    opt = GaussNewton(prob.model, lr=.01, betas=(.8, .6), damping=.02, update_every=2)
    d, m = 0., 0.
    for t in range(5):
        g = flat(torch.autograd.grad(twin(), twin.params))
        if t % 2 == 0: d = .6 * d + .4 * dense(twin.model, twin.inputs, mse_hessian(twin.targets)).diagonal()
        m = .8 * m + .2 * g
        step = .01 * m / (1 - .8**(t + 1)) / (d / (1 - .6**(t // 2 + 1)) + .02)
        with torch.no_grad():
            for p, s in zip(twin.params, step.split([p.numel() for p in twin.params])): p -= s.view(p.shape)
        opt.step(prob)
        torch.testing.assert_close(flat(prob.params), flat(twin.params), rtol=1e-10, atol=1e-13)


def test_orthogonal_least_squares_is_solved_in_one_step():
    "P^-1/2 or a missing factor 2 / n."
    gen = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(20, 5, generator=gen, dtype=F64))[0] * torch.tensor([1e-3, .1, 1., 9., 1e3], dtype=F64)
    y = torch.randn(20, 2, generator=gen, dtype=F64)
    line = nn.Linear(5, 2, bias=False).double()
    GaussNewton(line, lr=1., betas=(0., .9), damping=0.).step(Problem(line, x, y))
    torch.testing.assert_close(line.weight.detach(), torch.linalg.lstsq(x, y).solution.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_scaling_the_loss_leaves_the_step_unchanged(fisher, way):
    "The empirical Fisher in place of the Gauss-Newton matrix: its steps shrink as one over the scale."
    def move(c):
        prob = problem()
        scaled = prob if c == 1 else Problem(prob.model, prob.inputs * 1, prob.targets, lambda o, t: c * (o - t).square().mean())
        start = flat(prob.params); take(GaussNewton(prob.model, lr=.01, damping=0., fisher=fisher), scaled, way)
        return flat(prob.params) - start
    torch.testing.assert_close(move(1.), move(1000.), rtol=1e-8, atol=1e-13)


def test_a_parameter_in_other_units_changes_nothing():
    "A root of the diagonal: the step would grow with the unit."
    class Scaled(nn.Module):
        def __init__(self, a): super().__init__(); self.a, self.w = a, nn.Linear(3, 1, bias=False).double(); self.w.weight.data = torch.tensor([[1., 2., 3.]], dtype=F64) / a
        def forward(self, x): return self.w(self.a * x)
    x, ends = torch.randn(9, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), []
    for a in (1., 50.):
        model = Scaled(a); opt = GaussNewton(model, lr=.1, damping=0.)
        for _ in range(4): opt.step(Problem(model, x, x[:, :1]))
        ends.append(model.w.weight.detach() * a)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damping", [0., 1e-3])
def test_dead_units_stay_and_nothing_explodes(damping, way):
    "0 / 0 where no sample reaches a unit."
    prob = problem(activation=ReLU())
    with torch.no_grad(): prob.model.layers[0].bias[2] = -100.
    before = prob.model.layers[0].weight[2].clone()
    opt = GaussNewton(prob.model, lr=.01, damping=damping)
    for _ in range(3): take(opt, prob, way)
    assert flat(prob.params).isfinite().all() and torch.equal(prob.model.layers[0].weight[2], before)


def test_frozen_parameters_and_groups():
    "Options of the wrong group, or a frozen parameter that moves."
    prob = problem()
    prob.model.layers[0].weight.requires_grad_(False)
    groups = [{"params": list(prob.model.layers[0].parameters()) + list(prob.model.layers[1].parameters())}, {"params": list(prob.model.layers[2].parameters()), "lr": 0., "fisher": "sampled", "damping": .5}]
    opt = GaussNewton(prob.model, lr=.01, params=groups)
    before = [p.detach().clone() for p in prob.model.parameters()]
    opt.step(prob)
    assert [torch.equal(a, b) for a, b in zip(before, prob.model.parameters())] == [True, False, False, False, True, True]
    assert opt.preconditioner()[prob.model.layers[2].bias].min() >= .5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_low_precision_keeps_its_curvature_in_float32(fisher, dtype):
    "Squares in bfloat16."
    prob = problem(dtype=dtype)
    opt = GaussNewton(prob.model, lr=1e-3, fisher=fisher)
    first = prob().item()
    for _ in range(30): opt.step(prob)
    assert {opt.state[p]["curvature"].dtype for p in prob.params} == {torch.float32} and prob().item() < first


# ---------------------------------------------------------------------------------------------- state
def make_odd(): model = Odd(); x = torch.randn(12, 3, dtype=F64, generator=torch.Generator().manual_seed(1)); return Problem(model, x, x[:, :2])


KINDS = {"exact": (problem, {}), "sampled": (problem, {"fisher": "sampled"}), "outside": (make_odd, {})}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_save_load_continue_is_bit_for_bit(kind, way):
    "A generator or a counter that is not saved."
    make, options = KINDS[kind]
    def start(): prob = make(); return prob, GaussNewton(prob.model, lr=1e-3, update_every=2, **options)
    prob, opt = start()
    for _ in range(5): take(opt, prob, way)
    held = io.BytesIO(); torch.save({"model": prob.model.state_dict(), "opt": opt.state_dict()}, held); held.seek(0)
    for _ in range(6): take(opt, prob, way)
    again, other = start()
    state = torch.load(held, weights_only=True)
    again.model.load_state_dict(state["model"]); other.load_state_dict(state["opt"])
    for _ in range(6): take(other, again, way)
    assert torch.equal(flat(prob.params), flat(again.params))
    assert torch.equal(flat(opt.state[p]["curvature"] for p in prob.params), flat(other.state[p]["curvature"] for p in again.params))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_continue_alike(clone):
    "A copy that shares its model or loses its hooks."
    prob = make_odd(); opt = GaussNewton(prob.model, lr=1e-3)
    take(opt, prob, "idiom")
    other = clone(opt); twin = Problem(other.model, prob.inputs, prob.targets)
    for _ in range(3): take(opt, prob, "idiom"); take(other, twin, "idiom")
    assert torch.equal(flat(prob.params), flat(twin.params)) and prob.params[0] is not twin.params[0]


def test_the_seed_decides_and_a_refused_step_takes_no_random_numbers():
    "A global generator, or one that runs on after an error."
    prob = problem()
    assert torch.equal(seen(prob.model, prob, fisher="sampled", seed=3), seen(prob.model, prob, fisher="sampled", seed=3))
    assert not torch.equal(seen(prob.model, prob, fisher="sampled", seed=3), seen(prob.model, prob, fisher="sampled", seed=4))
    opt = GaussNewton(prob.model, fisher="sampled"); before = opt.state_dict()["generator"].clone()
    with pytest.raises(ValueError): opt.step(Problem(prob.model, prob.inputs, prob.targets[:3]))
    assert torch.equal(before, opt.state_dict()["generator"])


@pytest.mark.parametrize("way", ["problem", "closure", "idiom"])
def test_steps_leak_nothing(way):
    "A cycle of record, graph and hook (the cycle collector is off here)."
    prob = problem(dtype=torch.float32) if way == "problem" else make_odd()
    opt = GaussNewton(prob.model, lr=1e-4)
    for _ in range(20): take(opt, prob, way)
    count = lambda: sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    gc.collect(); gc.disable()
    try:
        before = count()
        for _ in range(200): take(opt, prob, way)
        after = count()
    finally: gc.enable()
    assert after <= before + 5


# ---------------------------------------------------------------------------------------------- bad input
def test_errors_are_one_sentence():
    "A misspelt kind, the empirical Fisher, parameters in place of the module, a model that was not called."
    prob = problem()
    for make, error, words in ((lambda: GaussNewton(prob.model, fisher="empirical"), ValueError, "one of 'exact', 'sampled'"), (lambda: GaussNewton(prob.model, damping=-1.), ValueError, "finite number >= 0"),
                               (lambda: GaussNewton(list(prob.params)), TypeError, r"write GaussNewton\(model\)"), (lambda: GaussNewton(prob.model, params=[{"params": list(prob.params), "damping": None}]), ValueError, "damping is None"),
                               (lambda: recipe("gauss-newton/exact").build(list(prob.params)), TypeError, "needs the module")):
        with pytest.raises(error, match=words): make()
    opt = GaussNewton(prob.model)
    with pytest.raises(RuntimeError, match="model's outputs"): opt.step(lambda: prob.model.layers[1](prob.model.activation(prob.model.layers[0](prob.inputs))).square().mean())
    assert flat(prob.params).isfinite().all()


def test_no_warning_for_parameters_outside_of_the_layers(recwarn):
    "K-FAC's warning, which would be wrong here."
    GaussNewton(Odd())
    assert not [w for w in recwarn if "sees linear" in str(w.message)]


# ---------------------------------------------------------------------------------------------- loops of one's own
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
@pytest.mark.parametrize("model", ["inr", "odd"])
def test_maximizing_minus_the_loss_is_minimizing_the_loss(model, fisher):
    "The curvature of the loss in place of minus the loss, in layers or in other parameters: only the damping is left, and the step explodes."
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    ends = []
    for sign in (1, -1):
        prob, odd = problem(), Odd()
        net, inputs = (prob.model, prob.inputs) if model == "inr" else (odd, x)
        opt = GaussNewton(net, fisher=fisher, maximize=sign < 0)
        for _ in range(3): opt.step(lambda net=net, inputs=inputs, sign=sign: sign * (net(inputs) - 1).square().mean())
        ends.append(flat(net.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


def test_a_unit_that_wakes_between_two_updates_does_not_explode():
    "A gradient divided by the smallest number: without damping, a diagonal of zero says nothing about the steps until the next one."
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad(): net[0].weight.fill_(1.); net[0].bias.copy_(torch.tensor([-5., 0.]))
    opt = GaussNewton(net, lr=1e-3, damping=0., update_every=3)
    ends = []
    for scale in (1., 10., 10., 10.):                   # the first unit is dead on inputs up to 5
        x = scale * torch.linspace(0, 1, 8, dtype=F64)[:, None]
        opt.step(lambda x=x: (net(x) - 1).square().mean())
        ends.append(net[0].bias[0].item())
    assert ends[:3] == [-5.] * 3 and ends[3] != -5. and flat(net.parameters()).abs().max() < 10


def test_a_layer_beside_the_outputs_is_named():
    "An AttributeError of an int, or a gradient divided by the damping alone."
    class Side(nn.Module):
        def __init__(self): super().__init__(); self.body, self.side, self.head = (nn.Linear(2, 2, dtype=F64) for _ in range(3))
        def forward(self, x): h = torch.tanh(self.body(x)); self.seen = self.side(h); return self.head(h)
    net, x = Side(), torch.ones(4, 2, dtype=F64)
    before = flat(net.parameters())
    opt = GaussNewton(net)
    with pytest.raises(RuntimeError, match="layer 'side', but not through what the model returns"): opt.step(lambda: (net(x) + net.seen).square().mean())
    assert torch.equal(before, flat(net.parameters()))
    opt.step(lambda: (net(x) + net.seen.detach()).square().mean())
