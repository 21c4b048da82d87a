"The step as recorded graphs: its numbers are those of the step without recording. Where there is no GPU, torch's operations are recorded in place of its launches."
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inr_precond.curvature import Problem
from inr_precond.inr import INR, Gaussian, PositionalEncoding, ReLU
from inr_precond.optim import ESGD, KFAC, SGD, AdaHessian, Adam, GaussNewton, Shampoo
from inr_precond.render import NeRFField, RadianceField
from inr_precond.train import Dials, GraphStep, ImageTask, Trainer, cuda_graph, lr_factor, stream, taped

RECORDERS = [pytest.param((taped, "cpu"), id="taped"), pytest.param((cuda_graph, "cuda"), id="cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]
MEMBERS = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1, nesterov=False),
    "SGD nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, lr_warmup=9),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW": lambda p: Adam(p, lr=0.01, weight_decay=0.1, lr_warmup=12, nesterov=True),
    "Adam without momentum": lambda p: Adam(p, lr=0.01, betas=(0.0, 0.99), max_grad_norm=0.1),
    "ESGD": lambda p: ESGD(p, lr=0.1, update_every=6, warmup=4, seed=1),
    "ESGD, steps": lambda p: ESGD(p, lr=0.1, update_every=6, warmup=4, bias_correction="steps", seed=1),
    "ESGD, mean": lambda p: ESGD(p, lr=0.1, update_every=6, warmup=4, accumulate="mean", lr_warmup_decay=0.9, seed=1),
    "ESGD, max": lambda p: ESGD(p, lr=0.1, update_every=6, warmup=4, accumulate="max", nesterov=True, seed=1),
    "AdaHessian(E)": lambda p: AdaHessian(p, lr=0.05, seed=1),
    "AdaHessian(J)": lambda p: AdaHessian(p, lr=0.01, eps=0.1, estimator="jacobi", update_every=3, seed=1),
    "AdaHessian, released J": lambda p: AdaHessian(p, lr=0.01, estimator="root-abs", power=0.5, seed=1),
    "maximize": lambda p: Adam(p, lr=0.001, maximize=True),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64; a number frozen in a recording is off by 1e-3 and more
POINTS = torch.rand(128, 2, generator=stream(0, "batches"), dtype=torch.float64) * 2 - 1
VALUES = torch.sin(5 * POINTS).prod(1, keepdim=True).expand(-1, 3).contiguous()


def network(device, dtype=torch.float64):
    return INR(2, 3, hidden_features=12, num_layers=3, activation=Gaussian(sigma=0.5), generator=stream(0, "initialisation"), dtype=dtype, device=device)


def path(make, steps, device, record=None, model=None, loss="mse", rows=lambda t: 32, between=lambda t, optimizer, model: None, **cast):
    "Losses, gradients' norms and weights along a training with a rate that falls, and the step; record None: without recording."
    model = network(device, **cast) if model is None else model
    optimizer = make(model.parameters())
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor("cosine", steps))
    step, seen = optimizer.step if record is None else GraphStep(optimizer, record), []
    for t in range(steps):
        between(t, optimizer, model)
        x, y = (v[t : t + rows(t)].to(device, next(model.parameters()).dtype) for v in (POINTS, VALUES))
        value = step(Problem(model, x, y, loss))
        falling.step()
        seen.append(torch.cat([value[None], torch.stack([p.grad.norm() for p in model.parameters()]), *(p.detach().flatten() for p in model.parameters())]))
    return torch.stack(seen).cpu(), step


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("recorder", RECORDERS)
def test_replays_are_the_steps_without_recording(recorder, name):
    "Catches a rate, a bias correction or a counter frozen in the recording, a preconditioner that a step without curvature looks for in the wrong place, and a step taken twice while it is recorded."
    record, device = recorder
    plain, _ = path(MEMBERS[name], 40, device)
    replayed, step = path(MEMBERS[name], 40, device, record)
    torch.testing.assert_close(replayed, plain, **CLOSE)
    assert len(step.recorded) == (2 if name.startswith("ESGD") or "(J)" in name else 1)  # and that something was recorded at all


@pytest.mark.parametrize("recorder", RECORDERS)
def test_what_one_trains_in(recorder):
    "Catches float64 numbers that meet float32 tensors."
    record, device = recorder
    for name in ("Adam", "ESGD, steps", "AdaHessian(E)"):
        plain, _ = path(MEMBERS[name], 20, device, dtype=torch.float32)
        replayed, _ = path(MEMBERS[name], 20, device, record, dtype=torch.float32)
        torch.testing.assert_close(replayed, plain, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_batch_of_another_shape_is_taken_by_itself(recorder):
    "Catches a small last batch that is filled up with rows of the batch before, and one after which the recordings are lost."
    record, device = recorder
    odd = {"rows": lambda t: 20 if t % 5 == 3 else 32}
    plain, _ = path(MEMBERS["AdaHessian(J)"], 40, device, **odd)
    calls = []
    replayed, step = path(MEMBERS["AdaHessian(J)"], 40, device, lambda work: calls.append(1) or record(work), **odd)
    torch.testing.assert_close(replayed, plain, **CLOSE)
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["weight_decay", "betas", "state", "clipping", "weights", "a step in between"])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_what_changes_is_noticed(recorder, change):
    "Catches a recording that goes on with an option, a state or weights that are no longer there."
    record, device = recorder

    def between(t, optimizer, model):
        if t != 24:
            return
        if change == "weight_decay":
            optimizer.param_groups[0]["weight_decay"] = 0.3
        if change == "betas":
            optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        if change == "state":
            optimizer.load_state_dict(optimizer.state_dict())
        if change == "clipping":
            optimizer.max_grad_norm = 1e-3
        if change == "a step in between":  # with curvature: P is made anew, somewhere else
            optimizer.step(Problem(model, POINTS[:32].to(device), VALUES[:32].to(device)))
        if change == "weights":
            for p in optimizer.param_groups[0]["params"]:
                p.data = p.data.clone() * 0.9

    plain, _ = path(MEMBERS["ESGD, steps"], 40, device, between=between)
    replayed, _ = path(MEMBERS["ESGD, steps"], 40, device, record, between=between)
    torch.testing.assert_close(replayed, plain, **CLOSE)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_any_module_and_any_loss(recorder):
    "Catches a recording that only the networks of this package allow: here autograd differentiates."
    record, device = recorder
    make = lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).to(device, torch.float64)
    torch.manual_seed(0)
    models = [make()]
    models.append(make())
    models[1].load_state_dict(models[0].state_dict())
    loss = lambda outputs, targets: (outputs - targets).abs().pow(1.5).mean()
    plain, _ = path(MEMBERS["ESGD"], 20, device, None, models[0], loss)
    replayed, _ = path(MEMBERS["ESGD"], 20, device, record, models[1], loss)
    torch.testing.assert_close(replayed, plain, **CLOSE)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_what_the_step_only_reads_is_watched(recorder):
    "Catches a recording that reads a buffer, or a frozen weight, where it was before its data was replaced."
    record, device = recorder

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.frozen = network(device), nn.Parameter(torch.ones(3, device=device, dtype=torch.float64), requires_grad=False)
            self.register_buffer("factor", torch.ones(3, device=device, dtype=torch.float64))

        def forward(self, x):
            return self.factor * self.frozen * self.inner(x)

    recordings = []

    def run(record):
        model, record = Scaled(), record and (lambda work: recordings.append(1) or recorder[0](work))
        optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        step, losses = optimizer.step if record is None else GraphStep(optimizer, record), []
        for t in range(12):
            if t in (5, 8):
                for tensor in (model.factor, model.frozen):
                    tensor.data = tensor.data * 0.5
            losses.append(step(Problem(model, POINTS[:32].to(device), VALUES[:32].to(device))).cpu())
        return torch.stack(losses)

    torch.testing.assert_close(run(record), run(None), **CLOSE)
    assert len(recordings) == 3  # the CPU's recorder finds the new data by itself, CUDA's does not


@pytest.mark.parametrize("recorder", RECORDERS)
def test_two_groups_on_clocks_of_their_own(recorder):
    "Catches one schedule for all: a layer that is thawed later has curvature at other steps, and one group another rate."
    record, device = recorder

    def run(record):
        model = network(device)
        first, *rest = model.parameters()
        optimizer = ESGD([{"params": [first], "lr": 0.02}, {"params": rest}], lr=0.1, update_every=4, warmup=0, seed=1)
        step, seen = optimizer.step if record is None else GraphStep(optimizer, record), []
        first.requires_grad_(False)
        for t in range(24):
            if t == 6:
                first.requires_grad_(True)
            x, y = (v[t : t + 32].to(device) for v in (POINTS, VALUES))
            step(Problem(model, x, y))
            seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return torch.stack(seen).cpu()

    torch.testing.assert_close(run(record), run(None), **CLOSE)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_the_loss_is_ones_own(recorder):
    "Catches a returned loss that the next replay overwrites."
    record, device = recorder
    model = network(device)
    step = GraphStep(Adam(model.parameters(), lr=0.01), record)
    losses = [step(Problem(model, POINTS[t : t + 32].to(device), VALUES[t : t + 32].to(device))) for t in range(6)]
    assert len({float(v) for v in losses}) == 6


@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_step_that_reads_the_device_is_refused(recorder):
    "Catches a recording that silently keeps a decision made once."
    record, device = recorder

    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 3, dtype=torch.float64)

        def forward(self, x):
            y = self.inner(x)
            return y if float(y.detach().sum()) > 1e9 else 2 * y

    model = Deciding().to(device)
    optimizer = Adam(model.parameters(), lr=0.01)
    step, problem = GraphStep(optimizer, record), Problem(model, POINTS.to(device), VALUES.to(device))
    step(problem)
    with pytest.raises(RuntimeError, match="step of Adam on this model could not be recorded .*step_mode='eager'"):
        step(problem)
    clock = optimizer._cohorts()[0]
    assert (clock.t, clock.k, clock.dial, optimizer.drawn) == (1, 1, None, None)
    if device == "cuda":  # the process is as before: CUDA's own refusal would leave the recording's stream current and the generator caught
        assert torch.cuda.current_stream() == torch.cuda.default_stream() and torch.rand(2, device=device).isfinite().all()
    optimizer.step(problem)  # launch by launch it goes on


class Aboard(TorchDispatchMode):
    "Stands for a recording by CUDA: an operation that sees a tensor on the host is refused."

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if any(torch.is_tensor(t) and t.device.type == "cpu" for t in tree_leaves((args, kwargs, result))):
            raise RuntimeError(f"{op} has a tensor on the host")
        return result


MODELS = {
    "picture": (lambda: INR(2, 3, 16, 3, Gaussian(0.1)), 2, 3, "mse"),
    "shape": (lambda: INR(3, 1, 16, 3, ReLU(), PositionalEncoding(3, 4)), 3, 1, "bce"),
    "radiance": (lambda: RadianceField(NeRFField(3, 16, Gaussian(0.1), skips=(2,), colour_features=8, view_encoding=PositionalEncoding(3, 2)), 2.0, 6.0, 8, background="white"), 9 + 8, 3, "mse"),
}


@pytest.mark.parametrize("name", ["ESGD, steps", "AdaHessian(E)"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recorder", RECORDERS)
def test_each_kind_of_field_is_replayed(recorder, model, name):
    "Catches an encoding, a loss, or a renderer's sums and slices that a recording does not repeat."
    record, device = recorder
    make, inputs, outputs, loss = MODELS[model]
    draw = stream(0, "batches")
    x, y = (torch.rand(8, 32, n, generator=draw, dtype=torch.float64).to(device) for n in (inputs, outputs))
    if model == "radiance":
        x[..., 9:] = 2 + 4 * x[..., 9:].sort(-1).values  # depths

    def run(record):
        torch.manual_seed(0)
        field = make().to(device, torch.float64)
        optimizer = MEMBERS[name](field.parameters())
        step = optimizer.step if record is None else GraphStep(optimizer, record)
        seen = torch.stack([step(Problem(field, x[t], y[t], loss)) for t in range(8)] + [p.detach().sum() for p in field.parameters()]).cpu()
        assert record is None or len(step.recorded) == (2 if name.startswith("ESGD") else 1)
        return seen

    torch.testing.assert_close(run(record), run(None), **CLOSE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MEMBERS)
def test_a_recorded_step_touches_the_device_alone(monkeypatch, name, model):
    "On torch's device without memory, which refuses every number that is read from it: catches a constant made on the host and copied in each step, which a CUDA graph cannot hold and the CPU's recorder does not see."
    make, inputs, outputs, loss = MODELS[model]
    network, x, y = make().to("meta"), torch.empty(32, inputs, device="meta"), torch.empty(32, outputs, device="meta")
    params = list(network.parameters())
    optimizer = MEMBERS[name](params)
    made = []
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *a, name=name, **k: made.append(name))
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda *a, **k: made.append("new_tensor"))
    for _ in range(8):
        cohorts = optimizer._cohorts()
        for c in cohorts:
            c.dial = Dials(x.device, torch.float32, 8)
        optimizer.drawn = [torch.empty_like(p) for p in params] if optimizer.needs_graph() else None
        with Aboard():
            optimizer.step(Problem(network, x, y, loss))
    assert not made


def test_what_stands_for_cuda_refuses_the_host():
    "Catches a stand-in that lets everything pass."
    on_device = torch.empty(3, device="meta")
    for work in (lambda: on_device * torch.tensor(3.0), lambda: on_device * torch.ones(3).to("meta"), lambda: on_device.sum().item(), lambda: on_device[on_device > 0]):
        with Aboard(), pytest.raises((RuntimeError, NotImplementedError)):
            work()


@pytest.mark.parametrize("make", [lambda m: Shampoo(m.parameters()), KFAC, GaussNewton, lambda m: torch.optim.Adam(m.parameters())])
def test_members_that_cannot_be_recorded_say_so(make):
    "Catches a recording of roots that are due by the host's schedule, or of an optimizer that is not of the family."
    with pytest.raises(ValueError, match="cannot be recorded as a CUDA graph.*SGD, Adam, ESGD, AdaHessian"):
        GraphStep(make(network("cpu")), taped)


def test_a_graph_needs_a_gpu():
    "Catches an error of CUDA's own in the middle of a run."
    with pytest.raises(ValueError, match="parameters are on 'cpu'.*CUDA device.*step_mode='eager'"):
        GraphStep(Adam(network("cpu").parameters()))


def test_the_trainer_takes_the_mode_and_refuses_others(monkeypatch):
    "Catches a mode that is accepted and does nothing, and one with a typo."
    import inr_precond.train as train

    class Picture:
        pixels = VALUES[:100].reshape(10, 10, 3).float()

        def coordinates(self, device, dtype):
            return POINTS[:100].to(device=device, dtype=dtype)

    def trained(mode, resume_at=None):
        model = network("cpu", torch.float32)
        task = ImageTask(Picture(), batch_size=32)
        made = Trainer(model, task, ESGD(model.parameters(), lr=0.1, update_every=5, warmup=3, seed=1), 60, stream(0, "batches"), "cosine", step_mode=mode)
        made.stop = lambda: made.history.step == resume_at
        return made

    recordings = []
    monkeypatch.setattr(train, "GraphStep", lambda optimizer: recordings.append(GraphStep(optimizer, taped)) or recordings[-1])
    eager, graph = trained("eager"), trained("graph")
    eager.train()
    graph.train()
    assert recordings[0].recorded and len(recordings) == 1
    torch.testing.assert_close(graph.history.losses, eager.history.losses, rtol=1e-4, atol=1e-6)
    cut = trained("graph", 33)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trained("graph")
    resumed.load_state_dict(cut.state_dict())
    resumed.train()
    assert torch.equal(resumed.history.losses, graph.history.losses)  # bit for bit, as without recording
    with pytest.raises(ValueError, match="step_mode is 'graf'; accepted are 'eager', 'graph'"):
        trained("graf")


# ---- rounded products ---------------------------------------------------------------------------------------------------------------------------

def test_rounded_products_are_for_the_steps_alone_and_never_a_global_setting():
    "Catches TF32 that outlasts a step, that reaches the evaluation, or that a float32 run takes over from the process."
    import inr_precond.train as train

    seen = {"step": [], "evaluation": []}
    now = lambda: torch.backends.cuda.matmul.fp32_precision

    class Line:
        inputs, loss, columns, level = torch.zeros(8, 2), "mse", ("mse", "psnr"), "psnr"
        def batch(self, generator): seen["step"].append(now()); return POINTS[:8].float(), VALUES[:8].float()
        def evaluate(self, model): seen["evaluation"].append(now()); return {"mse": 1.0, "psnr": 0.0}
        def state_dict(self): return {}

    before = now()
    for kind, setting in (("float32", "ieee"), ("tf32", "tf32")):
        model = network("cpu", torch.float32)
        made = Trainer(model, Line(), Adam(model.parameters()), 3, stream(0, "batches"))
        made.products = kind  # which is refused here, see below
        seen["step"].clear()
        made.train()
        assert seen["step"] == [setting] * 3 and set(seen["evaluation"]) == {before} and now() == before
    with pytest.raises(RuntimeError), train.products_in("tf32"):
        raise RuntimeError
    assert now() == before


def test_rounded_products_need_cuda_and_a_known_name():
    "Catches a CPU run that is called TF32, and a typo."
    model = network("cpu", torch.float32)
    for given, words in (("tf32", "data lie on 'cpu'; only CUDA devices"), ("tf23", "products is 'tf23'; accepted are 'float32', 'tf32'")):
        with pytest.raises(ValueError, match=words):
            Trainer(model, type("Task", (), {"inputs": torch.zeros(8, 2), "loss": "mse"})(), Adam(model.parameters()), 3, products=given)


def test_a_run_with_rounded_products_is_another_run():
    "Catches two runs under one key, and a key of the exact run that differs from the records'."
    from inr_precond.runs import RunConfig

    exact, rounded = (RunConfig(image="astronaut", image_size=16, **given) for given in ({}, {"products": "tf32"}))
    assert exact.key != rounded.key and "products" not in exact.explicit() and rounded.explicit()["products"] == "tf32"
    with pytest.raises(ValueError, match="products is 'bf16'"):
        RunConfig(products="bf16")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rounded_products_round_to_ten_bits():
    "On a GPU: catches a switch that switches nothing, and float32 that is rounded."
    import inr_precond.train as train

    a, b = (torch.randn(512, 512, generator=stream(0, name)) for name in ("a", "b"))
    exact, error = a.double() @ b.double(), {}
    for kind in train.PRODUCTS:
        with train.products_in(kind):
            error[kind] = float(((a.cuda() @ b.cuda()).double().cpu() - exact).norm() / exact.norm())
    assert error["float32"] < 1e-6 and 1e-5 < error["tf32"] < 1e-3
