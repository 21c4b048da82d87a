"""What the scripts of scenes share: look into a zip archive, and write a scene's files so that a scene that is cut off is not taken for a whole one."""
from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import _fetch


def kind_of(path: Path) -> str:
    """What a file is by its first bytes: "zip", "gzip", "a web page" or "neither a zip nor a gzip file"."""
    with open(path, "rb") as f: start = f.read(512)
    if start.startswith(b"PK"): return "zip"
    if start.startswith(b"\x1f\x8b"): return "gzip"
    return "a web page, as Google Drive sends in place of a file" if b"<html" in start.lower() or b"<!doctype" in start.lower() else "neither a zip nor a gzip file"


def zip_names(path: Path) -> list[str]:
    """The files in a zip archive; ValueError says what is wrong. The list stands at the end, so an archive that is cut off has none."""
    kind = kind_of(path)
    if kind != "zip": raise ValueError(f"it is {kind}")
    try:
        with zipfile.ZipFile(path) as z: return [n for n in z.namelist() if not n.endswith("/")]
    except (zipfile.BadZipFile, OSError, EOFError) as e: raise ValueError(f"it is damaged or incomplete: {e}") from e


def has_scenes(top: str, mark: str, scenes: list[str]) -> Callable[[Path], None]:
    """A check for `_fetch.fetch`: ValueError where the zip archive lacks the file `mark` of one of the scenes."""
    def check(path: Path) -> None:
        inside = {inner for n in zip_names(path) if (inner := below(n, top))}
        missing = [s for s in scenes if f"{s}/{mark}" not in inside]
        if missing: raise ValueError(f"it has no {top}/{missing[0]}/{mark}")
    return check


def below(name: str, top: str) -> str | None:
    """The part of an archive's name behind the folder `top`, wherever that stands in it; None where it is not there, or the name leads elsewhere."""
    parts = PurePosixPath(name).parts
    if ".." in parts or "__MACOSX" in parts or PurePosixPath(name).name.startswith(".") or top not in parts: return None
    return "/".join(parts[parts.index(top) + 1:]) or None


def from_zip(path: Path, top: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name behind `top`, content) of the wanted files of a zip archive, each verified by its checksum. Raises Problem."""
    with zipfile.ZipFile(path) as z:
        for info in z.infolist():
            inner = None if info.is_dir() else below(info.filename, top)
            if inner is None or not wanted(inner): continue
            try: yield inner, z.read(info)
            except (zipfile.BadZipFile, zlib.error, EOFError) as e: raise _fetch.Problem(f"{path} is damaged at {info.filename} ({e}). Delete it and run this command again.") from e


def write(pairs: Iterable[tuple[str, bytes]], folder: Path, last: tuple[str, ...]) -> int:
    """Number of files written under `folder`. Each appears whole or not at all; those whose names end in one of `last`, by which a scene is known, come at the end."""
    kept, count = [], 0
    for name, content in pairs:
        if name.endswith(last): kept.append((name, content)); continue
        _one(folder / name, content); count += 1
    for name, content in kept: _one(folder / name, content); count += 1
    return count


def _one(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally: part.unlink(missing_ok=True)


def at_hand(root: Path, folder: Path, *names: str) -> Path | None:
    """The first of the archives that is there already, in the data folder or in the folder of its data set."""
    return next((p for name in names for p in (folder / name, root / name) if p.is_file()), None)
