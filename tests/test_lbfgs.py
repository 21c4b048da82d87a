"L-BFGS: torch's numbers behind the family's step call, checkpoints, and answers to bad input."
import io

import pytest
import torch
from torch import nn

from inr_precond.curvature import Problem
from inr_precond.inr import INR, Gaussian
from inr_precond.optim.lbfgs import LBFGS
from inr_precond.train import lr_factor

SETTINGS = [dict(), dict(lr=.3, history_size=3), dict(line_search_fn="strong_wolfe", history_size=4), dict(line_search_fn="strong_wolfe", max_iter=1)]


def network(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return INR(2, 3, 12, 3, Gaussian(.3), generator=g, dtype=dtype)


def batches(count, rows=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(7)
    return [(torch.rand(rows, 2, generator=g, dtype=dtype) * 2 - 1, torch.rand(rows, 3, generator=g, dtype=dtype)) for _ in range(count)]


def loss_of(model, x, y): return (model(x) - y).square().mean()


def torch_closure(model, x, y):
    def closure():
        model.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss
    return closure


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("kind", ["returns the loss", "calls backward", "calls backward without zero_grad"])
def test_equals_torch_bit_for_bit(options, kind):
    "A gradient that is accumulated over the evaluations, differentiated twice, or an option that does not reach torch's class."
    ours, theirs = network(), network()
    a, b = LBFGS(ours.parameters(), **options), torch.optim.LBFGS(theirs.parameters(), **options)

    def backward_only(x, y):
        loss = loss_of(ours, x, y)
        loss.backward()
        return loss

    for x, y in batches(4):
        closure = {"returns the loss": lambda: loss_of(ours, x, y), "calls backward": torch_closure(ours, x, y), "calls backward without zero_grad": lambda: backward_only(x, y)}[kind]
        la, lb = a.step(closure), b.step(torch_closure(theirs, x, y))
        assert torch.equal(la, lb) and not la.requires_grad
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert a.evaluations == b.state[b._params[0]]["func_evals"] >= 4


@pytest.mark.parametrize("options", SETTINGS)
def test_a_problem_gives_the_same_path(options):
    "A Problem whose gradient is of another batch, or is left out of `.grad`: float64, so that only rounding may differ."
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    options = {**options, "max_iter": min(4, options.get("max_iter", 4))}  # few, for rounding grows with the iterations
    a, b = LBFGS(ours.parameters(), **options), torch.optim.LBFGS(theirs.parameters(), **options)
    for x, y in batches(3, dtype=torch.float64):
        la, lb = a.step(Problem(ours, x, y)), b.step(torch_closure(theirs, x, y))
        torch.testing.assert_close(la, lb.detach(), rtol=1e-9, atol=0)
    for p, q in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", SETTINGS)
def test_checkpoints_continue_bit_for_bit(options):
    "A state that loses pairs, the step length or the count of iterations; or one that only pickle can read."
    data = batches(6)
    whole = network()
    a = LBFGS(whole.parameters(), **options)
    for x, y in data[:3]: a.step(Problem(whole, x, y))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": a.state_dict()}, file)
    losses = [a.step(Problem(whole, x, y)) for x, y in data[3:]]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(seed=5)
    resumed.load_state_dict(saved["model"])
    b = LBFGS(resumed.parameters(), **options)
    b.load_state_dict(saved["optimizer"])
    assert [b.step(Problem(resumed, x, y)) for x, y in data[3:]] == losses
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters())) and a.evaluations == b.evaluations


def test_on_a_quadratic_the_last_pair_satisfies_the_secant_equation_and_the_minimum_is_found():
    "Steps that are not L-BFGS's: on 1/2 (x - c)'H(x - c) every kept pair obeys y = Hs, and the minimum is c."
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0]
    H = Q @ torch.diag(torch.logspace(0, 2, 8, dtype=torch.float64)) @ Q.T
    c = torch.randn(8, generator=g, dtype=torch.float64)
    x = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    opt = LBFGS([x], max_iter=60, max_eval=200, history_size=8, tolerance_grad=0., tolerance_change=0., line_search_fn="strong_wolfe")
    opt.step(lambda: .5 * (x - c) @ H @ (x - c))
    torch.testing.assert_close(x.detach(), c, rtol=0, atol=1e-7)
    state = opt.state[x]
    assert len(state["old_dirs"]) == 8
    torch.testing.assert_close(state["old_dirs"][0], H @ state["old_stps"][0], rtol=1e-5, atol=1e-12)


def test_only_trainable_parameters_move():
    "Differentiating with respect to a frozen parameter, which autograd refuses."
    model = network()
    frozen = next(model.parameters()).requires_grad_(False)
    before, (x, y) = frozen.clone(), batches(1)[0]
    opt = LBFGS(model.parameters())
    first = opt.step(lambda: loss_of(model, x, y))
    assert torch.equal(frozen, before) and opt.step(Problem(model, x, y)) < first


def test_schedulers_set_the_rate_and_hooks_run_once():
    "A step that a scheduler does not reach, or torch's hook around the base class's step that runs a user's hook twice."
    torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])  # from now on torch's own step is wrapped
    model, (x, y), calls = network(), batches(1)[0], []
    opt = LBFGS(model.parameters(), max_iter=2)
    opt.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lr_factor("cosine", 4))
    for _ in range(2):
        opt.step(Problem(model, x, y))
        scheduler.step()
    assert calls == [1, 1] and opt.param_groups[0]["lr"] == pytest.approx(.5)


def test_the_trainer_takes_it(tmp_path):
    "A step that the training loop cannot call, or that does not return the loss before the step."
    from inr_precond.data.images import load_image
    from inr_precond.train import ImageTask, Trainer
    def made(): return Trainer(model := network(), ImageTask(load_image("astronaut", 16), 64), LBFGS(model.parameters(), max_iter=3, history_size=3, line_search_fn="strong_wolfe"), 12, torch.Generator().manual_seed(0), evaluations=3, checkpoint=tmp_path / "c.pt")
    whole = made()
    history = whole.train()
    assert history.status == "finished" and torch.isfinite(history.losses).all() and history.evals[-1]["mse"] < history.losses[0]
    resumed = made()
    assert resumed.resume() and resumed.optimizer.evaluations == whole.optimizer.evaluations


@pytest.mark.parametrize("options, words", [(dict(lr=-1.), "lr is -1.0, but must be a finite number >= 0"), (dict(lr=float("nan")), "lr is nan"), (dict(max_iter=0), "max_iter is 0, but must be a whole number >= 1"),
                                            (dict(max_iter=2.5), "max_iter is 2.5"), (dict(history_size=True), "history_size is True"), (dict(line_search_fn="armijo"), "line_search_fn is 'armijo', but must be 'strong_wolfe' or None"),
                                            (dict(tolerance_grad=float("inf")), "tolerance_grad is inf"), (dict(max_eval=0), "max_eval is 0")])
def test_options_out_of_range(options, words):
    "torch accepts a history of 0 and an unknown line search, and fails in the middle of a training."
    with pytest.raises(ValueError, match=words): LBFGS([torch.zeros(2, requires_grad=True)], **options)


def test_bad_closures():
    "Errors three calls deeper that do not say what to write."
    w = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="give step.. a Problem or a closure that returns the loss"): LBFGS([w]).step()
    with pytest.raises(TypeError, match="returned float, but must return the loss"): LBFGS([w]).step(lambda: 1.)
    with pytest.raises(TypeError, match=r"a tensor of shape \(2,\)"): LBFGS([w]).step(lambda: w + 1)
    with pytest.raises(RuntimeError, match="does not depend on any parameter"): LBFGS([w]).step(lambda: torch.ones((), requires_grad=True) * 2)
    with pytest.raises(RuntimeError, match="does not depend on any parameter"): LBFGS([w]).step(lambda: torch.ones(()))
    assert torch.equal(w, torch.zeros(2)) and not LBFGS([w]).needs_graph()


def test_a_frozen_model_is_refused():
    "torch's own words about an empty list of inputs."
    x = torch.ones(3, 2, requires_grad=True)
    net = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(RuntimeError, match="every parameter of this optimizer is frozen"): LBFGS(net.parameters()).step(lambda: net(x).mean())


def test_a_state_of_another_optimizer_is_refused():
    "A KeyError at the next step."
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="no option 'max_iter', so it is not one of LBFGS"): LBFGS(net.parameters()).load_state_dict(torch.optim.Adam(net.parameters()).state_dict())
