"Coordinate networks: derivatives, parameter counts, initialisation, forward passes, bad input."
import copy
import math
import pickle

import pytest
import torch
from torch import nn

from inr_precond.inr import INR, Activation, GaborLayer, Gaussian, Linear, PositionalEncoding, ReLU, Sine, Wavelet

torch.set_num_threads(1)
SETTINGS = {"relu": dict(activation=ReLU()), "relu-pe": dict(activation=ReLU(), encoding=PositionalEncoding(2, 8)), "sine": dict(activation=Sine()),
            "gaussian": dict(activation=Gaussian(.05)), "wavelet": dict(activation=Wavelet()), "gabor": dict(layer=GaborLayer)}
seeded = lambda seed=0: torch.Generator().manual_seed(seed)
count = lambda model: sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("phi", [ReLU(), Sine(30.), Sine(7.), Gaussian(.05), Gaussian(.3), Wavelet(10., 10.), Wavelet(3., 5.)], ids=repr)
def test_derivatives_equal_autograd(phi):
    "A wrong sign, factor or exponent in phi' or phi'' (the printed Proposition 7.8 has such)."
    x = torch.cat([torch.linspace(-2, 2, 403, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]).requires_grad_()
    y = phi(x)
    dy, = torch.autograd.grad(y.sum(), x, create_graph=True)
    ddy = torch.autograd.grad(dy.sum(), x)[0] if dy.requires_grad else torch.zeros_like(x)
    for ours, theirs in zip(phi.derivatives(x.detach()), (y, dy, ddy)):
        assert ours.shape == x.shape
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-9)


def test_gaussian_is_the_released_form_and_not_a_printed_one():
    "exp(+x^2/2s^2) or exp(-s^2 x^2/2), as the paper prints: 7.39 and .99999 at x = .1 instead of .135."
    assert Gaussian(.05)(torch.tensor(.1, dtype=torch.float64)).item() == pytest.approx(math.exp(-2), rel=1e-12)


def test_gaussian_is_finite_and_differentiable_far_out():
    "NaN from 0 * inf where the exponential underflows."
    x = torch.tensor([-50., -3., 0., 3., 50.], requires_grad=True)
    y = Gaussian(.05)(x)
    g, = torch.autograd.grad(y.sum(), x, create_graph=True)
    h, = torch.autograd.grad(g.sum(), x)
    assert torch.isfinite(torch.stack([y, g, h])).all() and all(torch.isfinite(t).all() for t in Gaussian(.05).derivatives(x.detach()))


def test_sine_is_sin_omega_x_and_not_two_pi_omega_x():
    assert Sine(30.)(torch.tensor(.01, dtype=torch.float64)).item() == pytest.approx(math.sin(.3), rel=1e-12)


@pytest.mark.parametrize("changed, fresh, attribute", [(Gaussian(.3), Gaussian(.1), "sigma"), (Wavelet(3., 5.), Wavelet(3., 2.), "scale"), (Wavelet(3., 5.), Wavelet(4., 5.), "omega"), (Sine(7.), Sine(3.), "omega")])
def test_a_changed_activation_equals_a_new_one(changed, fresh, attribute):
    "A constant computed at construction, after which value, derivatives and repr disagree."
    x = torch.linspace(-1, 1, 51, dtype=torch.float64)
    setattr(changed, attribute, getattr(fresh, attribute))
    assert repr(changed) == repr(fresh) and torch.equal(changed(x), fresh(x))
    for a, b in zip(changed.derivatives(x), fresh.derivatives(x)): assert torch.equal(a, b)


def test_a_changed_gabor_layer_equals_its_formula():
    layer, x = GaborLayer(2, 3, generator=torch.Generator().manual_seed(0)), torch.rand(7, 2)
    layer.scale = 2.
    torch.testing.assert_close(layer(x), torch.cos(10 * layer.freqs(x)) * torch.exp(-(2 * layer.scales(x))**2))


def test_a_learned_sigma_gets_its_gradient():
    phi, x = Gaussian(.3), torch.linspace(-1, 1, 51, dtype=torch.float64)
    phi.sigma = nn.Parameter(torch.tensor(.3, dtype=torch.float64))
    torch.testing.assert_close(phi(x), Gaussian(.3)(x))
    torch.testing.assert_close(torch.autograd.grad(phi(x).sum(), phi.sigma)[0], (x.square() / .3**3 * Gaussian(.3)(x)).sum())
    assert "sigma=tensor" in repr(phi)


def test_inputs_of_another_width_are_named():
    for model in (INR(2, 3), INR(2, 3, encoding=PositionalEncoding(2, 4)), INR(2, 3, layer=GaborLayer)):
        with pytest.raises(ValueError, match=r"inputs of shape \(4, 3\): pass \(..., 2\)"): model(torch.zeros(4, 3))


def test_an_activation_may_be_defined_by_its_derivatives_alone():
    class Square(Activation):
        def derivatives(self, x): return x * x, 2 * x, torch.full_like(x, 2.)
    assert torch.equal(Square()(torch.tensor([3.])), torch.tensor([9.]))
    with pytest.raises(NotImplementedError, match="derivatives"): Activation()(torch.zeros(1))


@pytest.mark.parametrize("kw, expected", [(dict(), 198_915), (dict(activation=Sine()), 198_915), (dict(activation=ReLU(), encoding=PositionalEncoding(2, 8)), 198_915 + 32 * 256),
                                          (dict(layer=GaborLayer), 2 * 198_144 + 771)])
def test_parameter_counts_of_an_image_network(kw, expected):
    "A layer too many, a missing bias, a wrong encoding width."
    assert count(INR(2, 3, **kw)) == expected


def test_parameter_counts_of_the_other_networks():
    assert count(INR(1, 1, hidden_features=16, num_layers=3)) == 321 and count(INR(3, 1)) == 198_657 and count(INR(4, 2, num_layers=1)) == 10


def test_positional_encoding_has_d_plus_two_d_l_features():
    "The printed d + L, frequencies without pi, or octaves starting at 2."
    encoding = PositionalEncoding(2, 3)
    x = torch.tensor([[.3, -.7]], dtype=torch.float64)
    expected = [.3, -.7] + [f(2**k * math.pi * t) for f in (math.sin, math.cos) for k in range(3) for t in (.3, -.7)]
    assert encoding.out_features == 14
    torch.testing.assert_close(encoding(x), torch.tensor([expected], dtype=torch.float64))
    assert torch.equal(PositionalEncoding(2, 0)(x), x) and encoding(x.reshape(1, 1, 2)).shape == (1, 1, 14)


def test_gabor_layer_has_two_maps():
    layer = GaborLayer(3, 4, omega=7., scale=2., generator=seeded())
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), torch.cos(7 * layer.freqs(x)) * torch.exp(-(2 * layer.scales(x))**2))


def uniform_within(t, bound):
    "Kolmogorov-Smirnov distance to U(-bound, bound) below its .1 % quantile."
    u = ((t.detach().flatten().double() / bound + 1) / 2).sort().values
    n = len(u)
    i = torch.arange(n, dtype=torch.float64)
    return max((u - i / n).max(), ((i + 1) / n - u).max()) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("name", SETTINGS)
def test_initial_distributions(name):
    "SIREN weights on a Gaussian network, SIREN biases, a forgotten 1/omega, a wrong fan-in."
    model = INR(2, 3, generator=seeded(3), **SETTINGS[name])
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for k, linear in enumerate(linears):
        default = 1 / math.sqrt(linear.in_features)
        siren = 1 / linear.in_features if k == 0 else math.sqrt(6 / linear.in_features) / 30
        assert uniform_within(linear.weight, siren if name == "sine" else default), (name, k)
        assert uniform_within(linear.bias, default), (name, k)


def test_one_seed_gives_one_network_in_every_dtype_and_leaves_the_global_generator_alone():
    torch.manual_seed(5); before = torch.get_rng_state()
    a, b, c = INR(2, 3, generator=seeded()), INR(2, 3, generator=seeded(), dtype=torch.float64), INR(2, 3, generator=seeded(1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p.double(), q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.layers[0].weight, c.layers[0].weight)
    torch.manual_seed(5); d = INR(2, 3)
    torch.manual_seed(5); e = INR(2, 3)
    assert torch.equal(d.layers[1].weight, e.layers[1].weight)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mkldnn", [True, False])
def test_forward_without_gradients_equals_forward_with(name, mkldnn):
    "A tile left out, doubled or out of order; a product in another precision."
    model = INR(2, 3, generator=seeded(), **SETTINGS[name])
    x = torch.rand(5001, 2, generator=seeded()) * 2 - 1
    with torch.backends.mkldnn.flags(enabled=mkldnn), torch.no_grad(): fast = model(x)
    slow, exact = model(x).detach(), copy.deepcopy(model).double()(x.double()).detach()
    assert fast.shape == (5001, 3) and fast.is_contiguous()
    assert (fast - exact).abs().max() <= 3 * (slow - exact).abs().max() + 1e-6


def test_forward_takes_any_leading_shape():
    model = INR(2, 3, hidden_features=8, num_layers=3)
    x = torch.rand(4, 5, 2)
    torch.testing.assert_close(model(x), model(x.reshape(-1, 2)).reshape(4, 5, 3))
    assert model(torch.rand(2)).shape == (3,) and model(torch.empty(0, 2)).shape == (0, 3)


def test_forward_under_transforms_and_autocast_is_left_to_torch():
    "The oneDNN path taken where a transform or forward-mode differentiation watches: wrong or missing tangents."
    model = INR(2, 3, hidden_features=64, num_layers=3, generator=seeded())
    x = torch.rand(5000, 2)
    with torch.no_grad():
        _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        difference = (model.double()(x.double() + 1e-6) - model(x.double() - 1e-6)) / 2e-6
        torch.testing.assert_close(tangent.double(), difference, rtol=1e-3, atol=1e-3)
        model.float()
        with torch.autocast("cpu", dtype=torch.bfloat16): assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(model)(x.reshape(5, 1000, 2)).reshape(-1, 3), model(x), rtol=1e-3, atol=1e-4)


def test_dual_numbers_keep_their_tangent_without_gradients():
    "The oneDNN path taken inside torch.autograd.forward_ad: the tangent is lost."
    import torch.autograd.forward_ad as forward_ad
    model, x = INR(2, 3, hidden_features=64, num_layers=3, generator=seeded()), torch.rand(5000, 2)
    with torch.no_grad(), forward_ad.dual_level():
        assert forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent is not None


def test_networks_can_be_copied_pickled_and_reloaded():
    model = INR(2, 3, hidden_features=8, encoding=PositionalEncoding(2, 2), activation=ReLU())
    x = torch.rand(3, 2)
    assert torch.equal(copy.deepcopy(model)(x), model(x)) and torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    other = INR(2, 3, hidden_features=8, encoding=PositionalEncoding(2, 2), activation=ReLU())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x)) and all(k.startswith("layers.") for k in model.state_dict())


@pytest.mark.parametrize("make, message", [
    (lambda: Gaussian(0), "sigma=0"), (lambda: Gaussian(-1.), "sigma=-1.0"), (lambda: Gaussian(float("nan")), "sigma=nan"), (lambda: Gaussian("a"), "sigma='a'"), (lambda: Sine(math.inf), "omega=inf"),
    (lambda: Wavelet(scale=0), "scale=0"), (lambda: GaborLayer(2, 3, omega=0), "omega=0"), (lambda: GaborLayer(2, 0), "out_features=0"), (lambda: PositionalEncoding(2, -1), "num_frequencies=-1"),
    (lambda: PositionalEncoding(2, 2.5), "num_frequencies=2.5"), (lambda: INR(0, 3), "in_features=0"), (lambda: INR(2, 3, num_layers=0), "num_layers=0"), (lambda: INR(2, 3, hidden_features=True), "hidden_features=True"),
    (lambda: INR(2, 3, activation=ReLU(), layer=GaborLayer), "both activation and layer"), (lambda: INR(3, 3, encoding=PositionalEncoding(2, 4)), "encoding of 2 features")])
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")): make()


def test_a_bias_whose_numbers_lie_apart():
    "oneDNN reads a bias as if its numbers lay side by side: every other number of a longer tensor would come out wrong."
    layer = Linear(64, 128)
    layer.bias = torch.nn.Parameter(torch.arange(256.)[::2])
    x = torch.rand(512, 64)
    with torch.no_grad(): found = layer(x)
    assert not layer.bias.is_contiguous() and torch.allclose(found, x @ layer.weight.T + layer.bias, atol=1e-4)


@pytest.mark.parametrize("activation,word", [("sine", "'sine'"), (Gaussian, "'Gaussian'"), (3, "3")])
def test_an_activation_that_is_none_is_refused_at_once(activation, word):
    "Catches a name or a class, which would fail in the first forward pass, in torch's words."
    with pytest.raises(TypeError, match=f"INR was given activation={word}: pass a module"): INR(2, 3, activation=activation)
