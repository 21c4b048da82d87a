"""The family of optimizers against torch.optim, closed forms and itself. Each test's docstring names the mistake it would catch."""
import copy
import gc
import io
import math
import pickle

import pytest
import torch
from torch import nn

from inr_precond.curvature import Problem, hessian
from inr_precond.inr import INR, Gaussian
from inr_precond.optim import ESGD, SGD, AdaHessian, Adam, Shampoo
from inr_precond.optim.esgd import hidden_multiplier, updates_made

MAKERS = {
    "sgd": lambda p, **k: SGD(p, **{"lr": .05, "momentum": .9, **k}),
    "adam": lambda p, **k: Adam(p, **{"lr": .01, **k}),
    "esgd": lambda p, **k: ESGD(p, **{"lr": .1, "warmup": 3, "update_every": 4, **k}),
    "esgd-released": lambda p, **k: ESGD(p, **{"lr": .1, "warmup": 3, "update_every": 4, "bias_correction": "steps", **k}),
    "esgd-mean": lambda p, **k: ESGD(p, **{"lr": .1, "warmup": 3, "update_every": 4, "accumulate": "mean", **k}),
    "esgd-max": lambda p, **k: ESGD(p, **{"lr": .1, "warmup": 3, "update_every": 4, "accumulate": "max", "nesterov": True, "lr_warmup_decay": .9, **k}),
    "adahessian-j": lambda p, **k: AdaHessian(p, **{"lr": .05, "estimator": "jacobi", "eps": 1e-2, **k}),
    "adahessian-e": lambda p, **k: AdaHessian(p, **{"lr": .05, "estimator": "equilibration", **k}),
    "adahessian-r": lambda p, **k: AdaHessian(p, **{"lr": .05, "estimator": "root-abs", **k}),
    "shampoo": lambda p, **k: Shampoo(p, **{"lr": .02, "warmup": 2, "stats_every": 2, "inverse_every": 3, "block_size": 4, **k}),
}
CURVED = [n for n in MAKERS if n not in ("sgd", "adam", "shampoo")]


def problem(dtype=torch.float64, seed=0):
    "A small Gaussian network on a sine, as a Problem."
    gen = torch.Generator().manual_seed(seed)
    net = INR(1, 2, hidden_features=8, num_layers=3, activation=Gaussian(.4), generator=gen, dtype=torch.float64).to(dtype)
    x = torch.linspace(-1, 1, 32, dtype=torch.float64)[:, None]
    return Problem(net, x.to(dtype), torch.cat([torch.sin(5 * x), torch.cos(3 * x)], 1).to(dtype))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype), torch.randn(32, 2, dtype=dtype), torch.randn(32, 3, dtype=dtype)


def compare(ours, theirs, steps=100, dtype=torch.float64):
    "Largest difference of the parameters after training the same network with both."
    ends = []
    for make in (ours, theirs):
        net, x, y = mlp(dtype=dtype)
        opt = make(net.parameters())
        for _ in range(steps):
            opt.zero_grad()
            (net(x) - y).square().mean().backward()
            opt.step()
        ends.append(flat(net.parameters()))
    return (ends[0] - ends[1]).abs().max().item()


# ---------------------------------------------------------------------------------------------- equal to torch
@pytest.mark.parametrize("options", [dict(lr=.01), dict(lr=.03, betas=(.7, .9), eps=1e-3), dict(lr=.01, maximize=True)])
def test_adam_equals_torch(options):
    "A wrong bias correction, eps inside the root, or one step's delay."
    assert compare(lambda p: Adam(p, **options), lambda p: torch.optim.Adam(p, **options)) < 1e-13
    assert compare(lambda p: Adam(p, **options), lambda p: torch.optim.Adam(p, **options), dtype=torch.float32) < 1e-5


def wide(seed=0):
    "A float32 network with more than 16,384 parameters, which Adam's one-pass kernel takes, and its gradients at some steps."
    gen = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(*s, generator=gen)) for s in ((128, 130), (128,), (3, 128), (3,))]
    return params, [[torch.randn(p.shape, generator=gen) for p in params] for _ in range(12)]


def walk(opt, params, grads, after=lambda t: None):
    "The parameters after steps along given gradients."
    for t, gs in enumerate(grads):
        for p, g in zip(params, gs): p.grad = g.clone()
        opt.step()
        after(t)
    return flat(params)


def test_the_kept_root_is_that_of_the_present_curvature():
    "A root that survives an update of the curvature, or one made while the correction did not move."
    prob = problem()
    opt = ESGD(prob.params, lr=.01, warmup=2, update_every=3, bias_correction="steps")
    for t in range(16):
        opt.param_groups[0]["bias_correction"] = "updates" if 5 <= t < 9 else "steps"
        opt.step(prob)
        fresh = opt.preconditioner()
        for clock in opt._cohorts():
            for p, P in zip(clock.params, clock.preconditioner):
                if t != 5: assert torch.equal(P, fresh[p]) # at t = 5 the option has changed, which the next update takes up


@pytest.mark.parametrize("options", [dict(lr=.01), dict(lr=torch.tensor(.01)), dict(lr=.03, betas=(.7, .9), eps=1e-3), dict(lr=.01, maximize=True)])
def test_one_pass_adam_equals_torch(options):
    "The kernel fed with t counted from 0, with a stale step, with the sign of `maximize` applied twice or not at all, or with eps and betas of another group."
    a, grads = wide()
    b, _ = wide()
    c, _ = wide()
    opt, theirs = Adam(a, **options), torch.optim.Adam(b, **{**options, "lr": float(options["lr"])}, fused=True)
    slow = Adam(c, **options)
    slow._fusable = lambda clock: False
    halve = lambda o: lambda t: t == 5 and o.param_groups[0].update(lr=o.param_groups[0]["lr"] / 2)   # a schedule
    ours = walk(opt, a, grads, halve(opt))
    assert torch.equal(ours, walk(theirs, b, grads, halve(theirs)))
    torch.testing.assert_close(ours, walk(slow, c, grads, halve(slow)), rtol=1e-5, atol=1e-6)
    assert opt.state[a[0]]["step"] == opt.state[a[0]]["updates"] == 12


def test_one_pass_adam_decays_as_adamw():
    "Coupled decay by the kernel's own weight_decay, or decay twice."
    (a, grads), (b, _) = wide(), wide()
    torch.testing.assert_close(walk(Adam(a, lr=.01, weight_decay=.3), a, grads), walk(torch.optim.AdamW(b, lr=.01, weight_decay=.3), b, grads), rtol=1e-5, atol=1e-6)


def test_one_pass_adam_leaves_the_rest_to_the_passes():
    "The kernel, which reads memory in storage order, on a transposed gradient; on a step after one without curvature; on Nesterov's or on no momentum."
    def ends(change, options=()):
        found = []
        for fused in (True, False):
            params, grads = wide()
            opt = Adam(params, lr=.01, **dict(options))
            if not fused: opt._fusable = lambda clock: False
            for gs in grads:
                for p, g in zip(params, gs): p.grad = g.clone()
                change(opt, params)
                opt.step()
            found.append(flat(params))
        return found
    def transposed(opt, params): params[0].grad = params[0].grad.t().contiguous().t()
    def sparse_schedule(opt, params): opt.param_groups[0]["update_every"] = 3
    nothing = lambda opt, params: None
    for case in ((transposed,), (sparse_schedule,), (nothing, dict(nesterov=True)), (nothing, dict(betas=(0., .9)))):
        torch.testing.assert_close(*ends(*case), rtol=1e-5, atol=1e-6)


def test_one_pass_adam_continues_bit_for_bit():
    "A clock that the kernel's step does not advance, a counter that is shared with a loaded state, or a preconditioner left from before."
    (a, grads), (b, _) = wide(), wide()
    opt = Adam(a, lr=.01, lr_warmup=4)
    walk(opt, a, grads[:6])
    saved, weights = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in a]
    whole = walk(opt, a, grads[6:])
    with torch.no_grad():
        for p, w in zip(b, weights): p.copy_(w)
    resumed = Adam(b, lr=.01, lr_warmup=4)
    resumed.load_state_dict(saved)
    assert torch.equal(whole, walk(resumed, b, grads[6:]))
    P = opt.preconditioner()[a[1]]
    torch.testing.assert_close(P, (opt.state[a[1]]["curvature"] / (1 - .999**12)).sqrt() + 1e-8)


def test_weight_decay_equals_adamw():
    "Coupled decay (added to the gradient), or decay without the learning rate."
    assert compare(lambda p: Adam(p, lr=.01, weight_decay=.3), lambda p: torch.optim.AdamW(p, lr=.01, weight_decay=.3)) < 1e-13


@pytest.mark.parametrize("options", [dict(lr=.1), dict(lr=.05, momentum=.9), dict(lr=.05, momentum=.9, dampening=.5), dict(lr=.05, momentum=.8, nesterov=True), dict(lr=.01, momentum=.5, maximize=True)])
def test_sgd_equals_torch(options):
    "An averaging momentum, dampening at the first step, nesterov without the gradient."
    assert compare(lambda p: SGD(p, **options), lambda p: torch.optim.SGD(p, **options)) < 1e-13


def test_weight_decay_of_every_member_is_decoupled():
    "Decay that goes through the preconditioner."
    for name, make in MAKERS.items():
        p = nn.Parameter(torch.tensor([3.], dtype=torch.float64))
        make([p], lr=.5, weight_decay=.1).step(lambda: 0 * p.sum() + (0 * p**2).sum())
        assert p.item() == pytest.approx(3 * (1 - .5 * .1 * ((1 - .9) if name == "esgd-max" else 1))), name


# ---------------------------------------------------------------------------------------------- schedule and corrections
def test_needs_graph_follows_the_schedule():
    "Counting from 1, warm-up off by one, or N counted from the end of the warm-up."
    prob = problem()
    opt = ESGD(prob.params, warmup=5, update_every=4)
    due = []
    for t in range(20):
        if opt.needs_graph(): due.append(t)
        opt.step(prob)
    assert due == [0, 1, 2, 3, 4, 8, 12, 16]
    state = opt.state[prob.params[0]]
    assert state["step"].item() == 20 and state["updates"].item() == 8
    assert not Adam(prob.params).needs_graph()


def test_hidden_multiplier_against_values_by_hand():
    "Counting updates without the warm-up, or steps from 1 instead of 0."
    by_hand = {50: (51, 50), 149: (150, 51), 500: (501, 55), 1000: (1001, 60)}
    for step, (steps, updates) in by_hand.items():
        assert updates_made(step) == updates
        assert hidden_multiplier(step) == pytest.approx(math.sqrt((1 - .999**steps) / (1 - .999**updates)))
    assert [round(hidden_multiplier(s), d) for s, d in ((50, 1), (149, 2), (500, 1), (1000, 1))] == [1.0, 1.67, 2.7, 3.3]


def test_released_step_is_the_mended_step_times_the_multiplier():
    "A bias_correction argument that changes anything else, or nothing."
    h = torch.tensor([.5, 20.], dtype=torch.float64)
    def last_step(kind, steps=160):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        opt = ESGD([p], lr=1e-6, eps=0., bias_correction=kind)
        for _ in range(steps):
            before = p.detach().clone()
            opt.step(lambda: .5 * (h * p**2).sum())
        return before - p.detach()
    ratio = last_step("steps") / last_step("updates")
    torch.testing.assert_close(ratio, torch.full_like(ratio, hidden_multiplier(159)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("update_every", [1, 3, 10])
@pytest.mark.parametrize("accumulate", ["ema", "mean"])
def test_mean_of_D_does_not_depend_on_N(update_every, accumulate):
    "A bias correction that counts all steps: D would shrink with N. Parameters are held still (lr 0); four standard errors over independent probes."
    prob = problem()
    row2 = hessian(prob, prob.params).square().sum(1)
    estimates = []
    for seed in range(60):
        opt = ESGD(prob.params, lr=0., eps=0., warmup=2, update_every=update_every, accumulate=accumulate, seed=seed)
        for _ in range(2 + 4 * update_every): opt.step(prob)
        estimates.append(flat(opt.preconditioner().values()).square())
    estimates = torch.stack(estimates)
    error = (estimates.mean(0) - row2).abs() / (estimates.std(0) / len(estimates)**.5 + 1e-12 * row2.max())
    assert (error < 4).float().mean() > .99 and error.max() < 6


def test_constant_curvature_gives_P_exactly_at_every_step():
    "Bias correction by anything but the number of curvature updates."
    h = torch.tensor([1e-2, 3., 500.], dtype=torch.float64)
    for make in (lambda p: ESGD(p, lr=0., eps=0., warmup=3, update_every=7), lambda p: ESGD(p, lr=0., eps=0., accumulate="mean"), lambda p: AdaHessian(p, lr=0., eps=0., estimator="jacobi", update_every=5),
                 lambda p: AdaHessian(p, lr=0., eps=0.), lambda p: ESGD(p, lr=0., eps=0., accumulate="max", update_every=1)):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        opt = make([p])
        for _ in range(30):
            opt.step(lambda: .5 * (h * p**2).sum())
            torch.testing.assert_close(opt.preconditioner()[p], h, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [lambda p: ESGD(p, lr=1., betas=(0., .9), eps=0.), lambda p: AdaHessian(p, lr=1., betas=(0., .9), eps=0., estimator="jacobi"), lambda p: AdaHessian(p, lr=1., betas=(0., .9), eps=0.)])
def test_diagonal_quadratic_is_solved_in_one_step(make):
    "P^-1/2 instead of P^-1 (the printed (5)), or a missing root of the mean square."
    h = torch.tensor([1e-3, 1., 1e5], dtype=torch.float64)
    p = nn.Parameter(torch.tensor([1., -2., 3.], dtype=torch.float64))
    make([p]).step(lambda: .5 * (h * (p - 1)**2).sum())
    torch.testing.assert_close(p.detach(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["esgd", "esgd-mean", "adahessian-j", "adahessian-e"])
def test_scaling_the_loss_leaves_the_step_unchanged(name):
    "A curvature in the wrong power (the released AdaHessian(J) fails this, next test)."
    def move(c, name=name):
        prob = problem()
        start = flat(prob.params)
        opt = MAKERS[name](prob.params, eps=0.)
        for _ in range(1): opt.step(lambda: c * prob())
        return flat(prob.params) - start
    torch.testing.assert_close(move(1.), move(1000.), rtol=1e-8, atol=1e-12)


def test_released_jacobi_is_not_invariant():
    "A 'released' form that was silently corrected: its step must grow by sqrt(c)."
    steps = []
    for c in (1., 100.):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        AdaHessian([p], lr=.1, eps=0., estimator="root-abs").step(lambda: c * (p**2).sum())
        steps.append(1 - p.detach())
    torch.testing.assert_close(steps[1] / steps[0], torch.full((2,), 10., dtype=torch.float64))


def test_lr_warmup_is_linear_and_independent_of_the_curvature_warmup():
    "A rate that starts at 0, or reaches lr one step late."
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = SGD([p], lr=1., lr_warmup=4)
    moves = []
    for _ in range(6):
        before = p.item()
        opt.step(lambda: p.sum())
        moves.append(before - p.item())
    assert moves == pytest.approx([.25, .5, .75, 1., 1., 1.])


# ---------------------------------------------------------------------------------------------- closures
def trajectories(make, mode, steps=12):
    prob = problem()
    opt = make(prob.params)
    calls = 0
    def forward():
        nonlocal calls
        calls += 1
        return (prob.model(prob.inputs) - prob.targets).square().mean()
    def with_backward():
        opt.zero_grad()
        loss = forward()
        loss.backward(create_graph=opt.needs_graph())
        return loss
    for _ in range(steps):
        if mode == "problem": opt.step(prob)
        elif mode == "loss": opt.step(forward)
        elif mode == "closure-backward": opt.step(with_backward)
        else: with_backward(); opt.step()
    return flat(prob.params), calls


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", list(MAKERS))
def test_all_ways_to_call_step_agree(name):
    "A closure that is differentiated twice, accumulates into old gradients, or draws other probes."
    ways = {mode: trajectories(MAKERS[name], mode) for mode in ("problem", "loss", "closure-backward", "idiom")}
    for mode, (end, calls) in ways.items():
        torch.testing.assert_close(end, ways["idiom"][0], rtol=1e-9, atol=1e-11, msg=lambda m, mode=mode: f"{mode}: {m}")
        assert calls == (0 if mode == "problem" else 12)


@pytest.mark.parametrize("mode", ["problem", "loss", "closure-backward", "idiom"])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradient_is_left_in_grad_without_a_graph(mode):
    "A reference cycle parameter -> .grad -> graph -> parameter, or no .grad after step."
    prob = problem()
    opt = ESGD(prob.params, lr=0.)
    if mode == "problem": opt.step(prob)
    elif mode == "loss": opt.step(prob.__call__)
    else:
        def closure():
            opt.zero_grad(); loss = prob(); loss.backward(create_graph=True); return loss
        if mode == "idiom": closure(); opt.step()
        else: opt.step(closure)
    expected = torch.autograd.grad(prob(), prob.params)
    for p, g in zip(prob.params, expected):
        assert p.grad.grad_fn is None and not p.grad.requires_grad
        torch.testing.assert_close(p.grad, g)


def test_step_returns_the_detached_loss():
    prob = problem()
    loss = ESGD(prob.params).step(prob.__call__)
    assert loss.shape == () and not loss.requires_grad
    assert loss.item() == pytest.approx(problem()().item())


@pytest.mark.filterwarnings("ignore:Using backward")
def test_missing_graph_is_one_sentence():
    "An IndexError from autograd, or a silent step without curvature."
    prob = problem()
    opt = ESGD(prob.params)
    prob().backward()
    with pytest.raises(RuntimeError, match=r"create_graph=opt.needs_graph\(\)"): opt.step()
    def closure():
        opt.zero_grad(); loss = prob(); loss.backward(); return loss
    with pytest.raises(RuntimeError, match=r"create_graph=opt.needs_graph\(\)"): opt.step(closure)
    opt.step(prob)                                  # a refused step leaves a usable optimizer
    with pytest.raises(RuntimeError, match="no parameter has a gradient"): opt.zero_grad(); opt.step()


def test_closure_must_return_the_loss():
    prob = problem()
    with pytest.raises(TypeError, match="was given a int; give it a Problem, a closure"): Adam(prob.params).step(3)
    with pytest.raises(TypeError, match="NoneType"): Adam(prob.params).step(lambda: None)
    with pytest.raises(TypeError, match="shape"): Adam(prob.params).step(lambda: torch.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="does not depend"): Adam(prob.params).step(lambda: prob().detach())
    other = problem(seed=3)
    with pytest.raises(RuntimeError, match="does not depend"): Adam(prob.params).step(lambda: other())
    with pytest.raises(RuntimeError, match="none of this optimizer's parameters"): Adam(prob.params).step(other)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return 2 * g * ctx.saved_tensors[0]


def test_layer_without_a_second_derivative_is_named():
    "autograd's own message, which does not say which layer."
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="differentiated twice because of OnceBackward"): ESGD([p]).step(lambda: Once.apply(p).sum())
    Adam([p]).step(lambda: Once.apply(p).sum())


class Between(nn.Module):
    "A layer without a second derivative between two that have one."
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x): return self.b(Once.apply(self.a(x)))


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", ["closure", "problem", "idiom"])
def test_layer_without_a_second_derivative_inside_a_model_is_named(way):
    "Hv = 0, or a partly wrong Hv: torch leaves a node in the graph that is never executed where unused inputs are allowed."
    torch.manual_seed(0)
    model, x, y = Between(), torch.randn(8, 2), torch.randn(8, 1)
    opt = ESGD(model.parameters())
    before = opt.state_dict()["generator"]
    with pytest.raises(RuntimeError, match="differentiated twice because of OnceBackward"):
        if way == "closure": opt.step(lambda: (model(x) - y).square().mean())
        elif way == "problem": opt.step(Problem(model, x, y))
        else: (model(x) - y).square().mean().backward(create_graph=opt.needs_graph()); opt.step()
    assert torch.equal(opt.state_dict()["generator"], before)
    Adam(model.parameters()).step(lambda: (model(x) - y).square().mean())


@pytest.mark.parametrize("as_problem", [False, True])
def test_compiled_model_is_named(as_problem):
    net, x, y = mlp(dtype=torch.float32)
    compiled = torch.compile(net, backend="aot_eager")
    with pytest.raises(RuntimeError, match="differentiated twice because of .*CompiledFunction"):
        ESGD(net.parameters()).step(Problem(compiled, x, y) if as_problem else lambda: (compiled(x) - y).square().mean())


def test_refusal_at_the_first_derivative_is_named():
    "A compiled backward that reuses its buffers refuses already the gradient that keeps a graph: torch's words, which name no layer, must not reach the user."
    class Reuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g):
            if torch.is_grad_enabled(): raise RuntimeError("This backward function was compiled with non-empty donated buffers which requires create_graph=False")
            return g
    p = nn.Parameter(torch.ones(3)); closure = lambda: Reuses.apply(p).square().sum()
    with pytest.raises(RuntimeError, match="differentiated twice because of .*Reuses"): ESGD([p]).step(closure)
    Adam([p], lr=.5).step(closure)  # needs no graph
    torch.testing.assert_close(p.detach(), torch.full((3,), .5))


def test_loss_linear_in_the_parameters_has_zero_curvature():
    "An error where H = 0."
    p = nn.Parameter(torch.ones(3))
    ESGD([p], lr=.1, eps=1.).step(lambda: p.sum())
    torch.testing.assert_close(p.detach(), torch.full((3,), .9))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_clipping_and_accumulation_between_backward_and_step():
    "Steps that are not due must take whatever .grad holds."
    prob = problem()
    opt = ESGD(prob.params, warmup=1, update_every=10)
    opt.step(prob)
    assert not opt.needs_graph()
    for _ in range(2): (prob() / 2).backward()      # accumulates on the gradient that step left: zero it first
    opt.zero_grad()
    for _ in range(2): (prob() / 2).backward()
    nn.utils.clip_grad_norm_(prob.params, .1)
    opt.step()
    assert torch.linalg.vector_norm(flat(p.grad for p in prob.params)) <= .1 + 1e-9


def test_max_grad_norm_clips_the_gradient_and_not_the_curvature():
    "Clipping per tensor, or a clipped Hessian-vector product."
    prob = problem()
    a, b = problem(), problem()
    oa, ob = Adam(a.params, max_grad_norm=.05), torch.optim.Adam(b.params)
    for _ in range(5):
        oa.step(a)
        ob.zero_grad(); b().backward(); nn.utils.clip_grad_norm_(b.params, .05); ob.step()
    torch.testing.assert_close(flat(a.params), flat(b.params), rtol=1e-6, atol=1e-9)
    P = []
    for clip in (None, 1e-3):
        opt = ESGD(prob.params, lr=0., max_grad_norm=clip)
        opt.step(prob)
        P.append(flat(opt.preconditioner().values()))
    torch.testing.assert_close(*P)


def test_maximize_descends_the_negative():
    for name, make in MAKERS.items():
        a, b = problem(), problem()
        oa, ob = make(a.params, maximize=True), make(b.params)
        for _ in range(5): oa.step(a); ob.step(lambda: -b())
        torch.testing.assert_close(flat(a.params), flat(b.params), rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------------------------------------- parameters of every kind
def test_two_groups_have_their_own_options():
    "Options read from the first group for all."
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    opt = ESGD([{"params": [a], "lr": .5, "update_every": 2}, {"params": [b], "lr": .25}], lr=1., eps=0., betas=(0., .9), warmup=0, update_every=5)
    due = []
    for _ in range(6):
        due.append(opt.needs_graph())
        before = a.detach().clone(), b.detach().clone()
        opt.step(lambda: .5 * (3 * a**2 + 7 * b**2).sum())
        torch.testing.assert_close(a.detach(), before[0] * .5)
        torch.testing.assert_close(b.detach(), before[1] * .75)
    assert due == [True, False, True, False, True, True]
    assert opt.state[a]["updates"].item() == 3 and opt.state[b]["updates"].item() == 2


def test_frozen_and_unused_parameters():
    "A crash, a moved frozen parameter, or curvature that is undefined for an unused one."
    for make in MAKERS.values():
        used, unused, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
        frozen.requires_grad_(False)
        opt = make([used, unused, frozen])
        for _ in range(5): opt.step(lambda: (used**2 * frozen).sum())
        assert torch.equal(frozen, torch.ones(2)) and torch.equal(unused, torch.ones(2)) and (used != 1).all()
        assert torch.equal(unused.grad, torch.zeros(2)) and frozen.grad is None and not opt.state[frozen]


def test_problem_with_a_frozen_layer_matches_autograd():
    ends = []
    for fast in (True, False):
        prob = problem()
        params = prob.params
        params[0].requires_grad_(False)
        prob = Problem(prob.model, prob.inputs, prob.targets)
        opt = ESGD(prob.model.parameters(), warmup=2, update_every=3)
        for _ in range(8): opt.step(prob if fast else (lambda prob=prob: prob()))
        ends.append(flat(prob.model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


def test_parameter_thawed_later_starts_its_own_clock():
    "Curvature 0 for it until the next update, and a bias correction by others' steps: a huge first step."
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    b.requires_grad_(False)
    opt = ESGD([a, b], lr=.5, eps=0., betas=(0., .9), warmup=2, update_every=100)
    loss = lambda: .5 * (3 * a**2 + 7 * b**2).sum()
    for _ in range(10): opt.step(loss)
    b.requires_grad_(True)
    assert opt.needs_graph()
    opt.step(loss)
    torch.testing.assert_close(b.detach(), torch.full((2,), .5, dtype=torch.float64))
    assert opt.state[a]["step"].item() == 11 and opt.state[b]["step"].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(MAKERS))
def test_dtypes(name, dtype):
    "Moments in bfloat16, where an average with weight .001 never moves."
    prob = problem(dtype)
    opt = MAKERS[name](prob.params)
    first = prob().item()
    for _ in range(10): opt.step(prob.__call__)
    for p in prob.params:
        assert p.dtype == dtype and torch.isfinite(p).all()
        for key, value in opt.state[p].items(): assert value.dtype == (torch.float64 if dtype == torch.float64 and value.dim() else torch.float32), key
    assert math.isfinite(first) and prob().item() < 2 * first


def test_several_devices_and_wrong_dtypes_are_refused():
    with pytest.raises(ValueError, match="cpu and meta"): Adam([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))])
    with pytest.raises(ValueError, match="complex64"): Adam([nn.Parameter(torch.ones(1, dtype=torch.complex64))])


# ---------------------------------------------------------------------------------------------- a well-behaved torch.optim.Optimizer
def roundtrip(state):
    "Through a file's bytes, as a checkpoint goes."
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_save_load_continue_is_bit_for_bit(name, dtype, stop):
    "A probe generator, counter or precision that is lost on the way."
    def go(steps, prob, opt):
        for _ in range(steps): opt.step(prob)
    whole = problem(dtype); go(12, whole, MAKERS[name](whole.params))
    first = problem(dtype); opt = MAKERS[name](first.params); go(stop, first, opt)
    saved = roundtrip({"model": first.model.state_dict(), "opt": opt.state_dict()})
    second = problem(dtype, seed=5); second.model.load_state_dict(saved["model"])
    opt = MAKERS[name](second.params, seed=99) if name in CURVED else MAKERS[name](second.params)
    opt.load_state_dict(saved["opt"]); go(12 - stop, second, opt)
    assert torch.equal(flat(whole.params), flat(second.params))


@pytest.mark.parametrize("name", list(MAKERS))
def test_deepcopy_and_pickle_continue_alike(name):
    prob = problem()
    opt = MAKERS[name](prob.params)
    for _ in range(5): opt.step(prob)
    twin, twin_opt = copy.deepcopy((prob, opt))
    again, again_opt = pickle.loads(pickle.dumps((prob, opt)))
    for _ in range(5): opt.step(prob); twin_opt.step(twin); again_opt.step(again)
    assert torch.equal(flat(prob.params), flat(twin.params)) and torch.equal(flat(prob.params), flat(again.params))


@pytest.mark.parametrize("name", list(MAKERS))
def test_works_under_a_scheduler(name):
    "A rate read once, at construction."
    ends = []
    for by_hand in (True, False):
        prob = problem()
        opt = MAKERS[name](prob.params, lr=.02)
        schedule = None if by_hand else torch.optim.lr_scheduler.LambdaLR(opt, lambda t: .9**t)
        for t in range(8):
            if by_hand: opt.param_groups[0]["lr"] = .02 * .9**t
            opt.step(prob)
            if schedule: schedule.step()
        ends.append(flat(prob.params))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("name", list(MAKERS))
def test_state_is_tensors_updated_in_place(name):
    "State that is replaced at each step cannot be captured in a graph."
    prob = problem()
    opt = MAKERS[name](prob.params)
    opt.step(prob)
    def places(): return [(k, v.data_ptr()) for p in prob.params for k, v in sorted(opt.state[p].items())]
    before = places()
    for _ in range(9): opt.step(prob)
    assert places() == before and all(isinstance(v, torch.Tensor) for p in prob.params for v in opt.state[p].values())


def test_seed_decides_the_probes():
    "A global generator: runs would depend on what ran before."
    def end(seed):
        prob = problem()
        opt = ESGD(prob.params, seed=seed)
        torch.manual_seed(torch.seed() % 1000)
        for _ in range(3): opt.step(prob)
        return flat(prob.params)
    assert torch.equal(end(1), end(1)) and not torch.equal(end(1), end(2))


def test_probes_are_signs_and_vary():
    prob = problem()
    seen = []
    class Spy(ESGD):
        def update_curvature(self, clock): seen.append(flat(clock.probes)); super().update_curvature(clock)
    opt = Spy(prob.params, update_every=1)
    for _ in range(20): opt.step(prob)
    probes = torch.stack(seen)
    assert set(probes.unique().tolist()) == {-1., 1.} and len({tuple(p.tolist()) for p in probes}) == 20
    assert probes.mean().abs() < 5 / probes.numel()**.5


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", ["problem", "closure", "idiom"])
def test_a_thousand_steps_leak_nothing(way):
    "Graphs kept alive by .grad, which only the cycle collector would free (it is off here)."
    prob = problem(torch.float32)
    opt = ESGD(prob.params, lr=1e-3, update_every=2)
    def step():
        if way == "problem": opt.step(prob)
        elif way == "closure": opt.step(lambda: prob())
        else: opt.zero_grad(); prob().backward(create_graph=opt.needs_graph()); opt.step()
    for _ in range(60): step()
    gc.collect(); gc.disable()
    try:
        before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        for _ in range(1000): step()
        after = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    finally: gc.enable()
    assert after <= before + 5


@pytest.mark.parametrize("make, words", [
    (lambda p: ESGD(p, lr=-1.), "lr is -1.0"), (lambda p: ESGD(p, lr=float("nan")), "lr is nan"), (lambda p: ESGD(p, betas=(.9, 1.)), "betas is"), (lambda p: ESGD(p, update_every=0), "update_every is 0"),
    (lambda p: ESGD(p, warmup=1.5), "warmup is 1.5"), (lambda p: ESGD(p, accumulate="sum"), "'ema', 'mean', 'max'"), (lambda p: ESGD(p, bias_correction="step"), "'updates', 'steps'"),
    (lambda p: AdaHessian(p, estimator="j"), "'jacobi'"), (lambda p: SGD(p, nesterov=True), "nesterov needs"), (lambda p: Adam(p, max_grad_norm=0), "max_grad_norm"),
    (lambda p: Adam(p, maximize="no"), "maximize is 'no'"), (lambda p: ESGD(p, nesterov="false"), "nesterov is 'false'"), (lambda p: ESGD(p, seed=1.5), "seed is 1.5"), (lambda p: SGD(p, max_grad_norm="1"), "max_grad_norm is '1'"),
    (lambda p: Adam([{"params": p, "momentum": .9}]), "'momentum' is not an option of Adam"), (lambda p: ESGD(p, eps=-1e-3), "eps is"),
])
def test_wrong_options_are_one_sentence(make, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")): make([nn.Parameter(torch.ones(1))])


def test_all_frozen_is_refused():
    p = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(RuntimeError, match="frozen"): Adam([p]).step(lambda: p.sum())


def test_power_is_the_exponent_of_the_diagonal():
    "An argument that is accepted and ignored: the paper's Hessian power k."
    h = torch.tensor([.04, 9.], dtype=torch.float64)
    for estimator in ("jacobi", "equilibration"):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        opt = AdaHessian([p], lr=0., eps=0., power=.5, estimator=estimator)
        opt.step(lambda: .5 * (h * p**2).sum())
        torch.testing.assert_close(opt.preconditioner()[p], h.sqrt())


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("name", list(MAKERS))
def test_rolling_back_a_running_optimizer(name, start):
    "Counters, cached P or probes of the abandoned steps that survive a load; a state saved before the first step."
    prob = problem()
    opt = MAKERS[name](prob.params)
    for _ in range(start): opt.step(prob)
    saved = copy.deepcopy((prob.model.state_dict(), opt.state_dict()))
    for _ in range(5): opt.step(prob)
    first = flat(prob.params).clone()
    prob.model.load_state_dict(saved[0]); opt.load_state_dict(saved[1])
    for _ in range(5): opt.step(prob)
    assert torch.equal(flat(prob.params), first)


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("to", [torch.float64, torch.float32])
def test_state_of_another_precision_is_taken_over(name, to):
    "A raw dtype error at the next step; torch.optim.Adam continues too."
    prob = problem(torch.float32 if to == torch.float64 else torch.float64)
    opt = MAKERS[name](prob.params)
    for _ in range(3): opt.step(prob)
    other = problem(to)
    opt2 = MAKERS[name](other.params)
    opt2.load_state_dict(opt.state_dict())
    opt2.step(other)
    assert all(torch.isfinite(p).all() for p in other.params)


@pytest.mark.parametrize("name", CURVED)
def test_freezing_between_two_curvature_updates(name):
    "A cached P that is applied to the parameters that are left, in the wrong order."
    prob = problem()
    params = prob.params
    opt = MAKERS[name](params)
    for _ in range(6): opt.step(lambda: prob())
    params[0].requires_grad_(False)
    expected = {p: P for p, P in opt.preconditioner().items()}
    frozen = params[0].detach().clone()
    before = [p.detach().clone() for p in params]
    opt.step(lambda: prob())                        # t = 6 is not due for the ESGDs (warm-up 3, every 4)
    assert torch.equal(params[0], frozen) and all(not torch.equal(p, b) for p, b in zip(params[1:], before[1:]))
    if name == "esgd":
        for p, P in opt.preconditioner().items(): torch.testing.assert_close(P, expected[p])


def test_state_of_another_optimizer_is_refused_before_anything_changes():
    "A KeyError at the next step."
    prob = problem()
    ours = ESGD(prob.params); ours.step(prob)
    theirs = torch.optim.Adam(prob.params); prob().backward(); theirs.step()
    for opt, state in ((Adam(prob.params), theirs.state_dict()), (AdaHessian(prob.params), ours.state_dict()), (ESGD(prob.params), Adam(prob.params).state_dict())):
        with pytest.raises(ValueError, match="load the state of the same optimizer"): opt.load_state_dict(state)
        opt.step(prob)
    wider = INR(1, 2, hidden_features=9, num_layers=3, dtype=torch.float64)
    with pytest.raises(ValueError, match="load the state of the same model"): ESGD(wider.parameters()).load_state_dict(ours.state_dict())


def test_grad_scaler_is_refused_where_there_is_curvature():
    "P of the scaled loss: a step too small by the scale."
    prob = problem(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.)
    opt = ESGD(prob.params)
    scaler.scale(prob()).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="GradScaler"): scaler.step(opt)


def test_rates_of_other_kinds_and_momentum_turned_on_later():
    import numpy as np
    ends = []
    for lr in (.1, torch.tensor(.1, dtype=torch.float64), np.float64(.1)):
        prob = problem()
        opt = SGD(prob.params, lr=lr)
        opt.step(prob)
        opt.param_groups[0]["momentum"] = .9
        for _ in range(3): opt.step(prob)
        ends.append(flat(prob.params))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    ESGD(problem().params, update_every=np.int64(3))
