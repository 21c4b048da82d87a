"""data_scripts/div2k.py against a server of this machine: download, resume, verification, hand-placed files, and every failure in one message."""
import hashlib
import http.server
import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"
CROPS = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("_fetch", "div2k"): sys.modules.pop(name, None)
    yield importlib.import_module("div2k"), importlib.import_module("_fetch")
    for name in ("_fetch", "div2k"): sys.modules.pop(name, None)


@pytest.fixture
def div2k(scripts, monkeypatch, capsys):
    "div2k(*arguments) -> (status, stdout, stderr), in this process."
    script, fetch = scripts

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["div2k.py", "--quiet", *map(str, arguments)])
        status = 0
        try: fetch.run(script.main)
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return call


class Server(http.server.ThreadingHTTPServer):
    "Serves `body` at any path; what it does besides is set by attributes."
    body, kind, ranges, break_after, status, etag, type = b"", "application/octet-stream", True, None, 200, '"v1"', "application/octet-stream"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.sent = [], []
        self.url = f"http://127.0.0.1:{self.server_port}/data_div2k.npz"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass

    def do_GET(self):
        s, start, code = self.server, 0, self.server.status
        wanted = self.headers.get("Range")
        s.requests.append(wanted)
        if wanted and s.ranges and self.headers.get("If-Range") in (None, s.etag):
            start = int(wanted.removeprefix("bytes=").rstrip("-")); code = 206 if start < len(s.body) else 416
        self.send_response(code)
        self.send_header("Content-Type", s.type)
        self.send_header("Content-Length", str(max(len(s.body) - start, 0)))
        if s.etag: self.send_header("ETag", s.etag)
        if code == 206: self.send_header("Content-Range", f"bytes {start}-{len(s.body) - 1}/{len(s.body)}")
        self.end_headers()
        s.sent.append(len(s.body) - start)
        if code != 416: self.wfile.write(s.body[start:] if s.break_after is None else s.body[start:start + s.break_after])


@pytest.fixture
def server(tmp_path):
    np.savez(tmp_path / "original.npz", test_data=CROPS, train_data=CROPS[::-1])
    with Server() as s:
        s.body = (tmp_path / "original.npz").read_bytes()
        thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .02}, daemon=True); thread.start()
        yield s
        s.shutdown(); thread.join()


def pngs(root): return {p.name: np.asarray(Image.open(p)) for p in sorted((Path(root) / "div2k").glob("*.png"))}


def one_message(stderr):
    assert stderr.startswith("div2k.py: ") and stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
    return stderr


def test_download_unpack_record_and_do_nothing_twice(div2k, server):
    status, out, err = div2k("--root", "d", "--url", server.url)
    assert (status, err) == (0, "") and "wrote 6 of 6" in out
    got = pngs("d")
    assert list(got) == [f"test_{i:02d}.png" for i in (2, 5, 7, 9, 11, 14)] and all(np.array_equal(a, CROPS[int(n[5:7])]) for n, a in got.items())
    recorded = Path("d/div2k/data_div2k.npz.sha256").read_text().split()
    assert recorded == [hashlib.sha256(server.body).hexdigest(), "data_div2k.npz"]
    assert sorted(p.name for p in Path("d/div2k").iterdir() if p.suffix != ".png") == ["data_div2k.npz", "data_div2k.npz.sha256"]
    times = {p: p.stat().st_mtime_ns for p in Path("d/div2k").iterdir()}
    status, out, err = div2k("--root", "d", "--url", server.url)
    assert status == 0 and "wrote 0 of 6" in out and len(server.requests) == 1 and times == {p: p.stat().st_mtime_ns for p in Path("d/div2k").iterdir()}


def test_the_library_finds_what_the_script_wrote(div2k, server, monkeypatch):
    from inr_precond.data.images import default_image, load_image
    assert div2k("--url", server.url, "--images", 14)[0] == 0       # data/ in the working directory, as the library
    assert default_image() == "lion" and np.array_equal((load_image("lion", None).pixels * 255).round().numpy(), CROPS[14])


def test_root_follows_the_environment(div2k, server, monkeypatch, scripts):
    monkeypatch.setenv("INR_PRECOND_DATA", "elsewhere")
    assert div2k("--url", server.url, "--images", 3)[0] == 0 and list(pngs("elsewhere")) == ["test_03.png"]


@pytest.mark.parametrize("ranges,etag,asks", [(True, '"v1"', True), (False, '"v1"', True), (True, "", False), (True, 'W/"v1"', False)])
def test_a_broken_download_is_continued_where_that_is_safe(div2k, server, ranges, etag, asks):
    "With Range and a strong validator it continues; otherwise it starts again, and never glues two files together."
    server.break_after, server.ranges, server.etag = 150_000, ranges, etag
    status, _, err = div2k("--url", server.url)
    assert status == 2 and "broke off" in one_message(err) and "again to continue" in err
    kept = Path("data/div2k/data_div2k.npz.part").stat().st_size
    assert 50_000 < kept <= 150_000 and not Path("data/div2k/data_div2k.npz").exists()
    server.break_after = None
    assert div2k("--url", server.url)[0] == 0
    assert server.requests == [None, f"bytes={kept}-" if asks else None] and server.sent[-1] == len(server.body) - (kept if asks and ranges else 0)
    assert Path("data/div2k/data_div2k.npz").read_bytes() == server.body and not list(Path("data/div2k").glob("*.part*"))


def test_a_file_that_changed_between_two_parts_is_fetched_whole(div2k, server, tmp_path):
    server.break_after = 150_000
    assert div2k("--url", server.url)[0] == 2
    np.savez(tmp_path / "other.npz", test_data=255 - CROPS)
    server.body, server.etag, server.break_after = (tmp_path / "other.npz").read_bytes(), '"v2"', None
    assert div2k("--url", server.url)[0] == 0 and np.array_equal(pngs("data")["test_14.png"], 255 - CROPS[14])


def test_a_part_longer_than_the_file_starts_again(div2k, server):
    server.break_after = 150_000
    assert div2k("--url", server.url)[0] == 2
    Path("data/div2k/data_div2k.npz.part").write_bytes(server.body + b"more"); server.break_after = None
    assert div2k("--url", server.url)[0] == 0 and Path("data/div2k/data_div2k.npz").read_bytes() == server.body


HTML = b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>"


@pytest.mark.parametrize("change,words", [
    (dict(status=404), ["HTTP 404"]), (dict(status=503), ["HTTP 503"]), (dict(body=HTML, type="text/html; charset=utf-8"), ["web page"]), (dict(body=HTML), ["web page"]), (dict(body=b"<p>Quota exceeded", type="text/html"), ["web page"]),
    (dict(body=b""), [".npz"]), (dict(body=b"PK\3\4 nonsense"), ["damaged or incomplete"])])
def test_a_bad_answer_gives_link_and_place_in_one_message(div2k, server, change, words):
    for name, value in change.items(): setattr(server, name, value)
    status, out, err = div2k("--root", "d", "--url", server.url)
    assert status == 2 and out == ""
    for word in [*words, server.url, os.path.join("d", "div2k", "data_div2k.npz"), "by hand"]: assert word in one_message(err)
    assert not Path("d/div2k/data_div2k.npz").exists() and not pngs("d")
    for name in change: delattr(server, name)                       # the link works again: so does the script, with nothing to clean up
    np.savez("original.npz", test_data=CROPS); server.body = Path("original.npz").read_bytes()
    assert div2k("--root", "d", "--url", server.url)[0] == 0


def test_no_network(div2k, scripts, monkeypatch):
    "The built-in links are both tried and both named; the message names the page for a browser."
    tried = []
    def refuse(url, **k): tried.append(url); raise requests.ConnectionError("HTTPSConnectionPool(host='drive', port=443): <object at 0x7f>")
    monkeypatch.setattr(requests, "get", refuse)
    status, _, err = div2k("--root", "d")
    assert status == 2 and len(tried) == 2 and all("1TtwlEDArhOMoH18aUyjIMSZ3WODFmUab" in u for u in tried)
    for word in ("no connection", "https://drive.google.com/uc?id=1TtwlEDArhOMoH18aUyjIMSZ3WODFmUab", os.path.join("d", "div2k", "data_div2k.npz")): assert word in one_message(err)
    assert "0x7f" not in err


def test_closed_port_and_timeout(div2k, scripts, monkeypatch):
    assert "no connection" in one_message(div2k("--url", "http://127.0.0.1:9/x.npz")[2])
    def late(url, **k): raise requests.ReadTimeout("late")
    monkeypatch.setattr(requests, "get", late)
    assert "no answer in time" in one_message(div2k("--url", "http://127.0.0.1:9/x.npz")[2])


def test_the_second_link_is_tried_where_the_first_is_dead(div2k, scripts, server, monkeypatch):
    monkeypatch.setattr(scripts[0], "URLS", ["http://127.0.0.1:9/gone.npz", server.url])
    assert div2k()[0] == 0 and len(pngs("data")) == 6


@pytest.mark.parametrize("place", ["d/div2k/data_div2k.npz", "d/data_div2k.npz"])
def test_a_hand_placed_file_needs_no_network(div2k, scripts, monkeypatch, place):
    monkeypatch.setattr(requests, "get", lambda *a, **k: pytest.fail("network"))
    Path(place).parent.mkdir(parents=True); np.savez(place, test_data=CROPS.astype(float))
    status, out, _ = div2k("--root", "d", "--images", 0, 15)
    assert status == 0 and np.array_equal(pngs("d")["test_15.png"], CROPS[15])


@pytest.mark.parametrize("content,words", [(HTML, "web page"), (b"", "no .npz"), (dict(train_data=CROPS), "no test_data"), (dict(test_data=CROPS[0]), "shape"), (dict(test_data=CROPS / 255.), "whole numbers"),
                                           (dict(test_data=np.array([None])), "test_data")])
def test_a_bad_hand_placed_file(div2k, content, words):
    path = Path("data/div2k/data_div2k.npz"); path.parent.mkdir(parents=True)
    np.savez(path, **content) if isinstance(content, dict) else path.write_bytes(content)
    status, _, err = div2k()
    assert status == 2 and words in one_message(err) and str(path) in err and "https://drive.google.com" in err


def test_a_file_that_changed_since_it_was_recorded(div2k, server):
    assert div2k("--url", server.url)[0] == 0
    np.savez("data/div2k/data_div2k.npz", test_data=255 - CROPS)
    status, _, err = div2k("--url", server.url)
    assert status == 2 and "SHA-256" in one_message(err) and "data_div2k.npz.sha256" in err
    Path("data/div2k/data_div2k.npz.sha256").unlink()
    assert div2k("--url", server.url)[0] == 0 and np.array_equal(pngs("data")["test_02.png"], 255 - CROPS[2])


def test_a_published_hash_is_checked(scripts, server, tmp_path):
    "For the data sets whose owners publish one."
    fetch = scripts[1]
    with pytest.raises(fetch.Problem, match="hash"):
        fetch.fetch([server.url], tmp_path / "a.npz", server.url, scripts[0].crops, known="0" * 64, progress=False)
    assert not (tmp_path / "a.npz").exists()
    digest = hashlib.sha256(server.body).hexdigest()
    assert fetch.fetch([server.url], tmp_path / "a.npz", server.url, scripts[0].crops, known=digest, progress=False) == digest
    with pytest.raises(fetch.Problem, match="SHA-256"): fetch.fetch([], tmp_path / "a.npz", server.url, scripts[0].crops, known="1" * 64)


def test_damaged_crops_are_written_again_and_sound_ones_kept(div2k, server):
    assert div2k("--url", server.url)[0] == 0
    path = Path("data/div2k/test_14.png"); path.write_bytes(path.read_bytes()[:100])
    assert "wrote 1 of 6" in div2k("--url", server.url)[1] and np.array_equal(pngs("data")["test_14.png"], CROPS[14])


def test_crops_alone_are_enough(div2k, server):
    assert div2k("--url", server.url)[0] == 0
    Path("data/div2k/data_div2k.npz").unlink()
    status, out, _ = div2k("--url", server.url)
    assert status == 0 and "already" in out and len(server.requests) == 1


def test_an_image_that_is_not_in_the_file(div2k, server):
    status, _, err = div2k("--url", server.url, "--images", 14, 99)
    assert status == 2 and "no image 99" in one_message(err) and "0 to 15" in err


def test_unwritable_root_and_full_disk(div2k, server, monkeypatch):
    Path("file").touch()
    status, _, err = div2k("--root", "file", "--url", server.url)
    assert status == 2 and "--root" in one_message(err)
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    status, _, err = div2k("--root", "d", "--url", server.url)
    assert status == 2 and "No space left" in one_message(err)


def test_as_a_command(server):
    "The status and the single message reach the shell; the progress bar goes to stderr."
    command = [sys.executable, str(SCRIPTS / "div2k.py"), "--root", "d", "--url"]
    good = subprocess.run([*command, server.url], capture_output=True, text=True)
    assert good.returncode == 0 and "wrote 6 of 6" in good.stdout and "data_div2k.npz" in good.stderr
    bad = subprocess.run([*command, "http://127.0.0.1:9/x.npz", "--root", "e"], capture_output=True, text=True)
    assert bad.returncode == 2 and "no connection" in one_message(bad.stderr)
