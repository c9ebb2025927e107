"""What ran is read from kernels' names and compiled code, and is never what was asked for without evidence."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bitwright.kernels import executed, is_linear, operands_of, precision_of, ran_as, unsupported
from bitwright.policy import Bits
from bitwright.sites import trace
from bitwright.targets import get_target

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = {
    "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16>(cutlass::…::Params)": "int8",
    "sm80_xmma_gemm_i8i32_i8i32_f32_tn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x32_kernel": "int8",
    "ampere_igemm_int8_128x128_ldg4_nn": "int8",
    "triton_tem_fused__int_mm__to_copy_mul_2": "int8",
    "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas": "fp8",
    "nvjet_qqtst_128x256_128x6_2x1_2cta_v_bz_TNT": "fp8",
    "nvjet_sm100_qqtst_128x256_128x6_2x1_2cta_v_bz_TNT": "fp8",
    "void cutlass::device_kernel<…CollectiveMma<…, cutlass::float_e4m3_t, …, cutlass::bfloat16_t>>(…)": "fp8",
    "triton_tem_fused__scaled_mm_0": "fp8",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "bf16",
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn": "bf16",
    "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_kernel": "bf16",
    "void at::native::conv_depthwise2d_forward_kernel<3, c10::BFloat16, int>(…)": "bf16",
    "nvjet_hsh_128x128_64x5_2x1_v_bz_TNN": "fp16",
    "ampere_fp16_s16816gemm_fp16_64x64_ldg8_f2f_stages_64x5_tn": "fp16",
    "ampere_sgemm_128x64_tn": "float32",
    "nvjet_xyz_128x128_64x5_TNN": "unknown",
    "triton_tem_fused_addmm_1": "unknown",
    # no product of a layer
    "void pytorch_flash::flash_fwd_kernel<…cutlass::bfloat16_t…>(…)": None,
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::…)": None,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": None,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, …>(…)": None,
    "triton_per_fused__int_mm_abs_amax_clamp_0": None,
    "triton_poi_fused__scaled_mm__to_copy_0": None,
    "void at::native::vectorized_elementwise_kernel<4, …c10::BFloat16…>(…)": None,
}
CODE = """
@triton_heuristics.pointwise(triton_meta={'signature': {'in_ptr0': '*bf16', 'out_ptr0': '*i8', 'xnumel': 'i32'}})
@triton.jit
def triton_poi_fused_round_0(in_ptr0, out_ptr0, xnumel): pass
@triton_heuristics.template(triton_meta={'signature': {'arg_A': '*i8', 'arg_B': '*i8', 'in_ptr2': '*bf16', 'out_ptr0': '*bf16'}})
@triton.jit
def triton_tem_fused_mm_mul_1(arg_A, arg_B, in_ptr2, out_ptr0): pass
@triton_heuristics.template(triton_meta={'signature': {'arg_A': '*bf16', 'arg_B': '*i8', 'out_ptr0': '*bf16'}})
@triton.jit
def triton_tem_fused__int_mm_2(arg_A, arg_B, out_ptr0): pass
"""


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_names_of_kernels_tell_the_operands(name, kind):
    assert precision_of(name) == kind


def test_compiled_code_goes_before_names():
    found = operands_of(CODE)
    assert found == {"triton_tem_fused_mm_mul_1": "int8", "triton_tem_fused__int_mm_2": "unknown"}
    assert executed([*found, "triton_poi_fused_round_0"], found) == {"int8": 1, "unknown": 1}


def test_only_products_all_of_the_precision_asked_for_are_called_so():
    names = ["nvjet_qqtst_a_TNT"] * 4 + ["void pytorch_flash::flash_fwd_kernel<bfloat16>"]
    assert ran_as("fp8", executed(names), layers=4)
    assert not ran_as("fp8", executed(names), layers=5)
    assert not ran_as("fp8", executed([*names, "nvjet_tst_b_TNT"]), layers=4)
    assert not ran_as("int8", executed(["nvjet_tst_b_TNT"]))
    assert not ran_as("int8", executed(["triton_poi_fused_copy_0"]))


def test_what_cannot_run_says_why():
    linear, classes = nn.Linear(64, 64), nn.Linear(512, 1000)
    assert unsupported(linear, "fp8", (9, 0)) is None
    assert unsupported(linear, "fp8", (8, 6)) == "fp8 needs compute capability 8.9, this GPU has 8.6"
    assert unsupported(classes, "fp8", (9, 0)) == "fp8 products need multiples of 16 features, this layer has 512 and 1000"
    assert unsupported(classes, "int8", (9, 0)) is None
    assert unsupported(nn.Conv2d(8, 8, 3), "int8", (9, 0)) == "torchao has no int8 kernel for this convolution"
    assert unsupported(nn.Conv2d(8, 8, 3), "bf16", (9, 0)) is None
    assert [is_linear(nn.Conv2d(8, 8, 1, **more)) for more in ({}, {"stride": 2}, {"groups": 8}, {"padding": 1})] == [
        True,
        True,
        False,
        False,
    ]


def test_the_target_claims_no_bfloat16_arithmetic():
    sites = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 3, 3, 3)).sites
    assert {get_target("nvidia-gpu").runs(site, Bits(16, 16)) for site in sites} == {"float32 with bf16 weights"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_latency")


def test_each_layer_is_timed_in_the_forms_that_it_has(script):
    cases = script.cases("resnet18", 32)
    assert sum(case.alike for case in cases if case.form != "pixels") == 21
    forms = {case.name: case for case in cases if case.form == "pixels"}
    assert [case.alike for case in forms.values()] == [1, 1, 1]  # the strided projections
    one = next(iter(forms.values()))
    conv = next(case for case in cases if case.name == one.name and case.form == "convolution")
    assert (one.shape, conv.shape) == ((32 * 28 * 28, 64), (32, 64, 56, 56))
    assert (script.asked(conv), script.asked(one)) == (("bf16",), ("bf16", "int8", "fp8"))
    x = torch.randn(1, 64, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(one.module(x[:, :, ::2, ::2].movedim(1, -1)), conv.module(x).movedim(1, -1), rtol=1e-3, atol=1e-4)


def test_int8_of_a_block_is_near_float(script):
    pytest.importorskip("torchao", reason="torchao is not installed")
    case = script.Case("block", "block", script.Block(32, 2), (2, 24, 32), products=4)
    module, x, wanted = script.prepared(case, "int8", torch.device("cpu"))
    assert module.qkv.weight.qdata.dtype == torch.int8
    assert case.module.qkv.weight.dtype == torch.float32
    with torch.no_grad():
        assert (module(x).float() - wanted).norm() / wanted.norm() < 0.02


def test_rows_say_what_ran_and_confirm_only_that(script, monkeypatch):
    ran = {"bf16": ["nvjet_tst_a_TNT"] * 4, "int8": ["cutlass_80_tensorop_i16832gemm_s8_a"] * 3 + ["nvjet_tst_a_TNT"]}
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(
        script, "prepared", lambda case, precision, device: (asked.append(precision) or case.module, x := torch.ones(2, 24, 32), x)
    )
    monkeypatch.setattr(script, "compiled", lambda module, x: (lambda: module(x), {}))
    monkeypatch.setattr(script, "kernels", lambda call: ran[asked[-1]])
    monkeypatch.setattr(script, "recorded", lambda call: None)
    monkeypatch.setattr(script, "replayed", lambda recording: 2.5)
    case = script.Case("block", "block", script.Block(32, 2), (2, 24, 32), products=4)
    bf16, int8, fp8 = script.rows_of(case, 3, torch.device("cpu"))
    assert (bf16["executed"], bf16["confirmed"], bf16["median_us"], bf16["n"]) == ("bf16 x4", True, 2.5, 3)
    assert (int8["executed"], int8["confirmed"]) == ("bf16 x1 int8 x3", False)
    assert (fp8["executed"], fp8["skipped"]) == ("", "fp8 needs compute capability 8.9, this GPU has 8.6")
    monkeypatch.setattr(script, "kernels", lambda call: 1 / 0)
    assert {row["skipped"] for row in script.rows_of(case, 3, torch.device("cpu"))[:2]} == {"ZeroDivisionError: division by zero"}


def test_median_and_quartiles(script):
    assert script.spread([1.0, 2.0, 3.0, 4.0, 100.0]) == {"median_us": 3.0, "low_us": 2.0, "high_us": 4.0, "n": 5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_script_says_so():
    done = subprocess.run([sys.executable, "gpu_latency.py"], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "skipped: no CUDA device\n"), done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_block_runs_in_the_precisions_asked_for(script):
    pytest.importorskip("torchao", reason="torchao is not installed")
    rows = script.rows_of(script.cases("block", 32)[0], 3, torch.device("cuda"))
    assert [row["asked"] for row in rows] == ["bf16", "int8", "fp8"]
    for row in rows:
        assert row["skipped"] or (row["confirmed"] and row["n"] == 3 and row["error"] < 0.1), json.dumps(row)
