"Occupancy fields: the task, the config, the run and its folder, records, comparison and verdict; on the embedded knot, whose inside is a formula."
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from inr_precond import claims, figures, reproduce, runs
from inr_precond.claims import REJECTED, REPRODUCED, UNDECIDED
from inr_precond.data.shapes import Sampling, load_shape, sample_points
from inr_precond.optim import ESGD
from inr_precond.runs import RunConfig, RunError, record, recorded, run, sweep
from inr_precond.train import OccupancyTask, Trainer, stream

SMALL = {"task": "occupancy", "shape": "trefoil", "points": 6000, "batch_size": 256, "sigma": .3, "hidden_features": 24, "num_layers": 3, "steps": 60}


@pytest.fixture(scope="module")
def knot():
    return load_shape("trefoil")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = RunConfig(**SMALL, recipe="esgd/released", options={"update_every": 10, "warmup": 5})
    return config, run(config, tmp_path_factory.mktemp("store"))


def numbered(count):
    "Points that say which one they are, inside where the number is odd."
    i = torch.arange(count)
    return torch.stack([i, 0 * i, 0 * i], 1).float(), i % 2 == 1, (torch.zeros(1, 3), torch.ones(1, dtype=torch.bool), torch.zeros(1))


# ---- the task ---------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch, block", [(50_000, 16), (8192, 64), (480, 32), (7, 1)])
def test_blocks_divide_the_batch(batch, block):
    "A block that does not divide the batch would make batches of another size than was asked for."
    task = OccupancyTask(*numbered(100_000), batch_size=batch)
    assert task.block == block and len(task.batch(stream(0, "batches"))[0]) == batch


def test_an_epoch_visits_each_point_once_with_its_own_label():
    "Catches sampling with replacement, a batch that overlaps the next, and labels that are shuffled otherwise than their points."
    task, generator = OccupancyTask(*numbered(1000), batch_size=96), stream(3, "batches")
    epochs = [[task.batch(generator) for _ in range(task.steps_per_epoch)] for _ in range(2)]
    for epoch in epochs:
        seen, labels = torch.cat([x[:, 0] for x, _ in epoch]), torch.cat([y[:, 0] for _, y in epoch])
        assert sorted(seen.tolist()) == list(range(1000 // 32 * 32)) and torch.equal(labels, seen % 2)
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def test_points_lie_in_memory_once_and_labels_in_a_byte():
    "Catches float labels (four times the memory of 12 million points) and a table of 64-bit points."
    task = OccupancyTask(*numbered(64))
    assert task.inputs.dtype == torch.float32 and task.targets.element_size() == 1 and task.batch()[1].dtype == torch.float32


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "8"])
def test_a_batch_size_that_is_none_is_refused(batch):
    with pytest.raises(ValueError, match="50,000"):
        OccupancyTask(*numbered(8), batch_size=batch)


def test_points_without_labels_are_refused():
    points, inside, held_out = numbered(8)
    for wrong in ((points, inside[:5]), (points[:0], inside[:0])):
        with pytest.raises(ValueError, match="one label a point"):
            OccupancyTask(*wrong, held_out)


def test_the_evaluation_against_counting(knot):
    "BCE and both IoUs by brute force in numpy: catches a threshold at .5, kinds that are mixed up, and a mean over chunks of unequal size."
    drawn = sample_points(knot, Sampling(3001, seed=5))
    kind = torch.arange(3).repeat_interleave(torch.tensor(drawn.sampling.sizes))
    task = OccupancyTask(drawn.points, drawn.labels, (drawn.points, drawn.labels, kind), chunk=170)
    field = lambda x: 3 * (.2 - (x - .1).square().sum(1, keepdim=True))
    found = task.evaluate(field)
    x, y = drawn.points.double().numpy(), drawn.labels.numpy().astype(bool)
    z = 3 * (.2 - ((x - .1) ** 2).sum(1))
    p = 1 / (1 + np.exp(-z))
    assert found["bce"] == pytest.approx(-np.where(y, np.log(p), np.log(1 - p)).mean(), rel=1e-5)
    for name, which in (("iou", 0), ("iou_surface", 2)):
        own = kind.numpy() == which
        assert found[name] == pytest.approx((y & (z > 0))[own].sum() / (y | (z > 0))[own].sum(), abs=2e-3)


def test_a_field_that_is_not_finite_is_a_divergence(knot):
    drawn = sample_points(knot, Sampling(300))
    task = OccupancyTask(drawn.points, drawn.labels, (drawn.points, drawn.labels, torch.arange(300) // 100))
    model = torch.nn.Linear(3, 1)
    trainer = Trainer(model, task, ESGD(model.parameters(), lr=.1), 4)
    with torch.no_grad():
        model.bias.fill_(math.nan)
    assert trainer.train().status == "diverged" and trainer.loss == "bce"


# ---- the config -------------------------------------------------------------------------------------------------------------------------------

def test_the_tasks_defaults():
    "Catches the paper's numbers mistyped, and a picture's field in a shape's config."
    config = RunConfig(task="occupancy", shape="trefoil")
    assert (config.points, config.far, config.near, config.batch_size, config.image, config.image_size) == (12_000_000, .1, .01, 50_000, None, None)
    assert RunConfig().image == "lion" and RunConfig().batch_size == 512 and RunConfig().shape is None
    assert config.signal == "trefoil" and RunConfig().signal == "lion" and config.label.startswith("trefoil gaussian")


def test_image_runs_keep_their_names():
    "The key of a run made before shapes existed, from its record: catches a field that enters the hash of an image's run."
    records = [json.loads(file.read_text()) for file in sorted(runs.RECORDS.glob("gaussian-adam-released-s0-*.json"))]
    pictures = [kept for kept in records if kept["config"].get("task", "image") == "image"]
    assert pictures
    for kept in pictures:
        config = RunConfig.from_dict(kept["config"])
        resolved = {**config.explicit(), "format": runs.FORMAT, "image": kept["resolved"]["image"], "data_sha256": kept["resolved"]["data_sha256"]}
        assert kept["key"].endswith(runs.key_hash(resolved))


@pytest.mark.parametrize("wrong, words", [({"image": "lion"}, "has no image"), ({"image_size": 64}, "has no image_size"), ({"shape": "trefoyl"}, "did you mean 'trefoil'"), ({"points": 2}, "points is 2"),
                                          ({"near": 0.}, "near is 0"), ({"far": math.nan}, "far is nan"), ({"shape": 7}, "shape is 7"), ({"task": "occupency"}, "did you mean 'occupancy'")])
def test_a_wrong_field_is_one_sentence(wrong, words):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        RunConfig(**{**SMALL, **wrong})
    assert "\n" not in str(caught.value)


def test_a_shapes_field_on_a_picture_is_refused():
    with pytest.raises(ValueError, match="the task 'image' has no points; leave it None, or choose the task 'occupancy'"):
        RunConfig(points=100)


def test_what_decides_the_training_decides_the_key():
    "Catches two trainings that share a folder."
    keys = {RunConfig(**{**SMALL, **change}).key for change in ({}, {"points": 6001}, {"near": .02}, {"far": .2}, {"seed": 1}, {"batch_size": 128})}
    assert len(keys) == 6


def test_the_same_mesh_elsewhere_is_the_same_run(tmp_path):
    import trimesh

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        trimesh.creation.box((1, 2, 3)).export(tmp_path / folder / "box.ply")
    a, b = (RunConfig(**{**SMALL, "shape": str(tmp_path / folder / "box.ply")}) for folder in ("one", "two"))
    assert a.key == b.key and a != b


def test_points_are_the_same_for_every_seed_and_the_evaluation_sees_others():
    "Catches points that are drawn with the run's seed (seeds would differ in their data), and an evaluation on the training's points."
    a, b = (runs.task_of(RunConfig(**SMALL, seed=s)) for s in (0, 1))
    assert torch.equal(a.inputs, b.inputs) and torch.equal(a.held_out[0], b.held_out[0])
    seen = {tuple(p) for p in a.inputs.view(-1, 3).tolist()}
    assert not seen & {tuple(p) for p in a.held_out[0].tolist()} and len(a.held_out[0]) == runs.HELD_OUT


# ---- runs -------------------------------------------------------------------------------------------------------------------------------------

def test_a_run_has_what_the_figures_need(finished):
    config, done = finished
    assert sorted(p.name for p in done.folder.iterdir()) == sorted([*runs.RESULTS["occupancy"], "metrics.json"])
    assert list(done.evals) == ["step", "seconds", "cpu_seconds", "bce", "iou", "iou_surface"]
    assert set(done.final) == {"bce", "iou", "iou_surface", "best_iou", "best_step"} and done.final["bce"] == done.evals.bce.iloc[-1] < math.log(2)
    assert done.provenance["data"]["name"] == "trefoil" and len(done.provenance["data"]["sha256"]) == 64 and "IoU" in repr(done)


def test_the_weights_are_the_trained_network(finished):
    "The stored network must give the stored evaluation, bit for bit: catches weights of another step and a lost parameter."
    config, done = finished
    assert runs.task_of(config).evaluate(done.trained())["bce"] == done.final["bce"]


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path):
    "Bit for bit, with the order of the blocks in the checkpoint; twice cut, once in mid-epoch."
    config, done = finished
    for at in (17, 41):
        count = iter(range(10_000))
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path, stop=lambda at=at, count=count: next(count) >= at)
    again = run(config, tmp_path)
    assert again.provenance["resumed_at"] > 17 and again.final == done.final and again.curve.loss.tolist() == done.curve.loss.tolist()
    assert all(torch.equal(p, q) for p, q in zip(again.trained().parameters(), done.trained().parameters()))


def test_the_points_are_kept_beside_the_runs(finished):
    "Catches a sweep that draws 12 million points anew for each run."
    files = sorted((finished[1].folder.parent / ".points").iterdir())
    assert len(files) == 2


def test_a_sweep_of_two_processes_gives_the_numbers_of_one(finished, tmp_path):
    config, done = finished
    first, other = sweep([config, dataclasses.replace(config, seed=1)], tmp_path, workers=2, progress=False)
    assert first.final == done.final and other.final != done.final


def test_a_missing_shape_fails_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("INR_PRECOND_DATA", str(tmp_path))
    with pytest.raises((FileNotFoundError, RunError), match="meshes"):
        run(RunConfig(**{**SMALL, "shape": "dragon"}), tmp_path / "runs")


def test_damage_is_found_and_repaired(finished, tmp_path):
    "Catches a weights file that no checksum watches."
    config, _ = finished
    made = run(config, tmp_path)
    (made.folder / "weights.npz").write_bytes(b"x")
    assert runs.damage(made.folder) == "weights.npz does not match its checksum"
    with pytest.warns(UserWarning, match="rebuilt"):
        assert run(config, tmp_path).final == made.final


def test_a_record_keeps_the_numbers_and_no_network(finished, tmp_path):
    config, done = finished
    record(done, tmp_path)
    kept, = recorded([config], tmp_path)
    assert kept.final == done.final and kept.evals[["step", "bce", "iou", "iou_surface"]].equals(done.evals[["step", "bce", "iou", "iou_surface"]]) and kept.trained() is None


def test_progress_says_iou():
    state = {"label": "knot", "step": 3, "steps": 9, "loss": .5, "level": "iou", "value": .9123, "eta_s": 2.}
    assert "IoU 0.912" in runs.progress_line(state) and "IoU -" in runs.progress_line({**state, "value": None})


# ---- comparison and verdict ---------------------------------------------------------------------------------------------------------------------

def made_up(recipe, seed, last, steps=4000, status="finished", shape="armadillo"):
    "A run whose BCE falls geometrically from ln 2 to `last`."
    step = np.linspace(0, steps, 41).astype(int)
    bce = math.log(2) * (last / math.log(2)) ** (step / steps)
    evals = pd.DataFrame({"step": step, "seconds": step * .1, "cpu_seconds": step * .1, "bce": bce, "iou": 1 - bce, "iou_surface": 1 - bce})
    config = SimpleNamespace(task="occupancy", signal=shape, shape=shape, recipe=recipe, options={}, seed=seed, points=1_000_000, batch_size=8192, steps=steps, schedule="constant", final_lr_factor=None)
    return SimpleNamespace(config=config, key=f"{recipe}{seed}", status=status, diverged_at=None, evals=evals, curve=pd.DataFrame({"step": step[1:], "seconds": step[1:] * .1, "loss": bce[1:]}),
                           final={"bce": last, "iou": 1 - last, "iou_surface": 1 - last, "best_iou": 1 - last}, ms_per_step=100., state_floats_per_parameter=2., metrics_sha256="", recorded=False, provenance={})


def rows_of(esgd=.05, shampoo=.3, seeds=5, **more):
    groups = {"Adam": [made_up("adam/released", s, .1) for s in range(seeds)], "ESGD released": [made_up("esgd/released", s, esgd * 1.01 ** s, **more) for s in range(seeds)],
              "Shampoo released": [made_up("shampoo/released", s, shampoo * 1.01 ** s) for s in range(seeds)]}
    return figures.measure(groups), groups


def test_a_lower_bce_is_a_gain():
    "ln(.1 / .05) for ESGD, negative for Shampoo: catches a sign that is right for PSNR only."
    rows, _ = rows_of()
    first = rows[rows.seed == 0].set_index("method")
    assert first.difference["ESGD released"] == pytest.approx(math.log(2)) and first.difference["Shampoo released"] == pytest.approx(-math.log(3))
    assert first.steps_to_target["ESGD released"] == pytest.approx(4000 * math.log(math.log(2) / .1) / math.log(math.log(2) / .05), rel=.01) and math.isnan(first.steps_to_target["Shampoo released"])
    assert set(rows) >= {"shape", "batch_size", "bce", "iou", "iou_surface", "target_bce"} and "image" not in rows


def test_the_three_verdicts_of_esgd_occupancy():
    judge = lambda rows: claims.judge("esgd-occupancy", claims.from_rows("esgd-occupancy", rows)["esgd-occupancy"]["printed"], form="printed").verdict
    assert judge(rows_of()[0]) == REPRODUCED
    assert judge(rows_of(esgd=.2)[0]) == REJECTED                 # it never arrives
    assert judge(rows_of(shampoo=.08)[0]) == REJECTED             # Shampoo ends below Adam
    assert judge(rows_of(esgd=.0999)[0]) == REJECTED              # hardly faster than Adam: below the margin of 5 %
    assert judge(rows_of(seeds=4)[0]) == UNDECIDED


def test_a_diverged_run_counts_as_a_field_that_knows_nothing():
    "Catches a diverged run that is left out, which would reward it."
    rows, _ = rows_of(status="diverged")
    assert rows[rows.method == "ESGD released"].difference.tolist() == pytest.approx([math.log(.1 / math.log(2))] * 5)
    assert claims.ends_above(rows, "Adam", "ESGD released")["differences"] == pytest.approx([math.log(math.log(2) / .1)] * 5)


def test_adam_beats_sgd_needs_each_activation():
    part = {"differences": [.3, .31, .29, .3, .32], "pairs": [["armadillo", s] for s in range(5)]}
    judge = lambda parts: claims.judge("adam-beats-sgd", claims.evidence("adam-beats-sgd", parts=parts)).verdict
    every = dict.fromkeys(claims.OCCUPANCY, part)
    assert judge(every) == REPRODUCED
    assert judge({**every, "ReLU": {**part, "differences": [-d for d in part["differences"]]}}) == REJECTED
    assert judge({name: part for name in claims.OCCUPANCY[:-1]}) == UNDECIDED


def test_short_runs_and_small_batches_rank_nothing():
    assert figures.too_short(600, 8192, "occupancy") and figures.too_short(4000, 2048, "occupancy") and not figures.too_short(4000, 8192, "occupancy")
    assert "too short to rank" in figures.short_note([made_up("adam/released", 0, .1, steps=600)]) and figures.short_note([made_up("adam/released", 0, .1)]) == ""


def test_sentences_and_tables_speak_of_bce():
    rows, groups = rows_of()
    assert "BCE after 4,000 steps: lower" in figures.conclude(rows, "ESGD released") and "higher" in figures.conclude(rows, "Shampoo released") and "final BCE" in figures.conclude_speed(rows, "ESGD released")
    table = figures.result_table(rows)
    assert {"final BCE", "final IoU", "IoU near the surface", "steps to Adam's final BCE"} <= set(table) and not any("PSNR" in c for c in table)
    assert figures.summary(rows)["Adam"]["bce"] == pytest.approx(.1)


def test_the_figures_are_drawn():
    _, groups = rows_of()
    axes = figures.convergence(groups, target="Adam").axes
    assert len(axes) == 6 and axes[0].get_yscale() == axes[2].get_yscale() == "log" and axes[4].get_ylabel().startswith("IoU") and any("final BCE" in t.get_text() for t in axes[2].texts)
    assert len(figures.convergence_by_signal(groups).axes) == 3 and "IoU" in figures.final_dots(groups).axes[0].get_xlabel()


# ---- the batch ----------------------------------------------------------------------------------------------------------------------------------

def test_the_batch_knows_shapes(tmp_path, knot):
    "A shape's hash in the batch's memory, and a wrong shape refused before anything runs."
    assert reproduce.data_hashes(["trefoil", "astronaut", "nothing"]) == {"trefoil": knot.sha256, "astronaut": reproduce.data_hashes(["astronaut"])["astronaut"], "nothing": None}
    given = reproduce.given_parameters(SimpleNamespace(image=None, seeds=None, workers=None, parameters=["shape='trefoil'"]))
    assert given == {"shape": "trefoil"}
    with pytest.raises(reproduce.BatchError, match="shape"):
        reproduce.given_parameters(SimpleNamespace(image=None, seeds=None, workers=None, parameters=["shape='trefoyl'"]))
