"Training: streams, sampling, schedules, history, checkpoints, resume, divergence. Each test's docstring says the mistake it catches."
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inr_precond import train
from inr_precond.inr import INR
from inr_precond.recipes import recipe
from inr_precond.train import (
    BadCheckpoint,
    History,
    ImageTask,
    Trainer,
    block_length,
    evaluation_steps,
    load_checkpoint,
    lr_factor,
    psnr_of_mse,
    save_checkpoint,
    stop_signals,
    stream,
    stream_seed,
    write_atomically,
)

pytestmark = pytest.mark.filterwarnings("ignore:Seems like `optimizer.step\\(\\)` has been overridden")  # the tests wrap it to watch it
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]


def picture(size=20, width=None):
    "A smooth picture with the interface of ImageData."
    row, column = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, width or size), indexing="ij")
    pixels = torch.stack([0.5 + 0.4 * torch.sin(6 * row), 0.5 + 0.4 * torch.cos(8 * column), (row * column + 1) / 2], -1)
    grid = torch.stack([row, column], -1).reshape(-1, 2)
    return SimpleNamespace(pixels=pixels, coordinates=lambda device, dtype: grid.to(device=device, dtype=dtype))


def small(name="adam/released", steps=90, seed=0, device="cpu", dtype=torch.float32, overrides=None, **options):
    "A trainer of a small network; everything random comes from the seed."
    model = INR(2, 3, hidden_features=16, num_layers=3, generator=stream(seed, "initialisation"), device=device, dtype=dtype)
    task = ImageTask(picture(), batch_size=64, device=device, dtype=dtype)
    optimizer = recipe(name).build(model, seed=stream_seed(seed, "probes"), **(overrides or {}))
    return Trainer(model, task, optimizer, steps, stream(seed, "batches", device), **options)


def same(a, b):
    "Losses, evaluations, sampler and weights of two trainers are equal bit for bit."
    assert torch.equal(a.history.losses, b.history.losses)
    assert [(e["step"], e["mse"]) for e in a.history.evals] == [(e["step"], e["mse"]) for e in b.history.evals]
    assert [row[::2] for row in a.history.curve] == [row[::2] for row in b.history.curve]
    assert torch.equal(a.task.order, b.task.order) and a.task.position == b.task.position
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)


# --- the process

def python(code, *arguments):
    "Run a Python program with the package; one thread."
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_import_leaves_the_process_alone():
    "Catches settings applied on import: threads or signal handlers changed for every user of the library."
    code = "import signal, torch; torch.set_num_threads(3); h = signal.getsignal(signal.SIGTERM); import inr_precond.train; print(torch.get_num_threads() == 3, h is signal.getsignal(signal.SIGTERM))"
    assert python(code).stdout.split() == ["True", "True"]


def test_configure_process_says_what_it_did():
    "Catches a setting that is silently not applied, and a second call that crashes because torch takes the inter-op threads once."
    code = "import torch; from inr_precond.train import configure_process as c; torch.ones(9).sum(); print(c(1), c(2)['threads'])"
    done = python(code)
    assert done.returncode == 0 and "'threads': 1" in done.stdout and done.stdout.strip().endswith("2")


@pytest.mark.parametrize("threads", [0, -1, True, 1.0, "2", None])
def test_configure_process_refuses(threads):
    "Catches nonsense handed on to torch, which would take True for 1."
    with pytest.raises(ValueError, match="positive integer"):
        train.configure_process(threads)


# --- streams

def test_streams_are_separate_and_stable():
    "Catches one generator for all uses, and a derivation that changes between processes (hash() does): these numbers are part of what a run's key promises."
    assert [stream_seed(0, use) for use in ("initialisation", "batches", "probes")] == [1952974914541233639, 2312056721596985416, 133211880707868398]
    assert torch.equal(torch.rand(5, generator=stream(3, "batches")), torch.rand(5, generator=stream(3, "batches")))


def test_recipes_with_one_seed_see_the_same_weights_and_batches():
    "Catches probes drawn from the batches' generator: ESGD and Adam would part ways, and their difference would not be a paired one."
    trainers = [small(name, steps=30) for name in ("adam/released", "esgd/released", "adahessian-j/released")]
    seen = []
    for trainer in trainers:
        drawn, batch = [], trainer.task.batch
        trainer.task.batch = lambda generator, drawn=drawn, batch=batch: drawn.append(batch(generator)) or drawn[-1]
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        seen.append((weights, [x for x, _ in drawn]))
    for weights, inputs in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, seen[0][0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(inputs, seen[0][1], strict=True))


# --- the task

@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 90))
def test_an_epoch_visits_every_pixel_once(height, width, batch):
    "Catches sampling with replacement, a dropped last batch, a batch longer than the picture, and inputs paired with other pixels' colours."
    task = ImageTask(picture(height, width), batch)
    grid, colours = picture(height, width).coordinates("cpu", torch.float32), picture(height, width).pixels.reshape(-1, 3)
    generator = stream(0, "batches")
    for _ in range(2):
        batches = [task.batch(generator) for _ in range(task.steps_per_epoch)]
        assert all(len(x) == min(batch, height * width) for x, _ in batches[:-1])
        pairs = torch.cat([torch.cat(b, 1) for b in batches]).tolist()
        assert sorted(pairs) == sorted(torch.cat([grid, colours], 1).tolist())


def test_epochs_have_different_orders():
    "Catches a permutation drawn once for the whole run."
    task, generator = ImageTask(picture(), 400), stream(0, "batches")
    assert not torch.equal(task.batch(generator)[0], task.batch(generator)[0])


@pytest.mark.parametrize("batch_size", [0, -3, True, 2.0, None])
def test_task_refuses_batch_sizes(batch_size):
    "Catches a batch of zero pixels, whose mean is NaN, and True taken for 1."
    with pytest.raises(ValueError, match="batch_size"):
        ImageTask(picture(), batch_size)


@pytest.mark.parametrize("chunk", [1, 7, 399, 400, 10**6])
def test_evaluation_does_not_depend_on_the_chunk(chunk):
    "Catches a mean of chunk means (wrong where the last chunk is smaller) and pixels lost at a chunk's border."
    model = INR(2, 3, hidden_features=8, num_layers=3, generator=stream(0, "initialisation"))
    task = ImageTask(picture(), chunk=chunk)
    prediction = task.predict(model)
    assert prediction.shape == (20, 20, 3) and not prediction.requires_grad
    torch.testing.assert_close(task.evaluate(model)["mse"], (model(task.inputs) - task.targets).square().mean().item(), rtol=1e-5, atol=0)


def test_evaluation_is_of_the_unclipped_prediction():
    "Catches a clipped MSE, which is not the quantity that is minimised."
    task = ImageTask(picture())
    result = task.evaluate(lambda x: torch.full((len(x), 3), 3.0))
    assert result["mse"] == pytest.approx((3 - task.targets).square().mean().item(), rel=1e-6) and result["psnr"] == pytest.approx(-10 * math.log10(result["mse"]))
    assert psnr_of_mse(0.0) == 200 and math.isnan(psnr_of_mse(math.nan))


# --- schedules

@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(["constant", "cosine", "exponential"]), steps=st.integers(1, 10**5), final=st.one_of(st.none(), st.floats(1e-6, 1)))
def test_schedule_ends(name, steps, final):
    "Catches a schedule that starts off 1, ends off its final factor, rises, or goes on falling after the end."
    factor = lr_factor(name, steps, None if name == "constant" else final)
    end = {"constant": 1, "cosine": 0, "exponential": 0.01}[name] if final is None or name == "constant" else final
    assert factor(0) == pytest.approx(1) and factor(steps) == pytest.approx(end, abs=1e-12) and factor(steps + 9) == factor(steps)
    assert factor(0) >= factor(steps // 2) - 1e-12 >= factor(steps) - 2e-12


def test_cosine_is_torchs_cosine():
    "Catches a cosine with another period or a missing half."
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.3)
    theirs, ours = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.03), lr_factor("cosine", 50, 0.1)
    for t in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * ours(t), rel=1e-9)
        optimizer.step()
        theirs.step()


def test_step_t_uses_the_rate_of_step_t():
    "Catches a scheduler stepped before the optimizer: every rate would come one step early."
    rates = []
    trainer = small("sgd/released", steps=10, schedule="cosine")
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda problem: rates.append(trainer.optimizer.param_groups[0]["lr"]) or step(problem)
    trainer.train()
    assert rates == pytest.approx([(1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)])


def test_the_hidden_schedule_gives_adam_what_the_released_error_gives_esgd():
    "Catches a factor that is one step late: released ESGD must equal mended ESGD under this schedule, step by step."
    from inr_precond.recipes import recipe

    def path(name, schedule):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = recipe(name).build([p], seed=1, lr=0.005)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(schedule, 400))
        visited = []
        for _ in range(400):
            optimizer.step(lambda: (p**4).sum() + (p**2).sum())
            scheduler.step()
            visited.append(p.detach().clone())
        return torch.stack(visited)

    released, mended = path("esgd/released", "constant"), path("esgd/mended", "esgd-hidden")
    assert (released - path("esgd/mended", "constant")).abs().max() > 1e-2
    torch.testing.assert_close(released, mended, rtol=1e-4, atol=1e-5)  # eps stands outside the root, so that the two differ by its share


def test_unknown_schedule():
    "Catches a mistyped schedule taken for the constant one."
    with pytest.raises(ValueError, match="cosine"):
        lr_factor("cosin", 10)


def test_state_kept_in_lists_is_counted():
    "Catches L-BFGS reported at 2 floats a parameter, because its pairs lie in lists."
    from inr_precond.optim import LBFGS

    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = LBFGS([p], lr=0.01, max_iter=6, history_size=3)
    optimizer.step(lambda: (p**4).sum())
    assert train.state_floats_per_parameter(optimizer) == 2 * 3 + 2


# --- blocks and evaluations

@settings(max_examples=200, deadline=None)
@given(steps=st.integers(1, 10**6), evaluations=st.integers(1, 50))
def test_evaluation_steps(steps, evaluations):
    "Catches more evaluations than asked for, a missing last one, one at step 0, and one off a block's end, where no one would look."
    at, block = evaluation_steps(steps, evaluations), block_length(steps)
    assert at == sorted(set(at)) and 1 <= len(at) <= evaluations and at[-1] == steps and at[0] >= 1
    assert all(s % block == 0 for s in at[:-1]) and 1 <= block <= 64


def test_no_value_is_read_back_within_a_block(monkeypatch):
    "Catches a host synchronisation per step: .item(), float() or a truth value of a tensor between two readings of the clock."
    trainer = small("sgd/released", steps=4000)
    trainer._steps(1, lambda: False)  # the optimizer's own first step may look at its options

    def refuse(*_):
        raise AssertionError("a tensor was read back to the host within a block")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    trainer._steps(60, lambda: False)
    assert trainer.history.step == 60


def test_seconds_count_steps_and_nothing_else(monkeypatch):
    "Catches evaluation, checkpointing or progress inside the time of a step."
    now = {"s": 0.0}
    monkeypatch.setattr(train, "clock", lambda device: (now["s"], 2 * now["s"]))

    def spend(seconds, value=None):
        now["s"] += seconds
        return value

    trainer = small(steps=80, progress=lambda state: spend(1000))
    step, evaluate = trainer.optimizer.step, trainer.task.evaluate
    trainer.optimizer.step = lambda problem: spend(1, step(problem))
    trainer.task.evaluate = lambda model: spend(100, evaluate(model))
    trainer.save = lambda: spend(10)
    history = trainer.train()
    assert (history.seconds, history.cpu_seconds) == (80, 160) and history.ms_per_step == 1000
    assert [row[:2] for row in history.curve] == [(s, s) for s in range(2, 81, 2)] and history.evals[-1]["seconds"] == 80 and history.evals[-1]["cpu_seconds"] == 160


def test_ms_per_step_is_a_median():
    "Catches a mean, which one disturbed block spoils."
    history = History(100)
    history.marks = [(0, 0.0), (10, 0.1), (20, 0.2), (30, 60.0), (40, 60.1), (50, 60.2)]
    assert history.ms_per_step == pytest.approx(10)


# --- checkpoints

@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_damaged_byte_is_noticed(data, tmp_path_factory):
    "Catches torch.load alone, which loads a checkpoint with a flipped byte in a tensor without a word."
    file = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    save_checkpoint({"weights": torch.arange(50.0), "step": 3}, file)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    file.write_bytes(content)
    with pytest.raises(BadCheckpoint):
        load_checkpoint(file)


def test_checkpoint_does_not_run_code(tmp_path):
    "Catches weights_only=False: a checkpoint would be a program."
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    buffer = io.BytesIO()
    torch.save({"x": Evil()}, buffer, pickle_module=pickle)
    payload = buffer.getvalue()
    (tmp_path / "c.pt").write_bytes(__import__("hashlib").sha256(payload).hexdigest().encode() + payload)
    with pytest.raises(BadCheckpoint):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch, moment):
    "Catches writing in place: a full disk would destroy the last good checkpoint. No temporary file may stay either."
    file = tmp_path / "c.bin"
    write_atomically(file, b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "write":
        real = open
        monkeypatch.setattr("builtins.open", lambda name, mode="r", *a, **k: full() if "w" in mode and str(name).endswith(".tmp") else real(name, mode, *a, **k))
    else:
        monkeypatch.setattr(os, moment, full)
    with pytest.raises(OSError, match="No space left.*untouched") as caught:
        write_atomically(file, b"new")
    monkeypatch.undo()
    assert caught.value.errno == 28 and file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["c.bin"]


# --- resume

RECIPES = ["sgd/released", "adam/released", "esgd/released", "esgd/crowsonkb", "adahessian-e/released", "adahessian-j/released"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("schedule", ["constant", "cosine", "exponential"])
@pytest.mark.parametrize("name", RECIPES)
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, name, schedule, device):
    "Catches any state that a checkpoint forgets: optimizer, counters, probe generator, schedule, order and position in the epoch, losses, evaluations."
    options = dict(name=name, schedule=schedule, device=device, overrides={"lr": 0.01, **({"update_every": 7, "warmup": 5} if name.startswith("esgd") else {})})
    whole = small(**options)
    whole.train()
    for at in (31, 60):  # within a block and an epoch; at the end of a block
        trainer = small(**options, seed=0 if at == 31 else at, checkpoint=tmp_path / "c.pt")
        assert trainer.resume() == (at == 60)
        trainer.stop = lambda trainer=trainer, at=at: trainer.history.step >= at
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.history.step == at
    resumed = small(**options, seed=99, checkpoint=tmp_path / "c.pt")
    assert resumed.resume()
    resumed.train()
    same(resumed, whole)
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def test_resume_at_every_step(tmp_path):
    "Catches a block end or an evaluation that is lost, or counted twice, when the stop falls exactly on it."
    whole = small("sgd/released", steps=25)
    whole.train()
    for at in range(1, 25):
        cut = small("sgd/released", steps=25, checkpoint=tmp_path / f"{at}.pt")
        cut.stop = lambda cut=cut, at=at: cut.history.step >= at
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        resumed = small("sgd/released", steps=25, checkpoint=tmp_path / f"{at}.pt")
        assert resumed.resume() and resumed.history.step == at
        resumed.train()
        same(resumed, whole)


def test_time_goes_on_counting_after_a_resume(tmp_path, monkeypatch):
    "Catches a clock that starts at zero again, or that counts the time between the two processes."
    now = {"s": 0.0}
    monkeypatch.setattr(train, "clock", lambda device: (now["s"], now["s"]))

    def counting(trainer):
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda problem: now.update(s=now["s"] + 1) or step(problem)
        return trainer

    cut = counting(small(checkpoint=tmp_path / "c.pt"))
    cut.stop = lambda: cut.history.step >= 33
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    now["s"] += 500
    resumed = counting(small(checkpoint=tmp_path / "c.pt"))
    resumed.resume()
    assert resumed.train().seconds == 90 and resumed.history.ms_per_step == 1000


def test_checkpoints_are_written_between_evaluations(tmp_path, monkeypatch):
    "Catches checkpoints at evaluations alone: a run of hours would lose an hour."
    trainer = small(steps=90, evaluations=1, checkpoint=tmp_path / "c.pt", checkpoint_every=0.0)
    saved, save = [], trainer.save
    monkeypatch.setattr(trainer, "save", lambda: (saved.append(trainer.history.step), save()))
    trainer.train()
    assert len(saved) > 20


def test_checkpoint_of_another_run_is_refused(tmp_path):
    "Catches a checkpoint of the same network and optimizer that belongs to another run, and one of no known run."
    file = tmp_path / "checkpoint.pt"
    small(checkpoint=file, run="a").save()
    assert small(checkpoint=file, run="a").resume()
    with pytest.raises(BadCheckpoint, match=f"checkpoint.pt in {tmp_path} belongs to the run 'a' and not to 'b'"):
        small(checkpoint=file, run="b").resume()
    small(checkpoint=file).save()
    with pytest.raises(BadCheckpoint, match="names no run"):
        small(checkpoint=file, run="a").resume()
    save_checkpoint([1, 2], file)
    with pytest.raises(BadCheckpoint, match="names no run"):
        small(checkpoint=file, run="a").resume()


def test_checkpoint_of_another_network_is_refused(tmp_path):
    "Catches a checkpoint loaded into a model it does not fit, or half loaded."
    small(steps=5, checkpoint=tmp_path / "c.pt").train()
    model = INR(2, 3, hidden_features=8, num_layers=3)
    other = Trainer(model, ImageTask(picture(), 64), recipe("adam/released").build(model), 5, stream(0, "batches"), checkpoint=tmp_path / "c.pt")
    with pytest.raises(BadCheckpoint, match="does not fit"):
        other.resume()


PROGRAM = """
import json, sys, pathlib
sys.path.insert(0, {tests!r})
from test_train import small
trainer = small("esgd/released", steps={steps}, checkpoint=sys.argv[1], checkpoint_every=0., schedule="cosine")
trainer.resume()
trainer.progress, trainer.told_at = (lambda s: print("progress", s["step"], flush=True)), 0
start = trainer.history.step
print("begin", start, flush=True)
trainer.train()
print(json.dumps([start, trainer.history.losses.tolist(), [(e["step"], e["mse"]) for e in trainer.history.evals], sum(p.double().sum().item() for p in trainer.model.parameters())]))
"""


def start(file, steps=1500):
    "A process that trains with a checkpoint at every block."
    code = PROGRAM.format(tests=os.path.dirname(__file__), steps=steps)
    return subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(file):
    process = start(file)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    "Catches everything that survives only in memory: kill -9, twice, at a moment nobody chose, then continue in a new process."
    whole = finish(tmp_path / "whole.pt")
    for _ in range(2):
        process = start(tmp_path / "cut.pt")
        before = (tmp_path / "cut.pt").stat().st_mtime_ns if (tmp_path / "cut.pt").exists() else 0
        while not (tmp_path / "cut.pt").exists() or (tmp_path / "cut.pt").stat().st_mtime_ns == before:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    resumed = finish(tmp_path / "cut.pt")
    assert resumed[0] > 0, "the killed process left no checkpoint to resume from"
    assert resumed[1:] == whole[1:]


def test_sigterm_saves_and_ends(tmp_path):
    "Catches a process that dies of SIGTERM without a checkpoint, or that ignores it and trains on."
    process = start(tmp_path / "c.pt", steps=10**6)
    assert process.stdout.readline().startswith("begin") and process.stdout.readline().startswith("progress")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and load_checkpoint(tmp_path / "c.pt")["history"]["step"] > 0


def test_signal_handlers_are_restored():
    "Catches a training that leaves its handlers behind: Ctrl-C would do nothing in the notebook afterwards."
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    trainer = small(steps=5)
    trainer.train()
    trainer = small(steps=5)
    trainer.optimizer.step = lambda problem: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_ctrl_c_finishes_the_step_and_a_second_one_does_not_wait(tmp_path):
    "Catches an interrupt in the middle of an update, and a training that cannot be ended."
    trainer = small(checkpoint=tmp_path / "c.pt")
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda problem: (os.kill(os.getpid(), signal.SIGINT) if trainer.history.step == 12 else None, step(problem))[1]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.history.step == 13 and load_checkpoint(tmp_path / "c.pt")["history"]["step"] == 13
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# --- divergence

def diverging(at, value=math.nan, **options):
    "A trainer whose loss is `value` at step `at` and never again (a NaN in the weights would stay)."
    trainer = small(**options)
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda problem: step(problem) * (value if trainer.history.step == at else 1)
    return trainer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 37, 88, 89])
def test_divergence_is_a_result_and_its_step_exact(at, value):
    "Catches a crash, a step rounded to the block that found it, a single Inf that the block's mean of later steps hides, and a curve that ends in NaN."
    history = diverging(at, value).train()
    assert history.status == "diverged" and history.diverged_at == at
    assert all(math.isfinite(loss) for _, _, loss in history.curve) and (history.curve[-1][0] if history.curve else 0) == at
    assert all(e["step"] <= at for e in history.evals)


def test_divergence_after_a_resume(tmp_path):
    "Catches a search for NaN that starts at the resumed step and misses the ones before it in the same block."
    trainer = diverging(3, steps=4000, checkpoint=tmp_path / "c.pt")  # blocks of 64
    trainer.stop = lambda: trainer.history.step >= 10
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = small(steps=4000, checkpoint=tmp_path / "c.pt")
    resumed.resume()
    assert resumed.train().diverged_at == 3


def test_evaluation_that_is_not_finite_is_divergence():
    "Catches weights that overflow in the last update, after the last loss was still a number."
    trainer = small(steps=40)
    trainer.task.evaluate = lambda model: {"mse": math.inf, "psnr": math.nan}
    history = trainer.train()
    assert history.status == "diverged" and history.evals == []


def test_a_real_divergence():
    "Catches a non-finite loss that the optimizer's own code turns into an exception."
    for name in ("sgd/released", "esgd/released", "adahessian-e/released"):
        history = small(name, steps=400, overrides={"lr": 1e12}).train()
        losses = history.losses
        assert history.status == "diverged" and losses[: history.diverged_at].isfinite().all() and not losses[history.diverged_at].isfinite()


# --- reports

def test_progress_tells_the_end_and_not_every_block(monkeypatch):
    "Catches a callback per step or block, which floods a notebook, and a last state that never arrives."
    states = []
    small(steps=200, progress=states.append).train()
    assert states[-1]["step"] == states[-1]["steps"] == 200 and states[-1]["eta_s"] == 0 and len(states) < 20
    assert set(states[-1]) == {"step", "steps", "loss", "level", "value", "seconds", "eta_s"}


def test_float64_losses_are_kept_in_float64():
    "Catches a loss buffer that rounds a float64 training to float32."
    trainer = small(steps=3, dtype=torch.float64)
    trainer.train()
    assert trainer.history.losses.dtype == torch.float64 and (trainer.history.losses.float().double() != trainer.history.losses).any()


@pytest.mark.parametrize("name, expected", [("sgd/released", {0.0, 1.0}), ("adam/released", {2.0}), ("esgd/released", {2.0})])
def test_state_floats_per_parameter(name, expected):
    "Catches counters or generator states counted as memory per parameter."
    trainer = small(name, steps=3)
    trainer.train()
    assert train.state_floats_per_parameter(trainer.optimizer) in expected


def test_tensorboard_scalars(tmp_path):
    "Catches a writer that is never closed, so that the scalars never reach the disk."
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small(steps=80, tensorboard=tmp_path / "tb").train()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"loss", "lr", "psnr"} <= set(events.Tags()["scalars"]) and events.Scalars("loss")[-1].step == 80


def test_tensorboard_absent(monkeypatch, tmp_path):
    "Catches a bare ModuleNotFoundError of a package the reader never heard of."
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install"):
        small(tensorboard=tmp_path)


def test_training_leaks_nothing():
    "Catches a graph or a batch kept alive by the history: live tensors must not grow with the steps."
    import gc

    def live():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    trainer = small("esgd/released", steps=1000, overrides={"update_every": 10}, evaluations=1)
    trainer._steps(100, lambda: False)
    before = live()
    trainer._steps(1000, lambda: False)
    assert live() <= before
