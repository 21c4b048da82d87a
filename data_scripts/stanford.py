"""Fetch two of the paper's four shapes, the Armadillo and the Dragon, from the Stanford 3D Scanning Repository.

    python data_scripts/stanford.py [--root DIR] [--shapes armadillo dragon]

writes ROOT/meshes/armadillo.ply and ROOT/meshes/dragon.ply at their full size (346 thousand and 871 thousand faces; the paper does not say which size it
used). The scans may be used for research and must be credited; no commercial use: http://graphics.stanford.edu/data/3Dscanrep/ .
ROOT is INR_PRECOND_DATA where it is set, else data/ in the working directory. A mesh that is there already, as .obj, .off, .ply, .stl or .glb, is kept.

The other two, Bimba and Gargoyle, come from the AIM@SHAPE repository, which offers no direct links. Take them from there, or from the folders that the
paper's authors share (https://universityofadelaide.box.com/s/13twlttg9aagf4srye11c6oh41t04dv5 and
https://universityofadelaide.box.com/s/k435ov4uoj8pybzdunuc3m92gap14zjp), and save them as ROOT/meshes/bimba.obj and ROOT/meshes/gargoyle.off (or another of the
formats above). The gargoyle is stored upside-down; leave it so, the pictures turn it.
"""
from __future__ import annotations

import argparse
import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import _fetch

PAGE = "http://graphics.stanford.edu/data/3Dscanrep/"
BASE = "http://graphics.stanford.edu/pub/3Dscanrep"
ARCHIVES = {"armadillo": f"{BASE}/armadillo/Armadillo.ply.gz", "dragon": f"{BASE}/dragon/dragon_recon.tar.gz"}
MEMBER = "dragon_vrip.ply"  # the reconstruction at full resolution
SUFFIXES = (".obj", ".off", ".ply", ".stl", ".glb", ".gltf")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The PLY file inside the archive; ValueError says what is wrong."""
    with open(path, "rb") as f: start = f.read(512)
    if not start.startswith(b"\x1f\x8b"):
        raise ValueError("it is a web page" if b"<html" in start.lower() or b"<!doctype" in start.lower() else "it is no gzip file")
    try:
        if not path.name.endswith(".tar.gz"):
            with gzip.open(path) as f: yield f
            return
        with tarfile.open(path) as tar:
            member = next((m for m in tar if m.isfile() and Path(m.name).name == MEMBER), None)
            if member is None: raise ValueError(f"it has no {MEMBER}")
            yield tar.extractfile(member)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as e: raise ValueError(f"it is damaged or incomplete: {e}") from e


def check(path: Path) -> None:
    """ValueError where the archive does not hold a whole PLY mesh (gzip's own checksum covers every byte)."""
    with opened(path) as f:
        if f.read(4) not in (b"ply\n", b"ply\r"): raise ValueError("what it holds is no PLY mesh")
        while f.read(1 << 20): pass
    with gzip.open(path) as f:  # the checksum stands at the end, behind the last member of a tar file
        try:
            while f.read(1 << 20): pass
        except (EOFError, zlib.error, gzip.BadGzipFile) as e: raise ValueError(f"it is damaged or incomplete: {e}") from e


def present(folder: Path, name: str) -> Path | None:
    """The mesh of that name in any format."""
    return next((p for s in SUFFIXES if (p := folder / f"{name}{s}").is_file() and p.stat().st_size), None)


def unpack(archive: Path, target: Path) -> None:
    """Write the archive's mesh; the file appears whole or not at all."""
    part = target.with_name(target.name + ".part")
    with opened(archive) as f, open(part, "wb") as out: shutil.copyfileobj(f, out)
    os.replace(part, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=_fetch.default_root(), help="the data folder (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", default=list(ARCHIVES), choices=list(ARCHIVES), metavar="NAME", help="armadillo, dragon (default: both)")
    parser.add_argument("--url", help="fetch from here instead, if the link has moved; one shape at a time")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.url and len(args.shapes) != 1: raise _fetch.Problem("--url is the address of one file: name its shape too, with --shapes armadillo or --shapes dragon.")
    folder = args.root / "meshes"
    for name in args.shapes:
        found = present(folder, name)
        if found: print(f"{found} is there already; nothing to do."); continue
        url = args.url or ARCHIVES[name]
        archive, target = folder / Path(ARCHIVES[name]).name, folder / f"{name}.ply"
        digest = _fetch.fetch([url], archive, args.url or PAGE, check, progress=not args.quiet)
        unpack(archive, target)
        print(f"{archive} (SHA-256 {digest}): wrote {target}.")
    missing = [name for name in ("bimba", "gargoyle") if not present(folder, name)]
    if missing: print(f"Not here, and to be put into {folder} by hand (--help says from where): {', '.join(missing)}.")


if __name__ == "__main__":
    _fetch.run(main)
