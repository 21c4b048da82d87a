"""inr_precond.data.scenes: cameras against closed forms, three conventions, splits, faults, the embedded scene, and the real data against themselves."""
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inr_precond.data import scenes
from inr_precond.data.scenes import Scene, default_scene, fingerprint, load_scene, look_at, scene_names, sphere_poses, visual_hull
from inr_precond.render import camera_to_world, world_to_camera

D = torch.float64
EYE, ANGLE = torch.eye(3, dtype=D), 2 * math.atan(6 / 15)  # the angle of 12 pixels at a focal length of 15


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700, text
    return text


def rotation(seed):
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(seed)))[0]
    return Q * torch.linalg.det(Q)


def scene(n=3, height=6, width=8, seed=0, **change):
    "A scene of noise with random cameras."
    rng = torch.Generator().manual_seed(seed)
    poses = torch.stack([torch.cat([rotation(seed + 10 + i), torch.randn(3, 1, dtype=D, generator=rng)], 1) for i in range(n)])
    values = dict(name="noise", images=torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=rng), poses=poses,
                  intrinsics=torch.tensor([9., 7., 4.2, 2.9]).repeat(n, 1), near=1., far=5., split={"train": range(n - 1), "test": [n - 1]})
    return Scene(**{**values, **change})


def front(n=12, height=9, width=12):
    "Forward-facing cameras on a grid, with pictures of noise."
    grid = torch.stack(torch.meshgrid(torch.linspace(-.6, .6, n // 3), torch.linspace(-.4, .4, 3), torch.tensor([3.]), indexing="ij"), -1).reshape(-1, 3)
    return replace(scene(n, height, width), poses=look_at(grid, (.1, .2, 0), up=(0, 1, 0)), intrinsics=torch.tensor([15., 15, width / 2, height / 2]).repeat(n, 1))


CAMERAS = pytest.mark.parametrize("name", ["grid", *(pytest.param(name, marks=pytest.mark.data) for name in ("fern", "lego"))])


def cameras(name):
    "Those of `front`, or all of a real scene with small pictures of noise in place of its own: 20 that face forward, 400 around."
    if name == "grid": return front()
    data = scenes._llff(real("nerf_llff_data", "fern"), None, 8) if name == "fern" else scenes._blender(real("nerf_synthetic", "lego"))
    n, height, width = len(data["poses"]), *((9, 12) if name == "fern" else (12, 12))
    k = torch.as_tensor(data["intrinsics"]) * torch.tensor([width, height, width, height])
    k[:, 1] = k[:, 1].where(~k[:, 1].isnan(), k[:, 0])
    return replace(scene(n, height, width), poses=data["poses"], intrinsics=k, near=data["near"], far=data["far"])


def square(pose): return [*pose.tolist(), [0, 0, 0, 1]]


def save(s, folder, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, p in enumerate(s.images.numpy()): Image.fromarray(p).save(folder / f"{i:03d}{suffix}")
    return [f"{i:03d}" for i in range(len(s))]


def write_llff(folder, s, world=lambda p: p, Q=EYE, bounds=(2., 4.), times=8, name="images"):
    "The scene as LLFF keeps it: in a world of its own, sizes and focal length those of pictures `times` as large."
    rows = []
    for pose in s.poses:
        right, up, back = (Q @ pose[:, i] for i in range(3))
        size = torch.tensor([s.height, s.width, s.intrinsics[0, 0]], dtype=D) * times
        rows.append(torch.cat([torch.stack([-up, right, back, world(pose[:, 3]), size], 1).reshape(-1), torch.tensor(bounds, dtype=D)]))
    save(s, folder / name)
    np.save(folder / "poses_bounds.npy", torch.stack(rows).numpy())
    return folder


def write_json(path, s, **more):
    "The scene as one transforms.json."
    names = save(s, path.parent)
    frames = [{"file_path": f"./{n}.png", "transform_matrix": square(p)} for n, p in zip(names, s.poses)]
    fx, fy, cx, cy = s.intrinsics[0].tolist()
    data = {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": s.width, "h": s.height, "frames": frames, "near": 1., "far": 6., **more}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return path


def same_pixels(got, s, to_own=lambda p: p):
    "Largest distance in pixels between where two scenes see the same points of the world."
    x, y, d = torch.rand(3, 200, dtype=D, generator=torch.Generator().manual_seed(5))
    points = s.unproject(torch.stack([x * s.width, y * s.height], -1), s.near + d * (s.far - s.near), 0)
    return max(float((got.project(got.normalise(to_own(points)), k)[0] - s.project(points, k)[0]).abs().max()) for k in range(len(s)))


@pytest.fixture(scope="module")
def knot(): return load_scene("knot", 50)


# --- a camera ----------------------------------------------------------------------------------------------------

def test_a_camera_that_can_be_followed():
    "At height 2, looking down: x to the right, y up the picture; a sign of an axis, rows for columns, or fx for fy would move one of these."
    s = scene(1, 4, 6, poses=torch.tensor([[[1., 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2]]]), intrinsics=[[10., 20, 3, 2]], split={"train": [0]})
    pixels, depth = s.project([[0, 0, 0], [.2, 0, 0], [0, .1, 1], [0, 0, 5]], 0)
    assert pixels[:3].tolist() == [[3, 2], [4, 2], [3, 0]] and pixels[3].isnan().all() and depth.tolist() == [2, 2, 1, -3]


def test_project_and_unproject_are_inverse():
    "project(centre + depth * ray) is the pixel and depth is along the axis, not along the ray."
    s = scene()
    for k in range(3):
        x = torch.rand(5, 40, 2, dtype=D) * torch.tensor([8., 6])
        d = torch.rand(5, 40, dtype=D) * 4 + .1
        points = s.unproject(x, d, k)
        pixels, depth = s.project(points, k)
        assert (pixels - x).abs().max() < 1e-11 and (depth - d).abs().max() < 1e-12
        c, back = s.poses[k, :, 3], s.poses[k, :, 2]
        torch.testing.assert_close((c - points) @ back, d)
        torch.testing.assert_close(points, c + d[..., None] * (s.unproject(x, torch.ones_like(d), k) - c))


@CAMERAS
def test_projection_is_the_matrix_of_the_textbook(name):
    "K [R|t] with the axes of OpenCV and COLMAP (right, down, forward), and back: the conversion that BARF's world-to-camera poses need."
    s = scene() if name == "grid" else cameras(name)
    extrinsics = world_to_camera(s.poses)
    torch.testing.assert_close(camera_to_world(extrinsics), s.poses, rtol=0, atol=1e-12)   # also of lego's, whose rotations are 1e-6 off: their transpose is no inverse
    assert same_pixels(replace(s, poses=camera_to_world(extrinsics)), s) < 1e-10
    flip = torch.diag(torch.tensor([1., -1, -1], dtype=D))
    points = torch.randn(100, 3, dtype=D)
    for k in range(len(s)):
        R, c = (s.poses[k, :, :3] @ flip).T, s.poses[k, :, 3]
        torch.testing.assert_close(extrinsics[k], torch.cat([R, -(R @ c)[:, None]], 1), rtol=0, atol=1e-14)
        fx, fy, cx, cy = s.intrinsics[k]
        h = (points @ R.T - R @ c) @ torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=D).T
        pixels, depth = s.project(points, k)
        ahead = h[:, 2] > 0
        torch.testing.assert_close(pixels[ahead], h[ahead, :2] / h[ahead, 2:]); torch.testing.assert_close(depth, h[:, 2])
        assert pixels[~ahead].isnan().all()


def test_pixel_centres_are_at_one_half():
    "The mean of the four central rays is the optical axis; with centres at whole numbers it is half a pixel off."
    s = scene(intrinsics=torch.tensor([9., 7., 4., 3.]).repeat(3, 1))
    centres = torch.tensor([[[3.5, 2.5], [4.5, 2.5]], [[3.5, 3.5], [4.5, 3.5]]])  # pixels (2, 3), (2, 4), (3, 3), (3, 4) of 6 x 8
    axis = s.unproject(centres, torch.ones(2, 2), 1).mean((0, 1)) - s.poses[1, :, 3]
    torch.testing.assert_close(axis, -s.poses[1, :, 2])


def test_look_at():
    "Right-handed, level, looking at the target; a cross product the other way round makes mirrors of all pictures."
    poses = look_at(torch.randn(20, 3, dtype=D) * 3, (.3, -.2, .5), up=(0, 0, 2))
    R = poses[:, :, :3]
    torch.testing.assert_close(R.mT @ R, torch.eye(3, dtype=D).expand(20, 3, 3)); assert (torch.linalg.det(R) > 0).all()
    assert R[:, 2, 0].abs().max() < 1e-12 and (R[:, 2, 1] > 0).all()
    away = torch.tensor([.3, -.2, .5], dtype=D) - poses[:, :, 3]
    torch.testing.assert_close(-R[:, :, 2], away / away.norm(dim=1, keepdim=True))
    assert torch.allclose(look_at([[0., -3, 0]])[0, :, :3], torch.tensor([[1., 0, 0], [0, 0, -1], [0, 1, 0]], dtype=D))
    for c in ([[0., 0, 3]], [[0., 0, 0]]):
        with pytest.raises(ValueError, match="looks along"): look_at(c)


def test_sphere_poses_are_even():
    "Latitudes crowded at the poles (equal angles for equal heights) or a wrong golden angle leave gaps and doubles."
    c = sphere_poses(100, 2.)[:, :, 3]
    torch.testing.assert_close(c.norm(dim=1), torch.full((100,), 2., dtype=D))
    near = (torch.cdist(c, c) + 9 * torch.eye(100)).min(1).values
    assert near.min() > .8 * near.median() and near.max() < 1.2 * near.median() and c.mean(0).norm() < .05
    assert torch.histc(c[:, 2], 4, -2, 2).tolist() == [25] * 4
    for count in (0, -1, 2.5):
        with pytest.raises(ValueError) as e: sphere_poses(count)
        assert f"count is {count!r}; an integer of at least 1" in one_sentence(e)


# --- sizes -------------------------------------------------------------------------------------------------------

def test_resizing_averages_areas_exactly():
    "Against integrals of the piecewise constant picture in rational arithmetic; whole and broken factors, and each axis for itself."
    from fractions import Fraction
    picture = np.random.default_rng(0).integers(0, 256, (7, 10, 3), np.uint8)
    def share(old, new): return [[max(Fraction(0), min(Fraction((k + 1) * old, new), i + 1) - max(Fraction(k * old, new), i)) * Fraction(new, old) for i in range(old)] for k in range(new)]
    for height, width in ((3, 4), (7, 5), (2, 10), (5, 2)):
        exact = [[sum(a * b * int(picture[i, j, 0]) for i, a in enumerate(r) if a for j, b in enumerate(c) if b) for c in share(10, width)] for r in share(7, height)]
        got = scenes._shrunk(picture, height, width)
        assert got.dtype == np.uint8 and got.shape == (height, width, 3)
        assert got[..., 0].tolist() == [[math.floor(v + Fraction(1, 2)) for v in row] for row in exact]


def test_resizing_moves_nothing():
    "Points stay at the same fraction of the picture; focal lengths exchanged between the axes, or scaled once for both, move them."
    s = replace(scene(height=12, width=20), alpha=torch.full((3, 12, 20), 128, dtype=torch.uint8))
    small = s.resized(4, 5)
    points = torch.randn(50, 3, dtype=D)
    for k in range(3):
        a, b = s.project(points, k)[0], small.project(points, k)[0]
        torch.testing.assert_close(b, a * torch.tensor([5 / 20, 4 / 12], dtype=D), equal_nan=True)
    assert small.images.shape == (3, 4, 5, 3) and (small.alpha == 128).all() and s.resized(12, 20) is s
    torch.testing.assert_close(small.images.double().mean((1, 2)), s.images.double().mean((1, 2)), atol=.6, rtol=0)
    for bad in ((13, 20), (4, 1), (4., 5), (True, 5)):
        with pytest.raises(ValueError, match="an integer from 2"): s.resized(*bad)


def test_subset_takes_everything_along():
    "A pose, an alpha or a file name of the neighbouring view would pass unseen."
    s = replace(scene(5), alpha=torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 6, 8).contiguous(), files=[f"{i}.png" for i in range(5)], split={"train": [0, 3], "test": [4, 1], "val": [2]})
    part = s.subset("test")
    assert len(part) == 2 and part.files == ("4.png", "1.png") and part.split == {"test": (0, 1)} and part.alpha[:, 0, 0].tolist() == [4, 1]
    assert torch.equal(part.images, s.images[[4, 1]]) and torch.equal(part.poses, s.poses[[4, 1]]) and torch.equal(part.intrinsics, s.intrinsics[[4, 1]])
    with pytest.raises(ValueError, match="its split has test"): part.subset("train")


def test_the_hash_names_what_a_run_sees_and_nothing_else():
    "A run on other pixels, cameras, depths or splits must not be taken for this one; a copy elsewhere must."
    s = scene()
    moved = s.poses.clone(); moved[0, 0, 3] = np.nextafter(float(moved[0, 0, 3]), 9)
    pixel = s.images.clone(); pixel[0, 0, 0, 0] ^= 1
    others = [replace(s, images=pixel), replace(s, poses=moved), replace(s, intrinsics=s.intrinsics * 1.01), replace(s, near=.9), replace(s, far=6), replace(s, split={"train": [0], "test": [2]}),
              replace(s, inverse_depth=True), replace(s, background="white"), replace(s, images=s.images.reshape(3, 8, 6, 3)), replace(s, recipe="r")]
    assert len({s.sha256, *(o.sha256 for o in others)}) == 11
    assert replace(s, name="copy", files=["a", "b", "c"], source="elsewhere").sha256 == s.sha256 == pickle.loads(pickle.dumps(s)).sha256
    assert replace(s, split={"test": [2], "train": [0, 1]}).sha256 == s.sha256


# --- faults of a scene -------------------------------------------------------------------------------------------

POSES = scene().poses


@pytest.mark.parametrize("change,words", [
    (dict(images=torch.zeros(3, 6, 8, 3)), "float32; give a uint8"), (dict(images=np.zeros((3, 6, 8, 3), np.uint8)), "ndarray"), (dict(images=torch.zeros(0, 6, 8, 3, dtype=torch.uint8)), "at least one view"),
    (dict(images=torch.zeros(3, 6, 8, 4, dtype=torch.uint8)), "(n, H, W, 3)"), (dict(alpha=torch.zeros(3, 6, 7, dtype=torch.uint8)), "alpha is a (3, 6, 7)"), (dict(background="black"), "'white' or None"),
    (dict(poses=POSES[:2]), "poses are of shape (2, 3, 4) where 3 images need (3, 3, 4)"), (dict(intrinsics=torch.ones(3, 3)), "intrinsics are of shape (3, 3)"), (dict(frame=torch.ones(4, 4)), "frame are of shape"),
    (dict(poses=POSES * math.nan), "poses hold NaN"), (dict(poses=POSES * torch.tensor([1, 1, 1.01, 1])), "view 0 is not orthonormal"), (dict(poses=POSES * torch.tensor([1., -1, 1, 1])), "a reflection"),
    (dict(poses=torch.cat([POSES[:2], POSES[2:, :, [0, 0, 2, 3]]])), "view 2 is not orthonormal"), (dict(intrinsics=torch.tensor([[1., 1, 0, 0], [1, -3, 0, 0], [1, 1, 0, 0]])), "view 1 has a focal length of -3"),
    (dict(near=5., far=5.), "near is 5 and far is 5"), (dict(near=0.), "0 < near"), (dict(far=math.inf), "far < infinity"), (dict(near=math.nan), "near is nan"),
    (dict(split={"train": [0, 3]}), "names view 3, and the views are 0 to 2"), (dict(split={"train": [-1]}), "names view -1"), (dict(split={"train": [0, 1], "test": [1]}), "names view 1 twice"),
    (dict(split={"train": [0, 0]}), "twice"), (dict(split={"train": [0], "test": []}), "'test' of the split is empty"), (dict(split={"trian": [0]}), "give a dict"), (dict(split={}), "give a dict"), (dict(split=[0]), "give a dict")])
def test_each_fault_of_a_scene_is_one_sentence(change, words):
    "Not checked, each of these ends as a crash far away or as a blurred picture."
    with pytest.raises(ValueError) as e: scene(**change)
    assert words in one_sentence(e) and "'noise'" in str(e.value)


def test_float32_poses_are_accepted():
    "Blender's matrices are single precision: 1e-7 off."
    assert scene(poses=POSES.float()).poses.dtype == D


# --- LLFF --------------------------------------------------------------------------------------------------------

@CAMERAS
def test_llff_round_trip(tmp_path, name):
    "Written from the definition, in a turned, moved and scaled world: columns out of order, a lost sign, a focal length of the wrong size or a centre that is scaled after it is moved give other pixels."
    s, Q = cameras(name), rotation(3)
    world = lambda p: 7 * p @ Q.T + torch.tensor([10., -20, 5], dtype=D)
    got = load_scene(write_llff(tmp_path / "s", s, world, Q, bounds=(14., 28.)))
    assert same_pixels(got, s, world) < 1e-10 and torch.equal(got.images, s.images) and got.name == "s"
    assert got.inverse_depth and got.background is None and got.alpha is None and abs(got.near - 4 / 3) < 1e-12 and abs(got.far - 8 / 3) < 1e-12
    assert got.poses[:, :, 3].mean(0).norm() < 1e-12
    back = got.poses[:, :, 2].mean(0); assert torch.allclose(back / back.norm(), torch.tensor([0., 0, 1], dtype=D))
    assert got.poses[:, 0, 1].mean().abs() < 1e-12     # the mean of the ups has no part to the right
    inverse = torch.linalg.inv(got.frame[:, :3])     # the poses in the file's world
    torch.testing.assert_close(inverse @ (got.poses[:, :, 3] - got.frame[:, 3]).T, world(s.poses[:, :, 3]).T, rtol=0, atol=1e-6)
    torch.testing.assert_close(inverse / torch.linalg.det(inverse) ** (1 / 3) @ got.poses[:, :, :3], Q @ s.poses[:, :, :3], rtol=0, atol=1e-6)
    depth_own, depth = s.project(torch.zeros(1, 3), 0)[1], got.project(got.normalise(world(torch.zeros(1, 3, dtype=D))), 0)[1]
    torch.testing.assert_close(depth, depth_own * 7 / (.75 * 14))


def test_llff_bounds_are_the_extremes_of_all_views(tmp_path):
    "The scale comes from the smallest depth of all photographs, not from the first one's."
    folder = write_llff(tmp_path / "s", front())
    data = np.load(folder / "poses_bounds.npy"); data[4, 15], data[7, 16] = 1., 9.
    np.save(folder / "poses_bounds.npy", data)
    got = load_scene(folder)
    assert abs(got.near - 4 / 3) < 1e-12 and abs(got.far - 12) < 1e-12


def test_llff_chooses_the_folder_and_scales_the_focal_length(tmp_path):
    "images_8 read with the focal length of images_4 is the classic; so is a size that the coarse folder lacks."
    big = front(12, 36, 48)
    folder = write_llff(tmp_path / "s", big, times=4, name="images_4")
    save(big.resized(18, 24), folder / "images_8")
    eight, four = load_scene(folder), load_scene(folder, factor=4)
    assert (eight.height, eight.width) == (18, 24) and (four.height, four.width) == (36, 48) and torch.equal(four.images, big.images)
    torch.testing.assert_close(four.intrinsics, 2 * eight.intrinsics)
    assert float(four.intrinsics[0, 0]) == 15 and Path(load_scene(folder, 24).files[0]).parent.name == "images_8"
    small = load_scene(folder, (30, 40))
    assert Path(small.files[0]).parent.name == "images_4" and torch.equal(small.images, big.resized(30, 40).images) and abs(float(small.intrinsics[0, 0]) - 15 * 40 / 48) < 1e-12
    assert load_scene(folder, 12).images.shape[1:3] == (9, 12)
    with pytest.raises(ValueError) as e: load_scene(folder, 100)
    assert "36 x 48" in one_sentence(e) and "fewer than" in str(e.value)
    with pytest.raises(ValueError) as e: load_scene(folder, factor=2)
    assert "the factors 4, 8" in one_sentence(e)


@pytest.mark.parametrize("n,last,every8", [(20, [18, 19], [0, 8, 16]), (62, list(range(56, 62)), list(range(0, 62, 8))), (34, [31, 32, 33], [0, 8, 16, 24, 32]), (9, [8], [0, 8]), (2, [1], [0])])
def test_the_two_splits(n, last, every8):
    "BARF holds out int(.1 n) at the end, nerf-pytorch every eighth from the first; rounding up, or counting from 7, makes other tables."
    for holdout, test in (("last", last), ("every8", every8)):
        got = scenes._held_out(n, holdout, "")
        assert got["test"] == test and sorted(got["test"] + got["train"]) == list(range(n))


def test_holdout_is_chosen(tmp_path):
    "A default that changes silently changes every LLFF table."
    folder = write_llff(tmp_path / "s", front())
    assert load_scene(folder).split["test"] == (11,) and load_scene(folder, holdout="every8").split["test"] == (0, 8)
    with pytest.raises(ValueError, match="'last', 'every8' or None"): load_scene(folder, holdout="8")


def llff_fault(folder, what):
    path = folder / "poses_bounds.npy"; data = np.load(path)
    if what == "missing image": (folder / "images" / "003.png").unlink()
    elif what == "another size": Image.new("RGB", (12, 8)).save(folder / "images" / "003.png")
    elif what == "no images": [p.unlink() for p in (folder / "images").iterdir()]
    elif what == "broken image": (folder / "images" / "003.png").write_bytes((folder / "images" / "003.png").read_bytes()[:60])
    elif what == "16 bits": Image.fromarray(np.zeros((9, 12), np.uint16)).save(folder / "images" / "003.png")
    elif what == "truncated": path.write_bytes(path.read_bytes()[:-8])
    elif what == "empty file": path.write_bytes(b"")
    elif what == "a pickle": np.save(path, np.array([None]), allow_pickle=True)
    elif what == "15 columns": np.save(path, data[:, :15])
    elif what == "NaN": data[2, 3] = math.nan; np.save(path, data)
    elif what == "no depth": data[2, 15] = 0; np.save(path, data)
    elif what == "sheared": data[2, 1] *= 1.1; np.save(path, data)
    elif what == "far before near": data[:, [15, 16]] = [[3., 2.]]; np.save(path, data)
    elif what == "turned":
        for p in (folder / "images").iterdir(): Image.open(p).transpose(Image.Transpose.ROTATE_90).save(p)
    elif what == "an archive":
        with open(path, "wb") as f: np.savez(f, data)


@pytest.mark.parametrize("what,kind,words", [
    ("missing image", ValueError, ["cameras for 12 images", "holds 11"]), ("another size", ValueError, ["003.png has 8 x 12", "one size"]), ("no images", FileNotFoundError, ["no pictures", "images_8"]),
    ("broken image", ValueError, ["003.png", "damaged or incomplete"]), ("16 bits", ValueError, ["more than 8 bits"]), ("truncated", ValueError, ["poses_bounds.npy", "damaged or incomplete"]), ("empty file", ValueError, ["damaged or incomplete"]),
    ("a pickle", ValueError, ["poses_bounds.npy"]), ("15 columns", ValueError, ["17 numbers"]), ("NaN", ValueError, ["NaN"]), ("no depth", ValueError, ["not positive"]), ("sheared", ValueError, ["view 2 is not orthonormal"]),
    ("far before near", ValueError, ["nearest depth at 3 and its farthest at 2"]), ("turned", ValueError, ["000.png", "96 x 72", "9 x 12 pixels", "turned"]), ("an archive", ValueError, ["poses_bounds.npy", ".npz"])])
def test_faults_of_llff_are_one_sentence(tmp_path, what, kind, words):
    folder = write_llff(tmp_path / "s", front())
    llff_fault(folder, what)
    with pytest.raises(kind) as e: load_scene(folder)
    for word in words: assert word in one_sentence(e)


def test_llff_needs_cameras_that_face_one_way(tmp_path):
    "The average of directions that cancel is no direction: dividing by its length made poses of NaN."
    s = replace(scene(2), poses=look_at([[3., 0, 0], [-3, 0, 0]]), split={"train": [0, 1]})
    with pytest.raises(ValueError) as e: load_scene(write_llff(tmp_path / "s", s))
    assert "no average pose" in one_sentence(e)


# --- JSON --------------------------------------------------------------------------------------------------------

def write_blender(folder, s, parts=("train", "val", "test"), angle=ANGLE, rgba=None):
    for part in parts:
        names = save(s, folder / part)
        if rgba is not None:
            for n in names: Image.fromarray(rgba).save(folder / part / f"{n}.png")
        frames = [{"file_path": f"./{part}/{n}", "rotation": .01, "transform_matrix": square(p)} for n, p in zip(names, s.poses)]
        (folder / f"transforms_{part}.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    return folder


@CAMERAS
def test_blender_round_trip(tmp_path, name):
    "The angle is horizontal and whole: taken as vertical, or as half, the focal length is wrong; the poses are as they stand."
    s = cameras(name); n = len(s)
    got = load_scene(write_blender(tmp_path / "s", s, angle=2 * math.atan(.5 * s.width / float(s.intrinsics[0, 0]))))
    assert {k: len(v) for k, v in got.split.items()} == {"train": n, "val": n, "test": n} and (got.near, got.far, got.inverse_depth) == (2, 6, False)
    for part in ("train", "val", "test"):
        assert torch.equal(got.subset(part).images, s.images) and torch.equal(got.subset(part).poses, s.poses) and same_pixels(got.subset(part), s) < 1e-11
    assert [Path(f).parent.name for f in got.subset("test").files] == ["test"] * n
    with pytest.raises(ValueError, match="its own test cameras"): load_scene(tmp_path / "s", holdout="last")
    with pytest.raises(ValueError, match="no LLFF scene"): load_scene(tmp_path / "s", factor=8)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_blender_takes_the_depths_that_its_files_state(tmp_path):
    "2 and 6 in place of what is stated train a scene of another scale on rays that never meet it."
    folder = write_blender(tmp_path / "s", front())
    change(folder / "transforms_train.json", near=.5, far=20)
    got = load_scene(folder)
    assert (got.near, got.far) == (.5, 20) and (load_scene(folder, bounds=(1, 3)).near, load_scene(folder, bounds=(1, 3)).far) == (1, 3)
    change(folder / "transforms_test.json", near=.5, far=20.)                           # said twice, and the same
    assert load_scene(folder).far == 20
    change(folder / "transforms_test.json", far=21)
    with pytest.raises(ValueError) as e: load_scene(folder)
    for word in ("transforms_train.json", "0.5, 20", "transforms_test.json", "0.5, 21"): assert word in one_sentence(e)
    change(folder / "transforms_val.json", near=.5)
    with pytest.raises(ValueError, match="near without the other"): load_scene(folder)


@pytest.mark.parametrize("radius,accepted", [(1.9, False), (2.1, True), (4., True), (5.9, True), (6.1, False), (40., False)])
def test_blender_without_depths_must_fit_its_layouts(tmp_path, radius, accepted):
    "Cameras 40 from an object with rays that end at 6 train an empty field without a word."
    s = replace(scene(6), poses=sphere_poses(6, radius), split={"train": range(6)})
    folder = write_blender(tmp_path / "s", s)
    if accepted: assert load_scene(folder).near == 2
    else:
        with pytest.raises(ValueError) as e: load_scene(folder)
        assert "states no near and far" in one_sentence(e) and f"{radius:.3g} away" in str(e.value)
        assert load_scene(folder, bounds=(.5 * radius, 2 * radius)).far == 2 * radius


@pytest.mark.parametrize("part", ["val", "test"])
def test_blender_tests_on_pictures_of_its_own(tmp_path, part):
    "A copied transforms_train.json, or a folder of links, makes held-out PSNR the PSNR of training."
    folder = write_blender(tmp_path / "s", front())
    own = folder / part / "003.png"; own.unlink(); own.symlink_to(folder / "train" / "005.png")
    with pytest.raises(ValueError) as e: load_scene(folder)
    assert "003.png" in one_sentence(e) and "trained on tests nothing" in str(e.value)
    (folder / f"transforms_{part}.json").write_bytes((folder / "transforms_train.json").read_bytes())
    with pytest.raises(ValueError, match="in transforms_train.json and in another part"): load_scene(folder)
    change(folder / "transforms_test.json", frames=json.loads((folder / "transforms_val.json").read_text())["frames"]) if part == "test" else None
    if part == "test": assert len(load_scene(folder)) == 36                              # val and test may be the same: neither is trained on


def test_what_is_no_scene_is_said_to_be_none(tmp_path):
    "A mesh was said to be 'not valid JSON', and a folder in the place of a file gave a bare Errno."
    mesh = tmp_path / "bimba.obj"; mesh.write_text("v 0 0 0\n")
    with pytest.raises(ValueError) as e: load_scene(mesh)
    assert "does not end in .json" in one_sentence(e)
    folder = write_blender(tmp_path / "s", front())
    (folder / "transforms_test.json").unlink(); (folder / "transforms_test.json").mkdir()
    with pytest.raises(ValueError) as e: load_scene(folder)
    assert "transforms_test.json is a folder" in one_sentence(e)


def test_rgba_is_composited_on_white(tmp_path):
    "Alpha dropped leaves the colour under it; premultiplied colours taken for straight are too bright. c a + 1 - a, in 255ths."
    rgba = np.zeros((9, 12, 4), np.uint8); rgba[..., :3] = [200, 100, 0]; rgba[..., 3] = np.arange(108).reshape(9, 12) * 255 // 107
    got = load_scene(write_blender(tmp_path / "s", front(), rgba=rgba))
    a = rgba[..., 3:] / 255.
    assert np.abs(got.images[5].numpy() - (rgba[..., :3] * a + 255 * (1 - a))).max() <= .5 and np.array_equal(got.alpha[5].numpy(), rgba[..., 3]) and got.background == "white"
    small = load_scene(tmp_path / "s", (3, 4))
    assert torch.equal(small.images, got.resized(3, 4).images) and torch.equal(small.alpha, got.resized(3, 4).alpha)


@CAMERAS
def test_nerfstudio_round_trip(tmp_path, name):
    "Read pictures are smaller than w x h says; the principal point is off the middle; the file's name carries its suffix."
    s = cameras(name); n = len(s)
    if name == "grid": s = replace(s, intrinsics=torch.tensor([15, 11, 6.5, 4.1], dtype=D).repeat(n, 1))
    threefold = dict(zip(("fl_x", "fl_y", "cx", "cy"), (3 * s.intrinsics[0]).tolist()))
    got = load_scene(write_json(tmp_path / "s" / "transforms.json", s, **threefold, w=3 * s.width, h=3 * s.height))
    assert torch.equal(got.poses, s.poses) and same_pixels(got, s) < 1e-11 and torch.equal(got.images, s.images)
    assert (got.near, got.far) == (1, 6) and got.name == "s" and got.split["test"] == tuple(range(n - max(1, n // 10), n))
    assert load_scene(tmp_path / "s" / "transforms.json", bounds=(2, 3)).far == 3


def test_intrinsics_of_each_frame(tmp_path):
    "One frame's focal length used for all."
    s = front(); path = write_json(tmp_path / "transforms.json", s)
    data = json.loads(path.read_text())
    for i, frame in enumerate(data["frames"]): frame["fl_x"] = 15. + i; frame["cy"] = 3.
    path.write_text(json.dumps(data))
    k = load_scene(path).intrinsics
    torch.testing.assert_close(k[:, 0], 15 + torch.arange(12, dtype=D)); assert (k[:, 1] == 15).all() and torch.allclose(k[:, 3], torch.tensor(3.).double())


def test_an_angle_means_square_pixels_of_the_file(tmp_path):
    "fy from fx where no vertical angle is given; after a resize that is not uniform the pixels are no longer square."
    path = write_json(tmp_path / "transforms.json", front(), camera_angle_x=2 * math.atan(6 / 15), **dict.fromkeys(("fl_x", "fl_y", "cx", "cy", "w", "h")))
    assert torch.allclose(load_scene(path).intrinsics[0], torch.tensor([15, 15, 6, 4.5]).double())
    assert torch.allclose(load_scene(path, (3, 6)).intrinsics[0], torch.tensor([7.5, 5, 3, 1.5]).double())
    data = json.loads(path.read_text()); path.write_text(json.dumps({**data, "camera_angle_y": 2 * math.atan(4.5 / 10)}))
    assert torch.allclose(load_scene(path).intrinsics[0], torch.tensor([15, 10, 6, 4.5]).double())


def test_named_splits(tmp_path):
    "nerfstudio's lists of file names."
    path = write_json(tmp_path / "transforms.json", front(), train_filenames=[f"./{i:03d}.png" for i in range(9)], test_filenames=["./011.png", "./009.png"])
    assert load_scene(path).split == {"train": tuple(range(9)), "test": (9, 11)} and load_scene(path, holdout="every8").split["test"] == (0, 8)


def test_depths_where_none_are_given(tmp_path):
    "From where the optical axes meet; cameras that look along one direction meet nowhere and are asked about."
    s = replace(scene(8), poses=sphere_poses(8, 4.))
    got = load_scene(write_json(tmp_path / "a" / "transforms.json", s, near=None, far=None))
    assert abs(got.near - 1) < 1e-9 and abs(got.far - 8) < 1e-9
    s = replace(s, poses=look_at([[float(i), 0, 3] for i in range(8)], torch.tensor([[float(i), 0, 0] for i in range(8)]), (0, 1, 0)))
    with pytest.raises(ValueError) as e: load_scene(write_json(tmp_path / "b" / "transforms.json", s, near=None, far=None))
    assert "bounds=(near, far)" in one_sentence(e)
    assert load_scene(tmp_path / "b", bounds=(1, 9)).far == 9


def test_lenses(tmp_path):
    "Distortion that is ignored in silence is a blur at the borders that no training removes."
    path = write_json(tmp_path / "transforms.json", front(), k1=.02)
    with pytest.warns(UserWarning, match="lens distortion.*undistort") as caught: load_scene(path)
    assert "\n" not in str(caught[0].message)
    with pytest.raises(ValueError) as e: load_scene(write_json(path, front(), camera_model="OPENCV_FISHEYE"))
    assert "only pinhole cameras" in one_sentence(e)


def json_fault(path, what):
    data = json.loads(path.read_text()); frame = data["frames"][2]
    if what == "comma": path.write_text(path.read_text().replace('"w"', ', "w"')); return
    if what == "list": path.write_text("[1]"); return
    if what == "binary": path.write_bytes(b"\xff\xfe\x00{"); return
    if what == "typo": frame["transform_matirx"] = frame.pop("transform_matrix")
    elif what == "no frames": del data["frames"]
    elif what == "empty frames": data["frames"] = []
    elif what == "no focal": del data["fl_x"]
    elif what == "no size": del data["w"]
    elif what == "missing image": frame["file_path"] = "images/7"
    elif what == "no name": del frame["file_path"]
    elif what == "word": frame["transform_matrix"][0][0] = "one"
    elif what == "3 x 3": frame["transform_matrix"] = np.eye(3).tolist()
    elif what == "transposed": frame["transform_matrix"] = np.array(frame["transform_matrix"]).T.tolist()
    elif what == "scaled": frame["transform_matrix"] = (np.array(frame["transform_matrix"]) * [[2.], [2], [2], [1]]).tolist()
    elif what == "mirrored": frame["transform_matrix"] = (np.array(frame["transform_matrix"]) * [-1, 1, 1, 1]).tolist()
    elif what == "negative": data["fl_x"] = -3
    elif what == "string": data["fl_x"] = "15"
    elif what == "near >= far": data["near"] = 7
    elif what == "a number for a frame": data["frames"][2] = 3
    elif what == "centre without size": [data.pop(k) for k in ("w", "h", "fl_x", "fl_y") if k in data]; data |= {"camera_angle_x": 1., "cx": 3., "cy": 2.}
    elif what == "degrees": del data["fl_x"]; data["camera_angle_x"] = 45.
    elif what == "fisheye": data["is_fisheye"] = True
    elif what == "fisheye in a frame": frame["camera_model"] = "OPENCV_FISHEYE"
    elif what == "Cx": data["Cx"] = data.pop("cx")
    elif what == "fly": frame["fly"] = 15.; data.pop("fl_y", None)
    elif what == "train_filename": data["train_filename"] = [frame["file_path"]]
    elif what == "near alone": del data["far"]
    elif what == "no such picture": data["train_filenames"] = ["elsewhere/0.png"]
    elif what == "no list": data["train_filenames"] = 5
    elif what == "nested list": data["test_filenames"] = [["000.png"]]
    elif what == "twice": frame["file_path"] = data["frames"][0]["file_path"]
    elif what == "NaN": data |= {"near": None, "far": None}; frame["transform_matrix"][1][3] = math.nan
    elif what == "infinite": frame["transform_matrix"][0][1] = -math.inf
    elif what == "another picture": data |= {"w": 99, "h": 16}
    elif what == "turned": frame |= {"w": 9, "h": 12}
    elif what == "deep": path.write_text("[" * 100_000); return
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


@pytest.mark.parametrize("what,kind,words", [
    ("comma", ValueError, ["not valid JSON", "line 1 column"]), ("list", ValueError, ["holds a list"]), ("binary", ValueError, ["not valid JSON"]), ("typo", ValueError, ["frame 2", "no 'transform_matrix'", "'transform_matirx' meant"]),
    ("no frames", ValueError, ["no 'frames'"]), ("empty frames", ValueError, ["no frames"]), ("no focal", ValueError, ["neither fl_x nor camera_angle_x"]), ("no size", ValueError, ["no w and h"]),
    ("missing image", FileNotFoundError, ["frame 2", "'images/7'"]), ("no name", ValueError, ["frame 2", "file_path"]), ("word", ValueError, ["frame 2", "4 x 4"]), ("3 x 3", ValueError, ["4 x 4"]), ("transposed", ValueError, ["last row"]),
    ("scaled", ValueError, ["view 2 is not orthonormal"]), ("mirrored", ValueError, ["view 2 is a reflection"]), ("negative", ValueError, ["fl_x = -3"]), ("string", ValueError, ["fl_x = '15'"]), ("near >= far", ValueError, ["near is 7 and far is 6"]),
    ("a number for a frame", ValueError, ["frame 2", "is a int"]),
    ("centre without size", ValueError, ["frame 0", "cx and no w and h"]), ("degrees", ValueError, ["camera_angle_x = 45.0", "pi radians", "degrees"]), ("fisheye", ValueError, ["is_fisheye", "only pinhole"]), ("fisheye in a frame", ValueError, ["frame 2", "OPENCV_FISHEYE"]),
    ("Cx", ValueError, ["'Cx'", "'cx' meant"]), ("fly", ValueError, ["frame 2", "'fly'", "'fl_y' meant"]), ("train_filename", ValueError, ["'train_filename'", "'train_filenames' meant"]), ("near alone", ValueError, ["near without the other"]),
    ("no such picture", ValueError, ["'elsewhere/0.png' in train_filenames", "file_path"]), ("no list", ValueError, ["train_filenames = 5"]), ("nested list", ValueError, ["test_filenames"]), ("twice", ValueError, ["frame 2", "which frame 0 names too"]),
    ("NaN", ValueError, ["frame 2", "nan in row 1, column 3"]), ("infinite", ValueError, ["frame 2", "-inf in row 0, column 1"]),
    ("another picture", ValueError, ["000.png", "99 x 16", "12 x 9 pixels", "no scaled copy"]), ("turned", ValueError, ["002.png", "9 x 12", "12 x 9 pixels"]), ("deep", ValueError, ["not valid JSON"])])
def test_faults_of_json_are_one_sentence(tmp_path, what, kind, words):
    path = write_json(tmp_path / "transforms.json", front())
    json_fault(path, what)
    with pytest.raises(kind) as e: load_scene(path)
    for word in words: assert word in one_sentence(e)
    assert "transforms.json" in str(e.value) or "scene '" in str(e.value) or what in ("another picture", "turned")


@pytest.mark.parametrize("w, h, good", [(12, 9, True), (36, 27, True), (6, 4.5, True), (12.4, 9, True), (50, 37, True), (50, 38, True), (14, 9, False), (9, 12, False), (50, 33, False), (50, 42, False)])
def test_a_scaled_size_may_be_off_by_its_rounding(tmp_path, w, h, good):
    "Pictures of 12 x 9 were made of 50 x 37 or 50 x 38; of 50 x 33 they were cut out, so that fy would be that of other pixels."
    path = write_json(tmp_path / "transforms.json", front(), w=w, h=h)
    if good: assert len(load_scene(path)) == 12
    else:
        with pytest.raises(ValueError) as e: load_scene(path)
        assert "no scaled copy" in one_sentence(e)


# --- BLEFF -------------------------------------------------------------------------------------------------------

def write_bleff(folder, s, scale=1., ids=True):
    save(s, folder / "images")
    poses = s.poses.clone(); poses[:, :, :3] *= scale
    (folder / "gt_metas.json").write_text(json.dumps({"c2ws": [square(p) for p in poses], "cam_angle_x": 2 * math.atan(6 / 15), "cam_angle_y": 2 * math.atan(4.5 / 15)}))
    if ids:
        for part, i in (("train", range(1, 12)), ("val", [0])): (folder / f"{part}_ids.txt").write_text("\n".join(map(str, i)))
    return folder


def test_bleff_round_trip_also_where_rotations_carry_a_scale(tmp_path):
    "Recentred and not scaled; a scale of the rotations (as in the scene bed) is not one of the centres."
    s = front()
    for scale in (1., .25):
        got = load_scene(write_bleff(tmp_path / f"{scale}", s, scale))
        assert same_pixels(got, s) < 1e-11 and got.inverse_depth and got.split == {"train": tuple(range(1, 12)), "test": (0,)}
        torch.testing.assert_close(torch.cdist(got.poses[:, :, 3], got.poses[:, :, 3]), torch.cdist(s.poses[:, :, 3], s.poses[:, :, 3]))
    sheared = write_bleff(tmp_path / "x", replace(s, name="x"))
    data = json.loads((sheared / "gt_metas.json").read_text()); data["c2ws"][3][0][0] *= 1.2; (sheared / "gt_metas.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="view 3 is not orthonormal"): load_scene(sheared)


@pytest.mark.parametrize("change, words", [({"cam_angle_x": 40., "cam_angle_y": 40.}, ["cam_angle_x = 40.0", "degrees"]), ({"cam_angle_y": 3.2}, ["cam_angle_y = 3.2", "pi radians"]), ({"c2ws": 3}, ["c2ws of type int"]), ({"c2ws": {"a": 1}}, ["c2ws of type dict"]), ("nan", ["camera 3", "NaN"]), ("zero", ["camera 3", "axis of length 0"])])
def test_faults_of_bleff_are_one_sentence(tmp_path, change, words):
    "Catches angles in degrees, which give a focal length of a pixel or two, or a negative one."
    folder = write_bleff(tmp_path / "s", front())
    data = json.loads((folder / "gt_metas.json").read_text())
    if change == "nan": data["c2ws"][3][0][3] = math.nan
    elif change == "zero": data["c2ws"][3] = [[0., 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 3], [0, 0, 0, 1]]
    else: data |= change
    (folder / "gt_metas.json").write_text(json.dumps(data))
    with pytest.raises(ValueError) as e: load_scene(folder)
    for word in [*words, "gt_metas.json"]: assert word in one_sentence(e)


@pytest.mark.parametrize("ids", ["1\ninf\n", "0.7\n1\n", "nan"])
def test_views_have_whole_numbers(tmp_path, ids):
    folder = write_bleff(tmp_path / "s", front())
    (folder / "train_ids.txt").write_text(ids)
    with pytest.raises(ValueError) as e: load_scene(folder)
    assert "train_ids.txt is not a list of view numbers" in one_sentence(e)


def test_the_fingerprint_sees_the_split_and_the_depths(tmp_path):
    "Catches tables that count as up to date though other views are held out, or the depths are others."
    folder = write_bleff(tmp_path / "b", front()); before = fingerprint(folder)
    (folder / "train_ids.txt").write_text("0 1 2 3"); (folder / "val_ids.txt").write_text("7 8")
    assert fingerprint(folder) != before
    path = write_json(tmp_path / "t" / "transforms.json", front()); before = fingerprint(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "near": 1.5}))
    assert fingerprint(path) != before


def test_a_scene_made_from_the_knot_has_a_hash_of_its_own():
    "Catches a recipe that outlives the pixels and cameras that it stands for."
    knot = load_scene("knot", 8)
    for other in (replace(knot, poses=knot.poses.flip(0)), replace(knot, images=255 - knot.images), replace(knot, near=1.), replace(knot, intrinsics=2 * knot.intrinsics)): assert other.sha256 != knot.sha256
    assert replace(knot, name="the same").sha256 == knot.sha256 == load_scene("knot", 8).sha256 and "|" in knot.recipe


def test_a_scene_sampled_to_infinity_has_nothing_behind_it(tmp_path):
    "Pictures with alpha before a white background, and a ray without an end: the background could never be seen."
    folder = write_bleff(tmp_path / "s", front())
    for file in (folder / "images").iterdir(): Image.open(file).convert("RGBA").save(file)
    got = load_scene(folder)
    assert got.inverse_depth and got.alpha is not None and got.background is None


def test_bounds_are_numbers(tmp_path):
    for wrong in (("a", "b"), (1, None), (True, 2)):
        with pytest.raises(ValueError, match="two numbers"): load_scene("knot", 8, bounds=wrong)
    with pytest.raises(ValueError, match="size is 0;"): load_scene("knot", 0)


def test_a_cache_that_cannot_be_used_costs_time_and_no_more(tmp_path):
    "Catches a load that fails after all its work, since the folder is a file, cannot be made, or holds a folder by the file's name."
    first = load_scene("knot", 8, cache=tmp_path / "c")
    (tmp_path / "file").write_text("x")
    (kept,) = (tmp_path / "c").iterdir(); kept.unlink(); kept.mkdir()
    for cache in (tmp_path / "c", tmp_path / "file", tmp_path / "file" / "below"): assert torch.equal(load_scene("knot", 8, cache=cache).images, first.images)


def test_bleff_names_and_splits(no_data, monkeypatch):
    "The archive writes balls1 where the paper says balls; without lists of views the last tenth is held out; a bad list is named."
    monkeypatch.setenv("INR_PRECOND_DATA", "d")
    folder = write_bleff(Path("d/BLEFF/mix_rt/t000r000/balls1"), front(), ids=False)
    write_bleff(Path("d/BLEFF/mix_rt/t010r010/balls1"), front())
    got = load_scene("bleff/balls")
    assert got.split["test"] == (11,) and got.name == "bleff/balls" and "BLEFF" in got.source and load_scene("bleff/balls1").sha256 == got.sha256
    assert load_scene("bleff/mix_rt/t010r010/balls").split["test"] == (0,)
    for part in ("train", "val"): (folder / f"{part}_ids.txt").write_text("1\ntwo\n")
    with pytest.raises(ValueError) as e: load_scene("bleff/balls")
    assert "train_ids.txt" in one_sentence(e)
    with pytest.raises(FileNotFoundError) as e: load_scene("bleff/deer")
    assert "data_scripts/bleff.py --root d --scenes deer" in one_sentence(e)


def test_bleff_without_metas_is_read_as_llff(no_data, monkeypatch):
    "Its poses_bounds.npy has LLFF's format."
    monkeypatch.setenv("INR_PRECOND_DATA", "d")
    write_llff(Path("d/BLEFF/mix_rt/t000r000/root"), front())
    assert abs(load_scene("bleff/root").near - 4 / 3) < 1e-12


# --- names and folders -------------------------------------------------------------------------------------------

def test_names_and_missing_data(no_data):
    assert default_scene() == "knot" and scene_names()[0] == "knot" and {"fern", "lego", "bleff/root"} < set(scene_names())
    for name, place, script in (("fern", "nerf_llff_data", "llff"), ("lego", "nerf_synthetic", "blender"), ("bleff/deer", "BLEFF", "bleff")):
        with pytest.raises(FileNotFoundError) as e: load_scene(name)
        for part in (os.path.join("data", place), f"data_scripts/{script}.py --root data", "INR_PRECOND_DATA", "knot"): assert part in one_sentence(e)
    with pytest.raises(ValueError, match="did you mean 'lego'"): load_scene("leggo")
    with pytest.raises(FileNotFoundError, match="there is no folder"): load_scene("nowhere/s")
    for wrong in (3, None, ""):
        with pytest.raises(TypeError): load_scene(wrong)


def test_names_are_found_under_the_root(no_data, monkeypatch):
    monkeypatch.setenv("INR_PRECOND_DATA", "d")
    write_blender(Path("d/nerf_synthetic/lego"), front()); write_llff(Path("d/nerf_llff_data/fern"), front()); write_blender(Path("d/nerf_synthetic/chair"), front())
    assert default_scene() == "lego" and load_scene("lego").name == "lego" and load_scene("fern").inverse_depth and "CC-BY-NC" in load_scene("lego").source
    assert load_scene("chair").near == 2   # not BLEFF's


def test_empty_and_foreign_folders(tmp_path):
    (tmp_path / "empty").mkdir(); (tmp_path / "other").mkdir(); (tmp_path / "other" / "a.txt").touch()
    for name, words in (("empty", "is empty"), ("other", "holds no cameras")):
        with pytest.raises(ValueError) as e: load_scene(tmp_path / name)
        assert words in one_sentence(e) and "transforms.json" in str(e.value)


@pytest.mark.parametrize("size", [1, 0, -3, True, 2.5, (8,), (8, 9, 3), (8, 1), "8"])
def test_bad_sizes(tmp_path, size):
    folder = write_llff(tmp_path / "s", front())
    for name in (folder, "knot"):
        with pytest.raises(ValueError) as e: load_scene(name, size)
        assert "size is" in one_sentence(e)


# --- the embedded scene ------------------------------------------------------------------------------------------

def test_the_knot_is_what_it_promises(knot):
    "At least 60 views, a test view nowhere near a training view, depths enclosed."
    assert len(knot.split["train"]) == 64 and len(knot.split["test"]) == 16 and (knot.height, knot.width, knot.background) == (50, 50, "white")
    train, test = (knot.poses[list(knot.split[s]), :, 2] for s in ("train", "test"))
    angle = torch.rad2deg((test @ train.T).clamp(-1, 1).acos()).min(1).values
    assert 6 < angle.min() and angle.max() < 13
    assert (knot.images[knot.alpha == 0] == 255).all() and .1 < (knot.alpha > 0).double().mean() < .4
    corners = torch.from_numpy(scenes.load_shape("trefoil").corners)
    depths = torch.stack([knot.project(corners, k)[1] for k in range(80)])
    assert knot.near < depths.min() and depths.max() < knot.far


def test_the_knots_pictures_are_of_the_knot(knot):
    "Rendered rays and `project` agree: the corners of the mesh lie in the mask but for slivers, and leave none of it empty, and a picture upside down or a neighbour's camera does not pass."
    corners = torch.from_numpy(scenes.load_shape("trefoil").corners[::7])
    for k in range(0, 80, 16):
        pixels = knot.project(corners, k)[0].floor().long()
        drawn = torch.zeros(50, 50, dtype=torch.bool); drawn[pixels[:, 1], pixels[:, 0]] = True
        solid = knot.alpha[k] > 0
        assert (drawn & ~solid).sum() <= .06 * solid.sum() and ((knot.alpha[k] == 255) & ~drawn).sum() <= .005 * solid.sum()
        assert (drawn.flip(0) ^ solid).sum() > .1 * solid.sum() and (drawn ^ (knot.alpha[(k + 1) % 80] > 0)).sum() > .1 * solid.sum()


def test_the_knots_hull_is_the_knot(knot):
    "Masks and cameras of one world: the hull contains the shape but for a pixel's skin, hardly more, and nothing where pictures are upside down."
    shape, axis = scenes.load_shape("trefoil"), torch.linspace(-1.1, 1.1, 41, dtype=D)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    solid, hull = torch.from_numpy(shape.inside(points)), visual_hull(knot, points)
    assert hull[solid].double().mean() > .95 and shape.formula(points[solid & ~hull].numpy()).max() < .044 and solid.sum() < hull.sum() < 1.6 * solid.sum()
    assert visual_hull(replace(knot, alpha=knot.alpha.flip(1)), points).sum() < .02 * hull.sum()
    assert visual_hull(knot, points, [0]).sum() > hull.sum() and not visual_hull(knot, [[9., 9, 9]]).any()
    with pytest.raises(ValueError, match="no alpha"): visual_hull(scene(), points)


def test_colours_follow_the_formula():
    "Albedo from the three gyroids, Lambert's cosine, Blinn's highlight, at points where each is known by hand."
    x = np.array([[.1, -.3, .7], [0, 0, 0]])
    def gyroid(p): return np.sin(p[0]) * np.cos(p[1]) + np.sin(p[1]) * np.cos(p[2]) + np.sin(p[2]) * np.cos(p[0])
    for row, c in ((0, 0), (0, 2), (1, 1)):
        expected = .5 + sum(w * 2 / 3 * gyroid(2 * np.pi * f * x[row] + c * d) for f, w, d in ((.5, .22, 2), (2, .14, .7), (6, .12, .3)))
        assert abs(scenes._albedo(x)[row, c] - expected) < 1e-14
    many = scenes._albedo(np.random.default_rng(0).uniform(-1, 1, (20_000, 3)))
    assert 0 < many.min() and many.max() < 1 and many.std() > .1
    n = np.stack([scenes._LIGHT, -scenes._LIGHT])
    _, diffuse, highlight = scenes._shade(x, n, n)          # lit from the front and seen from the front; lit from behind
    assert np.allclose(diffuse, [1, .45]) and np.allclose(highlight, [.4, 0])
    across = np.cross(scenes._LIGHT, [1., 0, 0]); across /= np.linalg.norm(across)
    at = lambda degrees: np.cos(np.radians(degrees)) * scenes._LIGHT + np.sin(np.radians(degrees)) * across   # directions by their angle from the light
    assert scenes._shade(x[:1], at(96)[None], at(176)[None])[2] == 0                  # the half vector is near the normal, but the light is below the horizon
    assert np.allclose(scenes._shade(x[:1], at(60)[None], at(110)[None])[2], .4 * np.cos(np.radians(5)) ** 20)


def test_a_pixel_is_the_mean_of_its_rays():
    "A rendering of twice the size, averaged, has the same cameras: half a pixel's shift or rays at the corners of pixels would show."
    a, b = load_scene("knot", 24), load_scene("knot", 48)
    off = lambda images: float((replace(b, images=images, recipe="").resized(24, 24).images.double() - a.images.double()).abs().mean())
    same = off(b.images)
    assert (a.intrinsics * 2 == b.intrinsics).all() and same < 4.5 and min(off(b.images.roll(step, axis)) for step in (1, -1) for axis in (1, 2)) > 2 * same
    wide = load_scene("knot", (20, 32))
    assert wide.images.shape == (80, 20, 32, 3) and wide.intrinsics[0].tolist()[2:] == [16, 10]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:], lambda b: b"", lambda b: bytes(len(b))])
def test_the_cache_is_read_when_whole_and_made_anew_when_damaged(tmp_path, monkeypatch, damage):
    drawn = []
    def fake(s):
        drawn.append(1)
        return np.full(tuple(s.images.shape), 7, np.uint8), np.full(tuple(s.images.shape[:3]), 9, np.uint8)
    monkeypatch.setattr(scenes, "_rendered", fake)
    first = load_scene("knot", 8, cache=tmp_path / "c")
    file, = (tmp_path / "c").iterdir(); content = file.read_bytes()
    assert (first.images == 7).all() and (first.alpha == 9).all() and len(drawn) == 1
    again = load_scene("knot", 8, cache=tmp_path / "c")
    assert len(drawn) == 1 and torch.equal(again.images, first.images) and torch.equal(again.alpha, first.alpha)
    again.images[0] = 1   # what is read may be written to
    file.write_bytes(damage(content))
    assert torch.equal(load_scene("knot", 8, cache=tmp_path / "c").images, first.images) and len(drawn) == 2 and file.read_bytes() == content and list((tmp_path / "c").iterdir()) == [file]
    load_scene("knot", 10, cache=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2


@pytest.mark.parametrize("rgba", [True, False])
def test_decoded_pictures_are_kept_until_a_file_changes(tmp_path, monkeypatch, rgba):
    "Catches a scene that is decoded in every process, one that stays when a photograph was replaced, and one that is there although a file is gone."
    folder = write_blender(tmp_path / "s", front(), rgba=np.random.default_rng(0).integers(0, 256, (9, 12, 4), np.uint8)) if rgba else write_llff(tmp_path / "s", front())
    decoded, real = [], scenes._picture
    monkeypatch.setattr(scenes, "_picture", lambda path: decoded.append(path) or real(path))
    plain, first = load_scene(folder, (3, 4)), load_scene(folder, (3, 4), cache=tmp_path / "c")
    count = len(decoded)
    again = load_scene(folder, (3, 4), cache=tmp_path / "c")
    assert len(decoded) == count and plain.sha256 == first.sha256 == again.sha256 and (again.alpha is not None) == rgba
    for name in ("images", "alpha", "intrinsics"):
        assert getattr(again, name) is None or torch.equal(getattr(again, name), getattr(plain, name))
    file = decoded[0]
    with Image.open(file) as picture: changed = 255 - np.asarray(picture)
    Image.fromarray(changed).save(file)
    assert load_scene(folder, (3, 4), cache=tmp_path / "c").sha256 == load_scene(folder, (3, 4)).sha256 != first.sha256
    file.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="is no|holds 11|there is no|missing"): load_scene(folder, (3, 4), cache=tmp_path / "c")
    monkeypatch.setattr(scenes, "KEPT", 10)
    load_scene("knot", 9, cache=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_the_knots_hash_is_that_of_its_recipe(monkeypatch, knot):
    "It names runs: it must not hang on a pixel that another machine rounds otherwise, and must change with the size."
    monkeypatch.setattr(scenes, "_rendered", lambda s: (np.zeros(tuple(s.images.shape), np.uint8), np.zeros(tuple(s.images.shape[:3]), np.uint8)))
    assert load_scene("knot", 50).sha256 == knot.sha256 != load_scene("knot", 51).sha256
    assert knot.subset("train").sha256 != load_scene("knot", 50).subset("train").sha256     # what is cut out of it is named by its pixels
    with pytest.raises(ValueError, match="its own test cameras"): load_scene("knot", holdout="last")
    assert load_scene("knot", 50, bounds=(1.5, 5)).near == 1.5


def test_the_default_scene_needs_no_network(no_data):
    code = ("import socket\ndef refuse(*a, **k): raise OSError('no network')\nsocket.socket.connect = refuse\nsocket.getaddrinfo = refuse\n"
            "from inr_precond.data.scenes import load_scene, default_scene\nassert len(load_scene(default_scene(), 8)) == 80")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=no_data)


# --- the real data -----------------------------------------------------------------------------------------------

def real(*parts):
    "The path below INR_PRECOND_DATA, or a skip."
    path = Path(os.environ["INR_PRECOND_DATA"], *parts)
    if not path.exists(): pytest.skip(f"needs {'/'.join(parts)} under INR_PRECOND_DATA")
    return path


def colmap_points(path):
    "Coordinates, colours and number of sightings in a points3D.bin: count; for each point id, 3 doubles, 3 bytes, error, length of the track, 8 bytes a sighting."
    data, at, xyz, rgb, sightings = path.read_bytes(), 8, [], [], []
    for _ in range(int.from_bytes(data[:8], "little")):
        xyz.append(np.frombuffer(data, "<f8", 3, at + 8)); rgb.append(np.frombuffer(data, "u1", 3, at + 32)); sightings.append(int.from_bytes(data[at + 43:at + 51], "little"))
        at += 51 + 8 * sightings[-1]
    assert at == len(data)
    return np.array(xyz), np.array(rgb), np.array(sightings)


def likeness(s, points, colours, shift=(0, 0), radial=0.):
    "Mean correlation of the points' colours with those of the pixels in which the views see them."
    values = []
    for k in range(len(s)):
        pixels, middle = s.project(s.normalise(points), k)[0], s.intrinsics[k, 2:]
        r2 = (((pixels - middle) / s.intrinsics[k, :2]) ** 2).sum(-1, keepdim=True)
        pixels = middle + (pixels - middle) * (1 + radial * r2) + torch.tensor(shift)
        seen = ((pixels >= 0) & (pixels < torch.tensor([s.width, s.height]))).all(-1)
        j, i = pixels[seen].long().unbind(-1)
        values.append(np.corrcoef(s.images[k, i, j].numpy().ravel(), colours[seen.numpy()].ravel())[0, 1])
    return float(np.mean(values))


@pytest.mark.data
def test_fern():
    "COLMAP's points, seen through the cameras as read, have the colours of the photographs; a shift of two pixels, a flip or the lens turned round lose them. The published split and BARF's scale."
    points, colours, sightings = colmap_points(real("nerf_llff_data", "fern", "sparse", "0", "points3D.bin"))
    s = load_scene("fern", factor=8)
    assert s.split == {"train": tuple(range(18)), "test": (18, 19)} and load_scene("fern", 20, holdout="every8").split["test"] == (0, 8, 16)
    assert s.images.shape == (20, 378, 504, 3) and abs(s.near - 4 / 3) < 1e-12 and 6 < s.far < 6.5 and abs(float(s.intrinsics[0, 0]) - 3260.526 / 8) < .01
    points, colours, lens = points[sightings >= 8], colours[sightings >= 8], .01975   # COLMAP's SIMPLE_RADIAL k: poses_bounds.npy drops it
    plain, exact = likeness(s, points, colours), likeness(s, points, colours, radial=lens)
    assert plain > .75 and exact > .85
    for shift in ((2, 0), (-2, 0), (0, 2), (0, -2)): assert likeness(s, points, colours, shift, lens) < exact - .2
    assert likeness(s, points, colours, radial=-lens) < plain - .05 and likeness(replace(s, images=s.images.flip(1)), points, colours) < .4


@pytest.mark.data
def test_lego(tmp_path):
    "The masks and the cameras are of one object: what all masks leave explains all of them, and with a flipped axis half; the published split. Every fifth view, for time."
    folder = real("nerf_synthetic", "lego")
    split = scenes._blender(folder)["split"]
    assert {k: len(v) for k, v in split.items()} == {"train": 100, "val": 100, "test": 200} and default_scene() == "lego"
    for part in split:
        data = json.loads((folder / f"transforms_{part}.json").read_text())
        data["frames"] = [{**f, "file_path": str(folder.resolve() / f["file_path"])} for f in data["frames"][::5]]
        (tmp_path / f"transforms_{part}.json").write_text(json.dumps(data))
    s = load_scene(tmp_path, 40)
    assert len(s) == 80 and (s.near, s.far, s.background) == (2, 6, "white") and abs(float(s.intrinsics[0, 0]) - 40 * 555.5555 / 400) < .01
    axis = torch.linspace(-1.5, 1.5, 61, dtype=D)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)

    def explained(s):
        "Points in the hull, and the share of the masks' pixels in which one of them is seen."
        cells, hits, all_ = points[visual_hull(s, points)], 0, 0
        for k in range(0, len(s), 2):
            j, i = s.project(cells, k)[0].long().clamp(0, 39).unbind(-1)
            seen = torch.zeros(40, 40, dtype=torch.bool); seen[i, j] = True
            hits, all_ = hits + int((seen & (s.alpha[k] >= 128)).sum()), all_ + int((s.alpha[k] >= 128).sum())
        return len(cells), hits / all_
    count, share = explained(s)
    assert 5_000 < count < 25_000 and share > .97
    for wrong in (replace(s, alpha=s.alpha.flip(1)), replace(s, alpha=s.alpha.flip(2)), replace(s, poses=s.poses * torch.tensor([1., -1, -1, 1]))): assert explained(wrong)[1] < .7
