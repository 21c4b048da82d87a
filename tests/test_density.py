"""Where Hv is zero: the corrected Theorems 3.1 and 3.2 against dense Hessians and brute force. Each test's docstring names the mistake it would catch."""
import json

import pytest
import torch
from torch import nn

from inr_precond import density, runs
from inr_precond.curvature import Problem, hessian, rademacher_like, value_grad_hvp
from inr_precond.density import (
    by_layer,
    dead_units,
    layer_density,
    packed,
    split_hvp,
    trajectories,
    trajectory,
    unpacked,
    unreached,
    zero_fraction,
    zero_mask,
)
from inr_precond.inr import INR, GaborLayer, Gaussian, PositionalEncoding, ReLU, Sine

F64 = torch.float64


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def flat(tensors): return torch.cat([t.flatten() for t in tensors])


def problem(activation=None, seed=0, width=10, layers=4, samples=7, loss="mse", encoding=None, outputs=2):
    "A random network and batch in float64, small enough for its dense Hessian."
    net = INR(2, outputs, width, layers, activation or ReLU(), encoding, generator=seeded(seed), dtype=F64)
    x = torch.rand(samples, 2, generator=seeded(seed + 1000), dtype=F64) * 2 - 1
    return Problem(net, x, torch.rand(samples, outputs, generator=seeded(seed + 2000), dtype=F64), loss)


def products(p, seed=0): return value_grad_hvp(p, p.params, rademacher_like(p.params, seeded(seed)))[1:]


def PERFECT(out, y): return (out - out.detach()).square().sum()  # the squared error of a perfect fit, with residuals of exactly zero


# ---------------------------------------------------------------------------------------------- block matrices of Section 7.3
def layer_blocks(psi, W, Z, identity=True):
    "D psi and D^2 psi of vec(psi(W Z)) in (Z, W), by Proposition 7.3 and Lemma 7.6: (units N, size), (units N, size, size)."
    (units, width), N = W.shape, Z.shape[1]
    _, d1, d2 = psi.derivatives(W @ Z)
    size = width * N + W.numel()
    D, D2 = torch.zeros(units * N, size, dtype=F64), torch.zeros(units * N, size, size, dtype=F64)
    for u in range(units):
        for s in range(N):
            z, w = torch.arange(width) * N + s, width * N + u * width + torch.arange(width)
            row, both = u * N + s, torch.cat([z, w])
            D[row, both] = d1[u, s] * torch.cat([W[u], Z[:, s]])
            D2[row, both[:, None], both] = d2[u, s] * torch.outer(*[torch.cat([W[u], Z[:, s]])] * 2)
            if identity:
                D2[row, z, w] += d1[u, s]
                D2[row, w, z] += d1[u, s]
    return D, D2


@pytest.mark.parametrize("psi", [ReLU(), Sine(2.), Gaussian(.6)], ids=["relu", "sine", "gaussian"])
def test_layer_blocks_equal_autograd(psi):
    "Lemma 7.6 without psi' I in the mixed block (which is what the printed proof of Theorem 3.2 uses), or sample and unit indices swapped."
    W, Z = torch.randn(3, 2, generator=seeded(), dtype=F64), torch.randn(2, 4, generator=seeded(1), dtype=F64)
    def layer(s): return psi(s[8:].view(3, 2) @ s[:8].view(2, 4)).reshape(-1)
    s = torch.cat([Z.reshape(-1), W.reshape(-1)])
    D, D2 = layer_blocks(psi, W, Z)
    true = torch.func.jacfwd(torch.func.jacrev(layer))(s)
    torch.testing.assert_close(D, torch.func.jacrev(layer)(s), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(D2, true, rtol=1e-11, atol=1e-12)
    printed = layer_blocks(psi, W, Z, identity=False)[1]
    assert (printed - true).abs().max() > .1
    if isinstance(psi, ReLU): assert printed.abs().max() == 0 and true.abs().max() == 1


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("activation", [ReLU(), Sine(3.), Gaussian(.3)], ids=["relu", "sine", "gaussian"])
def test_parts_sum_to_the_hessian(activation, loss):
    "(39) with a residual that is not held fixed, without its factor, or with Gauss-Newton's H_c of the other loss."
    p = problem(activation, width=5, layers=3, loss=loss)
    H, v = hessian(p, p.params), rademacher_like(p.params, seeded(3))
    split = split_hvp(p, p.params, v)
    torch.testing.assert_close(flat(split.total), H @ flat(v), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(split.gauss_newton) + flat(split.residual), H @ flat(v), rtol=1e-9, atol=1e-12)
    out = p.model(p.inputs)
    J = torch.stack([flat(torch.autograd.grad(o, p.params, retain_graph=True)) for o in out.flatten()])
    curvature = torch.full((out.numel(),), 2 / out.numel(), dtype=F64) if loss == "mse" else (out.sigmoid() * (1 - out.sigmoid())).detach().flatten() / out.numel()
    torch.testing.assert_close(flat(split.gauss_newton), J.T @ (curvature * (J @ flat(v))), rtol=1e-9, atol=1e-12)


def test_what_a_zero_second_derivative_does_imply():
    "The statement that ReLU'' = 0 empties the residual part: it empties its diagonal blocks only, so within a layer H is Gauss-Newton."
    p = problem(ReLU(), width=6, layers=3, samples=40)
    H = hessian(p, p.params)
    R = torch.stack([flat(split_hvp(p, p.params, v).residual) for v in [tuple(e.split([q.numel() for q in p.params])) for e in torch.eye(len(H), dtype=F64)] for v in [tuple(a.view_as(q) for a, q in zip(v, p.params))]], 1)
    ends = [sum(q.numel() for q in group) for group in by_layer(p.model, p.params)]
    edges = torch.tensor([0, *ends]).cumsum(0).tolist()
    for a, b in zip(edges, edges[1:]):
        assert R[a:b, a:b].abs().max() == 0
        assert torch.linalg.eigvalsh(H[a:b, a:b]).min() > -1e-12 * H.abs().max()
    assert R.abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- Theorem 3.2
@pytest.mark.parametrize("seed", range(12))
def test_zeros_of_hv_are_zeros_of_the_gradient(seed):
    "Printed Theorem 3.2 (zeros of Hv beyond the gradient's), or a forgotten kind of unreached weight: dead unit, dead layer, pair without a common sample."
    width, layers, samples = [(10, 4, 7), (4, 5, 3), (16, 3, 12), (6, 2, 2)][seed % 4]
    encoding = PositionalEncoding(2, 2) if seed % 3 == 0 else None
    p = problem(ReLU(), seed, width, layers, samples, "bce" if seed % 2 else "mse", encoding)
    off, rows = flat(unreached(p.model, p.inputs)), (hessian(p, p.params) == 0).all(1)
    grads, hv = products(p, seed)
    assert torch.equal(flat(zero_mask(grads)), off)
    assert torch.equal(flat(zero_mask(hv)), off)
    assert torch.equal(rows, off)


def test_dead_units_alone_do_not_explain_the_zeros():
    "Counting as unreached only the weights next to a dead unit."
    p = problem(ReLU(), 1, width=16, layers=4, samples=6)
    dead = dead_units(p.model, p.inputs)
    zeros = zero_mask(products(p)[0])[2]                       # weight of the second layer
    by_dead = dead[1][:, None] | dead[0][None]
    assert (zeros | ~by_dead).all() and (zeros & ~by_dead).sum() > 0
    z = p.model.layers[0](p.inputs)
    h = z.relu()
    active = torch.stack([z > 0, p.model.layers[1](h) > 0])
    together = torch.einsum("su,sv->uv", active[1].double(), active[0].double()) > 0
    assert (zeros | together).all()                            # never active together: zero


def test_printed_theorem_fails():
    "An implementation that follows the printed proof: phi'' = 0, hence R = 0 and Hv = Gv; and sparse."
    p = problem(ReLU(), width=24, layers=4, samples=200)
    split = split_hvp(p, p.params, rademacher_like(p.params, seeded(1)))
    assert flat(split.residual).norm() > .05 * flat(split.total).norm()
    assert flat(zero_mask(split.total)).double().mean() < .25   # far from sparse where units are alive
    assert not (flat(zero_mask(split.total)) & ~flat(zero_mask(products(p)[0]))).any()


def test_perfect_fit_has_curvature_without_gradient():
    "The reverse implication without 'almost every': at zero residual the gradient vanishes everywhere and Hv = Gv does not."
    p = problem(ReLU(), samples=30)
    grads, hv = products(Problem(p.model, p.inputs, p.targets, PERFECT))
    assert flat(grads).abs().max() == 0
    assert torch.equal(flat(zero_mask(hv)), flat(unreached(p.model, p.inputs)))


@pytest.mark.parametrize("activation", [Sine(30.), Gaussian(.05)], ids=["sine", "gaussian"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_sine_and_gaussian_have_no_zero(activation, loss):
    "A count that calls small entries zero, or takes the value (not the derivative) of a unit for its life."
    for seed in range(3):
        p = problem(activation, seed, width=12, layers=4, samples=9, loss=loss)
        assert not flat(zero_mask(products(p, seed)[1])).any() and not flat(unreached(p.model, p.inputs)).any() and not flat(dead_units(p.model, p.inputs)).any()
        assert not (hessian(p, p.params) == 0).all(1).any()


# ---------------------------------------------------------------------------------------------- Theorem 3.1
def test_non_zero_vectors_with_sparse_products():
    "Printed Theorem 3.1: every non-zero v gives a dense Hv. H^-1 e_1 gives one entry, a null vector none, though no row of H is zero."
    p = problem(Gaussian(.5), width=3, layers=3, samples=40)
    H = hessian(p, p.params)
    e = torch.eye(len(H), dtype=F64)[0]
    v = torch.linalg.solve(H, e)
    assert torch.linalg.cond(H) < 1e9 and v.abs().min() > 0
    hv = flat(value_grad_hvp(p, p.params, tuple(a.view_as(q) for a, q in zip(v.split([q.numel() for q in p.params]), p.params)))[2])
    torch.testing.assert_close(hv, e, rtol=0, atol=1e-6)
    x = torch.linspace(-1, 1, 256, dtype=F64)[:, None]
    curve = Problem(INR(1, 1, 16, 3, Gaussian(.05), generator=seeded(), dtype=F64), x, torch.sin(2 * torch.pi * x) + torch.sin(6 * torch.pi * x))
    H = hessian(curve, curve.params)
    values, vectors = torch.linalg.eigh(H)
    null = vectors[:, values.abs().argmin()]
    assert (H @ null).norm() < 1e-14 * H.norm() and null.norm() > .99 and not (H == 0).all(1).any()


# ---------------------------------------------------------------------------------------------- counting
def test_dead_units_by_brute_force():
    "A unit that is dead on some samples counted as dead, the head counted as a layer, or z >= 0 for z > 0."
    for encoding in (None, PositionalEncoding(2, 3)):
        p = problem(ReLU(), 2, width=14, layers=4, samples=5, encoding=encoding)
        h, found = p.inputs if encoding is None else encoding(p.inputs), dead_units(p.model, p.inputs)
        assert len(found) == 3
        for layer, dead in zip(p.model.layers[:-1], found):
            z = layer(h)
            assert dead.tolist() == [all(z[s, u].item() <= 0 for s in range(5)) for u in range(14)]
            h = z.relu()
        assert any(d.any() for d in found) and not all(d.all() for d in found)


def test_a_unit_at_exactly_zero_is_dead():
    "A derivative of ReLU at 0 that is 1, as Proposition 7.10 prints."
    p = problem(ReLU(), samples=3)
    with torch.no_grad(): p.model.layers[0].weight[0].zero_(); p.model.layers[0].bias[0].zero_()
    assert dead_units(p.model, p.inputs)[0][0]


def test_an_input_that_is_zero_is_not_reached():
    "Weights of an input that is 0 on the whole batch: gradient and Hv are zero."
    p = problem(ReLU(), samples=20)
    p.inputs[:, 1] = 0
    mask = unreached(p.model, p.inputs)
    assert mask[0][:, 1].all() and not mask[0][:, 0].all()
    assert torch.equal(flat(zero_mask(products(p)[1])), flat(mask))


def test_one_linear_layer():
    "The recursion's end taken for granted: a network without hidden layers has no dead unit and its Hv is dense."
    p = problem(ReLU(), layers=1, samples=4)
    assert dead_units(p.model, p.inputs) == () and not flat(unreached(p.model, p.inputs)).any()
    assert layer_density(p)[0] == {"layer": 1, "parameters": 6, "hv": 0, "gradient": 0, "beyond": 0, "only_gradient": 0, "gauss_newton": 0, "residual": 6, "almost": 0, "unreached": 0, "dead": None, "units": None}


def test_layer_density_counts():
    "Counts of another layer, biases left out, `beyond` and `only_gradient` swapped, or a tolerance that is absolute."
    p = problem(ReLU(), 1, width=12, layers=4, samples=6)
    v = rademacher_like(p.params, seeded(4))
    _, grads, hv = value_grad_hvp(p, p.params, v)
    rows = layer_density(p, v, tolerance=.1)
    for row, g, h in zip(rows, by_layer(p.model, grads), by_layer(p.model, hv)):
        assert row["parameters"] == flat(g).numel() and row["gradient"] == int((flat(g) == 0).sum()) == row["hv"] == int((flat(h) == 0).sum())
        assert row["almost"] == sum(int((t.abs() <= .1 * t.abs().max()).sum()) for t in h) >= row["hv"]
        assert row["beyond"] == row["only_gradient"] == 0
    assert sum(row["almost"] - row["hv"] for row in rows) > 0
    exact = layer_density(Problem(p.model, p.inputs, p.targets, PERFECT), v)
    assert all(row["only_gradient"] == row["parameters"] - row["hv"] and row["beyond"] == 0 for row in exact)
    scaled = layer_density(Problem(p.model, p.inputs, p.targets, lambda out, y: 1e-9 * (out - y).square().mean()), v, tolerance=.1)
    assert [row["almost"] for row in scaled] == [row["almost"] for row in rows]
    assert [row["dead"] for row in rows] == [int(d.sum()) for d in dead_units(p.model, p.inputs)] + [None]


def test_zero_mask_and_fraction():
    "A tolerance relative to all tensors together, or strict inequality, which would call no exact zero a zero."
    a, b = torch.tensor([0., 1e-3, 1.]), torch.tensor([1e-3, 2e-3])
    assert [m.tolist() for m in zero_mask((a, b))] == [[True, False, False], [False, False]]
    assert [m.tolist() for m in zero_mask((a, b), 1e-3)] == [[True, True, False], [False, False]]
    assert zero_mask(torch.empty(0))[0].shape == (0,) and zero_mask(torch.zeros(2), .5)[0].all()
    net = problem(layers=2, width=3).model
    tensors = [torch.ones_like(q) for q in net.parameters()]
    tensors[0][0] = 0
    assert zero_fraction(net, tensors) == [2 / 9, 0]


def test_packed_masks_come_back():
    "Bits in the wrong order, or a last byte cut off."
    for shape in ((5, 7), (8,), (1,), (0, 3), (256, 3)):
        mask = torch.rand(shape, generator=seeded(9)) < .3
        assert torch.equal(unpacked(json.loads(json.dumps(packed(mask)))), mask)


# ---------------------------------------------------------------------------------------------- through training
SMALL = dict(image="astronaut", image_size=16, hidden_features=8, num_layers=3, batch_size=32, activation="relu", recipe="esgd/released", options={"lr": .1}, steps=6)


def test_trajectory_is_computed_once(tmp_path, monkeypatch):
    "A cache keyed too narrowly (other seed, steps, layer), one that computes again, or a damaged file that is believed."
    config = runs.RunConfig(**SMALL)
    first = trajectory(config, (0, 3, 6), tmp_path, layer=2)
    file, = tmp_path.glob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "trainer", lambda *a, **k: pytest.fail("trained again"))
        assert trajectory(config, (0, 3, 6), tmp_path, layer=2) == first
        for other in (dict(config=runs.RunConfig(**{**SMALL, "seed": 1})), dict(at=(0, 6)), dict(layer=1), dict(layer=None), dict(config=runs.RunConfig(**{**SMALL, "options": {"lr": .2}}))):
            with pytest.raises(pytest.fail.Exception): trajectory(**{"config": config, "at": (0, 3, 6), "store": tmp_path, "layer": 2, **other})
    text = file.read_text()
    for damage in (text[: len(text) // 2], "[]", text.replace('"tolerance": 1e-06', '"tolerance": 1')):
        file.write_text(damage)
        again = trajectory(config, (0, 3, 6), tmp_path, layer=2)
        assert again["rows"] == first["rows"] and again["patterns"] == first["patterns"]
        assert json.loads(file.read_text())["rows"] == first["rows"]


def test_trajectory_measures_what_it_says(tmp_path):
    "Looks that disturb the training or each other, a look one step late, patterns of another layer."
    config = runs.RunConfig(**SMALL)
    often, seldom = trajectory(config, (0, 2, 6), tmp_path, layer=2), trajectory(config, (6,), tmp_path)
    assert [r for r in often["rows"] if r["step"] == 6] == seldom["rows"] and seldom["patterns"] == []
    made = runs.trainer(config)
    for _ in range(6): made.optimizer.step(Problem(made.model, *made.task.batch(made.generator)))
    assert density._look(made, 0, 6, 2) == (seldom["rows"], often["patterns"][-1])
    pattern, row = often["patterns"][0], often["rows"][1]
    assert unpacked(pattern["hv"]).shape == (8, 8) and row["layer"] == 2 and row["units"] == 8
    assert int(unpacked(pattern["dead_above"]).sum()) == row["dead"] and int(unpacked(pattern["dead_below"]).sum()) == often["rows"][0]["dead"]
    bias = row["hv"] - int(unpacked(pattern["hv"]).sum())
    assert 0 <= bias <= 8 and torch.equal(unpacked(pattern["hv"]), unpacked(pattern["gradient"]))


def test_divergence_is_a_result(tmp_path):
    "A diverged training that raises, is trained to the end, or reports the zeros of NaN."
    config = runs.RunConfig(**{**SMALL, "recipe": "sgd/released", "options": {"lr": 1e30}, "steps": 50})
    found = trajectory(config, (0, 50), tmp_path)
    assert 0 < found["diverged_at"] < 50 and {r["step"] for r in found["rows"]} == {0}
    assert trajectory(config, (0, 50), tmp_path) == found


def test_trajectories_resume_with_what_is_missing(tmp_path, monkeypatch):
    "A sweep that starts from the beginning after an interruption, or mixes up the order."
    configs = [runs.RunConfig(**{**SMALL, "seed": s}) for s in range(3)]
    real, seen = runs.trainer, []
    def stops(config, **options):
        if config.seed == 1 and len(seen) < 2: seen.append(-1); raise KeyboardInterrupt
        seen.append(config.seed)
        return real(config, **options)
    monkeypatch.setattr(runs, "trainer", stops)
    with pytest.raises(KeyboardInterrupt): trajectories(configs, (0, 2), tmp_path, workers=1)
    found = trajectories(configs, (0, 2), tmp_path, workers=1)
    assert seen == [0, -1, 1, 2] and [f["settings"]["config"]["seed"] for f in found] == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- bad input
def test_bad_input_ends_in_a_sentence(tmp_path):
    "A traceback from inside torch, or a wrong number, where a sentence is due."
    p = problem()
    x, net = p.inputs, p.model
    gabor = INR(2, 2, 4, 3, layer=GaborLayer, dtype=F64)
    broken = problem().model
    with torch.no_grad(): broken.layers[0].bias[0] = float("nan")
    config = runs.RunConfig(**SMALL)
    for call, kind, words in [
        (lambda: dead_units(nn.Linear(2, 2), x), TypeError, "pass an INR"),
        (lambda: unreached(gabor, x), ValueError, "elementwise activation"),
        (lambda: dead_units(net, x[:0]), ValueError, "at least one row"),
        (lambda: dead_units(net, x[0]), ValueError, r"pass a tensor \(B, 2\)"),
        (lambda: dead_units(net, x.tolist()), ValueError, "type list"),
        (lambda: dead_units(net, torch.rand(3, 5, dtype=F64)), ValueError, "INR was given inputs"),
        (lambda: dead_units(broken, x), ValueError, "diverged"),
        (lambda: zero_mask(torch.tensor([1., float("inf")])), ValueError, "not finite"),
        (lambda: zero_mask(torch.ones(2), 1.), ValueError, "tolerance=1.0"),
        (lambda: zero_mask(torch.ones(2), -1e-3), ValueError, "tolerance"),
        (lambda: zero_fraction(net, [torch.ones(2)]), ValueError, "one for each parameter"),
        (lambda: split_hvp(lambda: 0., p.params, p.params), TypeError, "pass a Problem"),
        (lambda: trajectory(config, (), tmp_path), ValueError, "increasing integers"),
        (lambda: trajectory(config, (5, 3), tmp_path), ValueError, "increasing integers"),
        (lambda: trajectory(config, (0,), tmp_path, layer=4), ValueError, "from 1 to 3"),
    ]:
        with pytest.raises(kind, match=words): call()


# Zeros of the gradient that Hv does not share


@pytest.fixture
def at_the_origin():
    "A sine network without biases on the input 0: every unit is 0 and none is flat."
    net = INR(1, 1, hidden_features=3, num_layers=3, activation=Sine(3.), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for layer in net.layers: layer.bias.zero_()
    return Problem(net, torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))


def test_a_unit_that_is_zero_but_not_flat_is_reached(at_the_origin):
    "Values alone taken for paths: the weight above such a unit has gradient zero, and Hv by way of the unit's slope."
    vectors = rademacher_like(at_the_origin.params, torch.Generator().manual_seed(1))
    _, grads, hv = value_grad_hvp(at_the_origin, at_the_origin.params, vectors)
    assert not grads[2].any() and hv[2].all()
    for off, h in zip(density.unreached(at_the_origin.model, at_the_origin.inputs), hv): assert not (off & (h != 0)).any()


def test_the_patterns_of_hv_and_gradient_are_not_exchanged(at_the_origin):
    "The gradient's zeros drawn as those of Hv, which for ReLU are the same."
    found = density._patterns(at_the_origin, rademacher_like(at_the_origin.params, torch.Generator().manual_seed(1)), 2)
    assert density.unpacked(found["gradient"]).all() and not density.unpacked(found["hv"]).any()


def test_each_look_draws_its_own_batch_and_probe(tmp_path, monkeypatch):
    "One batch and one probe for all times: their accidents would pass for a trend."
    looks = []
    monkeypatch.setattr(density, "layer_density", lambda problem, vectors: looks.append((problem.inputs, vectors)) or [])
    config = runs.RunConfig(image="astronaut", image_size=16, hidden_features=8, num_layers=3, batch_size=20, steps=4, recipe="adam/released")
    made = runs.trainer(config)
    for t in (0, 3): density._look(made, 0, t, None)
    (x, v), (y, w) = looks
    assert not torch.equal(x, y) and not all(torch.equal(a, b) for a, b in zip(v, w))
