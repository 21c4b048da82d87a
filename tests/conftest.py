"What all tests share: one thread, no display, and what becomes of tests that need data or a GPU."
import os
from pathlib import Path

import pytest
from hypothesis import settings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ.setdefault(name, "1")
os.environ.setdefault("MPLBACKEND", "agg")

settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ, print_blob=True)  # no test depends on time
settings.load_profile("tests")


def pytest_collection_modifyitems(config, items):
    "Tests of real data skip where there is none and say so; tests of a GPU are left out on a machine without one."
    import torch
    root = os.environ.get("INR_PRECOND_DATA")
    if not (root and Path(root).is_dir()):
        for item in items:
            if item.get_closest_marker("data"): item.add_marker(pytest.mark.skip(reason="needs INR_PRECOND_DATA, the folder of the real data"))
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker("cuda")]
        items[:] = [item for item in items if item not in gpu]
        if gpu: config.hook.pytest_deselected(items=gpu)


@pytest.fixture(scope="session")
def repository():
    "The root of the repository."
    return Path(__file__).parents[1]


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    "An empty working directory and no INR_PRECOND_DATA."
    monkeypatch.delenv("INR_PRECOND_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def alone(no_data, monkeypatch):
    "The same, and no proxy: for scripts that talk to a server of the test's own."
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]: monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
