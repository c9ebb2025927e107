"""The verbs of deployment, from the command line: targets, --target, export --check, verify."""

from __future__ import annotations

import html
import json
import shutil

import pytest
import yaml

from bitwright import cli
from bitwright.deployment import measured_latency
from bitwright.errors import TargetError
from bitwright.job import Job
from bitwright.latency import Table, fingerprint, named
from bitwright.pipeline import write_json
from bitwright.policy import Bits, Policy
from bitwright.progress import text_of
from bitwright.recipe import QuantizeOptions, load_recipe
from bitwright.report import render

pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")


def said(capsys, *argv, code=0):
    assert cli.main(list(argv)) == code
    out = capsys.readouterr()
    return json.loads(out.out.strip().splitlines()[-1]) if code == 0 and "--json" in argv else out.err or out.out


def capsys_out(capsys, *argv):
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def test_targets_are_listed_and_one_can_be_asked_for(capsys):
    found = said(capsys, "targets", "--json")["targets"]
    assert {"onnxruntime-x86", "openvino-x86", "bitfusion"} <= set(found)
    assert "W8 A8 runs as int8, faster" in said(capsys, "targets", "onnxruntime-x86")
    assert "did you mean 'openvino-x86'" in said(capsys, "targets", "openvino-x68", code=2)


@pytest.fixture(scope="module")
def deployed_run(tmp_path_factory):
    recipe = {
        "name": "t",
        "threads": 1,
        "data": {"name": "digits", "held_out": 100},
        "model": {"name": "digits_cnn"},
        "float": {"epochs": 1, "batch_size": 64, "max_steps": 20},
        "search": {"method": "uniform", "budgets": ["weight_bits<=8"], "weights": [4, 8, 16], "activations": [8, 16]},
        "quantize": {"calibration": 32, "scales": "power_of_two"},
        "finetune": {"epochs": 1, "batch_size": 64, "max_steps": 5},
    }
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "t.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["run", str(folder / "t.yaml"), "--target", "onnxruntime-x86", "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_a_target_restricts_the_choices_before_the_search_and_gives_its_points_and_format(deployed_run):
    job = Job.load(deployed_run)
    assert {bits for known in job.choices.values() for bits in known} == {(4, 8), (8, 8)}
    assert job.quantize_options.points == ("add", "concat", "pool", "shared")
    assert (deployed_run / "export" / "model.onnx").is_file()
    record = json.loads((deployed_run / "export" / "export.json").read_text())
    assert (record["to"], record["largest_difference"], record["file"]) == ("onnx", 0.0, "model.onnx")
    page = (deployed_run / "report.html").read_text()
    assert "onnx file" in page
    assert "checked bit for bit" in page


def test_a_policy_is_checked_and_every_violation_named(deployed_run, capsys):
    assert said(capsys, "export", str(deployed_run), "--check", "--json")["violations"] == []
    policy = json.loads((deployed_run / "policy.json").read_text())
    policy["sites"]["conv2"] = {"w": 16, "a": 4}
    other = deployed_run / "other.json"
    other.write_text(json.dumps(policy))
    said_of = said(capsys, "export", str(deployed_run), "--check", "--target", "bitfusion", "--policy", str(other), code=2)
    assert "1 of 6 sites do not run there: 'conv2' (convolution) has W16A4, nearest W8A4" in said_of
    policy["sites"]["conv9"] = {"w": 8, "a": 8}
    other.write_text(json.dumps(policy))
    assert "no site 'conv9'; did you mean" in said(capsys, "export", str(deployed_run), "--check", "--policy", str(other), code=2)
    assert "they go with --check" in said(capsys, "export", str(deployed_run), "--target", "bitfusion", code=2)


def test_points_that_the_run_lacks_are_named_by_the_check(deployed_run, capsys, monkeypatch):
    check = ("export", str(deployed_run), "--check")
    assert said(capsys, *check, "--json")["missing_points"] == []
    monkeypatch.setattr(Job, "quantize_options", QuantizeOptions(points=("add",)))
    assert said(capsys, *check, "--json")["missing_points"] == ["concat", "pool", "shared"]
    text = said(capsys, *check)
    assert "! the run has no 8-bit points for concat, pool, shared, so layers beside such tensors may run in float" in text
    assert "run the recipe with --target onnxruntime-x86, or with quantize.points: [add, concat, pool, shared]" in text
    policy = json.loads((deployed_run / "policy.json").read_text())
    policy["sites"] = {site: {"w": 32, "a": 32} for site in policy["sites"]}
    (deployed_run / "float.json").write_text(json.dumps(policy))
    assert said(capsys, *check, "--policy", str(deployed_run / "float.json"), "--json")["missing_points"] == []


def test_layers_that_do_not_run_in_integers_are_said_at_export_and_in_the_report(deployed_run, capsys, monkeypatch, tmp_path):
    from bitwright.exporters import onnx

    right, copied, file = onnx.executed_precision, tmp_path / "run", tmp_path / "m.onnx"
    monkeypatch.setattr(onnx, "executed_precision", lambda *given: {**right(*given), "conv2": "unknown", "fc": "float32: Gemm"})
    alarm = "In the exported file 2 layers of 8 bits or fewer do not run in integers: 'conv2' (unknown), 'fc' (float32: Gemm)."
    assert f"! {alarm}" in said(capsys, "export", str(deployed_run), "--file", str(file))
    found = said(capsys, "export", str(deployed_run), "--file", str(file), "--json")
    assert found["float_fallbacks"] == {"conv2": "unknown", "fc": "float32: Gemm"}
    shutil.copytree(deployed_run, copied)
    record = json.loads((copied / "export" / "export.json").read_text())
    assert record["float_fallbacks"] == {}
    (copied / "export" / "export.json").write_text(json.dumps({**record, "float_fallbacks": found["float_fallbacks"]}))
    assert html.escape(alarm) in render(copied)


def test_verify_prints_a_table_and_refuses_a_damaged_file_with_exit_code_2(deployed_run, capsys, tmp_path):
    file = deployed_run / "export" / "model.onnx"
    found = said(capsys, "verify", str(file), "--json")
    assert (found["to"], found["samples"], found["answer_difference"]) == ("onnx", 2, 0.0)
    assert "keeps its policy of 6 sites; run on 2 samples" in said(capsys, "verify", str(file))
    (tmp_path / "cut.onnx").write_bytes(file.read_bytes()[:-100])
    assert said(capsys, "verify", str(tmp_path / "cut.onnx"), code=2).startswith("bitwright: ")


def test_verify_of_a_folder_names_the_files_in_it_that_may_be_meant(deployed_run, capsys, tmp_path):
    for folder in (deployed_run, deployed_run / "export"):
        wanted = f"{folder}: a folder; give the file: {deployed_run / 'export' / 'model.onnx'}"
        assert wanted in said(capsys, "verify", str(folder), code=2)
    assert f"{tmp_path}: a folder; give the file that `bitwright export` wrote" in said(capsys, "verify", str(tmp_path), code=2)


def test_a_run_names_the_file_that_it_exported_whatever_its_format(deployed_run, capsys):
    assert f"export: {deployed_run / 'export' / 'model.onnx'}" in capsys_out(capsys, "run", str(deployed_run))


@pytest.mark.parametrize(("pin", "line"), [([8, 4], "'conv1' from W8A4 to W8A8; 'fc' from W8A4 to W8A8"), ([8, 8], None)])
def test_pins_that_a_target_moves_are_said_in_the_log(tiny, tmp_path, pin, line):
    told = []
    changes = ["target=size-only", "search.activations=[32]", f"search.pin_first={pin}", f"search.pin_last={pin}"]
    job = Job.open(load_recipe(tiny, changes), tmp_path / "run", log=lambda stage, row: told.append(f"{stage}: {text_of(row)}"))
    assert job.choices["conv1"] == (Bits(8, 8),)
    said_of = f"search: ! target size-only changes the widths that the recipe gives some sites, such as its pins: {line}"
    assert told == ([] if line is None else [said_of])


def test_a_packed_file_that_cannot_say_what_a_target_asks_is_refused_before_anything_is_trained(tiny):
    tiny["target"] = "onnxruntime-x86"
    with pytest.raises(TargetError, match="a packed file cannot say 8-bit points"):
        load_recipe(tiny)
    assert load_recipe({**tiny, "quantize": {"points": []}}).target == "onnxruntime-x86"
    with pytest.raises(TargetError, match="no target and no file of that name"):
        load_recipe({**tiny, "target": "phone"})


def test_latency_needs_a_target_and_a_place_for_its_table(capsys, recipe_file, tmp_path):
    assert "also give --save FILE" in said(capsys, "profile", str(recipe_file), "--measure", code=2)
    argv = ("profile", str(recipe_file), "--measure", "--save", str(tmp_path / "t.json"))
    assert "profile --measure: give --target" in said(capsys, *argv, code=2)


def test_a_network_by_name_is_timed_without_data(capsys, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    file = tmp_path / "t.json"
    named = ("--model", "digits_cnn", "--shape", "1x8x8", "--target", "onnxruntime-x86", "--measure")
    said(capsys, "profile", *named, "--save", str(file), "--policies", "1", "--judge", "0")
    data = json.loads(file.read_text())
    assert data["macs"]["conv1"] > 0
    assert {kind for terms in data["terms"].values() for kind in terms} == {"int8", "float32"}
    assert "also give --model NAME, --target NAME and --save FILE" in said(capsys, "profile", *named, code=2)
    wrong = (*named, "--save", str(file), "--judge", "-1")
    assert "give at least 1 policy to fit on, and 0 or more to judge" in said(capsys, "profile", *wrong, code=2)
    gpu = ("--model", "digits_cnn", "--shape", "1x8x8", "--target", "nvidia-gpu", "--measure", "--save", str(file))
    refused = said(capsys, "profile", *gpu, code=2)
    assert "target nvidia-gpu: tables of whole networks are not measured on GPUs; benchmarks/gpu_latency.py times single layers" in refused
    ignored = ("--model", "digits_cnn", "--data", "digits", "--measure", "--save", str(file), "--sensitivity")
    assert "--sensitivity has no meaning for it" in said(capsys, "profile", *ignored, code=2)


def test_a_table_of_another_machine_is_said_in_the_log_and_in_the_report(tiny, tmp_path, monkeypatch):
    here, told = fingerprint("onnxruntime"), []
    search = {**tiny["search"], "budgets": ["latency<=1ms"], "weights": [8, 32], "activations": [8, 32]}
    recipe = load_recipe(
        {**tiny, "target": "onnxruntime-x86", "latency": str(tmp_path / "t.json"), "search": search, "export": {"to": "onnx"}}
    )
    job = Job.open(recipe, tmp_path / "run", log=lambda stage, row: told.append(f"{stage}: {text_of(row)}"))
    classes = {site.name: {bits: str(job.target.runs(site, bits)) for bits in job.choices[site.name]} for site in job.trace.sites}
    terms = {name: dict.fromkeys(known.values(), 100) for name, known in classes.items()}
    macs = {site.name: site.macs for site in job.trace.sites}
    Table(named(job.target), {**here, "processor": "ANOTHER MACHINE"}, 0, terms, classes, macs).save(tmp_path / "t.json")
    write_json(job, "sites.json", job.sites_table())
    (line,) = told
    assert line.startswith("latency: ! The latency table was measured on another machine (ANOTHER MACHINE, ")
    assert f"than this one ({here['processor']}, " in line
    (job.run.path / "policy.json").write_text(Policy((name, Bits(8, 8)) for name in job.trace.names).to_json())
    assert render(job.run.path).count("measured on another machine (ANOTHER MACHINE") == 1

    monkeypatch.setattr("bitwright.deployment.SECONDS", 0.001)
    measured = measured_latency(job)["latency"]
    assert measured["machine"]["processor"] == here["processor"]
    assert measured["table"]["machine"]["processor"] == "ANOTHER MACHINE"
    write_json(job, "export/export.json", {"to": "onnx", "bytes": 1, "latency": measured})
    assert render(job.run.path).count("measured on another machine (ANOTHER MACHINE") == 1


def test_a_latency_budget_without_a_table_says_how_to_get_one(capsys, recipe_file, tmp_path):
    argv = ("search", str(recipe_file), "--out", str(tmp_path / "r"), "--set", "search.budgets=[latency<=1ms]")
    assert "measure one: bitwright profile --target NAME --measure" in said(capsys, *argv, code=2)
