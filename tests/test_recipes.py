"""Recipes: names, sources, and that released and mended differ in the error alone."""
import pytest
import torch
from torch import nn

from inr_precond.curvature import Problem
from inr_precond.recipes import recipe, recipes, register


def test_every_recipe_says_what_it_is_and_takes_a_step():
    for name in recipes():
        r = recipe(name)
        assert r.name == name and r.equation and r.source
        model = nn.Linear(3, 1, bias=False)
        nn.init.ones_(model.weight)
        r.build(model).step(Problem(model, torch.eye(3), torch.zeros(3, 1)))
        assert torch.isfinite(model.weight).all() and (model.weight != 1).all()


def test_a_recipe_that_needs_the_module_says_so():
    "Parameters alone reach K-FAC and fail with an attribute error three calls deeper."
    for name in (n for n in recipes() if recipe(n).takes_model):
        with pytest.raises(TypeError, match="give recipe.*the model and not its parameters"): recipe(name).build(nn.Linear(2, 2).parameters())


def test_released_and_mended_differ_in_the_bias_correction_alone():
    "A 'mended' that quietly has another rate or schedule."
    released, mended = (dict(recipe(f"esgd/{k}").options) for k in ("released", "mended"))
    assert (released.pop("bias_correction"), mended.pop("bias_correction")) == ("steps", "updates") and released == mended
    assert released == dict(lr=.15, betas=(.9, .999), eps=1e-4, update_every=100, warmup=50, accumulate="ema")


def test_recipes_are_frozen():
    with pytest.raises(TypeError): recipe("esgd/released").options["lr"] = 1.
    with pytest.raises(AttributeError): recipe("esgd/released").name = "x"


def test_overrides_and_seed_reach_the_optimizer():
    opt = recipe("esgd/mended").build(nn.Linear(2, 2), seed=7, lr=.5)
    assert opt.param_groups[0]["lr"] == .5 and opt.seed == 7 and opt.param_groups[0]["update_every"] == 100


def test_typos_are_answered_with_the_closest_name():
    with pytest.raises(ValueError, match="did you mean 'esgd/released'"): recipe("esgd/relased")
    with pytest.raises(ValueError, match="did you mean 'update_every'"): recipe("esgd/mended").build(nn.Linear(1, 1), update_evry=3)


def test_names_are_taken_once():
    from inr_precond.optim import SGD
    with pytest.raises(ValueError, match="exists already"): register("sgd/released", SGD, "", "")
    with pytest.raises(ValueError, match="not an option"): register("sgd/new", SGD, "", "", beta=1)
    assert "sgd/new" not in recipes()


def test_crowsonkb_follows_its_published_rule():
    "The author's rule by hand (decayed maximum, Nesterov look-ahead, rate times 1 - .99^k) on this package's schedule of curvature updates."
    p = nn.Parameter(torch.tensor([2.], dtype=torch.float64))
    opt = recipe("esgd/crowsonkb").build([p])
    m = d = 0.; x = 2.; k = 0
    for t in range(25):
        h = 6 * x                                   # f = x^3, f' = 3 x^2, f'' = 6 x
        g = 3 * x**2
        if t < 20 or t % 10 == 0: d = max(.999 * d, h**2); k += 1
        m = .9 * m + .1 * g
        look = .9 * m + .1 * g
        x -= (1 - .99**k) * look / (1 - .9**(t + 2)) / (d**.5 + 1e-4)
        opt.step(lambda: (p**3).sum())
        assert p.item() == pytest.approx(x, rel=1e-10)
