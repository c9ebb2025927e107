"""The whole job from Python, on scikit-learn's digits: a float network in, a packed mixed-precision network out.

python examples/quickstart.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import bitwright as bw
from bitwright.methods.sdq import SDQ
from bitwright.models import build


def main(epochs: int = 10) -> float:
    """Train, search, fine-tune, pack and load; return the packed network's accuracy."""
    torch.manual_seed(0)
    data = bw.load_data("digits", None, held_out=200, seed=0)
    model = build("digits_cnn")
    bw.finetune(model, data.fit, bw.FinetuneOptions(epochs=epochs, batch_size=64, lr=0.1))

    found = bw.trace(model, data.example())  # what can be quantized
    choices = bw.build_choices(found, weights=range(1, 9), activations=[4])  # first and last layer stay at 8 bits
    pins = {name: allowed[0] for name, allowed in choices.items() if len(allowed) == 1}
    budget = bw.parse_budget("weight_bits<=2.5", found.sites, pins=pins)
    problem = bw.Problem(model, found, choices, budget, data, seed=0)
    result = bw.search(problem, SDQ(epochs=epochs, batch_size=64))

    quantized = bw.quantize(model, result.policy, calibration=data.fit, correct=("batchnorm",))
    bw.finetune(quantized, data.fit, bw.FinetuneOptions(epochs=epochs, batch_size=64), teacher=model)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        artefact = bw.export(quantized, "packed", path, example=data.example(), policy=result.policy, reference=("digits_cnn", {}))
        packed = bw.load(path)
    accuracy = bw.evaluate(packed, data.test).top1
    print(f"float {bw.evaluate(model, data.test).top1:.3f}, packed {accuracy:.3f} in {artefact.size} bytes")
    print({name: str(bits) for name, bits in result.policy.items()})
    return accuracy


if __name__ == "__main__":
    main()
