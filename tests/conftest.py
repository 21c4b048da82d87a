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
    items[:] = dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


LONG = ("test_chapter", "test_experiment_at_smoke_scale", "test_stopped_batch_leaves_nothing_and_goes_on", "test_progress_is_shown_in_a_terminal", "test_killed_and_resumed_equals_uninterrupted", "test_two_million_faces")


def dealt(items, processes):
    "The tests in as many equal parts as xdist hands out at first, each with its share of the long ones in front: what one process leaves to the others at the end is then short."
    long = [item for item in items if getattr(item, "originalname", None) in LONG]
    short, order = [item for item in items if getattr(item, "originalname", None) not in LONG], []
    for k in range(processes):
        size = (k + 1) * len(items) // processes - k * len(items) // processes
        order += (own := long[k::processes]) + [short.pop(0) for _ in range(min(len(short), max(0, size - len(own))))]
    return order + short


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
