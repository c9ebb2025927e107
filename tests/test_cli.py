"""The command line: every verb, every flag, and each refusal as one line with exit code 2."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright import cli, runs
from bitwright.policy import Policy
from bitwright.recipe import load_recipe


def _refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must be refused, and return its one line."""
    capsys.readouterr()
    code = cli.main([str(text) for text in argv])
    said = capsys.readouterr()
    complaint = [line for line in said.err.splitlines() if line.startswith("bitwright: ")]
    assert code == 2, said.err
    assert "Traceback" not in said.err
    assert len(complaint) == 1, said.err
    return complaint[0]


def _result(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """Run a command with --json that must succeed, and return the object of its last line."""
    capsys.readouterr()
    code = cli.main([str(text) for text in (*argv, "--json")])
    said = capsys.readouterr()
    assert code == 0, said.err
    result: dict[str, Any] = json.loads(said.out.splitlines()[-1])
    return result


# ---- the verbs


def test_run_goes_on_with_a_finished_run_and_shows_its_table(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(finished_run)]) == 0
    out = capsys.readouterr().out
    for text in ("float", "sdq", "uniform", "random 2", "fisher", "BitOps", "test accuracy", "mean of 2 random policies", "report.html"):
        assert text in out


def test_json_is_the_last_line(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _result(capsys, "run", finished_run)
    assert result["recipe"] == "tiny"
    assert set(result["policy"]) == {"conv1", "conv2", "depthwise", "pointwise", "conv3", "fc"}
    assert result["evaluation"]["quantized"]["n"] == 450
    assert "report.html" in result["files"]


def test_search_from_flags(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in runs.load_tree(finished_run / "float.safetensors").items()}
    save_file(state, tmp_path / "net.safetensors")
    flags = ["--model", "digits_cnn", "--weights", tmp_path / "net.safetensors", "--data", "digits", "--held-out", "100"]
    flags += [
        "--budget",
        "weight_bits<=3",
        "--budget",
        "size<=11KB",
        "--weight-bits",
        "2",
        "3",
        "4",
        "--method",
        "fisher",
        "--samples",
        "64",
    ]
    result = _result(capsys, "search", *flags, "--out", tmp_path / "run", "--seed", "3")
    assert result["search"]["method"] == "fisher"
    assert result["search"]["average_weight_bits"] <= 3
    recipe = runs.Run.load(tmp_path / "run").manifest["recipe"]
    assert recipe["seed"] == 3
    assert recipe["search.options.samples"] == 64
    assert recipe["search.weights"] == [2, 3, 4]
    assert not (tmp_path / "run/model.safetensors").exists()


def test_flags_change_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "run", tmp_path / "none.npz"
    flags = ["--method", "seam", "--margin", "0", "--budget", "weight_bits<=4", "--budget", "size<=20KB", "--proxy", "digits:60"]
    flags += [
        "--weight-bits",
        "2",
        "4",
        "--activation-bits",
        "8",
        "--held-out",
        "150",
        "--weights",
        file,
        "--set",
        "search.options.epochs=1",
    ]
    assert "none.npz" in _refused(capsys, "search", "digits-sdq", *flags, "--out", out)
    recipe = load_recipe(out / "recipe.yaml")
    assert (recipe.data.held_out, recipe.model.weights) == (150, str(file))
    search = recipe.search
    assert (search.method, search.options) == ("seam", {"margin": 0, "epochs": 1})  # none of SDQ's own
    assert (search.budgets, search.weights, search.activations) == (["weight_bits<=4", "size<=20KB"], [2, 4], [8])


def test_the_options_of_a_recipes_own_method_are_flags_and_those_not_given_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k, flags in enumerate((["--epochs", "3"], ["--method", "sdq", "--epochs", "3"])):
        out = tmp_path / f"run{k}"
        _refused(capsys, "search", "digits-sdq", *flags, "--weights", tmp_path / "none.npz", "--out", out)
        assert load_recipe(out / "recipe.yaml").search.options == {"epochs": 3, "batch_size": 64, "lr": 0.02}


@pytest.mark.parametrize(
    "flags", [["--method", "seam"], ["--budget", "weight_bits<=4"], ["--lr", "1"], ["--held-out", "9"], ["--proxy", "digits"]]
)
def test_a_finished_search_is_not_asked_for_something_else(
    finished_run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "a run directory keeps its recipe" in _refused(capsys, "search", finished_run, *flags)


def test_a_profile_of_a_recipe_takes_its_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complaint = _refused(capsys, "profile", "digits-sdq", "--weights", tmp_path / "none.npz", "--sensitivity")
    assert "none.npz" in complaint


def test_the_verbs_of_a_run_directory(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(finished_run, tmp_path / "run")
    assert _result(capsys, "search", path)["search"]["method"] == "sdq"
    assert _result(capsys, "finetune", path, "--again")["stages"]["finetune"]["seconds"] > 0
    (path / "evaluation.json").unlink()
    assert _result(capsys, "evaluate", path, "--again")["evaluation"]["float"]["n"] == 450
    assert len(_result(capsys, "baselines", path)["baselines"]["rows"]) == 5
    assert _result(capsys, "export", path, "--again")["export"]["to"] == "packed"
    (path / "report.html").unlink()
    assert _result(capsys, "report", path)["report"] == str(path / "report.html")
    assert "<svg" in (path / "report.html").read_text()


def test_export_and_evaluate_a_file(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.safetensors"
    result = _result(capsys, "export", finished_run, "--to", "packed", "--file", small, "--option", "batchnorm=eval-vectors")
    assert result["bytes"] == small.stat().st_size < (finished_run / "export/model.safetensors").stat().st_size
    evaluated = _result(capsys, "evaluate", finished_run, "--file", small)
    assert evaluated["top1"] == json.loads((finished_run / "evaluation.json").read_text())["quantized"]["top1"]
    assert _result(capsys, "report", finished_run, "--file", tmp_path / "r.html")["report"] == str(tmp_path / "r.html")


def test_finetune_another_policy_in_a_new_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy.from_json((finished_run / "policy.json").read_text())
    other = policy.replace({"conv3": policy["conv3"]._replace(w=1)})
    (tmp_path / "p.json").write_text(other.to_json())
    out = tmp_path / "new"
    result = _result(
        capsys, "finetune", finished_run, "--policy", tmp_path / "p.json", "--set", "finetune.max_steps=3", "--seed", "0", "--out", out
    )
    assert result["policy"]["conv3"] == [1, 4]
    assert _result(capsys, "evaluate", out)["evaluation"]["quantized"]["average_weight_bits"] < 2.5


def test_profile_of_a_model_a_recipe_and_a_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _result(capsys, "profile", "--model", "cifar_resnet20", "--shape", "3x32x32")
    assert round(result["uniform"]["W3A3"]["bitops"] / 1e9, 3) == 0.389
    assert result["uniform"]["W32A32"]["weight_bits"] == 32
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert len(_result(capsys, "profile", "digits-sdq")["sites"]) == 6
        assert len(_result(capsys, "profile", "--model", "digits_cnn", "--data", "digits")["sites"]) == 6
        assert list(tmp_path.iterdir()) == []
    finally:
        os.chdir(here)


def test_profile_measures_saves_and_reuses_sensitivities(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = _result(capsys, "profile", finished_run, "--sensitivity")["sensitivity"]
    assert table["measure"] == "kl"
    assert table["values"]["conv2"]["W1A4"] > table["values"]["conv2"]["W8A4"] >= 0
    file = tmp_path / "fisher.json"
    saved = _result(capsys, "profile", finished_run, "--measure", "fisher", "--save", file)["sensitivity"]
    assert saved == json.loads(file.read_text())
    network = ["--model", "digits_cnn", "--weights", tmp_path / "net.safetensors", "--data", "digits", "--held-out", "100"]
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in runs.load_tree(finished_run / "float.safetensors").items()}
    save_file(state, tmp_path / "net.safetensors")
    search = ["search", *network, "--method", "fisher", "--activation-bits", "4", "--table", file]
    for k, budget in enumerate(("weight_bits<=2.5", "weight_bits<=4")):
        result = _result(capsys, *search, "--budget", budget, "--out", tmp_path / f"run{k}")
        assert json.loads((tmp_path / f"run{k}" / "sensitivity.json").read_text())["values"] == saved["values"]
        assert result["search"]["sample_passes"] < 2000  # the policy proposed is evaluated; nothing is measured
    complaint = _refused(capsys, *search, "--samples", "64", "--budget", "weight_bits<=4", "--out", tmp_path / "run2")
    assert "stale, measured on other options: options.samples (was 512, now 64)" in complaint


def test_profile_names_a_budget_that_cannot_be_kept(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in runs.load_tree(finished_run / "float.safetensors").items()}
    save_file(state, tmp_path / "net.safetensors")
    asked = ["profile", "--model", "digits_cnn", "--weights", tmp_path / "net.safetensors", "--data", "digits", "--check-additivity"]
    complaint = _refused(capsys, *asked, "--weight-bits", "2", "4", "--budget", "weight_bits<=1.5")
    assert "budget 'weight_bits<=1.5' cannot be met: its limit is" in complaint
    assert "the nearest feasible limit is" in complaint


def test_profile_checks_additivity_and_the_run_keeps_the_answer(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(finished_run, tmp_path / "run"))
    assert cli.main(["profile", str(path), "--check-additivity", "--policies", "8", "--measure", "fisher"]) == 0
    assert "is the loss additive? foretold ('fisher') against measured, 8 policies: rank correlation" in " ".join(
        capsys.readouterr().out.split()
    )
    answer = json.loads((path / "additivity.json").read_text())
    assert len(answer["points"]) == 8
    assert "Is the loss additive?" in (path / "report.html").read_text()
    assert _result(capsys, "report", path)["report"] == str(path / "report.html")
    assert _result(capsys, "run", path)["additivity"] == answer


def test_methods_lists_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    methods = _result(capsys, "methods")["methods"]
    assert {"sdq", "uniform", "random", "fisher"} <= set(methods)
    options = {option["name"]: option for option in methods["sdq"]["options"]}
    assert options["gate"]["default"] == "stochastic"
    assert all(option["about"] for entry in methods.values() for option in entry["options"])


def test_the_data_root_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITWRIGHT_DATA", str(tmp_path / "nowhere"))
    complaint = _refused(capsys, "profile", "--model", "cifar_resnet20", "--data", "cifar10")
    assert str(tmp_path / "nowhere") in complaint


def test_every_flag_is_explained() -> None:
    _, verbs = cli.build_parser(["search", "--method", "sdq"])
    assert set(verbs) == set(cli.VERBS)
    for verb, parser in verbs.items():
        for action in parser._actions:
            assert action.help, f"{verb}: {action.option_strings or action.dest} has no help"
        assert verb in parser.format_help() or parser.prog


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["search", "--method", "random", "--help"], ["--version"]])
def test_help_ends_well(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 0
    assert "bitwright" in capsys.readouterr().out


def test_a_methods_options_are_flags_of_search(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["search", "--method", "random", "--help"])
    assert "--within VALUE" in capsys.readouterr().out


def test_the_seeds_of_compare_are_said_to_begin_with_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    assert "(default: the recipe's and the next two)" in " ".join(capsys.readouterr().out.split())


# ---- the command line itself is wrong


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: VERB; see `bitwright --help`"),
        (["evalute"], "no verb 'evalute'; did you mean 'evaluate'?"),
        (["run"], "run: the following arguments are required: RECIPE; see `bitwright run --help`"),
        (["run", "digits-sdq", "--otu", "x"], "run: unknown argument '--otu'; did you mean '--out'?"),
        (["run", "digits-sdq", "--sed=3"], "run: unknown argument '--sed=3'; did you mean '--seed'?"),
        (["run", "digits-sdq", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["run", "digit-sdq"], "no bundled recipe and no file of that name; did you mean 'digits-sdq'?"),
        (["run", "digits-sdq", "--set", "seed"], "--set seed: expected key=value"),
        (["run", "digits-sdq", "--set", "serch.steps=3"], "unknown key 'serch'; did you mean 'search'?"),
        (["run", "digits-sdq", "--device", "abacus"], "--device abacus: cannot be used"),
        (["search"], "give a recipe, a run directory, or --model, --data and --budget (--model is missing)"),
        (["search", "--method", "sqd", "--model", "digits_cnn"], "unknown method 'sqd'; did you mean 'sdq'"),
        (["search", "--model", "m", "--data", "digits", "--budget", "x", "--epochs", "many"], "search.options.epochs is 'many'"),
        (["search", "--method", "random", "--epochs", "3"], "search: unknown argument '--epochs'"),
        (
            ["search", "digits-sdq", "--model", "digits_cnn"],
            "--model stands instead of a recipe; leave one of the two out, or give --set model",
        ),
        (["search", "digits-sdq", "--method", "seam", "--epochs", "many"], "search.options.epochs is 'many'"),
        (["search", "digits-sdq", "--method", "seam", "--set", "search.method=haq"], "--method and --set search.method say the same thing"),
        (["search", "digits-sdq", "--budget", "weight_bit<=4"], "budget 'weight_bit<=4': no cost 'weight_bit'"),
        (
            ["search", "digits-sdq", "--budget", "weight_bits<=3", "bitops<=W3A4"],
            "search: 'bitops<=W3A4' is a further budget, which needs a flag of its own: --budget … --budget 'bitops<=W3A4'",
        ),
        (["search", "--model", "digits_cnn", "--data", "digits", "--budget", "size<=9KB", "size<=1KB"], "'size<=1KB' is a further budget"),
        (["search", "digits-sdq", "--budget", "weight_bits<=3,bitops<=W3A4"], "holds more than one limit; give each a --budget of its own"),
        (["profile", "digits-sdq", "--method", "seam"], "profile: unknown argument '--method'"),
        (["profile", "digits-sdq", "--data", "cifar10"], "--data stands instead of a recipe"),
        (["profile", "--model", "resnet18", "--shape", "3x4x4", "--budget", "size<=1KB"], "so --budget has no meaning"),
        (["profile", "digits-sdq", "--model", "resnet18", "--shape", "3x4x4"], "so the recipe 'digits-sdq' has no meaning"),
        (["profile", "--shape", "3x4"], "profile --shape: also give --model NAME"),
        (["profile", "--model", "resnet18", "--shape", "3by4"], "--shape 3by4: expected sizes of one input, for example 3x224x224"),
        (["profile", "--model", "resnet118", "--shape", "3x32x32"], "no model 'resnet118'; did you mean 'resnet18'?"),
        (["profile", "digits-sdq", "--sensitivity"], "the network is not trained, and sensitivities need one; give a run, or --set model."),
        (["profile", "digits-sdq", "--measure", "kl"], "profile --measure: also give what to do with it: --sensitivity"),
        (["profile", "digits-sdq", "--check-additivity", "--measure", "fishr"], "unknown method 'fishr'; did you mean 'fisher'?"),
        (["profile", "digits-sdq", "--policies", "9"], "profile --policies: also give --check-additivity"),
        (
            ["profile", "--model", "resnet18", "--shape", "3x4x4", "--sensitivity"],
            "--shape: sensitivities are measured on images; give --data",
        ),
        (["evaluate", "nowhere"], "nowhere: no such run directory; give the --out of a `bitwright run`"),
        (["report", "nowhere"], "no run directory"),
    ],
)
def test_a_wrong_command_line(
    argv: Sequence[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in _refused(capsys, *argv)


def test_a_run_directory_keeps_its_recipe(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a run directory keeps its recipe; leave out --out, --set and --seed" in _refused(capsys, "run", finished_run, "--seed", 1)
    complaint = _refused(capsys, "finetune", finished_run, "--set", "finetune.epochs=1")
    assert "need a run of their own; give --out DIR" in complaint
    complaint = _refused(capsys, "finetune", finished_run, "--policy", tmp_path / "none.json", "--out", tmp_path / "x")
    assert "none.json: cannot be read (No such file or directory); give a policy.json" in complaint
    assert "expected key=value, for example" in _refused(capsys, "export", finished_run, "--option", "batchnorm")
    complaint = _refused(capsys, "export", finished_run, "--option", "batchnrm=x")
    assert "no option 'batchnrm' for packed; did you mean 'batchnorm'?" in complaint
    assert "no format 'onx'" in _refused(capsys, "export", finished_run, "--to", "onx")


# ---- the input is wrong: each message of the list that a user can meet


def _run(recipe: Path, out: Path, *overrides: str) -> list[object]:
    return ["run", recipe, "--out", out, "--device", "cpu", *(text for change in overrides for text in ("--set", change))]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.nmae=x"], "unknown key 'data.nmae'; did you mean 'name'?"),
        (["data.name=digit"], "no data set 'digit'; did you mean 'digits'?"),
        (["data.options.augmnet=crop"], "no option 'augmnet' for digits; did you mean 'augment'?"),
        (["data.held_out=5000"], "data.held_out: 5000 of 1347 training images of digits; give 1 to 1346"),
        (["search.budgets=weight_bit<=2"], "budget 'weight_bit<=2': no cost 'weight_bit'; did you mean 'weight_bits'?"),
        (["search.budgets=weight_bits=2"], "budget 'weight_bits=2': expected COST<=LIMIT"),
        (["search.budgets=bitops<=W3A9"], "budget 'bitops<=W3A9'"),
        (["search.budgets=weight_bits<=0.1"], "budget 'weight_bits<=0.1' cannot be met"),
        (["search.weights=[3, 9]"], "weight width 9 is not one of"),
        (["search.skip=[convx]"], "skip='convx' matches no module and no site; did you mean 'conv"),
        (["model.name=digit_cnn"], "no model 'digit_cnn'; did you mean 'digits_cnn'?"),
        (["model.arguments={num_class: 10}"], "num_class"),
        (["model.arguments={num_classes: 5}"], "has 5 outputs and the labels of digits run to 9; give it 10 outputs"),
        (["model.name=cifar_resnet20"], "does not run on the 1x8x8 images of digits"),
        (["model.weights=missing.safetensors"], "weights 'missing.safetensors': no such file"),
        (
            ["quantize.correct=[batchnrm]"],
            "quantize.correct is ['batchnrm']; expected 'equalize', 'compensate', 'rounding', 'refine', 'bias' or 'batchnorm'",
        ),
    ],
)
def test_a_wrong_recipe(overrides: list[str], message: str, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _refused(capsys, *_run(recipe_file, tmp_path / "run", *overrides))


def test_a_missing_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("BITWRIGHT_DATA", raising=False)
    argv = ["run", "cifar10-resnet20-sdq", "--out", tmp_path / "run"]
    complaint = _refused(capsys, *argv)
    assert "cifar10 needs a data root" in complaint
    assert "--data-root" in complaint
    assert "no such folder (the data root of cifar10)" in _refused(capsys, *argv, "--data-root", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no cifar10/train-*.npz" in _refused(capsys, *argv, "--data-root", tmp_path / "empty")


def test_empty_data(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    for part in ("train", "val"):
        (tmp_path / "data" / part / "cat").mkdir(parents=True)
    argv = _run(recipe_file, tmp_path / "run", "data={name: folder, held_out: 1}")
    complaint = _refused(capsys, *argv, "--data-root", tmp_path / "data")
    assert str(tmp_path / "data" / "train") in complaint


def test_weights_of_another_shape(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    from bitwright.models import build

    save_file(build("digits_cnn", num_classes=12).state_dict(), tmp_path / "wide.safetensors")
    complaint = _refused(capsys, *_run(recipe_file, tmp_path / "run", f"model.weights={tmp_path / 'wide.safetensors'}"))
    assert "'fc.bias' has shape [12], the model's is [10]; check the model's arguments" in complaint
    save_file({"conv": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "missing" in _refused(capsys, *_run(recipe_file, tmp_path / "b", f"model.weights={tmp_path / 'other.safetensors'}"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "wide.safetensors").read_bytes()[:500])
    assert "is damaged" in _refused(capsys, *_run(recipe_file, tmp_path / "c", f"model.weights={tmp_path / 'cut.safetensors'}"))


def test_a_policy_that_does_not_fit(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy.from_json((finished_run / "policy.json").read_text())
    cases = {
        "unknown": (Policy({**policy, "conv9": (2, 4)}), "the problem has no site 'conv9'; did you mean 'conv3'?"),
        "missing": (Policy({name: bits for name, bits in policy.items() if name != "conv3"}), "site 'conv3' has no entry"),
        "width": (policy.replace({"conv1": policy["conv1"]._replace(w=2)}), "site 'conv1' has W2A8, which is no choice of it"),
    }
    for name, (wrong, message) in cases.items():
        file = tmp_path / f"{name}.json"
        file.write_text(wrong.to_json())
        assert message in _refused(capsys, "finetune", finished_run, "--policy", file, "--out", tmp_path / name)
    (tmp_path / "broken.json").write_text('{"sites": ')
    complaint = _refused(capsys, "finetune", finished_run, "--policy", tmp_path / "broken.json", "--out", tmp_path / "d")
    assert "not a policy file" in complaint


def test_a_loss_that_is_no_number(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["finetune", finished_run, "--set", "finetune.lr=1e30", "--set", "finetune.checkpoint_seconds=0", "--out", tmp_path / "run"]
    complaint = _refused(capsys, *argv)
    assert "first seen in layer '" in complaint
    assert "the last good checkpoint is" in complaint
    assert (tmp_path / "run/checkpoint/finetune.safetensors").is_file()


def test_a_full_disk(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(finished_run, tmp_path / "run")
    before = (path / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(runs.os, "fsync", full)
        complaint = _refused(capsys, "report", path)
    assert "report.html: cannot be written (No space left on device)" in complaint
    assert (path / "report.html").read_bytes() == before


def test_an_edited_recipe(finished_run: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complaint = _refused(capsys, *_run(recipe_file, finished_run, "finetune.lr=0.5"))
    assert "began with another recipe; it differs in finetune.lr (was 0.01, now 0.5); give another --out" in complaint


def test_a_run_that_never_began_takes_a_mended_recipe(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = _run(recipe_file, tmp_path / "run", "search.budgets=weight_bits<=0.1")
    assert "cannot be met" in _refused(capsys, *argv)
    assert "cannot be met" in _refused(capsys, *_run(recipe_file, tmp_path / "run", "search.budgets=weight_bits<=0.2"))


def test_a_damaged_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(finished_run, tmp_path / "run")
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-10])
    assert "model.safetensors: damaged or truncated" in _refused(capsys, "evaluate", path, "--again")
    (path / "evaluation.json").write_text("{")
    assert "evaluation.json: not JSON" in _refused(capsys, "report", path)
    (path / "manifest.json").write_text("{}")
    assert "manifest.json" in _refused(capsys, "report", path)
    (tmp_path / "stuff").mkdir()
    (tmp_path / "stuff/notes.txt").write_text("mine")
    assert "so it is no run; give an empty or new directory" in _refused(capsys, *_run(Path("digits-sdq"), tmp_path / "stuff"))


# ---- our fault, and Ctrl-C


def test_an_unforeseen_error_is_our_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: argparse.Namespace) -> dict[str, Any]:
        """Divide by zero."""
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(cli.VERBS, "methods", (broken,))
    assert cli.main(["methods"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1] == cli.OUR_FAULT


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: argparse.Namespace) -> dict[str, Any]:
        """Be stopped."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "methods", (stopped,))
    assert cli.main(["methods"]) == 130
    said = capsys.readouterr().err
    assert "stopped; `bitwright methods` goes on from here; if a search was running, policy.json holds the best feasible policy" in said


def test_run_without_finetuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("float={epochs: 1, batch_size: 64, max_steps: 15}", "search.method=fisher", "search.options={}")
    short = [text for change in changes for text in ("--set", change)]
    run = tmp_path / "run"
    assert cli.main(["run", "digits-sdq", "--no-finetune", "--set", "baselines.random=1", *short, "--out", str(run)]) == 0
    capsys.readouterr()
    assert not (run / "finetune.jsonl").exists()
    assert json.loads((run / "baselines.json").read_text())["finetune"] is None
    assert (run / "export/model.safetensors").is_file()
    assert cli.main(["run", str(run), "--no-finetune"]) == 2
    assert "a run directory keeps its recipe" in capsys.readouterr().err


@pytest.mark.parametrize("known", [False, True])
def test_what_cannot_be_compared_is_refused_first(known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(load_recipe("digits-dqmq").to_dict()))
    assert cli.main(["compare", str(tmp_path) if known else "digits-dqmq"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "an adaptive recipe has no static policies to compare" in said[0]


def test_evaluate_under_conditions(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(finished_run, tmp_path / "run")
    before = json.loads((path / "evaluation.json").read_text())
    result = _result(capsys, "evaluate", path, "--conditions", "clean,gaussian_noise:3,contrast,mixed", "--seeds", "0", "1")
    for name in ("float", "quantized"):
        record = result["evaluation"][name]
        quality = record.pop("quality")
        assert record == before[name]
        assert [one["condition"] for one in quality["conditions"]][:3] == ["clean", "gaussian_noise:3", "contrast:1"]
        clean, noisy = quality["conditions"][:2]
        assert (clean["top1"], clean["interval"], clean["seeds"], noisy["seeds"]) == (record["top1"], record["interval"], 1, 2)
        assert quality["mean_corruption_accuracy"]["corruptions"] == 2
        assert str(quality["worst_severity"]) in quality["severities"]
        assert set(quality["conditions"][-1]["by_severity"]) == {"0", "1", "3", "5"}
    cli.main(["evaluate", str(path)])
    said = capsys.readouterr().out
    assert "gaussian_noise:3" in said
    assert "mean corruption accuracy (2 measured)" in said
    page = (path / "report.html").read_text()
    assert "Image quality" in page
    assert "Mean accuracy by severity" in page
    file = _result(capsys, "evaluate", path, "--file", path / "export/model.safetensors", "--conditions", "fog:2")
    assert file["quality"]["conditions"][0]["condition"] == "fog:2"


def test_conditions_that_cannot_be(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'fog'?" in _refused(capsys, "evaluate", finished_run, "--conditions", "clean,fogg:1")
    assert "fog:1 to fog:5" in _refused(capsys, "evaluate", finished_run, "--conditions", "fog:6")
    assert "also give --conditions" in _refused(capsys, "evaluate", finished_run, "--seeds", "1")
    assert "conditions: none given" in _refused(capsys, "evaluate", finished_run, "--conditions", "")
