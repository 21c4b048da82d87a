"""inr_precond.metrics: each metric against its definition or published values, and one sentence for each bad input."""
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import trimesh

from inr_precond import metrics
from inr_precond.data.images import data_root, load_image
from inr_precond.data.shapes import Shape
from inr_precond.metrics import iou, lpips, lpips_weights, mse, psnr, ssim, surface_distances

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a mistyped INR_PRECOND_DATA has a test of its own
    WEIGHTS, ROOT = lpips_weights(), data_root()
needs_weights = pytest.mark.skipif(WEIGHTS is None, reason="needs lpips/alexnet_features.pth under INR_PRECOND_DATA")
needs_triple = pytest.mark.skipif(WEIGHTS is None or ROOT is None or not (ROOT / "lpips" / "ex_ref.png").is_file(), reason="needs lpips/ex_ref.png under INR_PRECOND_DATA")


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    target = load_image("astronaut", 64).pixels
    return (target + .1 * torch.randn(target.shape, generator=g)).clamp(0, 1), target


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 500, text
    return text


# --- MSE and PSNR ----------------------------------------------------------------------------------------------

def test_mse_averages_over_pixels_and_channels():
    "Not a sum over the channels, not a root."
    target = torch.zeros(5, 7, 3); pred = target.clone(); pred[..., 0] = .6
    assert math.isclose(mse(pred, target), .36 / 3, rel_tol=1e-6)


@pytest.mark.parametrize("error,expected", [(1., 0.), (.1, 20.), (.01, 40.), (.001, 60.)])
def test_psnr_by_hand(error, expected):
    target = torch.zeros(4, 4, 3, dtype=torch.float64)
    assert math.isclose(psnr(target + error, target), expected, abs_tol=1e-9)
    assert math.isclose(psnr((target + error) * 255, target, data_range=255), expected, abs_tol=1e-9)


def test_psnr_is_skimages_and_needs_no_image_shape(pair):
    from skimage.metrics import peak_signal_noise_ratio
    pred, target = pair
    assert math.isclose(psnr(pred, target), peak_signal_noise_ratio(target.double().numpy(), pred.double().numpy(), data_range=1.), rel_tol=1e-9)
    assert math.isclose(psnr(pred.reshape(-1, 3), target.reshape(-1, 3)), psnr(pred, target))
    assert psnr(target, target) == math.inf and mse(target, target) == 0


def test_psnr_is_not_clipped():
    "It must agree with the loss, which sees predictions outside [0, 1]."
    assert math.isclose(psnr(torch.full((4, 4, 3), 1.5), torch.ones(4, 4, 3)), 10 * math.log10(4), rel_tol=1e-6)


def test_float64_accumulation():
    "A float32 mean of squares of this size is off in the fifth digit or worse."
    pred = torch.full((1000, 1000, 3), 1e-4) ; pred[0, 0, 0] = 1
    assert math.isclose(mse(pred, torch.zeros_like(pred)), (1 + (3e6 - 1) * float(pred[1, 1, 1])**2) / 3e6, rel_tol=1e-10)


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy(), lambda t: t.double(), lambda t: t.clone().requires_grad_(), lambda t: t.numpy()[::1].tolist(), lambda t: t.bfloat16().float()])
def test_tensors_arrays_and_lists_are_accepted(pair, convert):
    pred, target = pair
    value = psnr(convert(pred), convert(target))
    assert type(value) is float and abs(value - psnr(pred, target)) < .05


# --- SSIM -------------------------------------------------------------------------------------------------------

def reference_ssim(x, y):
    "Wang et al. 2004, equation 13, in loops over an explicit 11 x 11 Gaussian window."
    k = np.exp(-np.arange(-5, 6)**2 / (2 * 1.5**2)); w = np.outer(k, k) / np.outer(k, k).sum()
    values = []
    for c in range(3):
        for i in range(5, x.shape[0] - 5):
            for j in range(5, x.shape[1] - 5):
                a, b = (v[i - 5:i + 6, j - 5:j + 6, c] for v in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb, cov = (w * (a - ma)**2).sum(), (w * (b - mb)**2).sum(), (w * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


def test_ssim_equals_its_definition(pair):
    "Catches a flat window, sample covariance, a wrong range, and averaging over padded borders."
    pred, target = (v[:24, :20] for v in pair)
    assert math.isclose(ssim(pred, target), reference_ssim(pred.double().numpy(), target.double().numpy()), rel_tol=1e-9)


def test_ssim_with_zeros_around_sees_them_in_every_window_that_leaves_the_image(pair):
    "BARF's convention: catches a mean that leaves the border out, a reflected border, and one of another width."
    pred, target = (v[:24, :20].double().numpy() for v in pair)
    around = ((5, 5), (5, 5), (0, 0))
    expected = reference_ssim(np.pad(pred, around), np.pad(target, around))
    assert math.isclose(ssim(pred, target, border="zeros"), expected, rel_tol=1e-9) and abs(expected - ssim(pred, target)) > 1e-4
    with pytest.raises(ValueError, match="border is 'reflect'; give 'cropped'"):
        ssim(pred, target, border="reflect")


def test_ssim_equals_skimages_documented_setting(pair):
    from skimage.metrics import structural_similarity
    pred, target = (v.double().numpy() for v in pair)
    documented = structural_similarity(pred, target, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1)
    assert math.isclose(ssim(*pair), documented, rel_tol=1e-12)
    assert abs(ssim(*pair) - structural_similarity(pred, target, data_range=1.0, channel_axis=-1)) > 1e-3   # the default is another metric


def test_ssim_of_equal_and_of_clipped_images(pair):
    pred, target = pair
    assert ssim(target, target) == 1
    assert ssim(pred * 3 - 1, target) == ssim((pred * 3 - 1).clamp(0, 1), target)


# --- LPIPS ------------------------------------------------------------------------------------------------------

@needs_triple
@pytest.mark.data
def test_lpips_of_the_authors_example():
    "Inputs in [0, 1] instead of [-1, 1], version 0.0, random features or swapped channels give other numbers."
    ref, p0, p1 = (load_image(ROOT / "lpips" / f"ex_{n}.png", size=None).pixels for n in ("ref", "p0", "p1"))
    assert f"{lpips(p0, ref):.3f}" == "0.722" and f"{lpips(p1, ref):.3f}" == "0.138"
    assert math.isclose(lpips(ref, p0), lpips(p0, ref), rel_tol=1e-5) and lpips(ref, ref) == 0


@needs_weights
@pytest.mark.data
def test_lpips_leaves_the_global_generator_alone_and_is_built_once(pair, monkeypatch):
    metrics._lpips_model.cache_clear()
    before = torch.random.get_rng_state()
    first = lpips(*pair)
    assert torch.equal(before, torch.random.get_rng_state())
    monkeypatch.setattr(metrics, "_import_lpips", lambda: pytest.fail("built again"))
    assert lpips(pair[0].requires_grad_(), pair[1]) == first and type(first) is float


@needs_weights
@pytest.mark.data
def test_lpips_accepts_the_whole_networks_file_and_clips(pair, tmp_path):
    state = torch.load(WEIGHTS, weights_only=True) | {"classifier.1.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "alexnet-owt-7be5be79.pth")
    assert lpips(*pair, weights=tmp_path / "alexnet-owt-7be5be79.pth") == lpips(*pair)
    assert lpips(pair[0] * 3 - 1, pair[1]) == lpips((pair[0] * 3 - 1).clamp(0, 1), pair[1])


@needs_weights
@pytest.mark.data
def test_smallest_image_that_lpips_accepts():
    image = torch.rand(31, 31, 3, generator=torch.Generator().manual_seed(0))
    assert lpips(image.flip(0), image) > 0


def without_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("INR_PRECOND_DATA", str(tmp_path)); monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_lpips_without_weights_says_where_to_put_them(pair, tmp_path, monkeypatch):
    "And must not download them, nor fall back to random features."
    without_weights(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloads"))
    assert lpips_weights() is None
    with pytest.raises(FileNotFoundError) as e: lpips(*pair)
    assert str(tmp_path / "lpips" / "alexnet_features.pth") in one_sentence(e)
    with pytest.raises(FileNotFoundError, match="elsewhere.pth"): lpips(*pair, weights="elsewhere.pth")


def test_weights_are_found_in_torchvisions_cache(tmp_path, monkeypatch):
    without_weights(tmp_path, monkeypatch)
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir(parents=True); cached.touch()
    assert lpips_weights() == cached
    (tmp_path / "lpips").mkdir(); (tmp_path / "lpips" / "alexnet_features.pth").touch()
    assert lpips_weights() == tmp_path / "lpips" / "alexnet_features.pth"


@pytest.mark.parametrize("content", [b"", b"<html>", {"features.0.weight": torch.zeros(3)}, {f"features.{i}.{k}": torch.zeros(2, 2) for i in (0, 3, 6, 8, 10) for k in ("weight", "bias")}, torch.zeros(3)])
def test_a_file_that_is_no_alexnet_is_one_sentence(pair, tmp_path, content):
    path = tmp_path / "alexnet_features.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError) as e: lpips(*pair, weights=path)
    assert "alexnet-owt-7be5be79.pth" in one_sentence(e)


# --- bad input -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric", [mse, psnr, ssim, lpips])
def test_bad_input_is_one_sentence(metric, pair):
    pred, target = pair
    for p, t, kind, words in ((pred, target[:-1], ValueError, "same shape"), (pred, target[..., 0], ValueError, "same shape"), (pred * math.nan, target, ValueError, "pred holds NaN"),
                              (pred, target / 0, ValueError, "target holds NaN"), (pred[:0], target[:0], ValueError, "no values"), ("lion", target, TypeError, "give a tensor"), (None, target, TypeError, "give a tensor")):
        with pytest.raises(kind) as e: metric(p, t)
        assert words in one_sentence(e)


@pytest.mark.parametrize("metric", [psnr, ssim, lpips])
def test_images_of_bytes_are_refused(metric, pair):
    with pytest.raises(ValueError) as e: metric((pair[0] * 255).byte(), (pair[1] * 255).byte())
    assert "outside [0, 1]" in one_sentence(e)


@pytest.mark.parametrize("metric,side", [(ssim, 11), (lpips, 31)])
def test_shapes_that_are_no_image_or_too_small(metric, side, pair):
    for v in (torch.zeros(side - 1, 64, 3), torch.zeros(64, side - 1, 3), torch.zeros(64, 64), torch.zeros(64, 64, 1), torch.zeros(1, 64, 64, 3), torch.zeros(3, 64, 64)):
        with pytest.raises(ValueError) as e: metric(v, v)
        assert f"at least {side} pixels" in one_sentence(e)


@pytest.mark.parametrize("data_range", [0, -1, math.nan, math.inf, True, "1", None])
def test_bad_data_range(data_range, pair):
    with pytest.raises(ValueError) as e: psnr(*pair, data_range)
    assert "data_range" in one_sentence(e)


def test_import_is_light():
    "lpips, torchvision and scikit-image cost seconds and are imported when a metric needs them."
    code = "import sys, inr_precond.metrics; assert not {'lpips', 'torchvision', 'skimage', 'scipy', 'PIL', 'matplotlib', 'pandas'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- shapes -----------------------------------------------------------------------------------------------------

def surface(vertices, faces, **frame): return Shape(np.asarray(vertices), np.asarray(faces), "test", **{"centre": (0., 0., 0.), "scale": 1., **frame})


def sphere(radius): return (lambda m: surface(m.vertices, m.faces))(trimesh.creation.icosphere(4, radius))


def plane(width, z): return surface([[0., 0, z], [width, 0, z], [width, 1, z], [0, 1, z]], [[0, 1, 2], [0, 2, 3]])


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray, list])
def test_iou_by_hand(convert):
    "Accuracy, a threshold of one half or at or above 0, and an inverted sign give other numbers."
    logits, labels = [2., .1, -.1, -3., 0., 5.], [1, 1, 1, 0, 1, 0]
    assert iou(convert(logits), convert(labels)) == 2 / 5
    assert iou(convert([-v for v in logits]), convert(labels)) == 1 / 5


def test_iou_of_shapes_shifted_by_half():
    "Two boxes that share half of each: one third."
    x = np.random.default_rng(0).uniform(0, 3, 200_000)
    assert abs(iou(1 - np.abs(x - 1), (x > 1) & (x < 3)) - 1 / 3) < .005


def test_iou_ignores_shape_and_is_defined_for_empty_sets():
    assert iou(-torch.ones(3, 1), torch.zeros(3, dtype=torch.uint8)) == 1 and iou(torch.ones(3), torch.zeros(3)) == 0 and iou(-torch.ones(3), torch.ones(3)) == 0


@pytest.mark.parametrize("logits,labels,words", [([1.], [2], "1 for inside"), ([1.], [.5], "1 for inside"), ([1., 2.], [1], "same shape"), ([np.nan], [1], "NaN"), ([], [], "no values")])
def test_iou_of_bad_input(logits, labels, words):
    with pytest.raises(ValueError) as e: iou(logits, labels)
    assert words in one_sentence(e)


@pytest.mark.parametrize("swap", [False, True])
def test_distances_of_concentric_spheres(swap):
    "Squared distances (.01), a sum of the two directions (.2), and nearest vertices or samples instead of triangles all differ."
    a, b = (sphere(.6), sphere(.5)) if swap else (sphere(.5), sphere(.6))
    d = surface_distances(a, b, .05, 5_000)
    assert abs(d.chamfer - .1) < 1e-3 and d.fscore == d.precision == d.recall == 0 and d.normal_consistency > .99
    assert surface_distances(a, b, .102, 5_000).fscore == 1


def test_distances_of_shifted_planes():
    d = surface_distances(plane(1., .03), plane(1., 0.), .02, 2_000)
    assert math.isclose(d.chamfer, .03, rel_tol=1e-9) and d.fscore == 0 and math.isclose(d.normal_consistency, 1)
    assert surface_distances(plane(1., .03), plane(1., 0.), .031, 2_000).fscore == 1


def test_precision_is_the_reconstructions_and_recall_the_originals():
    d = surface_distances(plane(.5, 0.), plane(1., 0.), 1e-6, 20_000)
    assert d.precision == 1 and abs(d.recall - .5) < .02 and abs(d.fscore - 2 / 3) < .02 and abs(d.chamfer - 1 / 16) < .003
    assert surface_distances(plane(1., 0.), plane(.5, 0.), 1e-6, 2_000).recall == 1


def test_normals_at_right_angles_and_turned_round():
    "Orientation does not count, direction does."
    standing = surface([[0., .5, -.01], [1, .5, -.01], [1, .5, .01], [0, .5, .01]], [[0, 1, 2], [0, 2, 3]])
    assert surface_distances(standing, plane(1., 0.), .01, 1_000).normal_consistency < 1e-6
    turned = surface(plane(1., 0.).vertices, plane(1., 0.).faces[:, ::-1])
    assert surface_distances(turned, plane(1., 0.), .01, 1_000).normal_consistency == pytest.approx(1)


def test_a_surface_and_itself_and_the_originals_units():
    "The same surface has no distance; the frame of a reconstruction of its own does not matter, the original's does."
    a = sphere(.5)
    same = surface_distances(a, a, 1e-6, 3_000)
    assert same.chamfer < 1e-7 and same.fscore == 1
    other_frame = surface(sphere(.6).vertices, sphere(.6).faces, scale=7.)
    assert abs(surface_distances(other_frame, a, .05, 3_000).chamfer - .1) < 1e-3
    scaled = surface(a.vertices, a.faces, scale=2.)
    assert abs(surface_distances(sphere(.6), scaled, .05, 3_000).chamfer - .2) < 2e-3
    assert surface_distances(sphere(.6), a, samples=500) == surface_distances(sphere(.6), a, samples=500) != surface_distances(sphere(.6), a, samples=500, seed=1)


@pytest.mark.parametrize("options", [dict(threshold=0), dict(threshold=math.inf), dict(samples=0), dict(samples=1.5)])
def test_bad_settings_of_surface_distances(options):
    with pytest.raises(ValueError) as e: surface_distances(sphere(.5), sphere(.6), **options)
    assert next(iter(options)) in one_sentence(e)
