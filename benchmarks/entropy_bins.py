"""The two parts of SDQ's phase 2, each on and off: accuracy, in-bin variance and entropy of bin occupancy.

    python benchmarks/entropy_bins.py --data-root DATA --weights mlperf_tiny_resnet8.npz [--epochs 3] [--seeds 0 1 2]

MLPerf Tiny's ResNet-8 on CIFAR-10, 2-bit weights (ends at 8), float activations, distilled from itself. ``bins`` is the bin
regularization (weight 0.01, cosine from a quarter of the training); ``entropy`` ties step sizes to each filter's mean magnitude.
Writes results/entropy-bins.csv (accuracy per seed, and means with 95 % intervals) and results/entropy-bins-layers.csv (per layer,
seed 0: bits, in-bin variance in squared steps, entropy in bits).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from record import environment, mean_interval, write

from bitwright.data import load_data
from bitwright.evaluation import evaluate
from bitwright.models import build, load_weights
from bitwright.policy import Bits, Policy
from bitwright.quant import QuantOptions, quantize
from bitwright.sites import trace
from bitwright.training import FinetuneOptions, finetune
from bitwright.training.losses import BinStatistics, bin_statistics


def renamed(values: BinStatistics) -> dict[str, float]:
    """Return the statistics of a layer with the entropy under a name that the switch does not have."""
    return {"bits": values.bits, "variance": values.variance, "occupancy_entropy": values.entropy}


def main() -> None:
    """Train the four combinations with every seed and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--bins", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = build("resnet8")
    load_weights(model, arguments.weights)
    names = trace(model, torch.zeros(1, 3, 32, 32)).names
    policy = Policy((name, Bits(8 if name in (names[0], names[-1]) else 2, 32)) for name in names)
    made_by, rows, layers = environment(), [], []
    for entropy in (False, True):
        for bins in (0.0, arguments.bins):
            accuracies = []
            for seed in arguments.seeds:
                data = load_data("cifar10", arguments.data_root, held_out=5000, seed=seed, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
                forms = QuantOptions(entropy=entropy)
                quantized = quantize(model.eval(), policy, calibration=data.fit, correct=("batchnorm",), options=forms)
                options = FinetuneOptions(
                    epochs=arguments.epochs, lr=0.02, bins=bins, precision="bfloat16", compile=True, channels_last=True, weight_decay=2.5e-5
                )
                finetune(quantized, data.fit, options, teacher=model, seed=seed)
                accuracies.append(evaluate(quantized, data.test).top1)
                setting = {"entropy": entropy, "bins": bins, "epochs": arguments.epochs}
                rows.append({**setting, "seed": seed, "n": len(data.test), "top1": accuracies[-1], "interval": None, **made_by})
                if seed == arguments.seeds[0]:
                    found = bin_statistics(quantized)
                    layers += [{**setting, "layer": name, **renamed(values), **made_by} for name, values in found.items()]
                print(rows[-1], flush=True)
            summary = mean_interval(accuracies)
            rows.append({**setting, "seed": "mean", "n": summary["n"], "top1": summary["mean"], "interval": summary["interval"], **made_by})
    print(write("entropy-bins", rows), write("entropy-bins-layers", layers))


if __name__ == "__main__":
    main()
