"""What SDQ's paper says of the landscape (fig. 1): stochastic choice between adjacent widths against linear interpolation.

    python benchmarks/landscape.py --data-root DATA --weights RESNET20.th [--pairs 4-3 3-2 2-1] [--batches 32]

Two measurements per adjacent pair of widths, on ResNet-20 with float weights and BatchNorm in training mode, all layers at the pair:

* the gradient of β at β = 1/2, over batches and draws: its standard deviation over its mean magnitude per layer (median layer);
* the loss along the line from the lower width (t = 0) to the upper (t = 1): interpolation evaluates the mixture of the two
  quantized weights, stochastic the expectation over independent draws with β = t. Roughness is the mean squared second
  difference along the line, over the squared range of the stochastic line; the hump is the highest loss above the chord.

Writes results/landscape.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from record import environment, mean_interval, write
from torch import Tensor, nn

from bitwright.data import Split, load_data
from bitwright.methods.sdq import SDQ
from bitwright.models import build, load_weights
from bitwright.quant.gates import Gate, LayerGates, switchable
from bitwright.relaxation import logistic
from bitwright.sites import trace

POINTS = 11


def gated(model: nn.Module, pair: tuple[int, int], images: Tensor) -> tuple[nn.Module, list[Gate]]:
    """Return the network with a gate between two widths on every inner layer, and the gates."""
    sites = trace(model, images[:1]).sites
    inner = [site.name for site in sites[1:-1]]
    gates = [Gate.at(list(pair), [0.5, 0.5]) for _ in inner]
    layers = {name: LayerGates(gate, 32) for name, gate in zip(inner, gates, strict=True)}
    return switchable(model, layers, images).train(), gates


def set_upper(gates: list[Gate], upper: Tensor) -> None:
    """Give every gate its share of the upper width."""
    for gate, share in zip(gates, upper.float(), strict=True):
        gate.weights.data.copy_(torch.stack([share, 1 - share]))
        gate.weights.grad = None


def beta_gradients(network: nn.Module, gates: list[Gate], fit: Split, method: SDQ, batches: int) -> Tensor:
    """Return the gradient of β of every layer for each batch, ``[batch, layer]``."""
    rows = []
    for k in range(batches):
        beta = torch.full((len(gates),), 0.5, dtype=torch.float64, requires_grad=True)
        pairs = method.gates(beta, torch.ones(len(gates), dtype=torch.int64), logistic(len(gates)))
        set_upper(gates, pairs[:, 0].detach())
        x, y = fit.batch(torch.arange(k * 128, (k + 1) * 128))
        F.cross_entropy(network(x), y).backward()
        pairs.backward(torch.stack([gate.weights.grad for gate in gates]).double())
        rows.append(beta.grad.clone())
    return torch.stack(rows)


def line(network: nn.Module, gates: list[Gate], batch: tuple[Tensor, Tensor], *, draws: int) -> list[float]:
    """Return the loss at each point of the line; ``draws`` of 0 interpolates."""
    losses = []
    with torch.no_grad():
        for k in range(POINTS):
            t = k / (POINTS - 1)
            values = []
            for _ in range(max(1, draws)):
                set_upper(gates, (torch.rand(len(gates)) < t).double() if draws else torch.full((len(gates),), t))
                values.append(float(F.cross_entropy(network(batch[0]), batch[1])))
            losses.append(sum(values) / len(values))
    return losses


def roughness(losses: list[float], scale: float) -> float:
    """Return the mean squared second difference over a squared scale."""
    second = [losses[k - 1] - 2 * losses[k] + losses[k + 1] for k in range(1, len(losses) - 1)]
    return sum(s * s for s in second) / len(second) / scale**2


def main() -> None:
    """Measure every pair with both gates and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=["4-3", "3-2", "2-1"])
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--draws", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_data("cifar10", arguments.data_root, held_out=5000, seed=0)
    model = build("cifar_resnet20")
    load_weights(model, arguments.weights)
    images = data.fit.batch(torch.arange(128))[0]
    made_by, rows = environment(), []
    for text in arguments.pairs:
        high, low = map(int, text.split("-"))
        network, gates = gated(model, (high, low), images)
        batch = data.fit.batch(torch.arange(5000, 5256))
        lines = {"stochastic": line(network, gates, batch, draws=arguments.draws), "interpolation": line(network, gates, batch, draws=0)}
        scale = max(lines["stochastic"]) - min(lines["stochastic"])
        for gate, losses in lines.items():
            grads = beta_gradients(network, gates, data.fit, SDQ(gate=gate), arguments.batches)
            ratio = (grads.std(0) / grads.mean(0).abs().clamp_min(1e-12)).tolist()
            spread = grads.std(0).tolist()
            chord = [losses[0] + (losses[-1] - losses[0]) * k / (POINTS - 1) for k in range(POINTS)]
            row = {"pair": text, "gate": gate, "batches": arguments.batches, "seed": 0}
            row |= {"gradient_std_over_mean_median": sorted(ratio)[len(ratio) // 2], "gradient_std": mean_interval(spread)["mean"]}
            row |= {"roughness": roughness(losses, scale), "hump": max(a - b for a, b in zip(losses, chord, strict=True))}
            rows.append({**row, "line": " ".join(f"{v:.4f}" for v in losses), "n": len(ratio), **made_by})
            print({name: value for name, value in rows[-1].items() if name not in made_by}, flush=True)
    print(write("landscape", rows))


if __name__ == "__main__":
    main()
