"""ONNX files compute the network's codes, say so layer by layer, and are refused where they do not."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from deployed import ALL, IMAGES, IN_PLACE, NETWORKS, InPlace, OptionA, deployed
from torch import nn

from bitwright.errors import ExportError
from bitwright.exporters import Source, _plain_copy, export, verify
from bitwright.policy import Policy
from bitwright.quant import QuantOptions, quantize
from bitwright.sites import trace

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")

MIXED = [(8, 8), (4, 4), (2, 8), (1, 4), (3, 1), (5, 6), (16, 16), (32, 32), (7, 32), (32, 8)]
INTEGERS = [(8, 8), (4, 4), (2, 8), (6, 3)]


@pytest.mark.parametrize(("name", "bits"), [("option-a", [(8, 8)]), ("option-a", INTEGERS), ("inverted", [(4, 4)]), ("digits", INTEGERS)])
def test_power_of_two_scales_are_equal_bit_for_bit_and_every_layer_runs_in_integers(tmp_path, name, bits):
    model, x, policy = deployed(name, bits, scales="power_of_two")
    artefact = export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, fallback="raise")
    facts = json.loads((tmp_path / "m.onnx.parity.json").read_text())
    assert facts["exact"] is True
    assert (artefact.largest_difference, facts["outputs"], facts["float_fallbacks"]) == (0.0, 0.0, {})
    assert {row["steps"] for row in facts["alone"] + facts["chained"]} == {0}
    assert all(kind.startswith("int8") for kind in facts["executed"].values())
    assert artefact.levels == verify(tmp_path / "m.onnx").levels
    assert all(artefact.levels[site] <= 2**w for site, (w, _) in policy.items())


@pytest.mark.parametrize(("name", "bits"), [*((name, MIXED) for name in sorted(NETWORKS)), ("inverted", [(8, 8)]), ("block", [(8, 8)])])
def test_free_scales_are_within_one_step_layer_by_layer(tmp_path, name, bits):
    model, x, policy = deployed(name, bits)
    artefact = export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, outputs=0.05 if len(bits) == 1 else 1.0)
    assert max((row["steps"] for row in artefact.parity["alone"]), default=0) <= 1
    verified = verify(tmp_path / "m.onnx")
    assert verified.policy == policy
    rows = {(row.name, row.kind): row for row in verified.tensors}
    for site, (w, _) in policy.items():
        if (site, "weight") in rows and w <= 8:
            assert rows[site, "weight"].levels <= 2**w
        if (site, "weight") in rows and w == 16:
            assert rows[site, "weight"].stored == "BFLOAT16"


@pytest.mark.parametrize(("scales", "bits"), [("free", [(8, 8)]), ("free", [(8, 8), (4, 4)]), ("power_of_two", [(8, 8), (3, 5)])])
def test_groups_of_a_transposed_convolution_share_the_scales_of_their_channels(tmp_path, scales, bits):
    model, x, policy = deployed("grouped", bits, scales=scales)
    artefact = export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)
    assert artefact.parity["outputs"] < (0.02 if scales == "free" else 1e-6)
    assert artefact.levels["up"] <= 2 ** policy["up"].w


@pytest.mark.parametrize("scales", ["free", "power_of_two"])
@pytest.mark.parametrize("change", sorted(IN_PLACE))
def test_what_is_changed_in_place_after_it_was_quantized_is_compared_as_it_was(tmp_path, change, scales):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = InPlace(IN_PLACE[change]).eval()
    sites = trace(net, IMAGES).sites
    policy = Policy({site.name: (8, 8) for site in sites})
    options = QuantOptions(points=ALL, scales=scales)
    model = quantize(net, policy, calibration=IMAGES, sites=sites, options=options)
    artefact = export(model, "onnx", tmp_path / "m.onnx", example=IMAGES, policy=policy)
    assert artefact.parity["outputs"] < 0.01


def test_the_file_needs_the_checker_and_the_runtime_alone(tmp_path):
    import onnxruntime

    model, x, policy = deployed("option-a", [(8, 8)])
    export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):  # the batch is free
        (out,) = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})
        assert out.shape == (batch, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.parity.json"]


@pytest.mark.parametrize(("width", "stored"), [(4, "INT4"), (2, "INT2"), (5, "INT8")])
def test_native_types_are_of_the_width_where_no_integer_kernel_is_lost(tmp_path, width, stored):
    model, x, policy = deployed("tiny", [(width, 32)])
    export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, types="native", outputs=0.001)
    assert {row.stored for row in verify(tmp_path / "m.onnx").tensors} == {stored}
    model, x, policy = deployed("tiny", [(width, 8)])
    export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, types="native", outputs=1.0)
    assert {row.stored for row in verify(tmp_path / "m.onnx").tensors} == {"INT8", "UINT8"}


@pytest.mark.parametrize(
    "options", [{"quantizer": "dorefa"}, {"quantizer": "pact"}, {"quantizer": "entropy"}, {"per_channel": False}, {"narrow": True}]
)
def test_every_quantizer_is_exported(tmp_path, options):
    model, x, policy = deployed("tiny", [(4, 4), (7, 8), (1, 4)], **options)
    artefact = export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, outputs=1.0)
    assert all(artefact.levels[site] <= 2**w for site, (w, _) in policy.items())


def test_without_points_layers_fall_back_to_float_and_that_is_said_or_refused(tmp_path):
    model, x, policy = deployed("option-a", [(8, 8)], points=())
    artefact = export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)
    fell = dict.fromkeys(("stem", "two"), "float32: FusedConv")
    assert artefact.to_dict()["float_fallbacks"] == artefact.parity["float_fallbacks"] == fell
    message = r"does not run these in integers: 'stem' \(float32: FusedConv\), 'two' .*; quantize with a target or points"
    with pytest.raises(ExportError, match=message):
        export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, fallback="raise")


def test_a_layer_that_is_not_seen_in_the_runtimes_network_is_named_as_a_fall_back(tmp_path, monkeypatch):
    from bitwright.exporters import onnx as exporter

    model, x, policy = deployed("tiny", [(8, 8)])
    right = exporter.executed_precision
    monkeypatch.setattr(exporter, "executed_precision", lambda *given: {**right(*given), "4": "unknown"})
    assert export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy).float_fallbacks == {"4": "unknown"}


@pytest.mark.parametrize("call", [F.leaky_relu, F.hardswish, F.silu, torch.sigmoid])
def test_a_convolution_falls_back_before_an_activation_that_no_grid_is_taken_through_and_that_is_said(tmp_path, call):
    model = quantize(Refused(call), Policy({"layer": (8, 8)}), calibration=IMAGES, options=QuantOptions(points=ALL))
    artefact = export(model, "onnx", tmp_path / "m.onnx", example=IMAGES)
    assert list(artefact.float_fallbacks) == ["layer"]


# ---- what is refused


class Refused(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.layer, self.call = nn.Conv2d(3, 3, 1), call

    def forward(self, x):
        return self.call(self.layer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.fft.fft(x).real, "the call '.*fft.*' in the network itself has no ONNX form"),
        (lambda x: F.adaptive_avg_pool2d(x, 3), r"adaptive pooling from \[8, 8\] to \[3, 3\] has windows of several sizes"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override"),
        (
            lambda x: torch.div(x, 0.1, rounding_mode="floor"),
            "the call 'div' in the network itself has rounding_mode='floor'",
        ),
        (lambda x: F.softplus(x, beta=3), "the call 'softplus' in the network itself has beta=3"),
        (lambda x: x.mean((2, 3), dtype=torch.float64), "the call 'mean' in the network itself has dtype=torch.float64"),
        (lambda x: x if x.sum() > 0 else -x, "cannot be followed as a graph"),
    ],
)
def test_what_has_no_form_is_an_error_that_names_it(tmp_path, call, message):
    model = quantize(Refused(call), Policy({"layer": (8, 8)}), calibration=IMAGES)
    with pytest.raises(ExportError, match=message):
        export(model, "onnx", tmp_path / "m.onnx", example=IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_ends_in_a_fault_of_its_writer_is_an_error_that_names_it(tmp_path, monkeypatch):
    from bitwright.exporters import _writing

    monkeypatch.setitem(_writing._OPERATORS, "softmax", lambda writer, node, values: values[9])
    model = quantize(Refused(lambda x: x.softmax(1)), Policy({"layer": (8, 8)}), calibration=IMAGES)
    with pytest.raises(ExportError, match=r"the call 'softmax' in the network itself has arguments that .* \(IndexError: list index"):
        export(model, "onnx", tmp_path / "m.onnx", example=IMAGES)


@pytest.mark.parametrize("call", [lambda x: x - x.mean(), lambda x: x / (1 + x.sum().abs()), lambda x: x.mean(dtype=torch.float32) + x])
def test_a_mean_or_a_sum_without_axes_is_over_all(tmp_path, call):
    model = quantize(Refused(call), Policy({"layer": (8, 8)}), calibration=IMAGES)
    assert export(model, "onnx", tmp_path / "m.onnx", example=IMAGES).parity["outputs"] < 0.01


@pytest.mark.parametrize(("tokens", "exact"), [(7, False), (8, True)])
def test_a_mean_is_a_sum_of_integers_where_it_is_over_a_power_of_two_of_values(tmp_path, tokens, exact):
    class Mean(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean(1)

    x = torch.rand(4, tokens, 8, generator=torch.Generator().manual_seed(0))
    model = quantize(Mean(nn.Linear(8, 4)), Policy({"0": (8, 8)}), calibration=x, options=QuantOptions(scales="power_of_two"))
    assert export(model, "onnx", tmp_path / "m.onnx", example=x).parity["exact"] is exact


def test_wide_half_integer_codes_and_float_networks_and_unknown_options_are_errors(tmp_path):
    model, x, policy = deployed("tiny", [(8, 8)], quantizer="dorefa")
    with pytest.raises(ExportError, match=r"'0' has codes from -255 to 255.* use quantizer='lsq', or 7 bits"):
        export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)
    with pytest.raises(ExportError, match="no quantized layer"):
        export(OptionA(), "onnx", tmp_path / "m.onnx", example=IMAGES)
    with pytest.raises(ExportError, match="option types='int4': expected 'int8' or 'native'"):
        export(model, "onnx", tmp_path / "m.onnx", example=x, types="int4")
    with pytest.raises(ExportError, match="no option 'step' for onnx; did you mean 'steps'"):
        export(model, "onnx", tmp_path / "m.onnx", example=x, step=1)


def test_an_artefact_that_computes_something_else_is_refused_and_nothing_stays(tmp_path):
    model, x, policy = deployed("option-a", [(8, 8)], scales="power_of_two")
    other, _, _ = deployed("option-a", [(8, 8)], scales="power_of_two")
    with torch.no_grad():
        other.two.weight.mul_(1.5)
    from bitwright.exporters.onnx import Onnx

    Onnx().write(Source(_plain_copy(model), x, policy, None), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"does not reproduce the network: asked for equal codes .*'point:"):
        Onnx().check(Source(_plain_copy(other), x, policy, None), tmp_path / "m.onnx")


def test_outputs_beyond_the_bound_are_refused(tmp_path):
    model, x, policy = deployed("tiny", [(4, 4)])
    with pytest.raises(ExportError, match=r"its outputs differ by .* % of the largest .*, and 0\.001 % is allowed"):
        export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, outputs=1e-5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sites", [("0",), ("2",), ("0", "2"), ("5",)])
def test_negated_weights_are_refused_though_a_step_is_all_that_activations_of_one_bit_have(tmp_path, monkeypatch, sites):
    from bitwright.exporters._emission import Emission

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()
    policy = Policy(dict.fromkeys(("0", "2", "5"), (4, 1)))
    model = quantize(net, policy, calibration=IMAGES)
    export(model, "onnx", tmp_path / "right.onnx", example=IMAGES, policy=policy)
    right = Emission._write_codes

    def negated(self, coded, scale, codes):
        return right(self, coded, scale, -codes if coded.address in sites else codes)

    monkeypatch.setattr(Emission, "_write_codes", negated)
    found = (
        r"its outputs differ by .* and 1 % is allowed" if sites == ("5",) else r"\(1 bit\) differ, by .* steps in all, and .* are allowed"
    )
    with pytest.raises(ExportError, match=f"ONNX Runtime does not reproduce the network: .*{found}; nothing was written"):
        export(model, "onnx", tmp_path / "wrong.onnx", example=IMAGES, policy=policy)


def test_what_outputs_may_differ_by_is_far_from_all_of_them_at_any_width():
    from bitwright.exporters._graph import capture
    from bitwright.exporters._parity import allowed_outputs

    allowed = []
    for width in (1, 2, 3, 4, 8):
        model, x, _ = deployed("tiny", [(8, width)])
        allowed.append(allowed_outputs(capture(model, x), None))
    assert allowed == [0.3, 0.3, 2 / 7, 2 / 15, 0.05]


# ---- verify


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model, x, policy = deployed("option-a", [(4, 8)], scales="power_of_two")
    path = tmp_path_factory.mktemp("good") / "m.onnx"
    export(model, "onnx", path, example=x, policy=policy)
    return path


def test_verify_counts_levels_runs_the_file_and_tells_them(good):
    found = verify(good).to_dict()
    assert found["samples"] == 2
    assert found["answer_difference"] == 0.0
    assert {row["stored"] for row in found["tensors"]} == {"INT8", "UINT8"}
    assert json.loads(json.dumps(found))["policy"]["two"] == [4, 8]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(good, tmp_path, share):
    data = good.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ExportError, match=r"truncated|cut off|does not match|no format"):
        verify(tmp_path / "cut.onnx")


@pytest.mark.parametrize("place", [0.05, 0.3, 0.6, 0.95])
def test_a_flipped_bit_is_refused(good, tmp_path, place):
    data = bytearray(good.read_bytes())
    data[int(len(data) * place)] ^= 4
    (tmp_path / "bad.onnx").write_bytes(data)
    with pytest.raises(ExportError, match=r"bad\.onnx"):
        verify(tmp_path / "bad.onnx", to="onnx")


def _resigned(path, target, change):
    """Change a model as somebody would who also mends its checksum."""
    from bitwright.exporters._onnx_file import SUM, checksum

    model = onnx.load(str(path))
    change(model)
    entry = next(entry for entry in model.metadata_props if entry.key == SUM)
    entry.value = checksum(model)
    target.write_bytes(model.SerializeToString(deterministic=True))
    return target


def test_more_levels_than_the_policy_and_another_answer_are_refused_though_the_checksum_fits(good, tmp_path):
    def widen(model):
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == "two.weight")
        weight.raw_data = bytes(range(256)) * (len(weight.raw_data) // 256)

    def scale(model):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight_scale")
        tensor.raw_data = bytes(4) * (len(tensor.raw_data) // 4)

    with pytest.raises(ExportError, match=r"does not keep its policy: the weight 'two' has .* distinct values and 4 bits allow 16"):
        verify(_resigned(good, tmp_path / "wide.onnx", widen))
    with pytest.raises(ExportError, match=r"its output on the sample differs by .* from the network's own answer"):
        verify(_resigned(good, tmp_path / "other.onnx", scale))


def test_metadata_that_do_not_fit_are_refused(good, tmp_path):
    from bitwright.exporters._onnx_file import KEY

    def forget(model):
        del model.graph.initializer[:]

    def nonsense(model):
        next(entry for entry in model.metadata_props if entry.key == KEY).value = '{"format": "bitwright-onnx-1", "policy": 3}'

    def external(model):
        model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL

    for change, message in ((forget, "refused by onnx.checker"), (nonsense, "metadata do not parse"), (external, "refers to other files")):
        with pytest.raises(ExportError, match=message):
            verify(_resigned(good, tmp_path / "bad.onnx", change))


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ExportError, match="of no format that bitwright writes"):
        verify(tmp_path / "a.txt")
    with pytest.raises(ExportError, match="no such file"):
        verify(tmp_path / "b.onnx")
    (tmp_path / "c.onnx").write_bytes(onnx.ModelProto().SerializeToString())
    with pytest.raises(ExportError, match="bitwright did not write it"):
        verify(tmp_path / "c.onnx", to="onnx")


def test_a_packed_file_is_verified_too(tmp_path):
    from bitwright import models
    from bitwright.exporters import Verification
    from bitwright.sites import trace

    model = models.build("digits_cnn").eval()
    policy = Policy(dict.fromkeys(trace(model, torch.zeros(1, 1, 8, 8)).names, (3, 32)))
    quantized = quantize(model, policy)
    export(quantized, "packed", tmp_path / "m.safetensors", example=torch.rand(2, 1, 8, 8), policy=policy, reference=("digits_cnn", {}))
    found = verify(tmp_path / "m.safetensors")
    assert isinstance(found, Verification)
    assert set(found.levels.values()) <= set(range(9))
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:-9])
    with pytest.raises(ExportError, match="truncated"):
        verify(tmp_path / "m.safetensors")


def test_what_a_packed_file_cannot_say_is_an_error_that_names_it(tmp_path):
    model, x, policy = deployed("digits", [(8, 8)])
    with pytest.raises(ExportError, match="cannot say 'point:14:relu' of a target; give --to onnx"):
        export(model, "packed", tmp_path / "m.safetensors", example=x, policy=policy)
    model, x, policy = deployed("digits", [(8, 8)], points=(), scales="power_of_two")
    with pytest.raises(ExportError, match="the BatchNorm 'bn1' is folded"):
        export(model, "packed", tmp_path / "m.safetensors", example=x, policy=policy)


def test_options_in_quantize_reach_the_graph():
    assert QuantOptions(scales="power_of_two").integer
    assert not QuantOptions().integer


def test_a_policy_that_the_layers_do_not_run_at_is_refused_at_export_and_in_a_file(good, tmp_path):
    from bitwright.exporters._onnx_file import KEY

    model, x, policy = deployed("tiny", [(8, 8)])
    for wrong, message in (
        (Policy(dict.fromkeys(policy, (2, 2))), "the policy says W2A2 for"),
        (Policy({**policy, "zzz": (2, 2)}), "'zzz', which is no quantized layer"),
    ):
        with pytest.raises(ExportError, match=message):
            export(model, "onnx", tmp_path / "m.onnx", example=x, policy=wrong)
    assert not (tmp_path / "m.onnx").exists()

    def claim(model):
        entry = next(entry for entry in model.metadata_props if entry.key == KEY)
        content = json.loads(entry.value)
        content["policy"]["sites"] = {site: {"w": 1, "a": 1} for site in content["policy"]["sites"]}
        entry.value = json.dumps(content)

    with pytest.raises(ExportError, match="tampered with or damaged: the policy says W1A1"):
        verify(_resigned(good, tmp_path / "claims.onnx", claim))


@pytest.mark.parametrize(("option", "value"), [("steps", "abc"), ("outputs", "much"), ("types", "int3")])
def test_an_option_of_another_type_is_one_line(tmp_path, option, value):
    model, x, policy = deployed("tiny", [(8, 8)])
    with pytest.raises(ExportError, match=f"export: (option )?{option}"):
        export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy, **{option: value})


@pytest.mark.parametrize(
    ("to", "option", "value", "expected"),
    [
        ("onnx", "outputs", "nan", "expected a finite number"),
        ("openvino", "outputs", "inf", "expected a finite number"),
        ("qonnx", "outputs", -0.1, "expected greater than or equal to 0"),
        ("onnx", "outputs", "2", "expected less than or equal to 1"),
        ("openvino", "outputs", 1.5, "expected less than or equal to 1"),
        ("onnx", "steps", "-1", "expected greater than or equal to 0"),
        ("qonnx", "steps", -1, "expected greater than or equal to 0"),
    ],
)
def test_a_bound_without_a_meaning_is_one_line(tmp_path, to, option, value, expected):
    model, x, policy = deployed("tiny", [(8, 8)])
    with pytest.raises(ExportError, match=f"export: option {option}={value!r}: {expected}$"):
        export(model, to, tmp_path / "m.xml", example=x, policy=policy, **{option: value})


def test_a_last_layer_that_computes_something_else_is_refused_whatever_the_width_of_the_grids(tmp_path):
    from bitwright.exporters.onnx import Onnx

    model, x, policy = deployed("tiny", [(8, 2)])  # a bound of two steps of 2 bits is two thirds of the output
    export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)

    def shift(model):
        weight = max((t for t in model.graph.initializer if t.name.endswith("weight_scale")), key=lambda t: t.name)
        values = onnx.numpy_helper.to_array(weight) * 1.1
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), weight.name))

    changed = _resigned(tmp_path / "m.onnx", tmp_path / "changed.onnx", shift)
    with pytest.raises(ExportError, match=r"given the network's own codes, its outputs differ by .* and 1 % is allowed"):
        Onnx().check(Source(_plain_copy(model), x, policy, None), changed)
