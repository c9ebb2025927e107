"""The policy that a run has settled on, and what was made with it: an edited policy.json is told from the one that the search wrote.

Every stage from the search on keeps the digest of its policy in the manifest, and model.safetensors keeps that of the policy it was
fine-tuned at. A run of before there were digests is judged by search.jsonl, which names every policy that its search tried.
"""

from __future__ import annotations

from pathlib import Path

from bitwright.errors import RunError
from bitwright.policy import Policy
from bitwright.runs import Run, read_jsonl

FILE = "policy.json"
MARK = "policy"
"""The key of a policy's digest, in a stage's record and in model.safetensors."""
STAGES = ("search", "finetune", "evaluate", "baselines", "export")
"""The stages that find a policy or work with it, in order."""


def read_policy(run: Run) -> Policy:
    """Return a run's policy.

    Raises:
        RunError: there is none yet, or it is not the one that the run's stages were done with.
    """
    file = run.path / FILE
    if not file.is_file():
        raise RunError(f"{file}: not there yet; run `bitwright search {run.path}` first")
    policy = Policy.from_json(file.read_text("utf-8"))
    known = digest_of(run)
    if policy.digest != known if known is not None else not _tried(run, policy):
        raise RunError(_edited(file, run.path))
    return policy


def _edited(file: Path, run: Path) -> str:
    found = "edited: it is not the policy that this run's search settled on"
    own = f"give it a run of its own: bitwright finetune {run} --policy {file} --out NEW"
    return f"{file}: {found}; restore it, or `bitwright search {run} --again` to find it anew, or {own}"


def _tried(run: Run, policy: Policy) -> bool:
    """Return whether search.jsonl, as far as it says anything, names a policy."""
    plain = {name: list(bits) for name, bits in policy.items()}
    tried = [line["policy"] for line in read_jsonl(run.path / "search.jsonl") if line.get("policy")]
    return not tried or plain in tried


def digest_of(run: Run) -> str | None:
    """Return the digest of the policy that a run's finished search settled on; None where nothing says it."""
    stages = run.manifest["stages"]
    if "search" not in stages:
        return None
    return next((str(stages[name][MARK]) for name in STAGES if MARK in stages.get(name, {})), None)


def outdated(run: Run, stage: str) -> bool:
    """Return whether a stage was finished with another policy than the one of now."""
    own, known = run.manifest["stages"].get(stage, {}).get(MARK), digest_of(run)
    return own is not None and known is not None and own != known


def done(run: Run, stage: str) -> bool:
    """Return whether a stage is finished, for the policy of now where it depends on it."""
    return run.finished(stage) and not outdated(run, stage)


def marks(run: Run, stage: str) -> dict[str, str]:
    """Return what a stage keeps of its policy; nothing before the search, and in a run without a policy."""
    return {MARK: read_policy(run).digest} if stage in STAGES and (run.path / FILE).is_file() else {}
