"""The verb `policy`, on a run made without training."""

import json

import pytest

from bitwright import cli
from bitwright.job import Job
from bitwright.policy import Policy
from bitwright.recipe import load_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a policy in it: a translation needs no network."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    out = tmp_path_factory.mktemp("policy") / "run"
    job = Job.open(load_recipe("digits-sdq"), out)
    (out / "policy.json").write_text(Policy((name, (4, 8)) for name in job.trace.names).to_json())
    return out


def test_to_and_from(run, tmp_path, capsys):
    own = Policy.from_json((run / "policy.json").read_text())
    assert cli.main(["policy", "to", "modelopt", str(run), "--option", "algorithm=max", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"file": str(run / "export" / "policy-modelopt.json"), "format": "modelopt", "sites": len(own)}
    back = tmp_path / "back.json"
    assert cli.main(["policy", "from", "modelopt", str(run), "--file", told["file"], "--out", str(back), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["differing"] == {}
    assert Policy.from_json(back.read_text()) == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to", "torchao", "RUN"], "torchao cannot say"),
        (["to", "torchao", "nowhere"], "nowhere: no such run directory"),
        (["to", "modelop", "RUN"], "no format 'modelop'; did you mean 'modelopt'"),
        (["into", "modelopt", "RUN"], "'into'"),
        (["from", "modelopt", "RUN"], "policy from modelopt: no file to read; give --file FILE"),
        (["from", "modelopt", "RUN", "--file", "missing.json"], "missing.json: cannot be read (No such file or directory)"),
        (["to", "modelopt", "RUN", "--out", "x.json"], "--out x.json is where `policy from` writes; give --file x.json"),
        (["to", "modelopt", "RUN", "--option", "algorithm"], "--option algorithm: expected key=value"),
    ],
)
def test_what_is_wrong_is_one_line(run, capsys, arguments, message):
    assert cli.main(["policy", *(str(run) if text == "RUN" else text for text in arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line


def test_binary_files_are_refused(run, tmp_path, capsys):
    (tmp_path / "junk").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["policy", "from", "modelopt", str(run), "--file", str(tmp_path / "junk")]) == 2
    assert "cannot be read (it is no text); give a policy file" in capsys.readouterr().err
