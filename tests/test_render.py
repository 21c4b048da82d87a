"inr_precond.render against truth, in float64: rays, NDC, depths, compositing, the field, its derivatives, whole views, paths and videos."
import math
import os
import stat

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inr_precond.curvature import Problem, ggn_vp, hessian, hvp, value_and_grad
from inr_precond.inr import Gaussian, PositionalEncoding, ReLU, Sine, Wavelet
from inr_precond.optim import ESGD, SGD, AdaHessian, Adam
from inr_precond.render import (
    NDC,
    NeRFField,
    RadianceField,
    average_pose,
    camera_rays,
    camera_to_world,
    composite,
    depth_at,
    interval_lengths,
    orbit,
    product,
    project,
    render_view,
    sample_depths,
    spiral,
    view_rays,
    volume_weights,
    world_to_camera,
    write_video,
)
from inr_precond.train import GraphStep, taped

torch.set_num_threads(1)
f64 = torch.float64
seeded = lambda seed=0: torch.Generator().manual_seed(seed)
number = lambda *values: torch.tensor(values, dtype=f64)
FRONT, LENS = torch.eye(3, 4, dtype=f64), number(30., 28., 12., 10.)  # at the origin along -z; an image of 20 rows and 24 columns
LOOK = number(0., 0., -1.)[None]
flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])


def some_poses(n=6, seed=0):
    "Cameras that look anywhere."
    g = seeded(seed)
    R = torch.linalg.qr(torch.randn(n, 3, 3, generator=g, dtype=f64))[0]
    return torch.cat([R * R.det()[:, None, None], torch.randn(n, 3, 1, generator=g, dtype=f64)], -1)


def tiny(**options):
    return NeRFField(3, 8, **{"activation": Gaussian(.5), "skips": (2,), "colour_features": 6, "scale": .3, "generator": seeded(), "dtype": f64, **options})


def rays_of(pose=None, side=8):
    return tuple(r.reshape(-1, 3) for r in view_rays(orbit(4., 1)[0].double() if pose is None else pose, number(1.2 * side, 1.2 * side, side / 2, side / 2), side, side))


def batch_of(model, n=16, seed=1):
    "A Problem of n rays with depths drawn, and targets."
    o, d = (r[:: len(r) // n][:n] for r in rays_of())
    dtype = next(model.parameters()).dtype
    return Problem(model, model.inputs(o.to(dtype), d.to(dtype), seeded(seed)), torch.rand(n, 3, generator=seeded(seed + 1), dtype=dtype), "mse")


def one_sentence(error, *texts):
    said = str(error.value)
    assert "\n" not in said and len(said) < 400 and all(t in said for t in texts), said


# --- rays -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(2, 2), (20, 24), (480, 640)])
def test_the_four_central_rays_are_the_optical_axis(height, width):
    "Integer pixel centres (nerf-pytorch's, a bias of .5 / f), a principal point taken as (row, column), rows and columns exchanged."
    lens = number(500., 400., width / 2, height / 2)
    _, d = view_rays(FRONT, lens, height, width)
    middle = d[height // 2 - 1:height // 2 + 1, width // 2 - 1:width // 2 + 1]
    torch.testing.assert_close(middle.mean((0, 1)), LOOK[0], rtol=0, atol=1e-15)
    assert d.shape == (height, width, 3)


def test_directions_have_depth_one_and_know_up_and_right():
    "Unit directions (depths would then be distances), y counted downward, a mirrored image."
    _, d = view_rays(FRONT, LENS, 20, 24)
    assert (d[..., 2] == -1).all()
    assert (d[0, :, 1] > 0).all() and (d[-1, :, 1] < 0).all() and (d[:, 0, 0] < 0).all() and (d[:, -1, 0] > 0).all()
    torch.testing.assert_close(d[3, 5], number((5.5 - 12) / 30, -(3.5 - 10) / 28, -1))


def test_projection_returns_the_pixel_and_the_depth():
    "R instead of its transpose, a forgotten half pixel on one of the two ways, a distance where a depth belongs; each row has its own camera."
    poses, g = some_poses(), seeded(1)
    pixels, t = torch.rand(6, 2, generator=g, dtype=f64) * 20, torch.rand(6, generator=g, dtype=f64) * 5 + .1
    o, d = camera_rays(poses, LENS, pixels)
    seen, depth = project(o + t[:, None] * d, poses, LENS)
    torch.testing.assert_close(seen, pixels, rtol=0, atol=1e-11)
    torch.testing.assert_close(depth, t, rtol=1e-12, atol=0)
    assert torch.equal(o, poses[..., 3]) and project(o - d, poses, LENS)[1].max() < 0  # behind


def test_barfs_convention():
    "An axis not flipped, or flipped in the world instead of the camera: BARF's own formulas (world to camera, z forward, y down, centres at +.5) must give the same rays."
    pose = some_poses(1)[0]
    R, t = world_to_camera(pose).split([3, 1], -1)
    K = torch.tensor([[30., 0, 12], [0, 28, 10], [0, 0, 1]], dtype=f64)
    rows, columns = torch.meshgrid(torch.arange(20, dtype=f64) + .5, torch.arange(24, dtype=f64) + .5, indexing="ij")
    image = torch.stack([columns, rows, torch.ones_like(rows)], -1) @ torch.linalg.inv(K).T
    centre, points = (-R.T @ t)[:, 0], (image - t[:, 0]) @ R
    o, d = view_rays(pose, LENS, 20, 24)
    torch.testing.assert_close(o[0, 0], centre)
    torch.testing.assert_close(d, points - centre, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(camera_to_world(world_to_camera(some_poses())), some_poses(), rtol=0, atol=1e-14)
    assert (torch.linalg.det(world_to_camera(some_poses())[..., :3]) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("change, text", [(lambda p, k: (p * math.nan, k), "NaN"), (lambda p, k: (p[:2], k), "(..., 3, 4)"), (lambda p, k: (p * 1.01, k), "not orthonormal"), (lambda p, k: (p, k[:3]), "(..., 4)"),
                                          (lambda p, k: (p, k * number(1, 0, 1, 1)), "fx, fy > 0"), (lambda p, k: (p, k / 0), "NaN or infinite"), (lambda p, k: (p.numpy(), k), "ndarray"), (lambda p, k: (p.int(), k), "int32")])
def test_a_camera_that_is_none(change, text):
    "A bad pose that becomes a picture of NaN, or a stretched one."
    with pytest.raises(ValueError) as error: view_rays(*change(FRONT, LENS), 4, 4)
    one_sentence(error, text)


def test_pixels_of_a_wrong_shape():
    "Pixels given as (n,), which would broadcast to something."
    with pytest.raises(ValueError) as error: camera_rays(FRONT, LENS, torch.zeros(3, 3))
    one_sentence(error, "(3, 3)")


# --- NDC --------------------------------------------------------------------------------------------------------

def test_ndc_begins_at_minus_one_and_ends_at_one():
    "The origin not moved to the near plane, a sign, W and H exchanged; the way back to metric depth."
    ndc = NDC.of(LENS, 20, 24, near=1.3)
    o, d = (r.reshape(-1, 3) for r in view_rays(FRONT, LENS, 20, 24))
    o = o + number(.3, -.2, .4)
    moved, along = ndc.rays(o, d)
    assert (moved[:, 2] + 1).abs().max() < 1e-14 and (moved[:, 2] + along[:, 2] - 1).abs().max() < 1e-14
    far = o + 1e12 * d
    torch.testing.assert_close(ndc.points(far), moved + along, rtol=0, atol=1e-10)
    t = torch.rand(len(o), 1, generator=seeded(), dtype=f64) * .95
    p = ndc.world(moved + t * along)
    assert (p[:, 2] / (-1.3 / (1 - t[:, 0])) - 1).abs().max() < 1e-13 and (ndc.depth(t) / (1.3 / (1 - t)) - 1).abs().max() == 0
    s = (p[:, 2:] - o[:, 2:]) / d[:, 2:]
    assert ((o + s * d - p).norm(dim=-1) / p.norm(dim=-1)).max() < 1e-13
    assert ((ndc.world(ndc.points(p)) - p).norm(dim=-1) / p.norm(dim=-1)).max() < 1e-13
    edge = ndc.points(o[:1] * 0 + number(12 / 30, 10 / 28, -1) * 7)  # the corner of the frustum
    torch.testing.assert_close(edge[0, :2], number(1, 1))


def test_ndc_off_the_middle():
    "NDC of a camera whose principal point is beside the middle, where the formula is another."
    with pytest.raises(ValueError) as error: NDC.of(LENS, 20, 30)
    one_sentence(error, "principal point", "inverse depth")


@pytest.mark.parametrize("numbers, text", [((0., 0., 0.), "ax=0"), ((1., 0.), "ay=0"), ((1., 1., 0.), "near=0"), ((1., -2.), "ay=-2"), ((math.nan, 1.), "ax=nan")])
def test_ndc_of_a_camera_that_is_none(numbers, text):
    "Rays of NaN, or a mirrored world."
    with pytest.raises(ValueError) as error: NDC(*numbers)
    one_sentence(error, text)


def test_a_field_in_ndc_keeps_the_worlds_viewing_direction():
    "The viewing direction taken from NDC, where all rays of a camera would look almost alike."
    model = RadianceField(tiny(), 0., 1., 6, ndc=NDC(2.5, 2.8, 1.))
    o, d = (r.reshape(-1, 3) for r in view_rays(FRONT, LENS, 20, 24))
    rows = model.inputs(o, d)
    assert (rows[:, 2] + 1).abs().max() < 1e-14 and (rows[:, 9:] > 0).all() and (rows[:, 9:] < 1).all()
    torch.testing.assert_close(rows[:, 6:9], d / d.norm(dim=-1, keepdim=True))


# --- depths -----------------------------------------------------------------------------------------------------

def test_barfs_laws_of_depth():
    "Inverse depth from far to near, an end at the wrong place, steps that are even in the wrong quantity."
    for r in (0., .5):
        s = 1 - (torch.arange(128, dtype=f64) + r) / 128
        torch.testing.assert_close(depth_at(1 - s, 1., math.inf, True), 1 / (s + 1e-8), rtol=1e-12, atol=0)
    torch.testing.assert_close(sample_depths(2, 4, 2., 6., dtype=f64), number(2.5, 3.5, 4.5, 5.5).expand(2, 4))
    torch.testing.assert_close(depth_at(number(0, 1), 2., 6., True), number(2, 6), rtol=1e-7, atol=0)
    torch.testing.assert_close(depth_at(number(.5), 2., 6., True), number(3.), rtol=1e-7, atol=0)  # the harmonic mean
    assert torch.isfinite(depth_at(torch.tensor([0., .5, 1.]), 1., math.inf, True)).all()


@pytest.mark.parametrize("near, far, inverse", [(2., 6., False), (2., 6., True), (1., math.inf, True)])
def test_stratified_depths_are_one_in_each_bin_and_uniform_in_it(near, far, inverse):
    "One draw for all bins of a ray or for all rays, draws over the whole ray, a draw that is not uniform."
    t = sample_depths(3000, 8, near, far, inverse, seeded(), dtype=f64)
    u = ((1 / near - (1 / t - 1e-8)) / (1 / near - 1 / far) if inverse else (t - near) / (far - near)) * 8
    assert torch.equal(u.floor(), torch.arange(8., dtype=f64).expand(3000, 8)) and (t.diff(dim=-1) > 0).all()
    r = u - u.floor()
    expected = (torch.arange(3000, dtype=f64) + .5) / 3000
    assert ((r.sort(0).values - expected[:, None]).abs().amax(0) * math.sqrt(3000)).max() < 2.2  # Kolmogorov: exceeded once in 8,000
    assert (torch.corrcoef(r.T) - torch.eye(8)).abs().max() < .1 and r.std(1).min() > 0
    assert torch.equal(t, sample_depths(3000, 8, near, far, inverse, seeded(), dtype=f64))
    assert not torch.equal(t, sample_depths(3000, 8, near, far, inverse, seeded(1), dtype=f64))


def test_drawing_leaves_torchs_global_generator_alone():
    "A run that depends on whatever else draws in the process."
    state = torch.get_rng_state()
    sample_depths(5, 5, 1., 2., generator=seeded())
    RadianceField(tiny(), 2., 6., 4, density_noise=1.).inputs(*rays_of(), seeded())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("arguments, text", [((4, 4, 6., 2.), "near=6.0 and far=2.0"), ((4, 4, 2., 2.), "near < far"), ((4, 0, 2., 6.), "samples=0"), ((0, 4, 2., 6.), "rays=0"), ((4, 4, -1., 6.), "near=-1.0"),
                                             ((4, 4, 1., math.inf), "inverse_depth=True"), ((4, 4, 0., 1., True), "0 < near"), ((4, 4, math.nan, 1.), "nan"), ((4, 4, 6., 2., True), "0 < near < far")])
def test_depths_that_are_none(arguments, text):
    "near and far exchanged, no samples, infinity in metric steps: pictures of NaN or nothing."
    with pytest.raises(ValueError) as error: sample_depths(*arguments)
    one_sentence(error, text)
    if len(arguments) == 4 and arguments[0] == 4 and arguments[1] == 4:
        with pytest.raises(ValueError): RadianceField(tiny(), *arguments[2:])


# --- compositing ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"far": 6.}, {"rule": "midpoint", "near": 2.}, {"rule": "midpoint", "near": 2., "far": 6.}])
def test_weights_and_what_passes_sum_to_one(options):
    "An inclusive transmittance, a last interval forgotten, weights that are not exp(-sum sigma d)."
    g = seeded()
    density, t = torch.rand(40, 32, generator=g, dtype=f64), sample_depths(40, 32, 2., 6., generator=g, dtype=f64)
    lengths = interval_lengths(t, torch.randn(40, 3, generator=g, dtype=f64), **options)
    w, behind = volume_weights(density, lengths)
    assert (w.sum(-1) - (1 - torch.exp(-(density * lengths).sum(-1)))).abs().max() < 1e-14 and (w.sum(-1) + behind - 1).abs().max() < 1e-14
    by_hand, T = torch.zeros_like(w), torch.ones(40, dtype=f64)
    for i in range(32):
        by_hand[:, i] = T * (1 - torch.exp(-density[:, i] * lengths[:, i]))
        T = T * torch.exp(-density[:, i] * lengths[:, i])
    torch.testing.assert_close(w, by_hand, rtol=1e-11, atol=1e-16)
    torch.testing.assert_close(behind, T, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("direction", [(0., 0., -1.), (.7, -.4, -1.), (-2., 1., -1.)])
@pytest.mark.parametrize("n", [1, 2, 17, 128])
def test_a_slab_of_constant_density(n, direction):
    "Lengths without the ray's norm: at an angle light takes the way h / cos; a rule whose intervals do not fill the slab."
    d, sigma, h = number(*direction)[None], .4, 4.
    cos = 1 / d.norm().item()
    for rule, t in (("midpoint", sample_depths(1, n, 2., 6., dtype=f64)), ("left", 2 + 4 * torch.arange(n, dtype=f64)[None] / n)):
        r = composite(torch.full((1, n), sigma, dtype=f64), torch.ones(1, n, 3, dtype=f64), t, d, rule=rule, near=2., far=6.)
        assert abs(1 - r.opacity.item() - math.exp(-sigma * h / cos)) < 1e-14 and abs(r.colour[0, 0].item() - r.opacity.item()) < 1e-14


def test_the_last_interval_is_1e10_where_no_far_is_given():
    "A last interval of zero, which drops the last sample, or of an ordinary length, which lets light through a wall of the last sample."
    t = sample_depths(1, 4, 2., 6., dtype=f64)
    lengths = interval_lengths(t, 2 * LOOK)
    torch.testing.assert_close(lengths, 2 * number(1, 1, 1, 1e10)[None])
    torch.testing.assert_close(interval_lengths(t, LOOK, far=6.), number(1, 1, 1, .5)[None])
    torch.testing.assert_close(interval_lengths(t, LOOK, "midpoint", 2., 6.), number(1, 1, 1, 1)[None])
    only = composite(number(0, 0, 0, 1e-3)[None], torch.ones(1, 4, 3, dtype=f64), t, LOOK)
    assert only.opacity.item() == 1 and only.depth.item() == 5.5


@pytest.mark.parametrize("density, last, shows", [(F.softplus, None, False), (torch.relu, None, True), (F.softplus, 6., True), (torch.relu, 6., True)])
def test_a_white_background_and_each_density(density, last, shows):
    "A background that is dead, in value and in gradient: softplus with the infinite last interval; alive for ReLU, and for both where the last interval ends at far."
    t, pre = sample_depths(1, 64, 2., 6., dtype=f64), torch.full((1, 64), -8., dtype=f64, requires_grad=True)
    white = torch.ones(3, dtype=f64, requires_grad=True)
    r = composite(density(pre), torch.zeros(1, 64, 3, dtype=f64), t, LOOK, white, far=last)
    gradient, = torch.autograd.grad(r.colour.sum(), white)
    expected = 1. if shows else 0.
    assert (r.colour - expected).abs().max() < 2e-3 and (gradient - expected).abs().max() < 2e-3
    assert abs(r.opacity.item() - (1 - expected)) < 2e-3


def test_the_background_fills_what_is_not_hit():
    "The background weighted by the opacity, or added to all rays alike."
    t, c = sample_depths(1, 8, 2., 6., dtype=f64), torch.rand(1, 8, 3, generator=seeded(), dtype=f64)
    s = torch.rand(1, 8, generator=seeded(1), dtype=f64)
    bare, grey = (composite(s, c, t, LOOK, b, far=6.) for b in (None, number(.2, .5, .9)))
    torch.testing.assert_close(grey.colour, bare.colour + (1 - bare.opacity) * number(.2, .5, .9))
    assert torch.equal(grey.depth, bare.depth)


@pytest.mark.parametrize("plane", [2.05, 3.1, 4.7, 5.9])
def test_an_opaque_plane_is_found_within_one_bin(plane):
    "Depth of the bin before or after, or depth along the ray instead of the axis."
    for d in (LOOK, number(.6, .3, -1.)[None]):
        t = sample_depths(1, 64, 2., 6., dtype=f64)
        r = composite(1e6 * (t > plane).double(), torch.zeros(1, 64, 3, dtype=f64), t, d)
        assert 0 <= r.depth.item() - plane <= 4 / 64 and r.opacity.item() == 1


def test_order_of_convergence_of_the_depth():
    "Midpoints used as left edges: of first order where matter begins at near, half a bin off; with their bins of second order."
    def error(n, kind):
        t = sample_depths(1, n, 2., 6., dtype=f64) - (2 / n if kind == "edges" else 0)
        r = composite(torch.full_like(t, .5), torch.zeros(1, n, 3, dtype=f64), t, LOOK, rule="midpoint" if kind == "bins" else "left", near=2., far=6.)
        return (r.depth / r.opacity).item() - (2 + 2 - 4 / (math.e**2 - 1))
    order = {kind: math.log2(abs(error(128, kind) / error(256, kind))) for kind in ("edges", "next", "bins")}
    assert abs(order["edges"] - 1) < .03 and abs(order["next"] - 1) < .03 and abs(order["bins"] - 2) < .03
    assert abs(error(512, "edges") / (4 / 512) + .5) < .01


@pytest.mark.parametrize("options", [{}, {"far": 6., "background": 1.}, {"rule": "midpoint", "near": 2., "far": 6.}])
def test_compositing_has_exact_first_and_second_derivatives(options):
    "A detach, an in-place operation or a clamp that cuts a gradient."
    g = seeded()
    s, c = (torch.rand(2, 5, *tail, generator=g, dtype=f64).requires_grad_() for tail in ((), (3,)))
    t, d = sample_depths(2, 5, 2., 6., generator=g, dtype=f64), torch.randn(2, 3, generator=g, dtype=f64)
    f = lambda s, c: composite(s, c, t, d, **options)
    assert torch.autograd.gradcheck(f, (s, c)) and torch.autograd.gradgradcheck(f, (s, c))


@pytest.mark.parametrize("far", [None, 6.])
def test_float32_is_safe_from_empty_to_opaque(far):
    "NaN from infinity times zero in value, gradient or second derivative; thin intervals lost to 1 - exp(-x) = 0."
    s = torch.tensor([[0.] * 8, [1e6] * 8, [0., 1e-30, 1e-9, 1., 90., 1e6, 0., 0.], [0, 0, 0, 0, 0, 0, 0, 1e6]], requires_grad=True)
    r = composite(s, torch.rand(4, 8, 3, generator=seeded()), sample_depths(4, 8, 2., 6.), torch.randn(4, 3, generator=seeded(1)) * 3, 1., far=far)
    first, = torch.autograd.grad(r.colour.square().sum() + r.depth.sum(), s, create_graph=True)
    second, = torch.autograd.grad(first.sum(), s)
    assert all(torch.isfinite(v).all() for v in (*r, first, second)) and (r.weights >= 0).all() and (r.opacity <= 1 + 1e-6).all()
    thin, _ = volume_weights(torch.full((1, 3), 1e-12), torch.ones(1, 3))
    torch.testing.assert_close(thin, torch.full((1, 3), 1e-12), rtol=1e-6, atol=0)


def test_shapes_that_do_not_belong_together():
    "Shapes that broadcast to a wrong picture."
    t = sample_depths(3, 4, 2., 6.)
    for arguments in ((t, torch.ones(3, 4, 4), t, torch.ones(3, 3)), (t[:, :3], torch.ones(3, 4, 3), t, torch.ones(3, 3)), (t, torch.ones(3, 4, 3), t, torch.ones(1, 3)), (t, torch.ones(3, 4, 3), t, torch.ones(3, 2))):
        with pytest.raises(ValueError) as error: composite(*arguments)
        one_sentence(error, "composite was given")
    for rule, text in (("right", "rule='right'"), ("midpoint", "no near")):
        with pytest.raises(ValueError) as error: interval_lengths(t, torch.ones(3, 3), rule)
        one_sentence(error, text)
    with pytest.raises(ValueError) as error: interval_lengths(t[:, :0], torch.ones(3, 3))
    one_sentence(error, "without samples")


# --- the field --------------------------------------------------------------------------------------------------

def test_parameters_of_the_papers_network():
    "A layer too many or too few, the skip at another place, a branch of another width."
    count = lambda f: sum(p.numel() for p in f.parameters())
    assert count(NeRFField()) == 4 * 256 + 6 * 257 * 256 + 260 * 256 + 257 + 260 * 128 + 129 * 3 == 496_260
    assert count(NeRFField(activation=ReLU(), encoding=PositionalEncoding(3, 10), view_encoding=PositionalEncoding(3, 4))) == 496_260 + 2 * 60 * 256 + 24 * 128
    assert [layer.in_features for layer in NeRFField().layers] == [3, 256, 256, 256, 259, 256, 256, 256]


class Plain(nn.Module):
    "The same network from its formulas, with concatenations, in double precision."

    def __init__(self, field): super().__init__(); self.f = field

    def forward(self, points, views):
        f, affine = self.f, lambda layer, x: x @ layer.weight.T + layer.bias
        encode = lambda e, x: x if e is None else e(x)
        x, v = encode(f.encoding, points * f.scale), encode(f.view_encoding, views.unsqueeze(1).expand_as(points))
        h = x
        for k, layer in enumerate(f.layers, 1):
            seen = torch.cat([h, x], -1) if k in f.skips else h
            z = affine(layer, seen)
            h = f.activation(z - z.mean(-1, keepdim=True) if k <= f.centred_layers else z)
        raw = affine(f.density_head, seen)[..., 0] + f.density_bias
        density = torch.log1p(torch.exp(raw)) if f.density == "softplus" else raw.clamp(min=0)
        return density, 1 / (1 + torch.exp(-affine(f.colour_head, f.activation(affine(f.colour_layer, torch.cat([h, v], -1))))))


FIELDS = {"gaussian": {}, "relu": {"activation": ReLU()}, "relu-pe": {"activation": ReLU(), "encoding": PositionalEncoding(3, 10), "view_encoding": PositionalEncoding(3, 4)},
          "sine": {"activation": Sine(30.)}, "wavelet": {"activation": Wavelet(3., 3.)}, "skip at the last": {"skips": (8,)}, "two skips": {"skips": (2, 5)}, "no skip": {"skips": ()}, "density relu": {"density": "relu", "density_bias": .1},
          "centred": {"centred_layers": 2}, "scaled": {"scale": .2}, "xavier": {"initialisation": "xavier", "activation": ReLU()}}


@pytest.mark.parametrize("name", FIELDS)
def test_the_field_is_its_formula(name):
    "Parts of a split matrix exchanged, a direction given to another ray, the density taken after the wrong layer, an option that is not used."
    f = NeRFField(8, 12, **{"activation": Gaussian(.4), "colour_features": 7, "generator": seeded(), "dtype": f64, **FIELDS[name]})
    points, views = torch.randn(5, 9, 3, generator=seeded(1), dtype=f64), F.normalize(torch.randn(5, 3, generator=seeded(2), dtype=f64), dim=-1)
    ours, theirs = f(points, views), Plain(f)(points, views)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    loss = lambda pair: (pair[0].sum() + pair[1].square().sum())
    for a, b in zip(*(torch.autograd.grad(loss(pair), list(f.parameters())) for pair in (ours, theirs))): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert all(map(torch.equal, f.parameters(), NeRFField(8, 12, **{"activation": Gaussian(.4), "colour_features": 7, "generator": seeded(), "dtype": f64, **FIELDS[name]}).parameters()))


def test_each_option_changes_what_it_says():
    "An option that is accepted and forgotten."
    points, views = torch.randn(5, 9, 3, generator=seeded(1), dtype=f64), F.normalize(torch.randn(5, 3, generator=seeded(2), dtype=f64), dim=-1)
    base = NeRFField(8, 12, Gaussian(.4), colour_features=7, generator=seeded(), dtype=f64)(points, views)
    for options in ({"skips": ()}, {"density": "relu"}, {"density_bias": 1.}, {"centred_layers": 1}, {"scale": 2.}, {"initialisation": "xavier"}, {"view_encoding": PositionalEncoding(3, 4)}, {"encoding": PositionalEncoding(3, 2)}):
        other = NeRFField(8, 12, Gaussian(.4), **{"colour_features": 7, "generator": seeded(), "dtype": f64, **options})(points, views)
        assert not all(torch.allclose(a, b) for a, b in zip(base, other)), options
    density, colours = NeRFField(8, 12, Gaussian(.4), colour_features=7, generator=seeded(), dtype=f64)(points, -views)
    assert torch.equal(density, base[0]) and not torch.allclose(colours, base[1])  # the direction changes colours alone


def test_float32_paths_agree_with_float64():
    "oneDNN's product and the Gaussian's short derivatives: a wrong term in a gradient or a Hessian-vector product; a batch evaluated in blocks without gradients."
    options = dict(hidden_layers=4, hidden_features=80, activation=Gaussian(.5), skips=(3,), colour_features=70, scale=.3)
    models = [RadianceField(NeRFField(**options, generator=seeded(), dtype=dtype), 2., 6., 8, background="white") for dtype in (torch.float32, f64)]
    problems = [batch_of(m, 32) for m in models]
    problems[1] = Problem(models[1], problems[0].inputs.double(), problems[0].targets.double(), "mse")
    v = [torch.randn(p.shape, generator=seeded(5)) for p in models[0].parameters()]
    for ours, theirs in ((value_and_grad(p, p.params)[1] for p in problems), (hvp(p, p.params, tuple(u.to(q.dtype) for u, q in zip(v, p.params))) for p in problems)):
        assert (flat(ours).double() - flat(theirs)).norm() / flat(theirs).norm() < 1e-4
    o, d = (r.float().repeat(8, 1) for r in rays_of(side=16))
    with torch.no_grad(): blocks = models[0](models[0].inputs(o, d))
    torch.testing.assert_close(blocks, models[0](models[0].inputs(o, d)).detach(), rtol=1e-4, atol=1e-5)


def test_a_part_of_a_matrix_goes_to_onednn_in_one_piece():
    "oneDNN given a matrix whose rows do not follow each other: right, and a thousand times slower."
    x, w = torch.randn(200, 70, generator=seeded()), torch.randn(90, 75, generator=seeded(1)).requires_grad_()
    y = product(x, w[:, :70])
    torch.testing.assert_close(y, x @ w[:, :70].T, rtol=1e-4, atol=1e-4)
    if y.grad_fn.name() == "_OneDNNBackward": assert y.grad_fn.saved_tensors[1].is_contiguous()
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), w)[0][:, :70], 2 * y.T.detach() @ x, rtol=1e-4, atol=1e-2)


def test_transforms_of_torch_func_see_the_same_field():
    "A custom Function that drops a tangent or a batch dimension."
    from torch.func import functional_call, grad, jvp
    model = RadianceField(NeRFField(3, 64, Gaussian(.5), skips=(2,), colour_features=64, scale=.3, generator=seeded()), 2., 6., 8, background="white")
    problem = batch_of(model, 16)
    params = dict(model.named_parameters())
    v = {k: torch.randn(p.shape, generator=seeded(3)) for k, p in params.items()}
    loss = lambda p: (functional_call(model, p, (problem.inputs,)) - problem.targets).square().mean()
    theirs = flat(jvp(grad(loss), (params,), (v,))[1].values())
    ours = flat(hvp(problem, problem.params, tuple(v.values())))
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    few = [model.field.layers[0].weight, model.field.colour_head.weight]  # is_grads_batched in float32
    dense, twin = hessian(lambda: problem(), few), hessian(problem, few)
    assert (dense - twin).abs().max() / twin.abs().max() < 1e-4


@pytest.mark.parametrize("options, text", [({"skips": (1,)}, "skips=(1,)"), ({"skips": (9,)}, "hidden_layers=8"), ({"density": "exp"}, "density='exp'"), ({"initialisation": "he"}, "initialisation='he'"), ({"hidden_layers": 1}, "hidden_layers=1"),
                                           ({"hidden_features": 0}, "hidden_features=0"), ({"scale": 0.}, "scale=0.0"), ({"centred_layers": -1}, "centred_layers=-1")])
def test_a_field_that_cannot_be(options, text):
    "A mistyped option that becomes a default."
    with pytest.raises(ValueError) as error: NeRFField(**options)
    one_sentence(error, text)


# --- the module that is trained ---------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"background": "white"}, {"background": "white", "density_noise": .5}, {"rule": "midpoint", "inverse_depth": True, "background": (.1, .5, .2)}])
def test_hessian_vector_product_against_the_dense_hessian(options):
    "Depths or noise drawn anew in the second differentiation, a detach in the renderer, a first derivative in place of a second."
    model = RadianceField(tiny(), 2., 6., 6, **options)
    problem = batch_of(model)
    H, v = hessian(problem, problem.params), tuple(torch.randn(p.shape, generator=seeded(7), dtype=f64) for p in problem.params)
    Hv = flat(hvp(problem, problem.params, v))
    assert (H @ flat(v) - Hv).norm() / Hv.norm() < 1e-12 and (H - H.T).abs().max() / H.abs().max() < 1e-12
    ends = []
    for sign in (1, -1):
        with torch.no_grad(): [p.add_(u, alpha=sign * 1e-5) for p, u in zip(problem.params, v)]
        ends.append(flat(value_and_grad(problem, problem.params)[1]))
        with torch.no_grad(): [p.sub_(u, alpha=sign * 1e-5) for p, u in zip(problem.params, v)]
    assert ((ends[0] - ends[1]) / 2e-5 - Hv).norm() / Hv.norm() < 1e-6
    G = flat(ggn_vp(problem, problem.params, v))
    assert (G @ flat(v)) > 0 and torch.equal(problem(), problem())


def test_rows_hold_all_that_is_random():
    "A forward pass that draws, rows of evaluation with noise, noise that is forgotten or of another size."
    o, d = rays_of()
    model = RadianceField(tiny(), 2., 6., 6, density_noise=.5)
    train, evaluation = model.inputs(o, d, seeded()), model.inputs(o, d)
    assert train.shape == (64, 9 + 12) and evaluation.shape == (64, 9 + 6)
    assert abs(train[:, 15:].std().item() - .5) < .08 and torch.equal(evaluation[:, 9:], sample_depths(64, 6, 2., 6., dtype=f64))
    torch.testing.assert_close(evaluation[:, 6:9].norm(dim=-1), torch.ones(64, dtype=f64))
    quiet = torch.cat([train[:, :15], 0 * train[:, 15:]], -1)
    assert torch.equal(model(train), model(train)) and torch.allclose(model(quiet), model(train[:, :15])) and not torch.allclose(model(quiet), model(train))


def test_last_and_rule_change_what_they_say():
    "The default of the last interval, and options that do not reach the quadrature."
    o, d = rays_of()
    colour = lambda **options: RadianceField(tiny(), 2., 6., 6, **options)(RadianceField(tiny(), 2., 6., 6).inputs(o, d))
    assert torch.equal(colour(), colour(last="infinite")) and torch.equal(colour(background="white"), colour(background=(1, 1, 1), last="far"))
    assert not torch.allclose(colour(), colour(last="far")) and not torch.allclose(colour(background="white"), colour(background="white", last="infinite"))
    assert not torch.allclose(colour(rule="midpoint", last="far"), colour(last="far"))
    model = RadianceField(tiny(), 2., 6., 6)
    assert (model.render(model.inputs(o, d)).opacity - 1).abs().max() < 1e-14  # a density that is nowhere zero, and no end
    far = RadianceField(tiny(), 1., math.inf, 6, inverse_depth=True, background="white", last="infinite")
    assert torch.isfinite(far(far.inputs(o, d, seeded()))).all()


def test_a_background_behind_an_interval_without_an_end_is_refused():
    "White asked for behind a last interval that reaches to infinity: opacity 1 everywhere, and no white to be seen."
    for options in ({"background": "white"}, {"last": "far"}):
        with pytest.raises(ValueError, match="give a finite far, or last='infinite'"): RadianceField(tiny(), 1., math.inf, 6, inverse_depth=True, **options)


def test_rays_of_a_scene_in_float64_meet_a_field_in_float32():
    "A Scene keeps its cameras in float64; torch's own word for it is that matrices must have the same dtype."
    o, d = rays_of()
    model = RadianceField(tiny(), 2., 6., 6).float()
    rows = model.inputs(o.double(), d.double())
    assert rows.dtype is torch.float32 and torch.equal(model(rows), model(model.inputs(o.float(), d.float())))


def test_the_background_goes_where_the_model_goes():
    "A background left in another dtype, or written into checkpoints, where a field without it could not read them."
    model = RadianceField(tiny(), 2., 6., 6, background="white").float()
    assert model.background.dtype is torch.float32 and "background" not in model.state_dict()


@pytest.mark.parametrize("options, text", [({"near": 6., "far": 2.}, "near=6.0"), ({"samples": 0}, "samples=0"), ({"background": "green"}, "'green'"), ({"background": (1, 1)}, "three numbers"), ({"last": "never"}, "last='never'"), ({"rule": "right"}, "rule='right'")])
def test_a_radiance_field_that_cannot_be(options, text):
    "A mistyped option that becomes a default, or a picture of nothing."
    with pytest.raises(ValueError) as error: RadianceField(tiny(), **{"near": 2., "far": 6., "samples": 6, **options})
    one_sentence(error, text)
    for wrong in (None, NeRFField, lambda points, views: points):
        with pytest.raises(TypeError) as error: RadianceField(wrong, 2., 6.)
        one_sentence(error, "a field of type", "pass a module")


def test_inputs_of_a_wrong_shape():
    "Rows made for another number of samples, read as if they were these."
    model = RadianceField(tiny(), 2., 6., 6)
    for call, text in ((lambda: model(torch.zeros(4, 14, dtype=f64)), "(4, 14)"), (lambda: model.inputs(torch.zeros(4, 3), torch.zeros(3, 3)), "(B, 3) twice"), (lambda: model.inputs(torch.zeros(0, 3), torch.zeros(0, 3)), "B >= 1"),
                       (lambda: model.field(torch.zeros(4, 6, 3), torch.zeros(4, 6, 3)), "views")):
        with pytest.raises(ValueError) as error: call()
        one_sentence(error, text)


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=.1), lambda p: Adam(p, lr=1e-2), lambda p: ESGD(p, lr=.1, update_every=3, warmup=2, seed=1), lambda p: AdaHessian(p, lr=.05, seed=1)], ids=["SGD", "Adam", "ESGD", "AdaHessian"])
def test_any_optimizer_trains_it_and_its_step_can_be_recorded(make):
    "A forward pass that reads the device (.item(), an if on a tensor) or copies to it, and so cannot become a CUDA graph; a recording with the first batch's depths in it."
    def train(record):
        model = RadianceField(tiny(), 2., 6., 6, background="white", density_noise=.1)
        optimizer = make(model.parameters())
        step, o, d = optimizer.step if record is None else GraphStep(optimizer, record), *rays_of()
        y, losses, g = .5 + .5 * d / d.norm(dim=-1, keepdim=True), [], seeded(2)
        for _ in range(8): losses.append(step(Problem(model, model.inputs(o, d, g), y, "mse")).item())
        return losses, flat([p.detach() for p in model.parameters()]), step
    (plain, weights, _), (replayed, others, step) = train(None), train(taped)
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(plain), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(others, weights, rtol=1e-8, atol=1e-10)
    assert step.recorded and plain[-1] < plain[0]


def test_a_small_field_overfits_one_view():
    "A renderer whose gradient does not lead anywhere: to more than 30 dB on 16 x 16 pixels."
    pose, lens = orbit(4., 1)[0], torch.tensor([19., 19., 8., 8.])
    o, d = (r.reshape(-1, 3) for r in view_rays(pose, lens, 16, 16))
    i, j = torch.meshgrid(torch.arange(16.), torch.arange(16.), indexing="ij")
    disc = ((i - 7.5)**2 + (j - 7.5)**2 < 30).float()[..., None]
    picture = (disc * torch.stack([i / 16, j / 16, .5 + .3 * torch.sin(i)], -1) + 1 - disc).reshape(-1, 3)
    model = RadianceField(NeRFField(4, 64, Gaussian(.1), skips=(3,), colour_features=32, density_bias=-2., generator=seeded()), 2., 6., 16, background="white")
    optimizer, g = Adam(model.parameters(), lr=3e-3), seeded(1)
    for _ in range(250): optimizer.step(Problem(model, model.inputs(o, d, g), picture, "mse"))
    psnr = -10 * math.log10((render_view(model, pose, lens, 16, 16).colour.reshape(-1, 3) - picture).square().mean().item())
    assert psnr > 30, psnr


# --- whole views, paths, videos ---------------------------------------------------------------------------------

def test_a_view_does_not_depend_on_its_chunks():
    "A last chunk dropped or out of order, depths drawn at evaluation, memory that grows with the picture."
    model, pose, lens = RadianceField(tiny(), 2., 6., 6, background="white", density_noise=1.), orbit(4., 1)[0].double(), number(10, 10, 4, 3.5)
    most, calls = [], []
    model.field.register_forward_pre_hook(lambda module, args: most.append(args[0].shape[:-1].numel()))
    o, d = (r.reshape(-1, 3) for r in view_rays(pose, lens, 7, 8))
    whole = model.render(model.inputs(o, d))
    for chunk in (1, 5, 28, 56, 1000):
        most.clear()
        view = render_view(model, pose, lens, 7, 8, chunk, progress=lambda *a: calls.append(a))
        torch.testing.assert_close(view.colour.reshape(-1, 3), whole.colour, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(view.depth.reshape(-1), whole.depth / whole.opacity, rtol=1e-12, atol=1e-12)
        assert view.colour.shape == (7, 8, 3) and view.opacity.shape == view.depth.shape == (7, 8) and max(most) <= chunk * 6 and not view.colour.requires_grad
        assert calls[-1] == (56, 56)
    assert calls[0] == (1, 56) and torch.equal(render_view(model, pose, lens, 7, 8, progress=True).colour, view.colour)
    with pytest.raises(ValueError) as error: render_view(model, pose, lens, 7, 8, 0)
    one_sentence(error, "chunk=0")
    with pytest.raises(ValueError) as error: render_view(model, pose * math.nan, lens, 7, 8)
    one_sentence(error, "NaN")


def test_a_view_is_of_the_models_precision():
    "A camera of a scene is float64 and a trained field float32: catches a product that refuses them together, and rays that are rounded before they are turned."
    pose, lens = orbit(4., 1)[0].double(), number(10, 10, 4, 3.5)
    truth = render_view(RadianceField(tiny(), 2., 6., 6), pose, lens, 7, 8).colour
    for dtype in (torch.float32, f64):
        model = RadianceField(tiny(), 2., 6., 6).to(dtype)
        for camera in ((pose, lens), (pose, lens.float()), (pose.float(), lens), (pose.float(), lens.float())):
            view = render_view(model, *camera, 7, 8)
            assert all(part.dtype is dtype for part in view) and (view.colour - truth).abs().max() < 1e-4


def test_nothing_hit_has_no_depth():
    "Zero over zero shown as a depth of zero, in front of everything."
    model = RadianceField(tiny(density_bias=-60.), 2., 6., 6, background="white")
    view = render_view(model, orbit(4., 1)[0].double(), number(10, 10, 4, 4), 8, 8)
    assert view.depth.isnan().all() and (view.colour - 1).abs().max() < 1e-12


def test_orbit_looks_at_the_centre_from_everywhere():
    "A camera that looks away, upside down, a circle that is not closed evenly or not at its height."
    centre = (1., -2., .5)
    poses = orbit(3., 10, 40., centre).double()
    place = poses[:, :, 3] - number(*centre)
    torch.testing.assert_close(place.norm(dim=-1), torch.full((10,), 3., dtype=f64), rtol=1e-5, atol=0)
    torch.testing.assert_close(place[:, 2], torch.full((10,), 3 * math.sin(math.radians(40)), dtype=f64), rtol=1e-5, atol=0)
    pixel, depth = project(number(*centre), poses, LENS)
    torch.testing.assert_close(pixel, number(9.5, 11.5).expand(10, 2), rtol=0, atol=1e-4)
    assert (depth > 2.9).all() and (project(number(*centre) + number(0, 0, .2), poses, LENS)[0][:, 0] < 9.5).all()
    steps = (place - place.roll(-1, 0)).norm(dim=-1)
    assert steps.max() - steps.min() < 1e-5 and (torch.linalg.det(poses[..., :3]) - 1).abs().max() < 1e-5


def test_spiral_stays_among_the_cameras_and_looks_at_one_point():
    "A path in the world's axes instead of the cameras', a focus behind the cameras, roll."
    g, base = seeded(), some_poses(1)[0]
    offsets = (torch.rand(30, 3, generator=g, dtype=f64) - .5) * number(2, 1, .2)
    poses = base.repeat(30, 1, 1)
    poses[:, :, 3] += offsets @ base[:, :3].T
    mean = average_pose(poses)
    torch.testing.assert_close(mean[:, :3], base[:, :3], rtol=0, atol=1e-12)
    path = spiral(poses, 5., 40)
    pixel, depth = project(mean[:, 3] - 5 * mean[:, 2], path, LENS)
    torch.testing.assert_close(pixel, number(9.5, 11.5).expand(40, 2), rtol=0, atol=1e-9)
    moved = (path[:, :, 3] - mean[:, 3]) @ base[:, :3]
    assert (depth > 4).all() and (moved.abs().amax(0) <= (offsets - offsets.mean(0)).abs().amax(0) + 1e-9).all() and (moved[:, :2].abs().amax(0) > .3 * number(1, .5)).all()
    assert (path[:, :, 1] @ base[:, 1] > .9).all()
    torch.testing.assert_close((spiral(poses, 5., 4, radii=(0, 0, 0))[2] - mean), torch.zeros(3, 4, dtype=f64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("call, text", [(lambda: orbit(0.), "radius=0"), (lambda: orbit(1., 0), "frames=0"), (lambda: orbit(1., 3, 90.), "elevation=90"), (lambda: spiral(FRONT[None], 0.), "focus=0"), (lambda: spiral(FRONT[None, :2], 1.), "(..., 3, 4)"),
                                        (lambda: spiral(FRONT, 1.), "spiral was given poses of shape (3, 4)"), (lambda: spiral(FRONT[None][:0], 1.), "(0, 3, 4)"), (lambda: average_pose(FRONT), "average_pose was given poses of shape (3, 4)")])
def test_paths_that_cannot_be(call, text):
    "Poses of NaN, which are noticed a minute later."
    with pytest.raises(ValueError) as error: call()
    one_sentence(error, text)


def test_gif(tmp_path):
    "Frames lost, a picture turned, bytes taken for [0, 1]."
    from PIL import Image
    frames = torch.zeros(6, 8, 10, 3)
    for k in range(6): frames[k, k, k + 2] = 1  # a white pixel that walks
    for given in (frames, frames.numpy(), list(frames), [frames[0].numpy(), *frames[1:]], (frames * 255).to(torch.uint8)):
        with Image.open(write_video(given, tmp_path / "walk.gif", fps=25)) as picture:
            assert picture.n_frames == 6 and picture.size == (10, 8) and picture.info["duration"] == 40 and picture.info["loop"] == 0
            for k in range(6):
                picture.seek(k)
                shown = np.asarray(picture.convert("L"))
                assert np.unravel_index(shown.argmax(), shown.shape) == (k, k + 2) and shown.max() > 250


FAKE = "#!{python}\nimport sys\nfrom pathlib import Path\ndata = sys.stdin.buffer.read()\nPath(sys.argv[-1]).write_bytes(data)\nPath(sys.argv[-1] + '.txt').write_text(' '.join(sys.argv[1:]))\nif b'\\x07' in data: print('it broke', file=sys.stderr); sys.exit(1)\n"


@pytest.mark.skipif(os.name != "posix", reason="a stand-in for ffmpeg that only POSIX systems run")
def test_mp4_with_a_stand_in_for_ffmpeg(tmp_path, monkeypatch):
    "Sides that H.264 does not take, a size told wrongly, a failure of ffmpeg that is passed over, a missing ffmpeg that ends in a traceback."
    import sys
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    frames = torch.zeros(3, 5, 7, 3)
    with pytest.raises(FileNotFoundError) as error: write_video(frames, tmp_path / "a.mp4")
    one_sentence(error, "pip install imageio-ffmpeg", ".gif")
    fake = tmp_path / "ffmpeg"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = write_video(frames, tmp_path / "a.mp4", fps=12)
    assert path.stat().st_size == 3 * 6 * 8 * 3 and "-s 8x6" in (said := (tmp_path / "a.mp4.txt").read_text()) and "-r 12" in said and "yuv420p" in said
    with pytest.raises(RuntimeError) as error: write_video((frames + 7).to(torch.uint8), tmp_path / "a.mp4")
    one_sentence(error, "it broke")


@pytest.mark.parametrize("frames, name, text", [(torch.zeros(2, 4, 4, 3), "a.avi", "'.avi'"), (torch.zeros(4, 4, 3), "a.gif", "(4, 4, 3)"), (torch.zeros(0, 4, 4, 3), "a.gif", "(0, 4, 4, 3)"), (torch.full((2, 4, 4, 3), math.nan), "a.gif", "NaN"),
                                               ([], "a.gif", "no frames"), ([torch.zeros(4, 4, 3), torch.zeros(5, 4, 3)], "a.gif", "(4, 4, 3) float32 and of (5, 4, 3) float32"),
                                               ([np.zeros((4, 4, 3)), np.zeros((4, 4, 3), np.uint8)], "a.gif", "uint8"), ([torch.zeros(4, 4)], "a.gif", "(1, 4, 4)")])
def test_videos_that_cannot_be(frames, name, text, tmp_path):
    "A file that is written and cannot be shown."
    with pytest.raises(ValueError) as error: write_video(frames, tmp_path / name)
    one_sentence(error, text)
