"""Do sensitivities add up? Each measure's table against the measured loss of random policies (`bitwright profile --check-additivity`).

    python benchmarks/additivity.py --data-root DATA --weights RESNET20.th [--policies 40] [--limpq-steps 40]

CIFAR-10 ResNet-20, weights of 1 to 8 bits, activations of 8, three budgets; every measure is judged on the same policies. No training,
except of LIMPQ's step sizes, which get a few steps.

Writes results/additivity.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from record import environment, write

from bitwright import parse_budget
from bitwright.additivity import check_additivity
from bitwright.data import load_data
from bitwright.methods.fisher import Fisher
from bitwright.methods.hawq import HAWQ
from bitwright.methods.kl import KL
from bitwright.methods.limpq import LIMPQ
from bitwright.models import build, load_weights
from bitwright.problem import Problem, build_choices
from bitwright.sensitivity import ScoredMethod
from bitwright.sites import trace

BUDGETS = ("weight_bits<=2", "weight_bits<=3", "weight_bits<=4")


def problems(data_root: Path, weights: Path) -> list[Problem]:
    """Return the same problem under each budget."""
    model = build("cifar_resnet20")
    load_weights(model, weights)
    data = load_data("cifar10", data_root, held_out=5000, seed=0)
    traced = trace(model.eval(), data.example())
    choices = build_choices(traced, range(1, 9), (8,))
    pins = {name: allowed[0] for name, allowed in choices.items() if len(allowed) == 1}
    return [Problem(model, traced, choices, parse_budget(text, traced.sites, pins=pins), data) for text in BUDGETS]


def main() -> None:
    """Measure every table once, and check it under every budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--policies", type=int, default=40)
    parser.add_argument("--limpq-steps", type=int, default=40)
    arguments = parser.parse_args()
    measures: dict[str, ScoredMethod] = {
        "kl": KL(),
        "kl, batchnorm: false": KL(batchnorm=False),
        "fisher": Fisher(),
        "hawq": HAWQ(),
        "hawq, labels: model": HAWQ(labels="model"),
        f"limpq, max_steps: {arguments.limpq_steps}": LIMPQ(max_steps=arguments.limpq_steps, batch_size=64),
    }
    rows, made = [], environment()
    own = problems(arguments.data_root, arguments.weights)
    for name, method in measures.items():
        before, started = own[0].sample_passes, time.process_time()
        table = method.sensitivity(own[0])
        spent = {"seconds": round(time.process_time() - started, 1), "sample_passes": own[0].sample_passes - before}
        for problem in own:
            found = check_additivity(problem, table, arguments.policies)
            row = {"measure": name, "budget": problem.budgets[0].text, "n": arguments.policies, "seed": problem.seed, **spent}
            for column in ("spearman", "near_budget", "pearson"):
                value = getattr(found, column)
                row |= {column: value.value, f"{column}_low": value.low, f"{column}_high": value.high}
            rows.append({**row, "warning": found.warning is not None, **made})
            print(row, flush=True)
    print(write("additivity", rows))


if __name__ == "__main__":
    main()
