"""What the scripts of this folder share: find the data folder, fetch one file, verify it, and fail in one message.

A file is fetched with pooch into the data folder. Its partial download stays beside it as NAME.part and is continued by the next call; the
SHA-256 is checked where the owners publish one, and otherwise recorded at the first download in NAME.sha256 and checked from then on.
A file that the user put there by hand is accepted in the same way, without a network.
"""
from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

TIMEOUT = (15, 60)  # seconds to connect, seconds without a byte


class Problem(Exception):
    """Something the user has to do; its text is the whole message. Scripts end with status 2."""


def default_root() -> Path:
    """INR_PRECOND_DATA, else data/ in the working directory."""
    return Path(os.environ.get("INR_PRECOND_DATA") or "data")


def drive_url(file_id: str) -> str:
    """Direct download of a Google Drive file, past the page that asks for a confirmation."""
    return f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t"


def sha256(path: Path) -> str:
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()


def by_hand(page: str, path: Path) -> str:
    return f"Download it by hand from {page} , save it as {path} , and run this command again."


class BrokenOff(Exception):
    """The transfer began and did not end; what came is kept."""


class ResumingDownloader:
    """A pooch downloader: HTTP with a progress bar that keeps what it has in `part` and asks for the rest with Range."""

    def __init__(self, part: Path, progress: bool = True):
        self.part, self.note, self.progress = part, part.with_name(part.name + ".json"), progress

    def _start(self, url):
        """(bytes to keep, request headers): only a part of the same URL with a validator is continued."""
        try: note = json.loads(self.note.read_text())
        except (OSError, ValueError): note = {}
        have = self.part.stat().st_size if self.part.is_file() else 0
        headers = {"Accept-Encoding": "identity"}
        if not have or note.get("url") != url or not note.get("validator"): return 0, headers
        return have, headers | {"Range": f"bytes={have}-", "If-Range": note["validator"]}

    def __call__(self, url, output_file, pooch):
        import requests
        have, headers = self._start(url)
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        if response.status_code == 416:  # the part is no beginning of this file: once more, from the start
            response.close(); self.part.unlink(missing_ok=True)
            have, response = 0, requests.get(url, headers={"Accept-Encoding": "identity"}, stream=True, timeout=TIMEOUT)
        with response:
            response.raise_for_status()
            if "text/html" in response.headers.get("Content-Type", ""):
                raise ValueError("the server sent a web page instead of the file")
            if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"): have = 0
            etag = response.headers.get("ETag", "")
            validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
            self.note.write_text(json.dumps({"url": url, "validator": validator}))
            self._write(response, have)
        os.replace(self.part, output_file)
        self.note.unlink(missing_ok=True)

    def _write(self, response, have):
        import requests
        from tqdm.auto import tqdm
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(self.part, "ab" if have else "wb") as f, tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=self.part.stem, disable=not self.progress) as bar:
            try:
                for chunk in response.iter_content(1 << 16):
                    f.write(chunk); bar.update(len(chunk))
            except requests.RequestException as e: raise BrokenOff(f"after {f.tell():,} bytes") from e
        got = self.part.stat().st_size
        if total is not None and got != total: raise BrokenOff(f"after {got:,} of {total:,} bytes")


def verify(path: Path, page: str, check: Callable[[Path], None], known: str | None = None) -> str:
    """SHA-256 of the file, after it was found to be what `check` wants and to have the known or recorded hash (recorded now if it is the first time)."""
    try: check(path)
    except ValueError as e: raise Problem(f"{path} is not the expected file ({e}). Delete it. {by_hand(page, path)}") from e
    record, digest = path.with_name(path.name + ".sha256"), sha256(path)
    recorded = record.read_text().split()[0] if record.is_file() and record.read_text().strip() else None
    for expected, where in ((known, "its owners publish"), (recorded, f"recorded in {record}")):
        if expected and expected != digest:
            advice = f"Delete {path} to fetch it again" + (f", or {record} if you trust the new file." if expected is recorded else ".")
            raise Problem(f"{path} has SHA-256 {digest}, not the {expected} {where}. {advice}")
    if recorded is None: record.write_text(f"{digest}  {path.name}\n")
    return digest


def fetch(urls: list[str], path: Path, page: str, check: Callable[[Path], None], known: str | None = None, progress: bool = True) -> str:
    """SHA-256 of the file at `path`, downloaded from the first of `urls` that has it where it is not there already.

    `page` is the address to name to a person, `check` raises where a file is not of the expected kind. Raises Problem.
    """
    import pooch
    import requests
    if path.is_file(): return verify(path, page, check, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("ERROR")
    downloader = ResumingDownloader(path.with_name(path.name + ".part"), progress)
    causes = []
    for url in urls:
        try:
            pooch.retrieve(url, known and f"sha256:{known}", fname=path.name, path=path.parent, downloader=downloader)
            check(path)
        except BrokenOff as e:
            raise Problem(f"The download of {path.name} from {url} broke off {e}. Run the command again to continue. Or: {by_hand(page, path)}") from e
        except (requests.RequestException, ValueError) as e:
            path.unlink(missing_ok=True)
            causes.append(f"{url}: {reason(e)}")
        else: return verify(path, page, check, known)
    raise Problem(f"{path.name} could not be downloaded ({'; '.join(causes)}). {by_hand(page, path)}")


def reason(error: Exception) -> str:
    """The cause of a failed request in a few words, without the addresses and objects that requests strings together."""
    import requests
    if isinstance(error, requests.HTTPError) and error.response is not None: return f"HTTP {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout): return "no answer in time"
    if isinstance(error, requests.ConnectionError): return "no connection"
    return " ".join(str(error).split())[:300] or type(error).__name__


def run(main: Callable[[], None]) -> None:
    """Call `main`; a Problem, a full disk or a folder that cannot be written ends with one message and status 2."""
    try: main()
    except Problem as e: sys.exit(_say(f"{e}"))
    except OSError as e: sys.exit(_say(f"{e.filename or 'The data folder'}: {e.strerror or e}. Choose another folder with --root, or free space and permissions there."))
    except KeyboardInterrupt: sys.exit(_say("interrupted; run the command again to continue"))


def _say(text):
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    return 2
