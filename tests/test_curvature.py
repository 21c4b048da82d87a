"Curvature: every product against the dense float64 Hessian, estimators against the truth, subsets, fall-backs, memory, bad input."
import copy
import gc
import math
import resource
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inr_precond.curvature as curvature
from inr_precond.curvature import (
    Problem,
    check_twice_differentiable,
    equilibration,
    ggn_vp,
    hessian,
    hutchinson_diagonal,
    hvp,
    rademacher_like,
    value_and_grad,
    value_grad_hvp,
)
from inr_precond.inr import INR, Activation, GaborLayer, Gaussian, PositionalEncoding, ReLU, Sine, Wavelet
from inr_precond.optim import ESGD

torch.set_num_threads(1)
SETTINGS = {"relu": dict(activation=ReLU()), "relu-pe": dict(activation=ReLU(), encoding=PositionalEncoding(2, 4)), "sine": dict(activation=Sine()),
            "gaussian": dict(activation=Gaussian(.05)), "wavelet": dict(activation=Wavelet()), "gabor": dict(layer=GaborLayer)}
seeded = lambda seed=0: torch.Generator().manual_seed(seed)
flat = lambda tensors: torch.cat([t.detach().reshape(-1).double() for t in tensors])
error = lambda a, b: ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


def make(name="gaussian", loss="mse", batch=24, width=8, layers=4, dtype=torch.float64, seed=0):
    model = INR(2, 3, hidden_features=width, num_layers=layers, generator=seeded(seed), dtype=dtype, **SETTINGS[name])
    return Problem(model, (torch.rand(batch, 2, generator=seeded(1)) * 2 - 1).to(dtype), torch.rand(batch, 3, generator=seeded(2)).to(dtype), loss)


def vectors(problem_or_params, seed=3):
    params = getattr(problem_or_params, "params", problem_or_params)
    return tuple(torch.randn(p.shape, generator=seeded(seed)).to(p) for p in params)


def reference(problem, params, v):
    "Loss, gradient, H v by autograd alone."
    loss = problem()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    return loss, grads, torch.autograd.grad(grads, params, v, allow_unused=True, materialize_grads=True)


def in_float64(problem):
    return Problem(copy.deepcopy(problem.model).double(), problem.inputs.double(), problem.targets.double(), problem.loss)


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("name", SETTINGS)
def test_backends_against_the_dense_hessian(name, loss):
    "A term of the R-operator left out or doubled: each enters some block of H."
    problem = make(name, loss)
    H = hessian(problem, problem.params)
    v = vectors(problem)
    exact = H @ flat(v)
    for backend in ("rop", "double_backward", "auto"):
        assert error(hvp(problem, problem.params, v, backend), [exact]) < 1e-12, backend


def test_hessian_equals_torch_func_and_is_symmetric():
    "Rows out of the order of `params`."
    problem = make(layers=3)
    model, x, y = problem.model, problem.inputs, problem.targets
    named = dict(model.named_parameters())
    blocks = torch.func.hessian(lambda p: F.mse_loss(torch.func.functional_call(model, p, (x,)), y))({n: p.detach() for n, p in named.items()})
    names = list(named)[::-1]
    expected = torch.cat([torch.cat([blocks[a][b].reshape(named[a].numel(), -1) for b in names], 1) for a in names])
    H = hessian(problem, [named[n] for n in names])
    assert H.dtype == torch.float64
    torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(H, H.T, rtol=1e-10, atol=1e-12)


def test_hessian_of_a_float32_problem_is_that_of_its_float64_twin():
    problem = make(dtype=torch.float32, layers=3)
    twin = in_float64(problem)
    torch.testing.assert_close(hessian(problem, problem.params), hessian(twin, twin.params), rtol=1e-12, atol=1e-14)
    assert problem.model.layers[0].weight.dtype == torch.float32 and problem.model.layers[0].weight.grad is None


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mkldnn", [True, False])
def test_float32_sweeps_are_as_exact_as_float32_autograd(name, loss, mkldnn):
    "Products in a lower precision, or an unstable formula in place of an exact one."
    problem = make(name, loss, batch=200, width=72, dtype=torch.float32)
    exact = in_float64(problem)
    v = vectors(problem)
    _, g, h = reference(exact, exact.params, [t.double() for t in v])
    _, g32, h32 = reference(problem, problem.params, v)
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        value, gs, hs = value_grad_hvp(problem, problem.params, v, "rop")
        loss_only, g_only = value_and_grad(problem, problem.params)
    assert value.item() == pytest.approx(exact().item(), rel=1e-5) and loss_only.item() == pytest.approx(exact().item(), rel=1e-5)
    assert error(gs, g) < 2 * error(g32, g) + 1e-6 and error(g_only, g) < 2 * error(g32, g) + 1e-6 and error(hs, h) < 2 * error(h32, h) + 1e-6


@pytest.mark.parametrize("name", ["gaussian", "gabor", "relu-pe"])
@pytest.mark.parametrize("batch", [1, 2, 63, 4097, 6200])
def test_batches_of_any_size(name, batch):
    "A tile left out or counted twice, a mean taken per tile, a batch of one treated as a vector."
    problem = make(name, batch=batch)
    v = vectors(problem)
    loss, g, h = reference(problem, problem.params, v)
    ours = value_grad_hvp(problem, problem.params, v, "rop")
    assert ours[0].item() == pytest.approx(loss.item(), rel=1e-12) and error(ours[1], g) < 1e-11 and error(ours[2], h) < 1e-11
    assert error(value_and_grad(problem, problem.params)[1], g) < 1e-11


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("name", SETTINGS)
def test_gauss_newton_product(name, loss):
    "The residual term left in, or the wrong Hessian of the cost."
    problem = make(name, loss, layers=3)
    params, out = problem.params, problem.model(problem.inputs)
    J = torch.stack([flat(torch.autograd.grad(o, params, retain_graph=True)) for o in out.reshape(-1)])
    s = out.detach().sigmoid().reshape(-1)
    Hc = torch.full_like(s, 2.) if loss == "mse" else s * (1 - s)
    v = vectors(problem)
    exact = J.T @ (Hc / out.numel() * (J @ flat(v)))
    assert error(ggn_vp(problem, params, v), [exact]) < 1e-12
    generic = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits
    assert error(ggn_vp(Problem(problem.model, problem.inputs, problem.targets, generic), params, v), [exact]) < 1e-12


@pytest.mark.parametrize("name", ["gaussian", "gabor", "relu"])
@pytest.mark.parametrize("choice", ["reversed", "last", "biases", "one weight", "a gap", "half a gabor layer"])
def test_a_subset_of_the_parameters_gives_the_block_of_h(name, choice):
    "The other parameters' columns leaking in, or results in the model's order instead of the caller's."
    problem = make(name)
    every = problem.params
    params = {"reversed": every[::-1], "last": every[-2:], "biases": every[1::2], "one weight": every[2:3], "a gap": (every[0], every[-1], every[3]), "half a gabor layer": every[4:6]}[choice]
    H = hessian(problem, params)
    v = vectors(params)
    for backend in ("rop", "double_backward"):
        loss, g, h = value_grad_hvp(problem, params, v, backend)
        assert [t.shape for t in g] == [p.shape for p in params] and error(h, [H @ flat(v)]) < 1e-11, backend
        assert error(g, torch.autograd.grad(problem(), params)) < 1e-11
    assert error(value_and_grad(problem, params)[1], torch.autograd.grad(problem(), params)) < 1e-11
    G = torch.stack([flat(ggn_vp(problem, params, [c.reshape(p.shape) for c, p in zip(e.split([p.numel() for p in params]), params)])) for e in torch.eye(len(H), dtype=torch.float64)])
    torch.testing.assert_close(G, G.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["rop", "double_backward"])
def test_frozen_and_foreign_parameters_give_zeros(backend):
    problem = make()
    frozen = problem.model.layers[1].weight.requires_grad_(False)
    foreign = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    params = (*problem.params, frozen, foreign)
    v = vectors(params)
    loss, g, h = value_grad_hvp(problem, params, v, backend)
    assert not g[-2].any() and not g[-1].any() and not h[-2].any() and not h[-1].any()
    H = hessian(problem, problem.params)
    assert error(h[:-2], [H @ flat(v[:-2])]) < 1e-11
    g, h = value_grad_hvp(problem, (foreign,), (foreign,), backend)[1:]
    assert not g[0].any() and not h[0].any() and not ggn_vp(problem, (foreign,), (foreign,))[0].any()


def test_parameters_shared_by_two_layers_add_up():
    problem = make()
    problem.model.layers[2].weight = problem.model.layers[1].weight
    params = problem.params
    v = vectors(params)
    loss, g, h = reference(problem, params, v)
    ours = value_grad_hvp(problem, params, v, "rop")
    assert error(ours[1], g) < 1e-11 and error(ours[2], h) < 1e-11
    torch.testing.assert_close(hessian(problem, params) @ flat(v), flat(h), rtol=1e-9, atol=1e-10)


def test_layers_without_bias_and_single_layer_networks():
    problem = make()
    problem.model.layers[0] = nn.Linear(2, 8, bias=False, dtype=torch.float64)
    problem.model.layers[3] = nn.Linear(8, 3, bias=False, dtype=torch.float64)
    for p in (problem, make(layers=1), make(layers=2)):
        v = vectors(p)
        loss, g, h = reference(p, p.params, v)
        ours = value_grad_hvp(p, p.params, v, "rop")
        assert error(ours[1], g) < 1e-11 and error(ours[2], h) < 1e-11


def test_an_activation_of_ones_own_with_derivatives_uses_the_sweeps():
    class Softsign(Activation):
        def derivatives(self, x):
            t = torch.tanh(x)
            return t, 1 - t * t, -2 * t * (1 - t * t)
    problem = make()
    problem.model.activation = Softsign()
    v = vectors(problem)
    _, g, h = reference(problem, problem.params, v)
    _, ours, hv = value_grad_hvp(problem, problem.params, v, "rop")
    assert error(ours, g) < 1e-12 and error(hv, h) < 1e-12


def test_non_contiguous_tensors():
    "Strides ignored."
    problem = make(batch=70, width=72, dtype=torch.float32)
    x, y = problem.inputs.t().contiguous().t(), torch.cat([problem.targets, problem.targets], 1)[:, ::2]
    problem = Problem(problem.model, x, y)
    for layer in problem.model.layers: layer.weight.data = layer.weight.data.t().contiguous().t()
    v = tuple(torch.randn(p.shape[::-1]).t() if p.dim() == 2 else torch.randn(2 * len(p))[::2] for p in problem.params)
    exact = in_float64(problem)
    _, g, h = reference(exact, exact.params, [t.double() for t in v])
    _, ours, hv = value_grad_hvp(problem, problem.params, v, "rop")
    assert not x.is_contiguous() and error(ours, g) < 1e-4 and error(hv, h) < 1e-4


def test_inputs_with_more_than_one_leading_dimension():
    problem = make(batch=24)
    shaped = Problem(problem.model, problem.inputs.reshape(2, 3, 4, 2), problem.targets.reshape(2, 3, 4, 3))
    v = vectors(problem)
    for a, b in zip(value_grad_hvp(problem, problem.params, v, "rop")[2], value_grad_hvp(shaped, problem.params, v, "rop")[2]): torch.testing.assert_close(a, b)


def test_results_are_fresh_and_never_overwritten():
    "A gradient that aliases scratch memory changes with the next call."
    problem = make(batch=100, width=72, dtype=torch.float32)
    v = vectors(problem)
    first = [*value_grad_hvp(problem, problem.params, v)[1], *value_grad_hvp(problem, problem.params, v)[2], *value_and_grad(problem, problem.params)[1], *ggn_vp(problem, problem.params, v)]
    copies = [t.clone() for t in first]
    with torch.no_grad():
        for p in problem.params: p.mul_(1.5)
    for _ in range(2): value_grad_hvp(problem, problem.params, v); value_and_grad(problem, problem.params); ggn_vp(problem, problem.params, v)
    assert all(torch.equal(a, b) for a, b in zip(first, copies))
    assert len({t.untyped_storage().data_ptr() for t in first}) == len(first) and all(t.is_contiguous() and not t.requires_grad for t in first)


def test_same_call_same_bits():
    problem = make(batch=300, width=72, dtype=torch.float32)
    v = vectors(problem)
    a, b = (value_grad_hvp(problem, problem.params, v, "rop") for _ in range(2))
    other = Problem(copy.deepcopy(problem.model), problem.inputs.clone(), problem.targets.clone())
    c = value_grad_hvp(other, other.params, v, "rop")
    for r in (b, c): assert torch.equal(a[0], r[0]) and all(torch.equal(s, t) for s, t in zip(a[1] + a[2], r[1] + r[2]))


def test_sweeps_follow_every_change_of_the_parameters():
    "A cached view of memory that the parameter no longer owns."
    problem = make(batch=64, width=72, dtype=torch.float32)
    value_and_grad(problem, problem.params)
    for p in problem.params: p.data = torch.randn(p.shape) * .1
    assert error(value_and_grad(problem, problem.params)[1], torch.autograd.grad(problem(), problem.params)) < 1e-4
    problem.model.double()
    double = Problem(problem.model, problem.inputs.double(), problem.targets.double())
    assert error(value_and_grad(double, double.params)[1], torch.autograd.grad(double(), double.params)) < 1e-10


def test_two_threads_on_one_model_do_not_share_scratch_memory():
    problem = make(batch=200, width=72, dtype=torch.float32)
    expected, wrong = flat(value_and_grad(problem, problem.params)[1]), []
    def work():
        for _ in range(30):
            if not torch.equal(flat(value_and_grad(problem, problem.params)[1]), expected): wrong.append(1)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


def test_more_openmp_threads_change_nothing_but_rounding():
    problem = make(batch=512, width=96, dtype=torch.float32)
    one = value_grad_hvp(problem, problem.params, vectors(problem))
    try:
        torch.set_num_threads(2)
        two = value_grad_hvp(problem, problem.params, vectors(problem))
    finally: torch.set_num_threads(1)
    assert error(two[1], one[1]) < 1e-5 and error(two[2], one[2]) < 1e-5


def test_a_thousand_calls_leak_nothing():
    "A tensor, graph or scratch buffer kept per call."
    problem = make(batch=128, width=64, dtype=torch.float32)
    sizes = [128, 100, 127]
    def calls(n):
        for i in range(n):
            p = Problem(problem.model, problem.inputs[:sizes[i % 3]], problem.targets[:sizes[i % 3]])
            value_and_grad(p, p.params) if i % 4 else value_grad_hvp(p, p.params, p.params)
    calls(100); gc.collect()
    tensors, peak = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.disable()
    try: calls(1000)
    finally: gc.enable()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= tensors + 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000 # KiB; one leaked gradient a call would be 50 MB


def test_a_model_is_not_kept_alive_by_its_scratch_memory():
    problem = make(batch=64)
    value_and_grad(problem, problem.params)
    gone = weakref.ref(problem.model)
    del problem; gc.collect()
    assert gone() is None and all(m is not None for m in curvature._pools)


# what the sweeps do not describe is left to autograd

class Twice(nn.Module):
    def forward(self, x): return 2 * x


def spoil_hook(problem): problem.model.layers[1].register_forward_hook(lambda m, i, o: 2 * o)
def spoil_pre_hook(problem): problem.model.layers[1].register_forward_pre_hook(lambda m, i: (3 * i[0],))
def spoil_model_hook(problem): problem.model.register_forward_hook(lambda m, i, o: o * o)
def spoil_activation(problem): problem.model.activation = nn.Tanh()
def spoil_activation_subclass(problem):
    class Louder(Gaussian):
        def forward(self, x): return 2 * super().forward(x)
    problem.model.activation = Louder(.3)
def spoil_layer(problem): problem.model.layers[1] = nn.Sequential(problem.model.layers[1], Twice())
def spoil_parametrization(problem): nn.utils.parametrizations.weight_norm(problem.model.layers[1])
def spoil_old_weight_norm(problem): nn.utils.parametrize.register_parametrization(problem.model.layers[0], "weight", Twice())
def spoil_encoding(problem): problem.model.encoding = nn.Linear(2, 2, dtype=torch.float64)
def spoil_parameter_hook(problem): problem.model.layers[0].weight.register_hook(lambda g: 5 * g)
def spoil_forward(problem): problem.model.forward = lambda x: problem.model._forward(x) ** 2
def spoil_loss(problem): problem.loss = lambda o, y: (o - y).square().mean() + sum(p.square().sum() for p in problem.model.parameters())
def spoil_learned_inputs(problem): problem.inputs = problem.inputs.clone().requires_grad_()
def spoil_learned_targets(problem): problem.targets = problem.targets.clone().requires_grad_()
def spoil_learned_sigma(problem):
    problem.model.activation = Gaussian()
    problem.model.activation.sigma = nn.Parameter(torch.tensor(.2, dtype=torch.float64))
def spoil_tensor_sigma(problem):
    problem.model.activation = Gaussian()
    problem.model.activation.sigma = torch.full((8,), .2, dtype=torch.float64, requires_grad=True)
def spoil_subclass(problem):
    class Scaled(INR):
        def forward(self, x): return 3 * super().forward(x)
    problem.model.__class__ = Scaled


@pytest.mark.parametrize("spoil", [f for n, f in list(globals().items()) if n.startswith("spoil_")], ids=lambda f: f.__name__[6:])
def test_whatever_the_sweeps_would_not_see_is_differentiated_by_autograd(spoil):
    "The sweeps taken for a network that is not what they assume: a wrong gradient without an error."
    problem = make()
    spoil(problem)
    params = problem.params
    v = vectors(params)
    loss, g, h = reference(problem, params, v)
    for ours in (value_grad_hvp(problem, params, v), (*value_and_grad(problem, params), h)):
        assert ours[0].item() == pytest.approx(loss.item(), rel=1e-10) and error(ours[1], g) < 1e-11 and error(ours[2], h) < 1e-11
    with pytest.raises(ValueError, match='backend="rop" does not apply because'): hvp(problem, params, v, "rop")


def test_a_hook_on_all_modules_is_seen():
    problem = make()
    v = vectors(problem)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: 2 * o if isinstance(m, Gaussian) else None)
    try:
        loss, g, h = reference(problem, problem.params, v)
        ours = value_grad_hvp(problem, problem.params, v)
        with pytest.raises(ValueError, match="because the model has hooks"): hvp(problem, problem.params, v, "rop")
    finally: handle.remove()
    assert ours[0].item() == pytest.approx(loss.item(), rel=1e-12) and error(ours[1], g) < 1e-11 and error(ours[2], h) < 1e-11
    assert error(value_grad_hvp(problem, problem.params, v, "rop")[1], g) > .01


def test_a_gabor_layer_with_a_learned_scale_falls_back():
    problem = make("gabor")
    problem.model.layers[1].scale = nn.Parameter(torch.tensor(3., dtype=torch.float64))
    v = vectors(problem)
    loss, g, h = reference(problem, problem.params, v)
    ours = value_grad_hvp(problem, problem.params, v)
    assert any(p is problem.model.layers[1].scale for p in problem.params) and "scale=tensor" in repr(problem.model)
    assert error(ours[1], g) < 1e-11 and error(ours[2], h) < 1e-11 and all(t.any() for t in ours[1])


def test_parameters_in_the_inputs_or_targets_get_their_gradient():
    "Poses, latent codes and learned targets left at zero gradient by sweeps that see the model alone."
    shift, scale = (nn.Parameter(torch.full((2,), c, dtype=torch.float64)) for c in (.1, 1.))
    problem = make()
    x, y = problem.inputs, problem.targets
    for change in (lambda: setattr(problem, "inputs", x * scale + shift), lambda: (setattr(problem, "inputs", x), setattr(problem, "targets", y * shift.sum()))):
        change()
        params = (*problem.params, shift)
        grads = value_and_grad(problem, params)[1]
        change()
        assert error(grads, torch.autograd.grad(problem(), params)) < 1e-12 and grads[-1].any()
        change()
        H = hessian(problem, params)
        change()
        v = vectors(params)
        assert error([H @ flat(v)], value_grad_hvp(problem, params, v)[2]) < 1e-11 and H[-1].any()


def test_hessian_sees_parameters_that_a_float64_copy_of_the_problem_would_not():
    "A twin of model and data in which a parameter inside the loss, or an outer one, is a constant."
    problem, weight = make(dtype=torch.float32, layers=2, width=4), nn.Parameter(torch.tensor(2.))
    problem.loss = lambda o, y: weight.square() * (o - y).square().mean() + problem.model.layers[0].weight.pow(4).sum()
    params = (problem.model.layers[0].weight, weight)
    H = hessian(problem, params)
    v = vectors(params)
    assert error([H @ flat(v)], reference(problem, params, v)[2]) < 1e-5
    assert H[-1, -1].item() == pytest.approx(2 * (problem.model(problem.inputs) - problem.targets).square().mean().item(), rel=1e-5)
    named = make(layers=2, width=4)
    foreign = nn.Parameter(torch.ones(2, dtype=torch.float64))
    H = hessian(named, (*named.params, foreign))
    assert not H[-2:].any() and not H[:, -2:].any()
    torch.testing.assert_close(H[:-2, :-2], hessian(named, named.params), rtol=1e-12, atol=1e-14)


def test_hessian_of_parameters_without_dimensions_or_elements():
    a, b, c = nn.Parameter(torch.tensor(2., dtype=torch.float64)), nn.Parameter(torch.ones(0, 3, dtype=torch.float64)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    f = lambda: (a**3 * c.square()).sum() + b.sum()
    torch.testing.assert_close(hessian(f, (a, b, c)), torch.tensor([[24., 24, 24], [24, 16, 0], [24, 0, 16]], dtype=torch.float64))
    assert hessian(f, (b,)).shape == (0, 0) == hessian(f, ()).shape


@pytest.mark.parametrize("name, attribute", [("gaussian", "sigma"), ("sine", "omega"), ("wavelet", "scale"), ("wavelet", "omega"), ("gabor", "scale"), ("gabor", "omega")])
def test_the_sweeps_follow_a_changed_activation(name, attribute):
    problem = make(name)
    if name != "gabor": problem.model.activation = copy.deepcopy(problem.model.activation)
    owner = problem.model.layers[1] if name == "gabor" else problem.model.activation
    v = vectors(problem)
    value_and_grad(problem, problem.params)
    setattr(owner, attribute, .7 * getattr(owner, attribute))
    loss, g, h = reference(problem, problem.params, v)
    ours = value_grad_hvp(problem, problem.params, v, "rop")
    assert ours[0].item() == pytest.approx(loss.item(), rel=1e-12) and error(ours[1], g) < 1e-11 and error(ours[2], h) < 1e-11


@pytest.mark.parametrize("name", ["gaussian", "gabor"])
@pytest.mark.parametrize("width", [8, 64])
def test_inference_mode_leaves_no_scratch_memory_that_autograd_mode_may_not_write(name, width):
    problem = make(name, width=width, batch=70, dtype=torch.float32)
    v = vectors(problem)
    first = value_grad_hvp(problem, problem.params, v, "rop")[2]
    with torch.inference_mode(): inside = value_grad_hvp(problem, problem.params, v, "rop")[2]
    after = value_grad_hvp(problem, problem.params, v, "rop")[2]
    for a, b, c in zip(first, inside, after): assert torch.equal(a, b) and torch.equal(a, c) and not c.is_inference()
    for f in (lambda: value_and_grad(lambda: problem(), problem.params), lambda: ggn_vp(Problem(problem.model, problem.inputs, problem.targets, F.mse_loss), problem.params, v)):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"): f()


def test_a_head_replaced_by_hand_sets_the_width_of_the_outputs():
    problem = make()
    problem.model.layers[-1] = nn.Linear(8, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"outputs of shape \(24, 1\) for targets of shape \(24, 3\)"): value_and_grad(problem, problem.params)
    problem.targets = problem.targets[:, :1]
    v = vectors(problem)
    assert error(hvp(problem, problem.params, v, "rop"), reference(problem, problem.params, v)[2]) < 1e-11


@pytest.mark.parametrize("change, kind, message", [
    (dict(targets=torch.zeros(4, 3, dtype=torch.int64)), ValueError, "targets of torch.int64 for loss='mse': pass floating-point targets"),
    (dict(targets=torch.zeros(4, 3, dtype=torch.bool), loss="bce"), ValueError, "targets of torch.bool for loss='bce'"),
    (dict(inputs=torch.zeros(4, 2).numpy()), TypeError, "inputs of type ndarray: pass a tensor"),
    (dict(targets=torch.zeros(4, 3).numpy()), TypeError, "targets of type ndarray: pass a tensor"),
    (dict(inputs=torch.zeros(4, 5)), ValueError, r"INR was given inputs of shape \(4, 5\): pass \(..., 2\)"),
    (dict(inputs=torch.zeros(0, 2), targets=torch.zeros(0, 3)), ValueError, r"empty batch, targets of shape \(0, 3\): pass at least one row")])
def test_data_that_do_not_fit_are_named(change, kind, message):
    model = INR(2, 3, hidden_features=8, num_layers=3)
    with pytest.raises(kind, match=message):
        problem = Problem(model, **dict(inputs=torch.zeros(4, 2), targets=torch.zeros(4, 3)) | change)
        value_and_grad(problem, problem.params)


def test_integer_targets_serve_a_loss_of_ones_own():
    problem = Problem(INR(2, 3, hidden_features=8, num_layers=3), torch.rand(5, 2), torch.tensor([0, 2, 1, 1, 0]), F.cross_entropy)
    assert all(g.any() for g in value_and_grad(problem, problem.params)[1])


def test_inside_a_functional_call_autograd_sees_the_replaced_parameters():
    problem = make()
    named = {n: (2 * p).detach().requires_grad_() for n, p in problem.model.named_parameters()}
    new = tuple(named.values())
    loss_fn = lambda: (torch.func.functional_call(problem.model, named, (problem.inputs,)) - problem.targets).square().mean()
    assert error(value_and_grad(loss_fn, new)[1], torch.autograd.grad(loss_fn(), new)) < 1e-12


def test_bfloat16_parameters_fall_back():
    problem = make(batch=64, width=16, dtype=torch.bfloat16)
    loss, g = value_and_grad(problem, problem.params)
    assert all(t.dtype == torch.bfloat16 for t in g) and error(g, torch.autograd.grad(problem(), problem.params)) == 0
    v = vectors(problem)
    assert error(hvp(problem, problem.params, v), reference(problem, problem.params, v)[2]) == 0
    mixed = Problem(make(dtype=torch.float32).model, problem.inputs, problem.targets)
    with pytest.raises(ValueError, match="rop"): hvp(mixed, mixed.params, vectors(mixed), "rop")


def test_autocast_is_left_to_autograd():
    problem = make(batch=64, width=16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = value_and_grad(problem, problem.params)[1], torch.autograd.grad(problem(), problem.params)
    assert error(ours, theirs) == 0


def test_any_callable_and_any_model():
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(9, 2, generator=seeded(), dtype=torch.float64)
    loss_fn = lambda: model(x).pow(4).mean()
    params = tuple(model.parameters())
    v = vectors(params)
    H = hessian(loss_fn, params)
    assert error(hvp(loss_fn, params, v), [H @ flat(v)]) < 1e-12 and error(value_and_grad(loss_fn, params)[1], torch.autograd.grad(loss_fn(), params)) == 0


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g * ctx.saved_tensors[0].cos()


class OnceLayer(nn.Module):
    def forward(self, x): return Once.apply(x)


class Mend(torch.autograd.Function):
    "A custom Function that can be differentiated twice."
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.sin()

    @staticmethod
    def backward(ctx, g): return g * ctx.saved_tensors[0].cos()


PRODUCTS = {"hvp": lambda f, p: hvp(f, p, vectors(p)), "double_backward": lambda f, p: hvp(f, p, vectors(p), "double_backward"), "hessian": hessian, "ggn_vp": lambda f, p: ggn_vp(f, p, vectors(p)),
            "hutchinson": lambda f, p: hutchinson_diagonal(f, p, 2, seeded()), "equilibration": lambda f, p: equilibration(f, p, 2, seeded())}
ADVICE = "use layers with a second derivative and an uncompiled model, or an optimizer that needs gradients alone \\(SGD, Adam\\)$"


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_layer_without_a_second_derivative_inside_a_model_is_named(product):
    "torch ends the gradient's graph in an Error node that allow_unused=True never executes: H v = 0, or partly wrong, without a word."
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), OnceLayer(), nn.Linear(4, 1)).double()
    problem = Problem(model, make().inputs, make().targets[:, :1])
    with pytest.raises(RuntimeError, match="differentiated twice because of OnceBackward; " + ADVICE): PRODUCTS[product](problem, problem.params)
    assert all(g.any() for g in value_and_grad(problem, problem.params)[1])
    head = problem.params[-2:]                               # nothing asked for lies behind the layer: the product is exact
    with_graph = Problem(nn.Sequential(*model[:3], nn.Identity(), model[4]), problem.inputs, problem.targets)
    with_graph.model[3].forward = torch.sin
    assert error(hvp(problem, head, vectors(head)), hvp(with_graph, head, vectors(head))) < 1e-12
    foreign = (nn.Parameter(torch.ones(2, dtype=torch.float64)),)
    assert not hvp(problem, foreign, vectors(foreign))[0].any()


def test_a_layer_whose_gradient_lost_its_graph_is_named():
    "Where what comes in from above is constant, torch leaves no Error node at all, and other terms hide that the gradient has lost its graph."
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    for f in (lambda: Once.apply(p).sum(), lambda: Once.apply(p).sum() + p.pow(3).sum(), lambda: 2 * Once.apply(p + 1).sum() + p.pow(3).sum()):
        with pytest.raises(RuntimeError, match="differentiated twice because of OnceBackward"): hvp(f, (p,), (p.detach(),))
    torch.testing.assert_close(hvp(lambda: Mend.apply(p).sum() + p.pow(3).sum(), (p,), (torch.ones_like(p),))[0], (6 * p - p.sin()).detach())
    loss = Once.apply(p).square().sum()
    grads = torch.autograd.grad(loss, (p,), create_graph=True)
    with pytest.raises(RuntimeError, match="because of OnceBackward"): check_twice_differentiable(grads, loss)
    with pytest.raises(RuntimeError, match="because of a layer marked once_differentiable"): check_twice_differentiable(grads)


@pytest.mark.parametrize("head", [lambda o: o.sum(), lambda o: o.square().mean()])
def test_a_compiled_model_is_named(head):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    problem = Problem(torch.compile(model, backend="aot_eager"), make().inputs, make().targets[:, :1], lambda o, y: head(o))
    with pytest.raises(RuntimeError, match="differentiated twice because of CompiledFunctionBackward; " + ADVICE): value_grad_hvp(problem, problem.params, vectors(problem))
    with pytest.raises(RuntimeError, match="because of CompiledFunctionBackward; "): ESGD(problem.params).step(problem)
    assert all(g.any() for g in value_and_grad(problem, problem.params)[1])


def test_torchs_other_errors_are_not_blamed_on_a_layer():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    kept = p.exp().square().sum()
    kept.backward()
    with pytest.raises(RuntimeError, match="second time") as e: hvp(lambda: kept, (p,), (p.detach(),))
    assert "differentiated twice" not in str(e.value)
    with pytest.raises(RuntimeError, match="inplace") as e:
        hvp(lambda: ((q := p.exp()).square().sum(), q.add_(1))[0], (p,), (p.detach(),))
    assert "differentiated twice" not in str(e.value)


def test_an_operation_of_torch_without_a_second_derivative_is_refused_in_the_same_sentence():
    "torch's message alone, or a custom Function named that has nothing to do with it."
    p = nn.Parameter(torch.rand(4, 3, dtype=torch.float64, generator=seeded()))
    with pytest.raises(RuntimeError, match=r"differentiated twice because of one of its operations \(.*_cdist_backward.*\); " + ADVICE):
        hvp(lambda: torch.cdist(Mend.apply(p), p[:2], p=1.5).square().sum(), (p,), (p.detach(),))


def test_linear_losses_and_losses_without_parameters_have_zero_curvature():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert not hvp(lambda: w.sum(), (w,), (w,))[0].any() and not hessian(lambda: w.sum(), (w,)).any()
    loss, (g,) = value_and_grad(lambda: torch.ones(()), (w,))
    assert loss == 1 and not g.any() and not hessian(lambda: torch.ones(()), (w,)).any()


def test_gradients_can_be_asked_for_inside_no_grad():
    for problem in (make(), Problem(make().model, make().inputs, make().targets, F.mse_loss)):
        expected = torch.autograd.grad(problem(), problem.params)
        with torch.no_grad(): assert error(value_and_grad(problem, problem.params)[1], expected) < 1e-12


# estimators

def test_probes_are_plus_minus_one_vary_and_come_from_the_generator():
    "Constant probes, probes from the global generator, zeros at the end of a byte."
    params = [torch.empty(33, 17), torch.empty(5, dtype=torch.float64), torch.empty((), dtype=torch.bfloat16)]
    state = torch.get_rng_state()
    a, b = rademacher_like(params, g := seeded()), None
    b = rademacher_like(params, g)
    assert torch.equal(state, torch.get_rng_state())
    for t, p in zip(a, params): assert t.shape == p.shape and t.dtype == p.dtype and (t.abs() == 1).all()
    assert not torch.equal(a[0], b[0]) and torch.equal(a[0], rademacher_like(params, seeded())[0])
    many = torch.stack([rademacher_like([torch.empty(50)], g)[0] for _ in range(2000)])
    assert many.mean(0).abs().max() < 4.5 / math.sqrt(2000) and ((many.T @ many / 2000 - torch.eye(50)).abs().max() < 5 / math.sqrt(2000))
    torch.manual_seed(0); c = rademacher_like(params); torch.manual_seed(0)
    assert torch.equal(c[0], rademacher_like(params)[0]) and rademacher_like([]) == ()


@pytest.mark.parametrize("kind", ["problem", "callable"])
def test_estimators_within_four_standard_errors(kind):
    "The printed (6): E[(Hv)^2] taken for the norm; a missing root; squares in place of products in (9)."
    problem, n = make(layers=3), 2000
    loss_fn = problem if kind == "problem" else (lambda: problem())
    H = hessian(problem, problem.params)
    row2 = H.square().sum(1)
    tests = [(flat(hutchinson_diagonal(loss_fn, problem.params, n, seeded(4))), H.diagonal(), row2 - H.diagonal().square()),
             (flat(equilibration(loss_fn, problem.params, n, seeded(5))).square(), row2, 2 * row2.square()),
             (flat(equilibration(loss_fn, problem.params, n, seeded(6), "rademacher")).square(), row2, 2 * (row2.square() - H.pow(4).sum(1)))]
    for estimate, truth, variance in tests:
        score = (estimate - truth) / (variance / n).sqrt().clamp_min(1e-12 * truth.abs().max())
        assert score.abs().max() < 4.5 and .7 < score.square().mean().sqrt() < 1.4 # 123 scores at once: the largest of them may exceed 4


def test_estimators_repeat_with_their_generator_and_keep_shapes():
    problem = make(dtype=torch.float32)
    for f in (hutchinson_diagonal, equilibration):
        a, b, c = f(problem, problem.params, 3, seeded()), f(problem, problem.params, 3, seeded()), f(problem, problem.params, 3, seeded(1))
        assert all(torch.equal(s, t) for s, t in zip(a, b)) and not torch.equal(a[0], c[0])
        assert [t.shape for t in a] == [p.shape for p in problem.params] and not a[0].requires_grad


# bad input

@pytest.mark.parametrize("call, message", [
    (lambda p, v: hvp(p, p.params, v[:-1]), "7 vectors for 8 parameters"), (lambda p, v: hvp(p, p.params, [t.reshape(-1) for t in v]), "vector 0 of shape"),
    (lambda p, v: hvp(p, p.params, [t.float() for t in v]), "torch.float32"), (lambda p, v: hvp(p, p.params, v, "forward"), "backend='forward'"),
    (lambda p, v: value_grad_hvp(lambda: p(), p.params, v, "rop"), "is not a Problem"), (lambda p, v: Problem(p.model, p.inputs, p.targets, "l1"), "loss='l1'"),
    (lambda p, v: value_and_grad(lambda: p.inputs, p.params), "shape"), (lambda p, v: value_and_grad(lambda: 1., p.params), "float"),
    (lambda p, v: value_and_grad(Problem(p.model, p.inputs, p.targets[:, :1]), p.params), r"shape \(24, 3\) for targets of shape \(24, 1\)"),
    (lambda p, v: Problem(p.model, p.inputs, p.targets[:, :1])(), r"shape \(24, 3\) for targets of shape \(24, 1\)"),
    (lambda p, v: hutchinson_diagonal(p, p.params, 0), "samples=0"), (lambda p, v: equilibration(p, p.params, 1.5), "samples=1.5"), (lambda p, v: equilibration(p, p.params, 1, distribution="cauchy"), "cauchy")])
def test_bad_arguments_are_named(call, message):
    problem = make()
    with pytest.raises(ValueError, match=message): call(problem, vectors(problem))


def test_ggn_vp_needs_a_problem():
    problem = make()
    with pytest.raises(TypeError, match="Problem"): ggn_vp(lambda: problem(), problem.params, vectors(problem))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SETTINGS)
def test_sweeps_on_cuda(name):
    problem = make(name, batch=5000)
    v = vectors(problem)
    _, g, h = reference(problem, problem.params, v)
    problem.model.cuda()
    there = Problem(problem.model, problem.inputs.cuda(), problem.targets.cuda())
    _, ours, hv = value_grad_hvp(there, there.params, tuple(t.cuda() for t in v), "rop")
    assert error([t.cpu() for t in ours], g) < 1e-10 and error([t.cpu() for t in hv], h) < 1e-10
