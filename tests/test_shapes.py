"""inr_precond.data.shapes: files, faults, labels against shapes whose inside is known, sampling, marching cubes, pictures."""
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from inr_precond.data import shapes
from inr_precond.data.shapes import (
    PointSet,
    Sampling,
    Shape,
    Trefoil,
    View,
    compare,
    default_shape,
    extract_shape,
    inside,
    inspect_mesh,
    load_shape,
    render,
    repaired,
    sample_points,
    sample_surface,
    save_mesh,
    shape_names,
    turntable,
    winding_number,
)


def arrays(mesh): return np.array(mesh.vertices), np.array(mesh.faces)


V, F = arrays(trimesh.creation.icosphere(subdivisions=4, radius=.9))   # sagitta .0015
SAGITTA = .003


def join(*meshes):
    offsets = np.cumsum([0, *(len(v) for v, _ in meshes)])
    return np.concatenate([v for v, _ in meshes]), np.concatenate([f + o for (_, f), o in zip(meshes, offsets)])


def in_cube(v, f, name="test"): return Shape(v, f, name, centre=(0., 0., 0.), scale=1.)


def norm(x): return np.linalg.norm(x, axis=1)


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


# --- labels ------------------------------------------------------------------------------------------------------

def box_distance(x): return (np.array([.9, .5, .3]) - np.abs(x)).min(1)
def torus_distance(x): return .25 - np.hypot(np.hypot(x[:, 0], x[:, 1]) - .6, x[:, 2])
def ball_distance(x): return .9 - norm(x)


KNOWN = {  # signed distance, positive inside; triangles in the cube
    "sphere": (ball_distance, (V, F)),
    "box": (box_distance, arrays(trimesh.creation.box((1.8, 1., .6)))),
    "torus": (torus_distance, arrays(trimesh.creation.torus(.6, .25, major_sections=160, minor_sections=80))),
    "nested spheres, both outward": (ball_distance, join((V, F), (V / 2, F))),
    "nested spheres, a cavity": (lambda x: np.minimum(ball_distance(x), norm(x) - .45), join((V, F), (V / 2, F[:, ::-1]))),
    "overlapping bodies": (lambda x: .6 - np.minimum(norm(x - [.3, 0, 0]), norm(x + [.3, 0, 0])), join((V / 1.5 + [.3, 0, 0], F), (V / 1.5 - [.3, 0, 0], F))),
    "inside out": (ball_distance, (V, F[:, ::-1])),
}


@pytest.mark.parametrize("name", KNOWN)
def test_labels_of_shapes_whose_inside_is_known(name):
    "Parity loses the overlap and fills or empties the wrong shell; a first hit loses bodies behind; a swapped sign, axis or scale loses everything."
    distance, mesh = KNOWN[name]
    shape, rng = in_cube(*mesh, name), np.random.default_rng(0)
    near = sample_surface(shape, 15_000, rng)[0] + rng.normal(size=(15_000, 3)) * .03
    points = np.concatenate([rng.uniform(-1, 1, (15_000, 3)), near])
    d = distance(points); clear = np.abs(d) > SAGITTA
    assert shape.report.closed and clear.mean() > .9
    got = inside(shape, points)
    assert got.dtype == bool and (got[clear] == (d[clear] > 0)).all()
    few = points[clear][:3_000]
    assert ((np.abs(winding_number(shape, few)) >= .5) == got[clear][:3_000]).all()


def test_winding_number_counts_bodies():
    "Solid angles per face summed over 4 pi: a factor, a sign or an unsorted result would show."
    shape = in_cube(*KNOWN["overlapping bodies"][1])
    np.testing.assert_allclose(winding_number(shape, [[0, 0, 0], [.7, 0, 0], [-.7, 0, 0], [0, .9, 0], [5, 5, 5]]), [2, 1, 1, 0, 0], atol=.02)


def test_labels_do_not_depend_on_order_batch_or_type():
    "Points are sorted before rays are followed; results must come back in the caller's order."
    rng, shape = np.random.default_rng(1), in_cube(V, F)
    points = rng.uniform(-1, 1, (5_000, 3)).astype(np.float32)
    whole = inside(shape, points)
    assert np.array_equal(inside(shape, points[::-1]), whole[::-1]) and np.array_equal(inside(shape, torch.from_numpy(points)), whole)
    assert np.array_equal(shapes._inside(shape, points.astype(float), batch=700), whole) and np.array_equal(np.concatenate([shape.inside(p) for p in points[:50, None]]), whole[:50])
    assert inside(shape, np.zeros((0, 3))).shape == (0,)


def test_a_ray_through_edges_and_vertices():
    "Points right below vertices and edge middles, where a single ray may slip through or count twice: the second direction and the solid angles decide."
    shape = in_cube(V, F)
    targets = np.concatenate([V, (V[F[:, 0]] + V[F[:, 1]]) / 2])
    for direction in shapes.DIRECTIONS:
        points = targets - .3 * direction
        clear = np.abs(norm(points) - .9) > SAGITTA
        assert (inside(shape, points)[clear] == (norm(points) < .9)[clear]).all()


def block(low, high): return arrays(trimesh.creation.box(bounds=[low, high]))


STACKS = {
    "one on the other": [((-5, 0, -5), (5, 1, 5)), ((-5, 1, -5), (5, 2, 5))],
    "a smaller one on top": [((-5, 0, -5), (5, 1, 5)), ((-2, 1, -3), (3, 2, 1))],
    "a sandwich": [((-5, 0, -5), (5, 1, 5)), ((-4, 1, -4), (4, 2, 4)), ((-3, 2, -3), (3, 3, 5))],
    "a table": [((-5, 4, -5), (5, 4.5, 5)), ((-3, 4, -3), (3, 5, 3)), *(((x, 0, z), (x + .5, 4, z + .5)) for x in (-4, 3) for z in (-4, 3))],
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_bodies_that_stand_on_each_other(name, turned, backward):
    "A ray goes on a little behind each face, over a second one in the same place: catches labels that lose an entry or an exit along both directions, in silence."
    boxes = STACKS[name][::-1 if backward else 1]
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))[0] if turned else np.eye(3)
    turn[:, 0] *= np.linalg.det(turn)
    v, f = join(*(block(*b) for b in boxes))
    shape = Shape(*shapes._merged(v @ turn.T, f), "boxes")
    points = np.random.default_rng(1).uniform(-1, 1, (20_000, 3))
    own = shape.denormalise(points) @ turn
    truth = np.any([((own > low) & (own < high)).all(1) for low, high in boxes], 0)
    clear = np.abs(own[:, None] - np.array(boxes).reshape(-1, 3)).min((1, 2)) > 1e-4
    assert (inside(shape, points) == truth)[clear].all() and truth.sum() > 300


def test_a_concave_polygon_is_cut_into_triangles_that_overlap(tmp_path):
    "Modelling programs write polygons; a fan of triangles covers a U's gap twice, once each way."
    outline = [(0, 0), (3, 0), (3, 3), (2, 3), (2, 1), (1, 1), (1, 3), (0, 3)]
    lines = [f"v {x} {y} {z}" for z in (0, .6) for x, y in outline] + ["f 8 7 6 5 4 3 2 1", "f 9 10 11 12 13 14 15 16"] + [f"f {i + 1} {(i + 1) % 8 + 1} {(i + 1) % 8 + 9} {i + 9}" for i in range(8)]
    (tmp_path / "u.obj").write_text("\n".join(lines))
    shape = load_shape(tmp_path / "u.obj")
    points = np.random.default_rng(2).uniform(-1, 1, (40_000, 3))
    x, y, z = shape.denormalise(points).T
    truth = (z > 0) & (z < .6) & (x > 0) & (x < 3) & (y > 0) & (y < 3) & ~((x > 1) & (x < 2) & (y > 1))
    assert (inside(shape, points) == truth).all()


def test_which_faces_lie_on_others():
    "Against all pairs: catches neighbours in one plane that count as overlapping, which would send every point of a box to the slow way, and pairs that a border between strips or roundings hides."
    rng = np.random.default_rng(3)
    base = rng.uniform(-.8, .8, (120, 1, 2)) + rng.uniform(-.15, .15, (120, 3, 2))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    corners = (np.concatenate([base, np.repeat(.1 * (np.arange(120) % 3), 3).reshape(120, 3, 1)], 2) @ turn.T).reshape(-1, 3)
    found = shapes._stacked(corners, np.arange(360).reshape(-1, 3))
    i, j = np.triu_indices(120, 1)
    pairs = shapes._meet(base[i], base[j]) & (i % 3 == j % 3)
    truth = np.zeros(120, bool); truth[i[pairs]] = truth[j[pairs]] = True
    assert 20 < truth.sum() < 120 and np.array_equal(found, truth)
    for a, b in zip(i[pairs][:40], j[pairs][:40]):  # and the test of a pair against points drawn in one and looked for in the other
        w = rng.dirichlet((1, 1, 1), 4000); p = w @ base[a]
        c = base[b] - base[b][:1]; uv = np.linalg.solve(np.stack([c[1], c[2]], 1), (p - base[b][0]).T)
        if ((uv > 0).all(0) & (uv.sum(0) < 1)).any(): assert shapes._meet(base[a][None], base[b][None])[0]
    fine = trimesh.creation.box(extents=(1, 1, 1))
    for _ in range(4): fine = fine.subdivide()
    assert not shapes._stacked(np.array(fine.vertices), np.array(fine.faces)).any() and not shapes._stacked(V, F).any()


def test_bodies_turned_inward_that_touch_others_are_warned_about():
    "What they share cancels; a cavity, and a mesh that is inside out as a whole, are labelled rightly and in peace."
    with pytest.warns(UserWarning, match="turned inward and cut or touch others"): assert not inside(in_cube(*join((V * .6, F), (V * .6 + [.4, 0, 0], F[:, ::-1]))), np.array([[.2, 0, 0]]))[0]
    with pytest.warns(UserWarning, match="enclose nothing.*repair=True"): inside(double := in_cube(*shapes._merged(*join((V, F), (V, F[:, ::-1])))), np.zeros((1, 3)))
    assert double.report.hollow == 1 and inside(repaired(double), np.zeros((1, 3)))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for v, f in (join((V, F), (V * .5, F[:, ::-1])), join((V, F[:, ::-1]), (V * .5, F)), (V, F[:, ::-1])): assert inside(in_cube(v, f), np.array([[0., 0, .7]]))[0]
        assert not inside(in_cube(*join((V, F), (V * .5, F[:, ::-1]))), np.zeros((1, 3)))[0]


def test_far_and_small_meshes_are_labelled_in_normalised_units():
    "A scan in micrometres a kilometre away: float32 rays in its own coordinates would see nothing."
    shape = Shape(V * 1e-6 + 1., F, "far")
    points = np.random.default_rng(2).uniform(-1, 1, (4_000, 3)); clear = np.abs(norm(points) - .9) > SAGITTA
    assert (inside(shape, points)[clear] == (norm(points) < .9)[clear]).all()


HOLED = (V, F[~((V[F].mean(1) > 0).all(1))])


def test_a_mesh_with_a_hole_is_warned_about_and_not_labelled_by_rays():
    "Rays leak through the hole: behind it the inside would be outside."
    shape = in_cube(*HOLED, "holed")
    points = np.random.default_rng(3).uniform(-.5, .5, (4_000, 3)); points = points[norm(points) < .3]
    with pytest.warns(UserWarning, match="not closed.*1 hole.*winding number.*repair=True") as caught: got = inside(shape, points)
    assert len(caught) == 1 and got.all() and "\n" not in str(caught[0].message)
    assert not (shapes.Rays(*HOLED).winding(points, np.array([.58, .58, .57])) != 0).all()   # what rays would say


def test_flipped_faces_are_not_labelled_by_counting():
    "A count of exits and entries is off by two behind a flipped face; the warning says that faces disagree."
    turned = F.copy(); turned[:20] = turned[:20, ::-1]
    shape, points = in_cube(V, turned, "turned"), np.random.default_rng(4).uniform(-1, 1, (3_000, 3))
    with pytest.warns(UserWarning, match="flipped against"): got = inside(shape, points)
    clear = np.abs(norm(points) - .9) > .15
    assert (got == (norm(points) < .9))[clear].all()


@pytest.mark.parametrize("points", [np.zeros(3), np.zeros((2, 2)), [["a", "b", "c"]], np.full((1, 3), np.nan)])
def test_bad_points_are_one_sentence(points):
    with pytest.raises(ValueError) as e: inside(in_cube(V, F), points)
    assert "give" in one_sentence(e)


# --- faults and repair -------------------------------------------------------------------------------------------

def test_report_counts_each_fault_and_no_other():
    turned = F.copy(); turned[7] = turned[7, ::-1]
    report = lambda v, f: inspect_mesh(Shape(v, f, "x"), crossings=True)
    clean = report(V, F)
    assert (clean.bodies, clean.inward, clean.holes, clean.flipped, clean.nonmanifold, clean.duplicates, clean.zero_area, clean.crossings, clean.closed) == (1, 0, 0, 0, 0, 0, 0, 0, True)
    two_holes = report(V, np.delete(F, [0, len(F) // 2], 0))
    assert two_holes.holes == 2 and not two_holes.closed and "2 holes" in str(two_holes)
    assert report(V, turned).flipped == 3 and not report(V, turned).closed
    twice = report(V, np.concatenate([F, F[5:6, [1, 2, 0]], F[9:10, ::-1]]))     # the same face written otherwise
    assert twice.duplicates == 2 and twice.nonmanifold == 6
    assert report(*join((V, F), (V + 3, F[:, ::-1]))).inward == 1
    assert report(*KNOWN["overlapping bodies"][1]).crossings > 10


def test_zero_area_faces_are_counted_and_harmless():
    "A face that collapses to a line, and one that names a vertex twice, on a mesh that is closed all the same."
    middle = V[F[0, :2]].mean(0)
    a, b, c = F[0]; n = len(V)
    faces = np.concatenate([F[1:], [[a, n, c], [n, b, c], [b, n, a], [a, b, b]]])     # split face 0; the sliver b-n-a closes the edge to its neighbour
    shape = in_cube(np.concatenate([V, middle[None]]), faces)
    assert shape.report.zero_area == 2 and shape.report.closed
    points = np.random.default_rng(5).uniform(-1, 1, (5_000, 3)); clear = np.abs(norm(points) - .9) > SAGITTA
    assert (inside(shape, points) == (norm(points) < .9))[clear].all()


def test_repair_closes_agrees_and_keeps_cavities():
    rng = np.random.default_rng(6)
    mixed = F.copy(); some = rng.random(len(F)) < .4; mixed[some] = mixed[some][:, ::-1]
    bad = Shape(*join((V, np.concatenate([np.delete(mixed, [3, 4, 700], 0), mixed[10:15]])), (V + 4, F[:, ::-1])), "bad")
    good = repaired(bad)
    assert not bad.report.closed and good.report.closed and good.report.inward == 1 and good.report.duplicates == 0   # the second body agreed with itself
    ball = norm(good.vertices[good.faces[:, 0]]) < 1
    assert abs(trimesh.Trimesh(good.vertices, good.faces[ball], process=False).volume / (4 / 3 * np.pi * .9**3) - 1) < .01      # outward
    assert (good.centre, good.scale) == (bad.centre, bad.scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error"); assert inside(good, good.normalise([[0, 0, 0]])).all()


def test_two_million_faces():
    "Inspection in Python loops, or a key that overflows, would not survive this size."
    n = 1000
    x, y = np.meshgrid(np.linspace(0, 2 * np.pi, n, endpoint=False), np.linspace(0, 2 * np.pi, n, endpoint=False), indexing="ij")
    v = np.stack([(2 + np.cos(y)) * np.cos(x), (2 + np.cos(y)) * np.sin(x), np.sin(y)], -1).reshape(-1, 3)
    i, j = np.indices((n, n)); at = lambda i, j: ((i % n) * n + j % n).ravel()
    f = np.concatenate([np.stack([at(i, j), at(i + 1, j), at(i + 1, j + 1)], 1), np.stack([at(i, j), at(i + 1, j + 1), at(i, j + 1)], 1)])
    shape = Shape(v, f, "torus")
    assert len(f) == 2_000_000 and shape.report.closed and shape.report.bodies == 1
    points = np.random.default_rng(7).uniform(-1, 1, (20_000, 3)); d = 1 - np.hypot(np.hypot(*(points[:, :2].T / .3)) - 2, points[:, 2] / .3)
    assert (inside(shape, points) == (d > 0))[np.abs(d) > 1e-3].all()


# --- files -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["obj", "off", "ply", "stl", "glb"])
def test_formats_give_the_same_surface(tmp_path, suffix):
    "STL's corners must be merged, GLB's scene unpacked."
    trimesh.creation.box((2, 1, 4)).apply_translation([10, 0, 0]).export(tmp_path / f"box.{suffix}")
    shape = load_shape(tmp_path / f"box.{suffix}")
    assert shape.vertices.shape == (8, 3) and shape.faces.shape == (12, 3) and shape.report.closed and shape.name == "box"
    np.testing.assert_allclose(shape.vertices.min(0), [9, -.5, -2], atol=1e-6)
    np.testing.assert_allclose(np.abs(shape.corners).max(0), [.45, .225, .9], atol=1e-6)


def test_a_scene_keeps_its_bodies_where_they_stand(tmp_path):
    "Geometry without its node's transformation would pile up at the origin."
    scene = trimesh.Scene()
    for x in (0, 5): scene.add_geometry(trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([x, 0, 0]))
    scene.export(tmp_path / "scene.glb")
    shape = load_shape(tmp_path / "scene.glb")
    assert shape.report.bodies == 2 and abs(np.ptp(shape.vertices[:, 0]) - 6) < 1e-6
    assert inside(shape, shape.normalise([[0, 0, 0], [5, 0, 0], [2.5, 0, 0]])).tolist() == [True, True, False]


def bad_files(folder):
    Image.new("RGB", (8, 8)).save(folder / "png.obj", format="PNG"); Image.new("RGB", (8, 8)).save(folder / "jpg.ply", format="JPEG")
    corners = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
    (folder / "nan.obj").write_text("v 0 0 0\nv 1 0 0\nv nan 1 0\nf 1 2 3\n"); (folder / "nofaces.obj").write_text(corners)
    (folder / "zero.obj").write_text("# f 0\n" + corners + "v 0 0 1\nf 4/1 2 3\nf\t 10/2 -0/3 1\n"); (folder / "half.obj").write_text("v 0 0 0\nv 1 0\n"); (folder / "index.obj").write_text(corners + "f 1 2 9\n"); (folder / "point.obj").write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")
    trimesh.PointCloud(V).export(folder / "cloud.ply")
    (folder / "empty.obj").touch(); (folder / "page.ply").write_text("<html>"); (folder / "text.stl").write_text("no mesh"); (folder / "a.xyzzy").write_text("1"); (folder / "folder.obj").mkdir()
    trimesh.creation.box().export(folder / "box.ply"); data = (folder / "box.ply").read_bytes(); (folder / "cut.ply").write_bytes(data[:-30])
    trimesh.creation.box().export(folder / "box.glb"); (folder / "cut.glb").write_bytes((folder / "box.glb").read_bytes()[:100])


@pytest.mark.parametrize("name,kind,words", [
    ("png.obj", ValueError, ["PNG image"]), ("jpg.ply", ValueError, ["JPEG image"]), ("nan.obj", ValueError, ["1 vertices with NaN"]), ("nofaces.obj", ValueError, ["no faces", "point cloud"]),
    ("cloud.ply", ValueError, ["no faces", "2,562 points"]), ("index.obj", ValueError, ["damaged"]), ("zero.obj", ValueError, ["vertex number 0 in line 7", "from 1"]), ("half.obj", ValueError, ["cut off"]), ("point.obj", ValueError, ["no extent"]), ("empty.obj", ValueError, ["empty"]),
    ("page.ply", ValueError, ["cannot be read"]), ("text.stl", ValueError, ["holds no mesh"]), ("a.xyzzy", ValueError, [".obj, .off"]), ("cut.ply", ValueError, ["incomplete"]), ("cut.glb", ValueError, ["incomplete"]),
    ("folder.obj", IsADirectoryError, ["is a folder"]), ("bxo.ply", FileNotFoundError, ["near it", "box.ply"]), ("nowhere/a.obj", FileNotFoundError, ["no mesh file", "trefoil"])])
def test_bad_files_are_one_sentence(tmp_path, name, kind, words):
    bad_files(tmp_path)
    with pytest.raises(kind) as e: load_shape(tmp_path / name)
    for word in [*words, name]: assert word in one_sentence(e)


@pytest.mark.parametrize("face", ["f 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n", "# f 0 1 2\nf 1 3 2\nf 1 2 4 \nf\t1 4 3\nf 2 3 4\n", "f -4 -2 -3\nf -4 -3 -1\nf -4 -1 -2\nf -3 -2 -1\n"])
def test_obj_faces_that_are_no_mistake_are_read(tmp_path, face):
    "A 0 in a comment is not vertex 0, and negative numbers count from the end."
    (tmp_path / "a.obj").write_text("g f 0\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n" + face)
    shape = load_shape(tmp_path / "a.obj")
    assert shape.report.closed and len(shape.faces) == 4 and inside(shape, shape.normalise([[.1, .1, .1], [.5, .5, .5]])).tolist() == [True, False]


def test_names_and_missing_data(no_data):
    assert default_shape() == "trefoil" and shape_names()[0] == "trefoil" and len(shape_names()) == 5
    with pytest.raises(FileNotFoundError) as e: load_shape("armadillo")
    for part in (os.path.join("data", "meshes", "armadillo.obj"), "data_scripts/stanford.py", "INR_PRECOND_DATA", "trefoil"): assert part in one_sentence(e)
    with pytest.raises(FileNotFoundError, match="by hand"): load_shape("bimba")
    with pytest.raises(ValueError, match="did you mean 'gargoyle'"): load_shape("gargoil")
    for wrong in (3, None, ""):
        with pytest.raises(TypeError): load_shape(wrong)


def test_a_scan_is_found_in_any_format(no_data, monkeypatch):
    monkeypatch.setenv("INR_PRECOND_DATA", "d")
    (no_data / "d" / "meshes").mkdir(parents=True); trimesh.creation.box().export(no_data / "d" / "meshes" / "armadillo.ply")
    assert default_shape() == "armadillo" and load_shape("armadillo").name == "armadillo" and "Stanford" in load_shape("armadillo").source


def test_default_shape_needs_no_network(no_data):
    code = ("import socket\ndef refuse(*a, **k): raise OSError('no network')\nsocket.socket.connect = refuse\nsocket.getaddrinfo = refuse\n"
            "from inr_precond.data.shapes import load_shape, default_shape\nassert load_shape(default_shape()).report.closed")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=no_data)


def test_missing_packages_are_one_sentence(monkeypatch):
    "They are imported where they are used; without them the module still loads."
    for name in ("igl", "igl.predicates", "embreex", "embreex.rtcore_scene"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as e: inside(in_cube(V, F), np.zeros((1, 3)))
    assert "pip install embreex" in one_sentence(e)
    with pytest.raises(ModuleNotFoundError, match="pip install libigl"): winding_number(in_cube(V, F), np.zeros((1, 3)))


@pytest.mark.data
@pytest.mark.parametrize("name", ["armadillo", "bimba", "gargoyle", "dragon"])
def test_the_papers_scans(name):
    if shapes._file_of(name) is None: pytest.skip(f"needs meshes/{name} under INR_PRECOND_DATA")
    shape = load_shape(name)
    assert shape.report.closed and shape.report.bodies == 1 and shape.report.inward == 0
    points = sample_points(shape, Sampling(6_000)).points.numpy()
    assert (inside(shape, points) != (winding_number(shape, points) >= .5)).mean() < 1e-3


# --- the map to the cube and the hash ----------------------------------------------------------------------------

TETRAHEDRON, NEEDLES = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.]]), np.array([[0, 0, 1], [1, 1, 2], [2, 2, 3]])   # each face is an edge


@pytest.mark.parametrize("v, f, words", [
    ([[0, 0, 0], [1, 0, 0], [2, 1, 0]], [[0, 1, 2]], "is flat"), ([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 0, 1], [1, 1, 2]], "is flat"), (TETRAHEDRON, NEEDLES, "no face with an area"), (TETRAHEDRON * 1e90 + 1e95, NEEDLES, "no face with an area"), (V * 1e-310, F, "float64 cannot hold"), (V * 1.5e308, F, "float64 cannot hold"), (V, F + .5, "faces of type float64")])
@pytest.mark.filterwarnings("error")
def test_what_encloses_nothing_is_refused(v, f, words):
    "Catches a triangle that is labelled empty, a mesh without area that ends the process when it is repaired, and sizes at which areas under- or overflow."
    for use in (lambda s: inside(s, np.zeros((1, 3))), repaired, lambda s: sample_points(s, Sampling(99))):
        with pytest.raises(ValueError) as e: use(Shape(v, f, "bad"))
        assert words in one_sentence(e)
    assert Shape(V * 1e-90, F, "small").report == Shape(V * 1e90, F, "large").report == Shape(V, F, "ball").report


def test_a_flat_file_is_refused_and_a_flat_surface_measured(tmp_path):
    "Nothing is inside a plane, nor inside needles, so it is no shape to train on; its distance to another is a number."
    (tmp_path / "q.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 1 0\nf 1 2 3\n")
    (tmp_path / "n.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 1 2\nf 2 2 3\nf 3 3 4\n")
    for repair in (False, True):
        with pytest.raises(ValueError, match="q.obj is flat"): load_shape(tmp_path / "q.obj", repair=repair)
        with pytest.raises(ValueError, match="n.obj has no face with an area .* each of its 3 faces"): load_shape(tmp_path / "n.obj", repair=repair)
    assert len(sample_surface(Shape([[0, 0, 0], [1, 0, 0], [2, 1, 0]], [[0, 1, 2]], "plane"), 10, np.random.default_rng(0))[0]) == 10


def test_a_gltf_without_its_other_file(tmp_path):
    trimesh.Trimesh(V, F).export(tmp_path / "a.glb")
    (tmp_path / "b.gltf").write_bytes(trimesh.exchange.gltf.export_gltf(trimesh.Trimesh(V, F))["model.gltf"])
    with pytest.raises(ValueError) as e: load_shape(tmp_path / "b.gltf")
    assert "b.gltf names the file" in one_sentence(e) and ".glb" in str(e.value)


def test_single_precision_is_warned_about_where_it_moves_vertices(tmp_path):
    "A scan in a land survey's coordinates: catches metres that a file rounds to quarters."
    far = Shape(V * 5 + [448_000, 5_411_000, 100], F, "survey")
    for suffix in ("ply", "glb", "stl"):
        with pytest.warns(UserWarning, match="single precision.*write .obj or .off"): save_mesh(far, tmp_path / f"a.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in ("obj", "off"):
            save_mesh(far, tmp_path / f"a.{suffix}")
            assert np.abs(np.sort(load_shape(tmp_path / f"a.{suffix}").vertices, 0) - np.sort(far.vertices, 0)).max() < 1e-6
        save_mesh(in_cube(V, F), tmp_path / "b.ply")


def test_a_formula_without_a_name_is_not_kept(tmp_path):
    "An address in memory is used again: catches one ball's labels that are given to another."
    balls = [Shape(V, F, "ball", formula=lambda p, r=r: r - norm(p)) for r in (.3, .6)]
    with pytest.raises(ValueError) as e: sample_points(balls[0], Sampling(300), tmp_path)
    assert "repr" in one_sentence(e) and not list(tmp_path.iterdir())
    assert [round(float(sample_points(b, Sampling(3000)).labels.float().mean()), 1) for b in balls] == [0., 0.]  # without a cache they are drawn
    with pytest.raises(ValueError) as e: sample_points(balls[0], Sampling(300), workers=2)
    assert "workers=1" in one_sentence(e)
    assert shapes._trefoil(24).sha256 != shapes._trefoil(32).sha256


def test_a_number_is_no_sampling():
    "sample_points(shape, 100) ended in 'astuple() should be called on dataclass instances'."
    with pytest.raises(TypeError, match=r"give a Sampling, such as Sampling\(100\)"): sample_points(in_cube(V, F), 100)


def test_a_cache_that_takes_no_file(tmp_path):
    "Catches twelve million points that are drawn and then lost for a folder's sake."
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError) as e: sample_points(in_cube(V, F), Sampling(300), tmp_path / "file")
    assert "give a folder" in one_sentence(e)
    first = sample_points(in_cube(V, F), Sampling(300), tmp_path / "c"); (kept,) = (tmp_path / "c").iterdir()
    old = kept.with_name(f".{kept.name}.1.part"); old.write_bytes(b"of a writer that was killed"); os.utime(old, (0, 0))
    kept.unlink(); kept.mkdir()
    with pytest.warns(UserWarning, match="cannot be kept"): assert torch.equal(sample_points(in_cube(V, F), Sampling(300), tmp_path / "c").points, first.points)
    assert not old.exists()


def test_a_field_that_is_zero_on_grid_points_is_closed():
    values = np.random.default_rng(0).integers(-1, 2, (12, 12, 12)).astype(np.float32)
    axes = [np.linspace(-1, 1, 12)] * 3
    assert Shape(*shapes._march(values, axes, 0.), "grid").report.closed


def test_pictures_of_no_size_and_wrong_titles():
    for size in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="size is"): render(in_cube(V, F), size=size)
    with pytest.raises(ValueError, match="1 titles are given for 2 shapes"): compare([in_cube(V, F)] * 2, ["a"])
    with pytest.raises(ValueError, match="NaN"): View(float("nan"))
    assert Sampling(np.int64(3000)) == Sampling(3000)


@pytest.mark.parametrize("scale,shift", [(1., 0.), (1e-3, 5.), (1e4, -1e5)])
def test_normalisation_round_trip(scale, shift):
    rng = np.random.default_rng(8)
    shape = Shape(V * scale * [1, .5, 2] + shift, F, "x")
    points = rng.uniform(-1, 1, (100, 3))
    assert np.abs(shape.normalise(shape.denormalise(points)) - points).max() < 1e-6
    assert np.abs(shape.denormalise(shape.normalise(shape.vertices)) - shape.vertices).max() < 1e-6 * max(scale, 1)
    assert np.isclose(np.ptp(shape.corners, 0).max(), 1.8) and np.allclose(shape.corners.max(0) + shape.corners.min(0), 0, atol=1e-9)


def test_hash_sees_surface_and_frame_but_not_the_name():
    a = Shape(V, F, "a")
    assert len(a.sha256) == 64 and Shape(V.copy(), F.astype(np.int32), "b", "elsewhere").sha256 == a.sha256
    moved = V.copy(); moved[0, 0] = np.nextafter(moved[0, 0], 9)
    assert len({a.sha256, Shape(moved, F, "a").sha256, Shape(V, F[:, [1, 2, 0]], "a").sha256, replace(a, scale=2.).sha256, replace(a, formula=Trefoil()).sha256, replace(a, formula=Trefoil(ridge=.01)).sha256}) == 6


# --- sampling ----------------------------------------------------------------------------------------------------

def test_a_third_each_and_the_noises():
    "Catches one noise for both parts, a variance for a deviation, vertices instead of areas, clipped points, labels of unrounded points."
    shape, sampling = in_cube(V, F, "sphere"), Sampling(60_001, seed=1)
    data = sample_points(shape, sampling)
    assert isinstance(data, PointSet) and data.points.dtype == torch.float32 and data.labels.dtype == torch.uint8 and sampling.sizes == (20_001, 20_000, 20_000)
    uniform, coarse, fine = (p.double().numpy() for p in data.points.split(sampling.sizes))
    assert np.abs(uniform).max() <= 1 and np.abs(uniform.mean(0)).max() < .02 and np.allclose(uniform.std(0), 3**-.5, rtol=.02)
    for p, noise in ((coarse, .1), (fine, .01)): assert abs((norm(p) - .9).std() / noise - 1) < .03 and np.abs(p.mean(0)).max() < .02
    assert (np.abs(coarse) > 1).any(1).mean() > .02 and not data.labels[(data.points.abs() > 1).any(1)].any()
    unit = lambda p: p / norm(p)[:, None]
    assert np.einsum("ij,ij->i", unit(coarse), unit(fine)).mean() < .05                          # independent draws
    assert np.array_equal(data.labels.numpy(), inside(shape, data.points))
    assert 0.45 < data.labels[-20_000:].double().mean() < .55


def test_surface_points_follow_area_not_faces():
    "A box of which one side is cut into many triangles; and within a triangle, no crowding at a corner."
    v, f = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [3, 0, 0], [3, 1, 0], [0, 0, 1e-3]], float), np.array([[0, 1, 2], [1, 3, 4], [0, 2, 2], [0, 1, 5]])
    points, face = sample_surface(in_cube(v, f), 30_000, np.random.default_rng(0))
    assert abs((face == 0).mean() - 1 / 3) < .01 and not (face == 2).any()
    np.testing.assert_allclose(points[face == 0].mean(0), [1 / 3, 1 / 3, 0], atol=.01)
    assert abs((points[face == 0][:, :2].sum(1) < .5).mean() - .25) < .015


def test_same_points_for_one_and_two_workers(monkeypatch):
    "A stream shared by chunks, or results in the order in which they finish, would differ."
    monkeypatch.setattr(shapes, "CHUNK", 2_000)
    shape, sampling = in_cube(V, F), Sampling(15_000, seed=5)
    one, two = sample_points(shape, sampling), sample_points(shape, sampling, workers=2)
    assert len(shapes._chunks(sampling)) == 9 and torch.equal(one.points, two.points) and torch.equal(one.labels, two.labels) and one.key == two.key


def test_seed_and_key():
    shape = in_cube(V, F)
    a, b, c = (sample_points(shape, Sampling(999, seed=s)) for s in (0, 0, 1))
    assert torch.equal(a.points, b.points) and not torch.equal(a.points, c.points)
    keys = {a.key, c.key, sample_points(shape, Sampling(999, noises=(.1, .02))).key, sample_points(in_cube(V / 2, F), Sampling(999)).key, sample_points(shape, Sampling(1_000)).key}
    assert len(keys) == 5 and a.key == b.key


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"", lambda b: bytes(len(b))])
def test_cache_is_read_when_whole_and_made_anew_when_damaged(tmp_path, monkeypatch, damage):
    shape, sampling = in_cube(V, F), Sampling(3_000)
    first = sample_points(shape, sampling, cache=tmp_path / "c")
    file, = (tmp_path / "c").iterdir(); content = file.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(shapes, "_drawn", lambda *a: pytest.fail("drawn again"))
        again = sample_points(shape, sampling, cache=tmp_path / "c")
        assert torch.equal(again.points, first.points) and torch.equal(again.labels, first.labels)
    file.write_bytes(damage(content))
    assert torch.equal(sample_points(shape, sampling, cache=tmp_path / "c").labels, first.labels)
    assert file.read_bytes() == content and list((tmp_path / "c").iterdir()) == [file]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="cannot be kept .*No space left"): assert len(sample_points(in_cube(V, F), Sampling(99), cache=tmp_path).points) == 99
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [dict(count=2), dict(count=True), dict(count=9.), dict(seed=-1), dict(noises=(-.1,)), dict(noises=.1), dict(noises=(float("nan"),))])
def test_bad_sampling(options):
    with pytest.raises(ValueError) as e: Sampling(**options)
    assert next(iter(options)) in one_sentence(e)


def test_open_meshes_are_warned_about_when_sampled():
    with pytest.warns(UserWarning, match="not closed"): sample_points(in_cube(*HOLED), Sampling(300))


# --- the trefoil -------------------------------------------------------------------------------------------------

def test_the_trefoils_mesh_and_formula_agree():
    "The formula's labels against rays through its triangles: a seam, a wrong level or a mirrored axis would show."
    shape = load_shape("trefoil")
    points = np.random.default_rng(9).uniform(-.9, .9, (20_000, 3)) * [1, 1, .45]
    value = Trefoil()(points); clear = np.abs(value) > .006
    by_rays = inside(replace(shape, formula=None), points)
    assert (by_rays == (value > 0))[clear].all() and np.array_equal(inside(shape, points), value > 0)
    assert shape.report.closed and shape.report.bodies == 1 and np.abs(shape.vertices).max() <= .901


def test_the_trefoils_hash_is_the_same_everywhere():
    "It names runs: it must not depend on the last digits of a machine's cosine."
    assert load_shape("trefoil").sha256 == "05be0d278c947c9875de84809a60492e3792660956142be8ffea2e1bcf52a0bd"


def test_a_meshes_hash_is_that_of_earlier_versions():
    "Catches a change of the hash that changes nothing of the points: every recorded run of a mesh would be made anew."
    tetrahedron = Shape(np.array([[0., 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]]), "tetrahedron")
    assert tetrahedron.sha256 == "559ce8b947b9a1b911ed6b8820bc1aea5c6a49074373fbf7ac2164e0bc4cf604"


# --- marching cubes ----------------------------------------------------------------------------------------------

def field(x): return .5 - (x - torch.tensor([.1, -.2, .3])).norm(dim=1)


def test_marching_cubes_volume_orientation_and_coordinates():
    "Inward faces, half a cell's shift, (z, y, x) order and a doubled spacing all show."
    shape = extract_shape(field, resolution=48)
    mesh = trimesh.Trimesh(shape.vertices, shape.faces, process=False)
    assert shape.report.closed and 0 < mesh.volume < 4 / 3 * np.pi / 8 and abs(mesh.volume / (4 / 3 * np.pi / 8) - 1) < .01
    np.testing.assert_allclose(mesh.center_mass, [.1, -.2, .3], atol=1e-3)
    assert abs(norm(shape.vertices - [.1, -.2, .3]) - .5).max() < 2e-3


def test_marching_cubes_returns_to_the_meshs_own_coordinates():
    original = Shape(V * [30, 10, 20] + [100, 0, -7], F, "scan")
    back = extract_shape(field, like=original, resolution=32)
    np.testing.assert_allclose(back.vertices.mean(0), original.denormalise([[.1, -.2, .3]])[0], atol=.5)
    assert (back.centre, back.scale, back.name) == (original.centre, original.scale, "scan reconstructed")
    np.testing.assert_allclose(np.ptp(back.vertices, 0), 1 / original.scale, rtol=.02)


def test_marching_cubes_in_chunks_of_any_size():
    "A chunk that is lost, repeated or transposed changes the surface; (n, 1) outputs and float16 are a network's."
    whole = extract_shape(field, resolution=20)
    for batch in (1, 399, 401, 10**6): assert np.array_equal(extract_shape(field, resolution=20, batch=batch).vertices, whole.vertices)
    assert np.array_equal(extract_shape(lambda x: field(x)[:, None].requires_grad_(), resolution=20).vertices, whole.vertices)
    largest = []
    extract_shape(lambda x: (largest.append(len(x)), field(x))[1], resolution=20, batch=1_000)
    assert max(largest) <= 1_000 and sum(largest) == 20**3


def test_a_shape_at_the_border_is_closed():
    assert extract_shape(lambda x: 1 - x[:, 2], resolution=8).report.closed
    full = extract_shape(lambda x: torch.where(x.norm(dim=1) < .3, -1., 1.), resolution=16)         # everything but a bubble
    assert full.report.closed and full.report.bodies == 2 and full.report.inward == 1
    assert inside(full, [[0, 0, 0], [.8, .8, .8]]).tolist() == [False, True]


@pytest.mark.parametrize("bad,words", [(lambda x: -1 - x.norm(dim=1), "all outside"), (lambda x: 1 + x.norm(dim=1), "all inside"), (lambda x: x[:, 0] * torch.nan, "NaN"), (lambda x: x, "one logit a point")])
def test_a_field_without_a_surface(bad, words):
    with pytest.raises(ValueError) as e: extract_shape(bad, resolution=8)
    assert words in one_sentence(e)


@pytest.mark.parametrize("options", [dict(resolution=1), dict(resolution=8.), dict(resolution=True), dict(batch=0)])
def test_bad_resolutions(options):
    with pytest.raises(ValueError, match=next(iter(options))): extract_shape(field, **options)


@pytest.mark.parametrize("use", [inspect_mesh, repaired, lambda s: inside(s, V), lambda s: winding_number(s, V), lambda s: sample_surface(s, 3, np.random.default_rng(0)), sample_points, lambda s: save_mesh(s, "a.ply"), lambda s: extract_shape(field, s, 8)])
@pytest.mark.parametrize("wrong, name", [(None, "NoneType"), ((V, F), "tuple"), ("trefoil", "str")])
def test_what_is_no_shape_is_one_sentence(use, wrong, name):
    "Catches a name, or a mesh of another library, that ends as an attribute that nobody has heard of."
    if wrong is None and "extract_shape" in use.__code__.co_names: return   # there it means the coordinates of the cube
    with pytest.raises(TypeError) as e: use(wrong)
    assert f"shape is of type {name}; give a Shape" in one_sentence(e)


def test_what_is_no_field_is_one_sentence():
    for wrong in ("x", None, torch.zeros(3)):
        with pytest.raises(TypeError) as e: extract_shape(wrong, resolution=8)
        assert f"field is of type {type(wrong).__name__}" in one_sentence(e)


@pytest.mark.parametrize("count", [-1, 2.5, True])
def test_counts_of_surface_points(count):
    with pytest.raises(ValueError) as e: sample_surface(in_cube(V, F), count, np.random.default_rng(0))
    assert f"count is {count!r}; an integer of at least 0" in one_sentence(e)


@pytest.mark.parametrize("suffix", ["ply", "glb", "obj", "off", "stl"])
def test_export_and_back(tmp_path, suffix):
    shape = Shape(V * 30 + [100, 0, -7], F, "scan")
    back = load_shape(save_mesh(shape, tmp_path / "new" / f"a.{suffix}"))
    assert back.report.closed and len(back.faces) == len(F) and abs(back.vertices.mean(0) - shape.vertices.mean(0)).max() < 1e-3
    assert [p.name for p in (tmp_path / "new").iterdir()] == [f"a.{suffix}"]
    assert trimesh.Trimesh(back.vertices, back.faces).volume > 0


def test_a_folder_is_no_file_to_write(tmp_path):
    "Catches a failure that names a temporary file which nobody asked for."
    (tmp_path / "a.ply").mkdir()
    for path in (tmp_path, tmp_path / "a.ply"):
        with pytest.raises(IsADirectoryError) as e: save_mesh(in_cube(V, F), path)
        assert "is a folder" in one_sentence(e) and ".part" not in str(e.value)


def test_export_to_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match=r"\.ply, \.glb"): save_mesh(in_cube(V, F), tmp_path / "a.doc")


# --- pictures ----------------------------------------------------------------------------------------------------

def test_picture_of_a_ball_is_the_formulas():
    "A mirrored camera, light from the wrong side, flat shading or a wrong scale."
    picture = render(in_cube(V, F), View(0, 0), 80)
    g = (np.arange(80) + .5) / 40 - 1; x, y = np.meshgrid(g, -g)
    light = np.array([-.5, .6, .62]); light /= np.linalg.norm(light)
    n = np.stack([x, y, np.sqrt((.81 - x**2 - y**2).clip(0))], -1) / .9
    expected = shapes.COLOUR * (.25 + .75 * (n @ light).clip(0))[..., None]
    clear = np.hypot(x, y) < .82
    assert picture.shape == (80, 80, 3) and picture.dtype == np.float32 and np.abs(picture - expected)[clear].max() < .02 and (picture[np.hypot(x, y) > .95] == 1).all()


@pytest.mark.parametrize("up", ["+x", "-x", "+y", "-y", "+z", "-z"])
@pytest.mark.parametrize("azimuth,elevation", [(0, 0), (70, 30), (200, -60)])
def test_cameras_are_right_handed_and_level(up, azimuth, elevation):
    right, above, back = axes = View(azimuth, elevation, up).axes()
    assert np.allclose(axes @ axes.T, np.eye(3)) and np.isclose(np.linalg.det(axes), 1)
    i, sign = "xyz".index(up[1]), 1 if up[0] == "+" else -1
    assert abs(right[i]) < 1e-12 and np.isclose(sign * above[i], np.cos(np.radians(elevation))) and np.isclose(sign * back[i], np.sin(np.radians(elevation)))


def test_detail_is_the_enlarged_square():
    whole = render(in_cube(V, F), View(0, 0, detail=(.25, .25, .25)), 80)
    enlarged = render(in_cube(V, F), View(0, 0, detail=(.25, .25, .25)), 20, detail=True)
    assert np.abs(enlarged - whole[20:40, 40:60]).max() < 1e-6


def test_reconstructions_are_drawn_in_the_originals_frame():
    "In a frame of its own a shape that lost a part would be shifted and enlarged."
    original, part = in_cube(V, F), Shape(V / 2, F, "half")
    assert np.array_equal(render(part, View(), 40, like=original), render(in_cube(V / 2, F), View(), 40)) and not np.array_equal(render(part, View(), 40), render(part, View(), 40, like=original))
    figure = compare([original, part], ["a", "b"], View(), 30)
    assert len(figure.axes) == 4 and [a.get_title() for a in figure.axes][:2] == ["a", "b"]


def test_turntable_is_light_and_self_contained():
    html = turntable(in_cube(V, F), frames=6, size=60)._repr_html_()
    assert len(html) < 60_000 and "http" not in html and "<script" not in html and html.count("data:image/jpeg;base64,") == 1 and 'max="5"' in html
    with pytest.raises(ValueError, match="frames is 0"): turntable(in_cube(V, F), frames=0)
