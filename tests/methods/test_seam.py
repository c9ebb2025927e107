"""SEAM: the contract, the margin term, the gates' draw, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bitwright.costs import Budget, WeightBits
from bitwright.data import Data, TensorSplit
from bitwright.driver import search
from bitwright.errors import RecipeError
from bitwright.methods.seam import SEAM, MarginLoss, State, class_centres, classifier, gumbel
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.proxy import replace_head
from bitwright.runs import read_jsonl
from bitwright.sites import trace
from bitwright.testing import Kind, check_method, planted
from bitwright.training import FinetuneOptions

SHORT = {"max_steps": 300, "epochs": 1000, "batch_size": 64}


def test_contract() -> None:
    check_method(SEAM(**(SHORT | {"max_steps": 12})), kinds=("conv", "joint"), limit=math.inf)


@pytest.mark.parametrize(("kind", "seed"), [("linear", 0), ("conv", 0), ("joint", 1)])
def test_finds_the_planted_optimum(kind: Kind, seed: int) -> None:
    plant = planted(kind, seed)
    assert plant.gap(search(plant.problem, SEAM(**SHORT)).history[-1].proposed) <= 0.02


def test_policies_meet_the_budget_and_use_several_widths() -> None:
    plant = planted("linear", 1)
    result = search(plant.problem, SEAM(**(SHORT | {"max_steps": 100})))
    assert plant.problem.feasible(result.policy)
    assert not result.history[-1].repaired
    assert len({bits.w for bits in result.policy.values()}) >= 3


@pytest.mark.parametrize("options", [{"gate": "mixed"}, {"margin": 0.0}, {"temperature_end": 0.2}])
def test_controls_change_the_search(options: dict[str, object]) -> None:
    plant = planted("conv", 0)
    logged: list[list[dict[str, object]]] = [[], []]
    for lines, chosen in zip(logged, ({}, options), strict=True):
        result = search(plant.problem, SEAM(**(SHORT | {"max_steps": 20} | chosen)), log=lines.append)
        assert plant.problem.feasible(result.policy)
    first, second = ((lines[-1]["gates"], lines[-1]["proposed"]) for lines in logged)
    assert first != second


def test_argmax_reads_the_most_probable_widths() -> None:
    plant = planted("linear", 0)
    lines: list[dict[str, object]] = []
    trial = search(plant.problem, SEAM(**(SHORT | {"max_steps": 30}), final="argmax"), log=lines.append).history[-1]
    gates = lines[-1]["gates"]
    assert isinstance(gates, dict)
    for name, gate in gates.items():
        site = name.removesuffix(":w")
        assert plant.problem.choices[site][gate.index(max(gate))] == trial.proposed[site]


def test_the_margin_term_reaches_weights_and_gates() -> None:
    plant = planted("conv", 0)
    found = {}
    for margin in (0.0, 5.0):
        method = SEAM(**(SHORT | {"max_steps": 3}), margin=margin)
        state = method.start(plant.problem)
        torch.manual_seed(0)
        state, _ = method.step(plant.problem, state, None)
        found[margin] = (state.alpha.clone(), {k: v.clone() for k, v in state.weights.items()}, state.strength.clone())
    assert any(not torch.equal(found[0.0][1][k], found[5.0][1][k]) for k in found[0.0][1])
    assert not torch.equal(found[0.0][2], found[5.0][2])


def test_gates_are_one_hot_draws_with_the_gradient_of_the_softmax() -> None:
    plant = planted("linear", 0)
    method = SEAM(**SHORT)
    state = method.start(plant.problem)
    torch.manual_seed(1)
    p = torch.full(state.alpha.shape, 1 / state.alpha.shape[1], dtype=torch.float64).requires_grad_()
    counts = torch.zeros_like(p)
    for _ in range(500):
        gates = method.gates(state, p)
        assert torch.equal(gates.detach().sort(1).values[:, -1], torch.ones(len(p), dtype=torch.float64))
        counts += gates.detach()
    assert (counts / 500 - p.detach()).abs().max() < 0.1
    (gradient,) = torch.autograd.grad((gates * torch.arange(p.shape[1])).sum(), p)
    assert gradient.abs().sum() > 0


def test_the_class_margin_is_kept_with_every_proposal(tmp_path: Path) -> None:
    plant = planted("conv", 0)
    search(plant.problem, SEAM(**(SHORT | {"max_steps": 60})), out=tmp_path)
    notes = [line["note"] for line in read_jsonl(tmp_path / "search.jsonl")[1:]]
    assert len(notes) == 2
    assert all(math.isfinite(note["margin"]) for note in notes)
    assert notes[0]["margin"] != notes[1]["margin"]


def test_gumbel_draws_have_their_mean_and_variance() -> None:
    torch.manual_seed(0)
    draws = gumbel(torch.zeros(20000))
    assert abs(float(draws.mean()) - 0.5772) < 0.05
    assert abs(float(draws.var()) - math.pi**2 / 6) < 0.1


def test_centres_follow_the_batch() -> None:
    head = nn.Linear(2, 2)
    loss = MarginLoss(nn.Sequential(head), "0", 1.0, FinetuneOptions())
    loss.centres = torch.zeros(2, 2)
    loss(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0]), torch.zeros(()))
    loss.settle()
    # half of the summed distance, over one more than the class's number of samples
    assert torch.allclose(loss.centres, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_the_compiled_loss_equals_the_eager_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
    values = []
    for compiled in (False, True):
        loss = MarginLoss(net, "2", 1.0, FinetuneOptions(compile=compiled))
        loss.centres = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        values.append(loss(x, y, torch.zeros(())).item())
        assert math.isfinite(loss.settle())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_class_centres_are_means_of_float_features() -> None:
    plant = planted("conv", 0)
    problem = plant.problem
    head = classifier(problem)
    seen: list[torch.Tensor] = []
    handle = problem.model.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    fit = problem.data.fit
    x, y = fit.batch(torch.arange(len(fit)))
    with torch.no_grad():
        problem.model(x)
    handle.remove()
    before = problem.sample_passes
    centres = class_centres(problem, head)
    assert problem.sample_passes == before + len(fit)
    assert torch.allclose(centres[3], seen[0][y == 3].mean(0), atol=1e-5)


def test_a_network_without_a_linear_classifier_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    split = TensorSplit(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    traced = trace(net, torch.rand(1, 1, 8, 8))
    choices = build_choices(traced, (2, 4))
    problem = Problem(net, traced, choices, Budget(WeightBits(), 10**6, "weight_bits"), SearchData(split, split))
    with pytest.raises(RecipeError, match="margins need a linear classifier"):
        SEAM(max_steps=1).start(problem)


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="margin=-1 is below 0"):
        SEAM(margin=-1)
    with pytest.raises(RecipeError, match="seam: gate='soft' is unknown"):
        SEAM(gate="soft")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="seam: alpha_lr and temperatures"):
        SEAM(alpha_lr=0)


def test_state_holds_the_gains_of_neighbouring_widths() -> None:
    plant = planted("linear", 0)
    method = SEAM(**SHORT)
    state: State = method.start(plant.problem)
    for _ in range(5):
        state, _ = method.step(plant.problem, state, None)
    net = state.net
    assert net is not None
    free = net.decisions.free
    assert torch.all(state.draws[free].sum((1, 2)) >= 5)  # a drawn width is the lower of one pair or the upper of another, or both
    assert torch.all(state.draws[:, 0] == 0)


def test_a_proxy_of_one_class_is_searched_and_the_margin_term_says_nothing() -> None:
    problem = planted("conv", 0).problem
    fit = problem.data.fit
    images, _ = fit.batch(torch.arange(64))
    one = TensorSplit(images, torch.zeros(64, dtype=torch.long), classes=1)
    network = copy.deepcopy(problem.model)
    replace_head(network, problem.trace.last, Data("one", one, one, one, 1, tuple(images.shape[1:])))
    proxy = problem.on(network, SearchData(one, one), evaluate=lambda policy: 0.0)
    result = search(proxy, SEAM(**(SHORT | {"max_steps": 20})))
    assert result.status == "done"
    assert problem.feasible(result.policy)
