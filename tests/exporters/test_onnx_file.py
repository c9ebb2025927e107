"""The sample in a file has a well-defined answer, and what a check says of a file names the one that was asked for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from deployed import deployed
from torch import nn

from bitwright.errors import ExportError
from bitwright.exporters import Source, _onnx_file, export, verify

PAIRS = [[[2, 3], "float32"]]


def sampled(allowed, run, pairs=PAIRS):
    return _onnx_file._sample(Source(nn.Identity(), torch.zeros(2, 3), None, None), pairs, allowed, run)


def test_noise_whose_answer_lies_on_the_border_of_two_codes_is_no_reason_to_refuse_a_file(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    model, x, policy = deployed("inverted", [(3, 2)])  # 4.7 % off on the first draw, and 0.03 % on the example
    export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, outputs=0.01)
    properties = {entry.key: entry.value for entry in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert json.loads(properties[_onnx_file.KEY])["sample"]["draw"] > 0
    assert verify(tmp_path / "m.onnx").answer <= 0.01


def test_the_first_draw_whose_answer_is_clear_is_kept_or_the_best_one():
    gaps = iter([0.5, 0.2, 0.01, 0.0])
    assert sampled(0.1, lambda values: values[0] * (1 + next(gaps)))["draw"] == 2
    gaps = iter([0.09, 0.05, *[0.08] * 14])
    assert sampled(0.1, lambda values: values[0] * (1 + next(gaps)))["draw"] == 1


def test_no_answer_is_kept_where_none_of_the_draws_has_a_clear_one():
    tried = []
    assert sampled(0.1, lambda values: tried.append(values) or values[0] * float("nan"))["answer"] is None
    assert len(tried) == _onnx_file.DRAWS


@pytest.mark.parametrize(("allowed", "pairs"), [(0.0, PAIRS), (0.1, [[[2, 3], "int64"]])])
def test_the_network_s_answer_to_the_first_draw_is_kept_where_equality_is_asked_for_or_all_draws_are_one(allowed, pairs):
    found = sampled(allowed, lambda values: pytest.fail("not to be run"), pairs)
    assert (found["draw"], found["answer"][0]) == (0, [2, 3])


def test_a_check_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    model, x, policy = deployed("tiny", [(4, 8)])
    right = _onnx_file._weight_check
    monkeypatch.setattr(_onnx_file, "_weight_check", lambda *given: replace(right(*given), levels=17))
    message = r"^m\.onnx: does not keep its policy: the weight '0' has 17 distinct values and 4 bits allow 16; nothing was written$"
    with pytest.raises(ExportError, match=message):
        export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)
    assert list(tmp_path.iterdir()) == []
