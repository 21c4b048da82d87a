"What the members of the family share, in shapes and scales that their own files leave out."
import pytest
import torch
from test_kfac import flat, linear_problem, problem
from test_optim import MAKERS
from test_optim import problem as small
from torch import nn

from inr_precond.curvature import Problem
from inr_precond.optim import ESGD, KFAC, AdaHessian, Adam, GaussNewton


@pytest.mark.parametrize("way", ["problem", "closure"])

@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_empirical_factors_are_those_of_the_samples(loss, way):
    "delta of the mean loss in S, which is too small by B^2 / B, or B counted twice: against each sample's own gradient (the bias's is its delta)."
    prob = problem(loss=loss)
    opt = KFAC(prob.model, lr=0., fisher="empirical")
    opt.step(prob if way == "problem" else lambda: prob())
    deltas = [torch.autograd.grad(Problem(prob.model, prob.inputs[i:i + 1], prob.targets[i:i + 1], loss)(), prob.params[1::2]) for i in range(32)]
    for (_, S), delta in zip(opt.factors().values(), zip(*deltas), strict=True):
        D = torch.stack(delta); torch.testing.assert_close(S, D.T @ D / 32, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("fisher", ["exact", "sampled"])

@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1)])
def test_gauss_newton_of_one_row_or_column(shape, fisher):
    "A squeezed dimension: the diagonal of linear least squares is 2/(B m) sum x_j^2, and 2/m for a bias."
    prob = linear_problem(m=shape[0], n=shape[1])
    opt = GaussNewton(prob.model, lr=0., damping=0., fisher=fisher); opt.step(prob)
    P = opt.preconditioner()
    torch.testing.assert_close(P[prob.model.weight], (2 / shape[0] * prob.inputs.square().mean(0)).expand(shape))
    torch.testing.assert_close(P[prob.model.bias], torch.full((shape[0],), 2 / shape[0], dtype=torch.float64))


@pytest.mark.parametrize("make", [lambda p: ESGD(p, lr=.01), lambda p: AdaHessian(p, lr=.01), lambda p: AdaHessian(p, lr=.01, estimator="jacobi")])
def test_diagonal_members_take_odd_parameters(make):
    "0-dimensional, empty, 1 x 1, 1 x n; a gradient that is zero."
    params = [nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in [(), (0,), (0, 3), (1, 1), (1, 5), (5, 1)]]
    still = nn.Parameter(torch.ones(4, 3, dtype=torch.float64)); opt = make([*params, still])
    for _ in range(4): opt.step(lambda: sum((p**2).sum() for p in params) + 0 * still.square().sum())
    assert all(p.isfinite().all() and (p != 1).all() for p in params) and torch.equal(still, torch.ones_like(still))


@pytest.mark.parametrize("name", ["esgd", "esgd-mean", "esgd-max", "adahessian-j", "adahessian-e"])
def test_a_scaled_loss_over_several_steps_with_eps_scaled_alike(name):
    "An average that scales at its first value alone; eps inside a root or squared."
    ends = []
    for c in (1., 64.):
        prob = small(); start = flat(prob.params); opt = MAKERS[name](prob.params, eps=1e-2 * c, lr=1e-3)
        for _ in range(6): opt.step(lambda c=c, prob=prob: c * prob())
        ends.append(flat(prob.params) - start)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-12)

def test_gauss_newton_scaled_with_its_damping():
    "Damping that is squared, or taken of the root, would not scale with the loss."
    ends = []
    for c in (1., 64.):
        prob = problem(); start = flat(prob.params); opt = GaussNewton(prob.model, lr=1e-3, damping=1e-3 * c)
        for _ in range(5): opt.step(lambda c=c, prob=prob: c * prob())
        ends.append(flat(prob.params) - start)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"then": "adam", "damping": 0.}, {"then": "adam", "ekfac": True}], ids=str)
def test_kfac_beside_layers_of_other_kinds(options):
    "A convolution and a normalisation: named once, the plain (momentum or Adam) step; the dead linear layer stays."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad(): net[3].bias.fill_(-100.)
    x = torch.rand(6, 1, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"4 parameters outside.*0\.weight, 0\.bias, 2\.weight, 2\.bias") as said: opt = KFAC(net, lr=.1, betas=(0., .9), **options)
    assert len(said) == 1
    dead = flat(net[3].parameters())
    for _ in range(3): opt.step(lambda: (net(x) - 1).square().mean() + net[2](net[1](net[0](x))).square().mean())
    assert torch.equal(dead, flat(net[3].parameters())) and flat(net.parameters()).isfinite().all() and list(opt.factors()) == ["3", "5"]


@pytest.mark.parametrize("model", [lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)), lambda: nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))])
@pytest.mark.parametrize("make", [lambda m: KFAC(m, fisher="exact"), lambda m: KFAC(m, fisher="sampled"), GaussNewton])
@pytest.mark.filterwarnings("ignore:KFAC sees linear layers alone", "ignore:Using backward")
def test_a_loss_without_second_derivative_in_the_outputs_is_refused(make, model):
    "L1 has a Gauss-Newton matrix of zeros: a step divided by the damping alone goes uphill. The empirical factors and a smooth loss are taken, and a gradient of zero is no reason to stop."
    torch.manual_seed(0)
    model = model()
    x, y = torch.randn(16, 2), torch.randn(16, 3)
    opt = make(model)
    with pytest.raises(RuntimeError, match='no second derivative in the model.s outputs.*L1.*fisher="empirical"'): opt.step(lambda: nn.functional.l1_loss(model(x), y))
    opt = make(model)
    with pytest.raises(RuntimeError, match="no second derivative"):
        nn.functional.l1_loss(model(x), y).backward(create_graph=True); opt.step()
    opt = make(model)
    opt.step(lambda: nn.functional.smooth_l1_loss(model(x), y)); opt.step(lambda: nn.functional.mse_loss(model(x), model(x).detach()))
    KFAC(model, fisher="empirical").step(lambda: nn.functional.l1_loss(model(x), y))


@pytest.mark.parametrize("call,kind,words", [
    (lambda: ESGD(nn.Linear(2, 3)), TypeError, r"ESGD was given a Linear, but takes its parameters; write ESGD\(model.parameters\(\)\)"),
    (lambda: AdaHessian([]), ValueError, "AdaHessian was given no parameters"), (lambda: ESGD(iter(())), ValueError, "ESGD was given no parameters"),
    (lambda: KFAC(nn.Conv2d(3, 3, 3)), ValueError, "KFAC found no linear layer in the Conv2d"), (lambda: KFAC(nn.ReLU()), ValueError, "no linear layer"),
    (lambda: GaussNewton(nn.ReLU()), ValueError, "no parameters")])
def test_what_has_nothing_to_optimize_is_one_sentence(call, kind, words):
    with pytest.raises(kind, match=words): call()


def test_generators_and_groups_are_taken():
    "Catches a generator that is used up by the check."
    model = nn.Linear(2, 3)
    assert len(ESGD(model.parameters()).param_groups[0]["params"]) == 2 == len(ESGD(p for p in model.parameters()).param_groups[0]["params"])
    assert [g["lr"] for g in ESGD([{"params": [model.weight], "lr": .5}, {"params": [model.bias]}], lr=.1).param_groups] == [.5, .1]
    with pytest.raises(TypeError): ESGD(model.weight)


def test_adam_does_not_take_over_the_state_of_esgd():
    "Their states have the same names and shapes: catches (Hv)^2 taken for g^2, with ESGD's rate."
    model = nn.Linear(2, 3)
    esgd, adam = ESGD(model.parameters()), Adam(model.parameters())
    esgd.step(lambda: model(torch.rand(4, 2)).square().mean()); adam.step(lambda: model(torch.rand(4, 2)).square().mean())
    for a, b in ((adam, esgd), (esgd, adam)):
        with pytest.raises(ValueError, match="the state to be loaded has (the|no) option"): a.load_state_dict(b.state_dict())
