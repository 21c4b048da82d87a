"""data_scripts/stanford.py against a server of this machine: download, resume, verification, hand-placed files, and every failure in one message."""
import gzip
import hashlib
import importlib
import io
import os
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
import trimesh
from test_data_scripts import HTML, SCRIPTS, Server

V = np.random.default_rng(0).normal(size=(30_000, 3))
PLY = trimesh.Trimesh(V, np.arange(30_000).reshape(-1, 3), process=False).export(file_type="ply")


def tar(**members):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as t:
        for name, content in members.items():
            info = tarfile.TarInfo(f"dragon_recon/{name}.ply"); info.size = len(content); t.addfile(info, io.BytesIO(content))
    return data.getvalue()


ARMADILLO, DRAGON = gzip.compress(PLY), tar(dragon_vrip_res4=b"ply\nsmall", dragon_vrip=PLY)


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("_fetch", "stanford"): sys.modules.pop(name, None)
    yield importlib.import_module("stanford")
    for name in ("_fetch", "stanford"): sys.modules.pop(name, None)


@pytest.fixture
def stanford(script, monkeypatch, capsys):
    "stanford(*arguments) -> (status, stdout, stderr), in this process."
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stanford.py", "--quiet", *map(str, arguments)])
        status = 0
        try: sys.modules["_fetch"].run(script.main)
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def server():
    with Server() as s:
        s.body = ARMADILLO
        thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .02}, daemon=True); thread.start()
        yield s
        s.shutdown(); thread.join()


def one_message(stderr):
    assert stderr.startswith("stanford.py: ") and stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
    return stderr


@pytest.mark.parametrize("name,body,archive", [("armadillo", ARMADILLO, "Armadillo.ply.gz"), ("dragon", DRAGON, "dragon_recon.tar.gz")])
def test_download_unpack_record_and_do_nothing_twice(stanford, server, name, body, archive):
    "The dragon's archive holds several resolutions: another than the full one would be a different shape."
    server.body = body
    status, out, err = stanford("--root", "d", "--shapes", name, "--url", server.url)
    assert (status, err) == (0, "") and "wrote" in out and "bimba, gargoyle" in out
    assert Path(f"d/meshes/{name}.ply").read_bytes() == PLY
    assert Path(f"d/meshes/{archive}.sha256").read_text().split()[0] == hashlib.sha256(body).hexdigest()
    assert sorted(p.name for p in Path("d/meshes").iterdir()) == sorted([f"{name}.ply", archive, f"{archive}.sha256"])
    assert "already" in stanford("--root", "d", "--shapes", name, "--url", server.url)[1] and len(server.requests) == 1


def test_the_library_finds_what_the_script_wrote(stanford, server):
    from inr_precond.data.shapes import default_shape, load_shape
    assert stanford("--shapes", "armadillo", "--url", server.url)[0] == 0
    assert default_shape() == "armadillo" and len(load_shape("armadillo").faces) == 10_000


def test_a_broken_download_is_continued(stanford, server):
    server.break_after = 150_000
    status, _, err = stanford("--shapes", "armadillo", "--url", server.url)
    assert status == 2 and "broke off" in one_message(err) and "again to continue" in err and not Path("data/meshes/armadillo.ply").exists()
    kept = Path("data/meshes/Armadillo.ply.gz.part").stat().st_size
    assert 50_000 < kept <= 150_000
    server.break_after = None
    assert stanford("--shapes", "armadillo", "--url", server.url)[0] == 0 and server.requests == [None, f"bytes={kept}-"]
    assert Path("data/meshes/armadillo.ply").read_bytes() == PLY and not list(Path("data/meshes").glob("*.part*"))


@pytest.mark.parametrize("change,words", [
    (dict(status=404), "HTTP 404"), (dict(body=HTML, type="text/html"), "web page"), (dict(body=HTML), "web page"), (dict(body=b""), "no gzip"), (dict(body=ARMADILLO[:-9]), "damaged or incomplete"),
    (dict(body=ARMADILLO[:5_000] + bytes(64) + ARMADILLO[5_064:]), "damaged or incomplete"), (dict(body=gzip.compress(b"solid")), "no PLY")])
def test_a_bad_answer_gives_link_and_place_in_one_message(stanford, server, change, words):
    for name, value in change.items(): setattr(server, name, value)
    status, out, err = stanford("--root", "d", "--shapes", "armadillo", "--url", server.url)
    assert status == 2
    for word in (words, server.url, os.path.join("d", "meshes", "Armadillo.ply.gz"), "by hand"): assert word in one_message(err)
    assert not Path("d/meshes/armadillo.ply").exists() and not Path("d/meshes/Armadillo.ply.gz").exists()


@pytest.mark.parametrize("body,words", [(tar(dragon_vrip_res4=PLY), "no dragon_vrip.ply"), (DRAGON[:-20], "damaged or incomplete"), (DRAGON[:3_000], "damaged or incomplete"), (gzip.compress(PLY), "damaged or incomplete")])
def test_a_bad_dragon(stanford, server, body, words):
    server.body = body
    status, _, err = stanford("--shapes", "dragon", "--url", server.url)
    assert status == 2 and words in one_message(err) and not Path("data/meshes/dragon.ply").exists()


def test_no_network_names_the_page_and_the_place(stanford, monkeypatch):
    tried = []
    def refuse(url, **k): tried.append(url); raise requests.ConnectionError("HTTPConnectionPool(host='x', port=80): <object at 0x7f>")
    monkeypatch.setattr(requests, "get", refuse)
    status, _, err = stanford("--root", "d")
    assert status == 2 and len(tried) == 1 and "graphics.stanford.edu" in tried[0] and "0x7f" not in err
    for word in ("no connection", "http://graphics.stanford.edu/data/3Dscanrep/", os.path.join("d", "meshes", "Armadillo.ply.gz")): assert word in one_message(err)


@pytest.mark.parametrize("place,content", [("Armadillo.ply.gz", ARMADILLO), ("armadillo.obj", b"v 0 0 0")])
def test_a_hand_placed_file_needs_no_network(stanford, monkeypatch, place, content):
    monkeypatch.setattr(requests, "get", lambda *a, **k: pytest.fail("network"))
    Path("d/meshes").mkdir(parents=True); Path("d/meshes", place).write_bytes(content)
    status, out, _ = stanford("--root", "d", "--shapes", "armadillo")
    assert status == 0 and Path("d/meshes/armadillo.ply").is_file() == place.endswith("gz")


def test_a_hand_placed_file_that_changed_or_is_something_else(stanford, server):
    path = Path("data/meshes/Armadillo.ply.gz")
    assert stanford("--shapes", "armadillo", "--url", server.url)[0] == 0
    Path("data/meshes/armadillo.ply").unlink(); path.write_bytes(gzip.compress(PLY + b"\n"))
    assert "SHA-256" in one_message(stanford("--shapes", "armadillo")[2])
    path.write_bytes(HTML)
    assert "web page" in one_message(stanford("--shapes", "armadillo")[2])


def test_full_disk_and_two_shapes_with_one_url(stanford, server, monkeypatch):
    assert "one file" in one_message(stanford("--url", server.url)[2])
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in one_message(stanford("--shapes", "armadillo", "--url", server.url)[2])
