"""Step sizes of large tensors: the values that decide are few, and all of them are looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.quant import calibration
from bitwright.quant.calibration import calibrate
from bitwright.quant.functional import fake_quantize

WIDTHS = (1, 2, 4, 8)


def heavy_tailed(count: int = 5000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator).abs() ** 2
    x[count // 3] = 40.0  # alone in its range
    return x


def error(x: Tensor, step: Tensor, bits: int, *, signed: bool) -> float:
    return float((fake_quantize(x, step, bits, signed=signed) - x).square().mean())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [False, True])
def test_a_thinned_tensor_gets_a_step_as_good_as_the_whole(monkeypatch: pytest.MonkeyPatch, bits: int, signed: bool) -> None:
    x = heavy_tailed() - 2.0 * signed
    whole = {rule: calibrate(x, bits, signed=signed, rule=rule) for rule in ("minmax", "mse")}
    monkeypatch.setattr(calibration, "SAMPLE", 500)
    assert torch.equal(calibrate(x, bits, signed=signed, rule="minmax"), whole["minmax"])
    thinned = calibrate(x, bits, signed=signed)
    assert error(x, thinned, bits, signed=signed) < 1.1 * error(x, whole["mse"], bits, signed=signed)


def test_one_large_value_counts_though_the_rest_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    x = heavy_tailed()
    monkeypatch.setattr(calibration, "SAMPLE", 500)
    kept, missed = (error(x, calibrate(values, 8, signed=False), 8, signed=False) for values in (x, x[x < 20]))
    assert missed > 3 * kept


def test_the_percentile_rule_keeps_its_share_of_a_thinned_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    x = heavy_tailed(100_000)
    monkeypatch.setattr(calibration, "SAMPLE", 20_000)
    top = float(calibrate(x, 8, signed=False, rule="percentile")) * 255
    assert float((x <= top).float().mean()) == pytest.approx(calibration.PERCENTILE, abs=3e-4)


def test_a_tensor_that_is_all_tail_is_thinned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SAMPLE", 100)
    x = torch.linspace(0.6, 1.0, 5001)
    assert float(calibrate(x, 8, signed=False, rule="minmax")) == pytest.approx(1 / 255)
    assert float(calibrate(x, 8, signed=False)) == pytest.approx(1 / 255, rel=0.03)
