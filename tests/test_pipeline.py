"""The stages: what they write, what they skip, and that a killed run ends as if it had not been."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bitwright import pipeline
from bitwright.baselines import COLUMNS
from bitwright.compare import compare
from bitwright.data import DatasetSplit, Mix, MixedSplit
from bitwright.errors import BudgetError, PolicyError, RecipeError, RunError, TrainingError
from bitwright.exporters.packed import load
from bitwright.job import Job, on_device
from bitwright.policy import Policy
from bitwright.recipe import load_recipe
from bitwright.runs import Run, load_tree, read_jsonl

FILES = ("recipe.yaml", "manifest.json", "sites.json", "search.jsonl", "search.json", "policy.json", "finetune.jsonl", "float.jsonl")
FILES += ("model.safetensors", "float.safetensors", "statistics.json", "evaluation.json", "baselines.json", "baselines.csv")
FILES += ("export/model.safetensors", "export/export.json", "report.html")


# ---- what a run leaves


def test_a_run_leaves_every_file_and_marks_every_stage(finished_run: Path) -> None:
    assert [name for name in FILES if not (finished_run / name).is_file()] == []
    assert set(Run.load(finished_run).manifest["stages"]) == set(pipeline.STAGES)


def test_the_policy_keeps_the_budget_and_the_ends(finished_run: Path) -> None:
    job = Job.load(finished_run)
    assert job.problem.feasible(job.policy)
    assert job.policy["conv1"].w == job.policy["fc"].w == 8
    assert {bits.a for bits in job.policy.values()} == {4, 8}
    assert job.describe(job.policy)["average_weight_bits"] <= 2.5


def test_the_artefact_gives_the_networks_own_logits_and_the_size_said(finished_run: Path) -> None:
    job = Job.load(finished_run)
    x = job.data.test.batch(torch.arange(16))[0]
    with torch.no_grad():
        assert torch.equal(load(finished_run / "export/model.safetensors").eval()(x), job.quantized(x))
    size = (finished_run / "export/model.safetensors").stat().st_size
    assert size == json.loads((finished_run / "export/export.json").read_text())["bytes"]
    assert size <= job.describe(job.policy)["size"]


def test_the_evaluation_counts_the_test_split(finished_run: Path) -> None:
    record = json.loads((finished_run / "evaluation.json").read_text())
    assert record["quantized"]["n"] == record["float"]["n"] == len(Job.load(finished_run).data.test)
    assert record["float"]["average_weight_bits"] == 32
    low, high = record["quantized"]["interval"]
    assert low <= record["quantized"]["top1"] <= high


def test_the_baselines_share_budget_and_training(finished_run: Path) -> None:
    record = json.loads((finished_run / "baselines.json").read_text())
    assert [row["policy"] for row in record["rows"]] == ["sdq", "uniform", "random 1", "random 2", "fisher"]
    assert record["finetune"] == {"epochs": 1, "batch_size": 64, "max_steps": 5}
    job = Job.load(finished_run)
    for row in record["rows"]:
        assert job.problem.feasible(Policy({name: tuple(bits) for name, bits in row["bits"].items()})), row["policy"]
    assert record["random"]["n"] == 2
    with (finished_run / "baselines.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 5
    assert all(value != "" for row in rows for value in row.values())


def test_identical_policies_are_trained_once(finished_run: Path) -> None:
    rows = json.loads((finished_run / "baselines.json").read_text())["rows"]
    for row in rows:
        twins = [other for other in rows if other["key"] == row["key"]]
        assert len({other["top1"] for other in twins}) == 1
        assert sum(other["same_as"] is None for other in twins) == 1


def test_the_curves_have_one_row_an_epoch(finished_run: Path) -> None:
    rows = read_jsonl(finished_run / "finetune.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert 0 <= rows[-1]["selection"] <= 1


# ---- what is skipped, and what is done again


def test_a_finished_run_is_not_run_again(finished_run: Path) -> None:
    before = {name: (finished_run / name).stat().st_mtime_ns for name in FILES if name != "recipe.yaml"}
    seen: list[tuple[str, Any]] = []
    summary = pipeline.run_stages(Job.load(finished_run, log=lambda stage, row: seen.append((stage, row))))
    assert seen == []
    assert {name: (finished_run / name).stat().st_mtime_ns for name in before} == before
    assert summary["evaluation"]["quantized"]["n"] == 450


def test_again_repeats_a_stage_to_the_same_result(finished_run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished_run, tmp_path / "copy")
    weights = load_tree(path / "model.safetensors")
    pipeline.run_stages(Job.load(path), ["finetune"], again=True)
    again = load_tree(path / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_a_stage_done_again_renews_the_report(finished_run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished_run, tmp_path / "copy")
    before = (path / "report.html").read_text()
    pipeline.run_stages(Job.load(path), ["export"], again=True)
    assert (path / "report.html").read_text() != before  # it tells when each stage was finished


def test_images_limit_what_everything_sees_of_the_training_images(tiny: dict[str, Any], tmp_path: Path) -> None:
    job = Job.open(load_recipe(tiny), tmp_path / "run")
    (job.run.path / "float.jsonl").touch()  # it has begun
    whole, few = job.data, Job.open(load_recipe(tiny, ["data.images=64"]), tmp_path / "few").data
    assert len(few.fit) == 64 < len(whole.fit)
    assert torch.equal(few.fit.batch(torch.arange(64))[0], whole.fit.batch(torch.arange(64))[0])
    assert (len(few.selection), len(few.test)) == (len(whole.selection), len(whole.test))
    with pytest.raises(RunError, match=r"it differs in data.images \(was null, now 64\)"):
        Job.open(load_recipe(tiny, ["data.images=64"]), tmp_path / "run")


def test_a_run_of_before_a_key_was_there_goes_on(tmp_path: Path) -> None:
    Run.open(tmp_path, {"data": {"name": "digits"}})
    Run.open(tmp_path, {"data": {"name": "digits", "images": None}})
    with pytest.raises(RunError, match=r"it differs in data.images \(was absent, now 64\)"):
        Run.open(tmp_path, {"data": {"name": "digits", "images": 64}})


def test_a_later_stage_runs_what_it_needs_and_no_more(tiny: dict[str, Any], tmp_path: Path) -> None:
    job = Job.open(load_recipe(tiny), tmp_path / "run")
    pipeline.run_stages(job, ["finetune"])
    assert set(job.run.manifest["stages"]) == {"float", "search", "finetune"}


def test_baselines_killed_between_policies_keep_those_done(finished_run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished_run, tmp_path / "copy")
    lines = (path / "baselines.jsonl").read_text().splitlines(keepends=True)
    (path / "baselines.jsonl").write_text("".join(lines[:3]))
    Run.load(path).reopen("baselines")
    pipeline.run_stages(Job.load(path), ["baselines"])
    again = (path / "baselines.jsonl").read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    same = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in again]
    assert same == [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_a_derived_run_keeps_network_and_policy(finished_run: Path, tmp_path: Path) -> None:
    job = Job.load(shutil.copytree(finished_run, tmp_path / "old"))
    beside = ("certificate.json", "sensitivity.json", "additivity.json")
    for name in beside:
        (job.run.path / name).write_text("{}")
    new = pipeline.derive(job, tmp_path / "new", ["finetune.epochs=1", "finetune.max_steps=3"])
    assert all((new.run.path / name).read_text() == "{}" for name in beside)
    pipeline.run_stages(new, ["evaluate"])
    assert new.policy == job.policy
    assert len(read_jsonl(tmp_path / "new/finetune.jsonl")) == 1
    other = job.policy.replace({"conv2": job.policy["conv2"]._replace(w=1)})
    with pytest.raises(RunError, match="began with another policy; give another --out"):
        pipeline.derive(job, tmp_path / "new", ["finetune.epochs=1", "finetune.max_steps=3"], other)
    replaced = pipeline.derive(job, tmp_path / "replaced", [], other)
    assert not any((replaced.run.path / name).exists() for name in (*beside, "search.json"))
    with pytest.raises(PolicyError, match="the problem has no site 'conv9'"):
        pipeline.derive(job, tmp_path / "third", [], Policy({"conv9": (2, 4)}))


def test_what_is_not_finite_is_written_as_null(finished_run: Path, tmp_path: Path) -> None:
    job = Job.load(shutil.copytree(finished_run, tmp_path / "run"))
    pipeline.write_json(job, "x.json", {"a": [1.0, float("inf")], "b": {"c": float("nan")}})
    assert json.loads((job.run.path / "x.json").read_text()) == {"a": [1.0, None], "b": {"c": None}}


# ---- budgets come first


def test_an_unreachable_budget_fails_before_any_training(tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"'weight_bits<=0.5' cannot be met: .* reach .* to .*; the nearest feasible limit is "):
        pipeline.run(load_recipe(tiny, ["search.budgets=weight_bits<=0.5"]), tmp_path / "run")
    assert not (tmp_path / "run/float.safetensors").exists()
    assert not (tmp_path / "run/float.jsonl").exists()


def test_a_size_budget_holds_for_the_file(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(
        tiny, ["search.budgets=size<=8.5KB", "search.method=fisher", "search.options={}", "finetune=null", "baselines=null"]
    )
    summary = pipeline.run(recipe, tmp_path / "run")
    assert summary["export"]["bytes"] <= 8500
    assert (tmp_path / "run/export/model.safetensors").stat().st_size <= 8500


def test_an_untrained_network_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    message = r"'digits_cnn' has neither model.weights nor a float section to train it; give --set model.weights=FILE"
    with pytest.raises(RecipeError, match=message):
        pipeline.run(load_recipe(tiny, ["float=null"]), tmp_path / "run")


def test_given_weights_are_taken_as_they_are(finished_run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in load_tree(finished_run / "float.safetensors").items()}
    save_file(state, tmp_path / "net.safetensors")
    job = Job.open(load_recipe(tiny, [f"model.weights={tmp_path / 'net.safetensors'}"]), tmp_path / "run")
    pipeline.run_stages(job, ["float"])
    assert all(torch.equal(tensor, state[name]) for name, tensor in job.network.state_dict().items())
    assert not (tmp_path / "run/float.jsonl").exists()


def test_a_teacher_of_its_own_is_loaded(finished_run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in load_tree(finished_run / "float.safetensors").items()}, tmp_path / "t.safetensors")
    job = Job.open(load_recipe(tiny, ["teacher.name=digits_cnn", f"teacher.weights={tmp_path / 't.safetensors'}"]), tmp_path / "run")
    assert job.teacher is not None
    assert torch.equal(job.teacher.state_dict()["fc.weight"], load_tree(finished_run / "float.safetensors")["fc.weight"])
    assert Job.open(load_recipe(tiny, ["teacher=null"]), tmp_path / "none").teacher is None


# ---- training that goes wrong


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    new = pipeline.derive(Job.load(finished_run), tmp_path / "new", ["finetune.lr=1e30", "finetune.checkpoint_seconds=0"])
    message = r"the loss is (nan|inf) at step \d+, first seen in layer '.*'; lower lr .*the last good checkpoint is"
    with pytest.raises(TrainingError, match=message):
        pipeline.run_stages(new, ["finetune"])
    assert (tmp_path / "new/checkpoint/finetune.safetensors").is_file()
    assert not new.run.finished("finetune")


def test_an_edited_recipe_is_refused_and_loses_nothing(finished_run: Path, tiny: dict[str, Any]) -> None:
    before = (finished_run / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"began with another recipe; it differs in finetune.lr \(was 0.01, now 0.5\); give another --out"):
        pipeline.run(load_recipe(tiny, ["finetune.lr=0.5"]), finished_run)
    assert (finished_run / "model.safetensors").read_bytes() == before


def test_other_weights_in_a_run_are_refused(finished_run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished_run, tmp_path / "copy")
    shutil.copyfile(path / "float.safetensors", path / "model.safetensors")
    with pytest.raises(RunError, match="belongs to another network"):
        _ = Job.load(path).quantized


def test_a_missing_stage_says_what_to_run(finished_run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished_run, tmp_path / "copy")
    (path / "policy.json").unlink()
    with pytest.raises(RunError, match="not there yet; run `bitwright search"):
        _ = Job.load(path).policy
    (path / "recipe.yaml").unlink()
    with pytest.raises(RunError, match=r"recipe.yaml: missing; restore it"):
        Job.load(path)


def test_batches_move_with_the_device(finished_run: Path) -> None:
    split = Job.load(finished_run).data.test
    moved = on_device(_Plain(split), torch.device("cpu")).take(5)  # type: ignore[arg-type]
    assert len(moved) == 5
    assert torch.equal(moved.batch(torch.arange(5))[0], split.batch(torch.arange(5))[0])


class _Plain:
    """A split that is no tensor in memory."""

    def __init__(self, split: Any):
        self.split, self.classes = split, split.classes

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Any, generator: Any = None) -> Any:
        return self.split.batch(index, generator)

    def subset(self, index: Any) -> Any:
        return _Plain(self.split.subset(index))


# ---- killed and continued, in processes of their own

SLOW = ["search.options.max_steps=60", "finetune.max_steps=60", "finetune.epochs=4", "baselines=null", "export=null", "report=false"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe file, and the run of it that nothing disturbed."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("killed")
    recipe = load_recipe(TINY, SLOW)
    (folder / "slow.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert _start(folder / "slow.yaml", folder / "whole").wait() == 0
    return folder / "slow.yaml", folder / "whole"


def _start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bitwright", "run", str(recipe), "--out", str(out), "--device", "cpu"]
    source = str(Path(pipeline.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _stop(process: subprocess.Popen[bytes], number: signal.Signals, when: Callable[[], bool]) -> bytes:
    """Send a signal as soon as ``when`` holds, and return what the process said."""
    limit = time.monotonic() + 200
    while not when():
        if process.poll() is not None:
            raise AssertionError(f"the run ended before it could be stopped: {process.communicate()[1].decode()}")
        assert time.monotonic() < limit, "the run never came so far"
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


def _searching(out: Path) -> Callable[[], bool]:
    return lambda: any(int(path.stem.partition("-")[2]) >= 15 for path in (out / "checkpoint").glob("search-*.safetensors"))


def _same_result(one: Path, other: Path) -> None:
    assert (one / "policy.json").read_bytes() == (other / "policy.json").read_bytes()
    mine, theirs = load_tree(one / "model.safetensors"), load_tree(other / "model.safetensors")
    assert list(mine) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    accuracy = [json.loads((path / "evaluation.json").read_text())["quantized"]["top1"] for path in (one, other)]
    assert accuracy[0] == accuracy[1]


def test_killed_in_search_and_in_finetuning_a_run_ends_the_same(whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, reference = whole
    out = tmp_path / "run"
    process = _start(recipe, out)
    _stop(process, signal.SIGKILL, _searching(out))
    assert process.returncode == -signal.SIGKILL
    assert not Run.load(out).finished("search")
    process = _start(recipe, out)
    _stop(process, signal.SIGKILL, lambda: len(read_jsonl(out / "finetune.jsonl")) >= 2)
    assert process.returncode == -signal.SIGKILL
    assert Run.load(out).finished("search")
    assert not Run.load(out).finished("finetune")
    assert _start(recipe, out).wait() == 0
    _same_result(out, reference)


def test_ctrl_c_leaves_a_feasible_policy_and_the_same_command_goes_on(whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, reference = whole
    out = tmp_path / "run"
    process = _start(recipe, out)
    said = _stop(process, signal.SIGINT, _searching(out)).decode()
    assert process.returncode == 130
    assert "goes on from here" in said
    assert "Traceback" not in said
    job = Job.load(out)
    assert job.problem.feasible(job.policy)
    assert _start(recipe, out).wait() == 0
    _same_result(out, reference)


def test_a_truncated_checkpoint_is_refused_and_nothing_is_lost(whole: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, reference = whole
    out = shutil.copytree(reference, tmp_path / "copy")
    Run.load(out).reopen("finetune", "evaluate")
    checkpoint = out / "checkpoint/finetune.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"damaged or truncated .*; restore it from a copy, or delete it to start that stage again"):
        pipeline.run(load_recipe(recipe), out)
    checkpoint.unlink()
    pipeline.run(load_recipe(recipe), out)
    _same_result(out, reference)


# ---- the ImageNet recipes, for two steps on a few images


@pytest.mark.parametrize("name", [f"imagenet-{net}-{method}" for net in ("resnet18", "mobilenetv2") for method in ("sdq", "seam")])
def test_imagenet_recipes_run_end_to_end(name: str, tmp_path: Path) -> None:
    _folder_of_images(tmp_path / "data")
    steps = {"batch_size": 2, "max_steps": 2}
    overrides = [f"{part}.{key}={value}" for part in ("search.options", "finetune") for key, value in steps.items()]
    overrides += ["data.held_out=2", "data.options.workers=1", "quantize.calibration=2", "float={epochs: 1, batch_size: 2, max_steps: 1}"]
    # Two candidates instead of eight: calibrating the others is most of what two steps take.
    overrides += ["search.weights=[3, 4]", "search.save_every=100", "threads=1"]
    overrides.append("finetune.lr=1e-4")  # nobody trained these networks
    if name.endswith("seam"):  # grey scans of 8 pixels: the proxy differs in size, channels and classes
        overrides += ["search.activations=[4]", "search.proxy={name: digits, images: 40, adapt: {epochs: 1, max_steps: 1, batch_size: 8}}"]
    summary = pipeline.run(name, tmp_path / "run", data_root=tmp_path / "data", overrides=overrides)
    assert summary["search"]["average_weight_bits"] <= (8 if name.endswith("seam") else 3.66)
    assert (tmp_path / "run/certificate.json").is_file() == name.endswith("seam")
    assert summary["evaluation"]["quantized"]["n"] == 2
    assert (tmp_path / "run/report.html").is_file()
    assert summary["export"]["bytes"] < 0.25 * 4 * json.loads((tmp_path / "run/sites.json").read_text())["parameters"]


def _folder_of_images(root: Path) -> None:
    """Write a few images of 224 pixels, two classes, as ImageNet's folders are."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 3), ("val", 1)):
        for label in ("n01", "n02"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8, generator=generator)
                image.fromarray(pixels.numpy()).save(folder / f"{k}.png")


def test_a_recipe_of_mixed_quality(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Every stage sees corrupted images; the float stage killed and gone on with gives the same weights; goals end search and training."""
    tiny |= {"name": "mixed", "baselines": None, "report": True}
    tiny["data"]["quality"] = {"corruptions": ["gaussian_noise", "contrast"], "severities": [3], "clean": 0.5, "held_out": ["brightness"]}
    tiny["search"] |= {"method": "uniform", "options": {}}
    tiny["evaluate"] = {"conditions": ["clean", "mixed", "held_out"], "seeds": [0, 1]}
    summary = pipeline.run(tiny, tmp_path / "one")
    record = summary["evaluation"]["quantized"]
    clean, mixed, held = record["quality"]["conditions"]
    assert clean["n"] == mixed["n"] == record["n"] == 450
    assert set(mixed["by_severity"]) == {"0", "3"}
    assert set(held["by_severity"]) == {"3"}

    def kill(stage: str, row: Mapping[str, Any]) -> None:
        if stage == "float" and row.get("epoch") == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(tiny, tmp_path / "two", log=kill)
    pipeline.run(tiny, tmp_path / "two")
    one, two = (load_tree(tmp_path / name / "float.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    accuracy = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert accuracy[0] == accuracy[1]


def test_a_search_stops_at_an_accuracy(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"baselines": None, "export": None, "report": False, "finetune": None, "teacher": None}
    tiny["search"] |= {"method": "greedy", "options": {}, "stop_at": "contrast:1>=0.01"}
    assert pipeline.run(tiny, tmp_path / "run")["search"]["status"] == "stopped"
    rows = read_jsonl(tmp_path / "run" / "search.jsonl")
    assert len([row for row in rows if not row.get("uniform")]) == 1
    with pytest.raises(RecipeError, match=r"compare: search\.stop_at would stop some methods before others"):
        compare(tiny, tmp_path / "comparison")


def test_a_split_that_is_moved_to_a_device_can_be_of_mixed_quality() -> None:
    base = DatasetSplit([(torch.rand(1, 8, 8), k % 2) for k in range(6)], classes=2)
    mix, index = Mix({"fog": 1}, {2: 1}, clean=0.0), torch.arange(6)
    x, y = MixedSplit(on_device(base, torch.device("cpu")), mix, seed=0).batch(index)
    expected, labels = MixedSplit(base, mix, seed=0).batch(index)
    assert torch.equal(x, expected)
    assert torch.equal(y, labels)
