"""The policy of a run: an edited one is refused wherever it is read, and what was made of another one is made anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bitwright import cli, pipeline, runs
from bitwright.errors import RunError
from bitwright.job import Job
from bitwright.policy import Bits, Policy
from bitwright.report import render

VERBS = (
    ("run",),
    ("export", "--to", "packed", "--file", "OUT"),
    ("export", "--check", "--target", "generic"),
    ("evaluate", "--again"),
    ("report",),
    ("policy", "to", "nncf"),
)


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run, free to be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def other(run: Path) -> Policy:
    """A policy that fits the run and that its search did not try."""
    policy = Policy.from_json((run / "policy.json").read_text())
    tried = [line["policy"] for line in runs.read_jsonl(run / "search.jsonl")]
    made = (policy.replace({"conv2": Bits(w, 4), "conv3": Bits(v, 4)}) for w in (1, 3) for v in (1, 3))
    return next(policy for policy in made if {name: list(bits) for name, bits in policy.items()} not in tried)


def edit(run: Path, policy: Policy) -> Path:
    file = run / "policy.json"
    file.write_text(policy.to_json())
    return file


def forget_digests(run: Path) -> None:
    """Make a run what it was before there were digests."""
    manifest = json.loads((run / "manifest.json").read_text())
    for record in manifest["stages"].values():
        record.pop("policy", None)
    (run / "manifest.json").write_text(json.dumps(manifest))
    runs.save_tree(run / "model.safetensors", runs.load_tree(run / "model.safetensors"))


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("old", [False, True], ids=["digests", "old"])
def test_an_edited_policy_is_refused_by_every_verb_that_reads_it(copied: Path, tmp_path: Path, capsys, verb, old) -> None:
    if old:
        forget_digests(copied)
    file = edit(copied, other(copied))
    words = [str(tmp_path / "out") if word == "OUT" else word for word in verb]
    place = 3 if words[0] == "policy" else 1
    assert cli.main([*words[:place], str(copied), *words[place:]]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert f"{file}: edited: it is not the policy that this run's search settled on; restore it, or `bitwright search" in line
    assert f"bitwright finetune {copied} --policy {file} --out NEW" in line
    assert not (tmp_path / "out").exists()


def test_an_edited_policy_may_have_a_run_of_its_own(copied: Path, tmp_path: Path) -> None:
    policy = other(copied)
    file = edit(copied, policy)
    assert cli.main(["finetune", str(copied), "--policy", str(file), "--out", str(tmp_path / "new")]) == 0
    assert Job.load(tmp_path / "new").policy == policy
    edit(tmp_path / "new", policy.replace({"fc": Bits(4, 4)}))
    with pytest.raises(RunError, match="edited: it is not the policy"):
        render(tmp_path / "new")


def test_a_search_once_more_mends_an_edited_policy(copied: Path) -> None:
    before = Job.load(copied).policy
    edit(copied, other(copied))
    pipeline.run_stages(Job.load(copied), ["search"], again=True)
    assert Job.load(copied).policy == before
    assert pipeline.run_stages(Job.load(copied))["evaluation"]


def test_a_run_of_before_there_were_digests_goes_on(copied: Path) -> None:
    forget_digests(copied)
    job = Job.load(copied)
    assert pipeline.run_stages(job)["evaluation"]
    pipeline.run_stages(job, ["export"], again=True)
    assert job.run.manifest["stages"]["export"]["policy"] == job.policy.digest
    render(copied)
    edit(copied, other(copied))
    (copied / "search.jsonl").unlink()  # the export's digest still tells
    with pytest.raises(RunError, match="edited: it is not the policy"):
        _ = Job.load(copied).policy


def test_what_was_made_of_another_policy_is_neither_shown_nor_exported_and_made_anew(copied: Path, tmp_path: Path) -> None:
    job = Job.load(copied)
    assert job.quantized is not None
    before, policy = (copied / "model.safetensors").read_bytes(), other(copied)
    edit(copied, policy)
    job.run.finish("search", policy=policy.digest)  # as a search does that settles on another policy than before
    assert "evaluation" not in pipeline.summary(job)
    assert "baselines" not in pipeline.summary(job)
    fresh = Job.load(copied)
    with pytest.raises(RunError, match=r"was fine-tuned at another policy than that of .*policy.json; type `bitwright finetune"):
        pipeline.export_file(fresh, path=tmp_path / "out")
    result = pipeline.run_stages(job)
    assert {job.run.manifest["stages"][name]["policy"] for name in ("finetune", "evaluate", "baselines", "export")} == {policy.digest}
    assert (copied / "model.safetensors").read_bytes() != before
    widths = result["evaluation"]["quantized"]["weight_widths"]
    assert widths == {str(width): count for width, count in job.describe(policy)["weight_widths"].items()}
