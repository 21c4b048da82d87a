"""data_scripts/llff.py, blender.py and bleff.py against a server of this machine: download, resume, layout, hand-placed files, and every failure in one message."""
import hashlib
import importlib
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from test_data_scripts import HTML, SCRIPTS, Server

pytestmark = pytest.mark.usefixtures("alone")
MODULES = ("_fetch", "_archive", "llff", "blender", "bleff")
RNG = np.random.default_rng(0)


def png(height, width, channels=3, kind="PNG"):
    data = io.BytesIO(); Image.fromarray(RNG.integers(0, 256, (height, width, channels), np.uint8)).save(data, kind)
    return data.getvalue()


def npy(array):
    data = io.BytesIO(); np.save(data, array)
    return data.getvalue()


def poses(n):
    "n rows as LLFF writes them: the identity's axes in its order (down, right, back), a row of cameras, 12 x 16 pixels, depths 2 to 5."
    rows = [np.stack([[0, -1, 0], [1, 0, 0], [0, 0, 1], [i, 0, 0], [48, 64, 60]], 1) for i in range(n)]
    return npy(np.concatenate([np.array(rows, float).reshape(n, 15), np.tile([2., 5.], (n, 1))], 1))


def frames(part, n): return json.dumps({"camera_angle_x": .7, "frames": [{"file_path": f"./{part}/r_{i}", "transform_matrix": np.eye(4).tolist()} for i in range(n)]}).encode()


LLFF = {f"{s}/{name}": content for s in ("fern", "flower") for name, content in {
    "poses_bounds.npy": poses(3), "sparse/0/points3D.bin": b"points", "simplices.npy": b"x", "mpis4/a.txt": RNG.bytes(150_000), **{f"images/IMG_{i}.JPG": png(48, 64, kind="JPEG") for i in range(3)},
    **{f"images_4/image{i:03d}.png": png(12, 16) for i in range(3)}, **{f"images_8/image{i:03d}.png": png(6, 8) for i in range(3)}}.items()}
BLENDER = {f"{s}/{name}": content for s in ("lego", "ship") for name, content in {
    **{f"transforms_{p}.json": frames(p, 2) for p in ("train", "val", "test")}, **{f"{p}/r_{i}.png": png(8, 8, 4) for p in ("train", "val", "test") for i in range(2)},
    "test/r_0_depth_0001.png": b"x", "test/r_0_normal_0001.png": b"x"}.items()}
METAS = json.dumps({"c2ws": [[[1, 0, 0, i], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]] for i in range(3)], "cam_angle_x": .7, "cam_angle_y": .5}).encode()
BLEFF = {f"{v}/{s}/{name}": content for v in ("mix_rt/t000r000", "mix_rt/t010r010") for s in ("balls1", "root2", "roundtable") for name, content in {
    "gt_metas.json": METAS, "train_ids.txt": b"1\n2\n", "val_ids.txt": b"0\n", "poses_bounds.txt": RNG.bytes(60_000), **{f"images/{i:03d}.png": png(12, 16, 4) for i in range(3)}}.items()}


def zipped(**tops):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as z:
        for top, files in tops.items():
            z.writestr(f"{top}/", b""); z.writestr(f"__MACOSX/{top}/fern/poses_bounds.npy", b"x")
            for name, content in files.items(): z.writestr(f"{top}/{name}", content)
    return data.getvalue()


def only(files, scene): return {n: c for n, c in files.items() if n.startswith(scene)}


def tarred(files, top="BLEFF"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as t:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{top}/{name}"); info.size = len(content); t.addfile(info, io.BytesIO(content))
    return data.getvalue()


EXAMPLE = zipped(nerf_llff_data=only(LLFF, "fern"), nerf_synthetic=only(BLENDER, "lego"))
BODY = {"llff": EXAMPLE, "blender": EXAMPLE, "bleff": tarred(BLEFF)}
SCENE = {"llff": ("nerf_llff_data/fern", "nerf_example_data.zip"), "blender": ("nerf_synthetic/lego", "nerf_example_data.zip"), "bleff": ("BLEFF/mix_rt/t000r000/balls1", "BLEFF.tar.gz")}
ARGS = {"llff": [], "blender": ["--size", 4], "bleff": ["--scenes", "balls"]}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in MODULES: sys.modules.pop(name, None)
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES: sys.modules.pop(name, None)


@pytest.fixture
def call(scripts, monkeypatch, capsys):
    "call(script, *arguments) -> (status, stdout, stderr), in this process."
    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--quiet", *map(str, arguments)])
        status = 0
        try: scripts["_fetch"].run(scripts[script].main)
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def server():
    with Server() as s:
        thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .02}, daemon=True); thread.start()
        yield s
        s.shutdown(); thread.join()


def one_message(stderr):
    assert stderr.split(".py: ")[0] in ("llff", "blender", "bleff") and stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
    return stderr


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_llff_lays_out_what_the_library_reads(call, server):
    "The example archive holds fern: cameras, the two reduced folders and COLMAP's points; not the originals, and nothing of Apple's."
    from inr_precond.data.scenes import load_scene
    server.body = EXAMPLE
    status, out, err = call("llff", "--root", "data", "--url", server.url)
    assert (status, err) == (0, "") and "wrote 8 files of fern" in out
    assert tree("data/nerf_llff_data") == {n: c for n, c in only(LLFF, "fern").items() if n.split("/")[1] in ("poses_bounds.npy", "images_4", "images_8", "sparse")}
    assert Path("data/nerf_example_data.zip.sha256").read_text().split() == [hashlib.sha256(EXAMPLE).hexdigest(), "nerf_example_data.zip"]
    s = load_scene("fern")
    assert (len(s), s.height, s.width) == (3, 6, 8) and load_scene("fern", factor=4).width == 16
    assert "already" in call("llff", "--root", "data", "--url", server.url)[1] and len(server.requests) == 1
    assert call("llff", "--root", "data", "--images", 1, 4)[0] == 0 and load_scene("fern", factor=1).width == 64 and len(server.requests) == 1   # from the archive that is there


def test_blender_reduces_by_areas_and_leaves_depth_maps(call, server):
    "Colours weighted by opacity: else the black under transparent pixels darkens every edge. The composite on white of the mean is the mean of the composites."
    from inr_precond.data.scenes import default_scene, load_scene
    server.body = EXAMPLE
    status, out, err = call("blender", "--root", "data", "--size", 4, "--url", server.url)
    assert (status, err) == (0, "") and "wrote 9 files of lego" in out
    assert sorted(tree("data/nerf_synthetic/lego")) == sorted([f"{p}/r_{i}.png" for p in ("test", "train", "val") for i in range(2)] + [f"transforms_{p}.json" for p in ("test", "train", "val")])
    s = load_scene("lego")
    assert default_scene() == "lego" and s.images.shape == (6, 4, 4, 3) and {k: len(v) for k, v in s.split.items()} == {"train": 2, "val": 2, "test": 2}
    rgba = np.asarray(Image.open(io.BytesIO(BLENDER["lego/val/r_1.png"])), float)
    white = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    assert np.abs(s.subset("val").images[1].numpy() - white.reshape(4, 2, 4, 2, 3).mean((1, 3))).max() <= 1.5
    assert np.abs(s.subset("val").alpha[1].numpy() - rgba[..., 3].reshape(4, 2, 4, 2).mean((1, 3))).max() <= .51


def test_blender_keeps_the_originals_and_refuses_broken_steps(call, server):
    server.body = EXAMPLE
    assert "whole steps" in one_message(call("blender", "--size", 3, "--url", server.url)[2]) and not Path("data/nerf_synthetic/lego/transforms_train.json").exists()
    assert "--size is 0" in one_message(call("blender", "--size", 0)[2])
    assert call("blender", "--size", 8)[0] == 0 and Path("data/nerf_synthetic/lego/train/r_0.png").read_bytes() == BLENDER["lego/train/r_0.png"]


def test_bleff_takes_one_variant(call, server):
    "root must not bring roundtable along, nor the other strengths of perturbation."
    from inr_precond.data.scenes import load_scene
    server.body = BODY["bleff"]
    status, out, err = call("bleff", "--root", "data", "--scenes", "balls", "root", "--url", server.url)
    assert (status, err) == (0, "") and "of balls, root" in out
    assert tree("data/BLEFF") == {n: c for n, c in BLEFF.items() if n.startswith(("mix_rt/t000r000/balls1", "mix_rt/t000r000/root2"))}
    assert load_scene("bleff/balls").split["test"] == (0,) and len(load_scene("bleff/root")) == 3
    assert call("bleff", "--root", "data", "--scenes", "balls", "--variant", "mix_rt/t010r010")[0] == 0 and len(load_scene("bleff/mix_rt/t010r010/balls")) == 3
    assert "Nothing to do" in call("bleff", "--root", "data", "--scenes", "balls", "root")[1] and len(server.requests) == 1
    status, _, err = call("bleff", "--root", "data", "--scenes", "deer")
    assert status == 2 and "no mix_rt/t000r000/deer" in one_message(err) and "mix_rt/t010r010/roundtable" in err
    assert "names of folders" in one_message(call("bleff", "--variant", "../x")[2])


@pytest.mark.parametrize("script", BODY)
def test_a_broken_download_is_continued(call, server, script):
    server.body, server.break_after = BODY[script], len(BODY[script]) - 1000
    status, _, err = call(script, *ARGS[script], "--url", server.url)
    scene, archive = SCENE[script]
    assert status == 2 and "broke off" in one_message(err) and "again to continue" in err and not Path("data", scene).exists()
    kept = Path("data", archive + ".part").stat().st_size
    assert 0 < kept < len(server.body)
    server.break_after = None
    assert call(script, *ARGS[script], "--url", server.url)[0] == 0 and server.requests == [None, f"bytes={kept}-"] and Path("data", scene).is_dir()
    assert Path("data", archive).read_bytes() == server.body and not list(Path("data").glob("**/*.part*"))


@pytest.mark.parametrize("script", BODY)
@pytest.mark.parametrize("change,words", [(dict(status=404), "HTTP 404"), (dict(body=HTML, type="text/html"), "web page"), (dict(body=HTML), "web page"), (dict(body=b""), "neither a zip nor"), (dict(body=b"PK\3\4 nonsense"), "i"), (dict(body=b"\x1f\x8b nonsense"), "i")])
def test_a_bad_answer_gives_link_and_place_in_one_message(call, server, script, change, words):
    server.body = BODY[script]
    for name, value in change.items(): setattr(server, name, value)
    status, out, err = call(script, *ARGS[script], "--root", "d", "--url", server.url)
    assert status == 2 and out == ""
    for word in (words, server.url, os.path.join("d", SCENE[script][1]), "by hand"): assert word in one_message(err)
    assert not Path("d", SCENE[script][1]).exists() and not Path("d", SCENE[script][0]).exists()


@pytest.mark.parametrize("script,page", [("llff", "https://people.eecs.berkeley.edu/~bmild/nerf/nerf_example_data.zip"), ("blender", "https://people.eecs.berkeley.edu/~bmild/nerf/nerf_example_data.zip"), ("bleff", "https://github.com/ActiveVisionLab/nerfmm")])
def test_no_network_names_the_page_and_the_place(call, monkeypatch, script, page):
    tried = []
    def refuse(url, **k): tried.append(url); raise requests.ConnectionError("HTTPConnectionPool(host='x', port=80): <object at 0x7f>")
    monkeypatch.setattr(requests, "get", refuse)
    status, _, err = call(script, "--root", "d")
    assert status == 2 and len(tried) == (1 if script == "bleff" else 2) and "0x7f" not in err
    for word in ("no connection", page, os.path.join("d", SCENE[script][1])): assert word in one_message(err)


@pytest.mark.parametrize("script,scene,drive", [("llff", "flower", "16VnMcF1KJYxN9QId6TClMsZRahHNMW5g"), ("blender", "ship", "18JxhpWD-4ZmuFKLzKlAw-w5PpzZxXOcG")])
def test_other_scenes_come_from_the_full_archive(call, monkeypatch, script, scene, drive):
    "The example archive lacks them: asking it would end in a puzzle."
    tried = []
    def refuse(url, **k): tried.append(url); raise requests.ConnectionError
    monkeypatch.setattr(requests, "get", refuse)
    top = "nerf_llff_data" if script == "llff" else "nerf_synthetic"
    status, _, err = call(script, "--scenes", scene)
    assert status == 2 and all(drive in u for u in tried) and os.path.join("data", f"{top}.zip") in one_message(err) and "128yBriW1IG_3NJ5Rp7APSTZsJqdJdfc1" in err


@pytest.mark.parametrize("script,name,place,extra", [
    ("llff", "nerf_example_data.zip", "", []), ("llff", "nerf_llff_data.zip", "nerf_llff_data", ["--scenes", "fern", "flower"]), ("llff", "nerf_llff_data.zip", "", ["--scenes", "fern"]),
    ("blender", "nerf_example_data.zip", "nerf_synthetic", ["--size", 4]), ("blender", "nerf_synthetic.zip", "", ["--size", 8, "--scenes", "ship", "lego"]), ("bleff", "BLEFF.tar.gz", "", ["--scenes", "balls"]), ("bleff", "BLEFF.tar.gz", "BLEFF", ["--scenes", "balls"])])
def test_a_hand_placed_archive_needs_no_network(call, monkeypatch, script, name, place, extra):
    monkeypatch.setattr(requests, "get", lambda *a, **k: pytest.fail("network"))
    body = {"nerf_example_data.zip": EXAMPLE, "nerf_llff_data.zip": zipped(nerf_llff_data=LLFF), "nerf_synthetic.zip": zipped(nerf_synthetic=BLENDER), "BLEFF.tar.gz": BODY["bleff"]}[name]
    Path("d", place).mkdir(parents=True); Path("d", place, name).write_bytes(body)
    status, out, err = call(script, "--root", "d", *extra)
    assert (status, err) == (0, "") and "wrote" in out and Path("d", SCENE[script][0]).is_dir()


@pytest.mark.parametrize("script", BODY)
def test_a_hand_placed_scene_is_kept(call, monkeypatch, script):
    monkeypatch.setattr(requests, "get", lambda *a, **k: pytest.fail("network"))
    scene = Path("d", SCENE[script][0])
    for name, content in {"llff": only(LLFF, "fern"), "blender": only(BLENDER, "lego"), "bleff": only(BLEFF, "mix_rt/t000r000/balls1")}[script].items():
        path = scene / name.split("balls1/" if script == "bleff" else "/", 1)[1]; path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(content)
    before = tree("d")
    assert "already" in call(script, "--root", "d", *ARGS[script])[1] and tree("d") == before


def test_an_archive_that_is_not_the_right_one(call):
    "The other data set's zip under this one's name; an archive without the scene."
    Path("data").mkdir(); Path("data/nerf_llff_data.zip").write_bytes(zipped(nerf_synthetic=BLENDER))
    assert "no nerf_llff_data/fern/poses_bounds.npy" in one_message(call("llff")[2])
    Path("data/nerf_synthetic.zip").write_bytes(zipped(nerf_synthetic=only(BLENDER, "ship")))
    assert "no nerf_synthetic/lego/transforms_train.json" in one_message(call("blender")[2])
    Path("data/BLEFF.tar.gz").write_bytes(EXAMPLE)
    assert "a zip file" in one_message(call("bleff")[2])


def test_damage_inside_an_archive(call):
    "A checksum of the archive fails in the middle of unpacking: one message, and no cameras that would pass for a scene."
    Path("data").mkdir()
    at = EXAMPLE.index(LLFF["fern/images_8/image001.png"]) + 40
    Path("data/nerf_example_data.zip").write_bytes(EXAMPLE[:at] + bytes([EXAMPLE[at] ^ 1]) + EXAMPLE[at + 1:])
    status, _, err = call("llff")
    assert status == 2 and "damaged at nerf_llff_data/fern/images_8/image001.png" in one_message(err) and not Path("data/nerf_llff_data/fern/poses_bounds.npy").exists()
    Path("data/BLEFF.tar.gz").write_bytes(BODY["bleff"][:len(BODY["bleff"]) // 2])
    status, _, err = call("bleff", "--scenes", "roundtable")
    assert status == 2 and "damaged or incomplete" in one_message(err) and not list(Path("data").glob("BLEFF/**/gt_metas.json"))


def test_an_archive_with_fewer_pictures_than_cameras(call):
    Path("data").mkdir(); files = {n: c for n, c in only(LLFF, "fern").items() if n != "fern/images_8/image002.png"}
    Path("data/nerf_example_data.zip").write_bytes(zipped(nerf_llff_data=files))
    assert "not as many pictures as cameras of fern" in one_message(call("llff")[2])
    assert call("llff", "--images", 4)[0] == 0


def test_names_that_lead_elsewhere(call):
    "A path with .. in an archive must not be written outside of the data folder."
    files = {**only(LLFF, "fern"), "fern/images_8/../../../../evil.png": b"x"}
    Path("data").mkdir(); Path("data/nerf_example_data.zip").write_bytes(zipped(nerf_llff_data=files))
    assert call("llff")[0] == 0 and not list(Path(".").rglob("evil.png"))


@pytest.mark.parametrize("script", BODY)
def test_a_full_disk(call, server, monkeypatch, script):
    server.body = BODY[script]
    assert call(script, *ARGS[script], "--url", "http://127.0.0.1:9/x")[0] == 2
    Path("data", SCENE[script][1]).write_bytes(BODY[script])
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    status, _, err = call(script, *ARGS[script])
    assert status == 2 and "No space left" in one_message(err) and not [p for p in Path("data").rglob("*") if p.name.endswith((".part", ".npy", ".json"))]
