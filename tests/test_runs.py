"""Run directories: nothing is lost, whatever happens to the disk."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import runs
from bitwright.errors import RunError
from bitwright.runs import Run, append_jsonl, load_tree, read_jsonl, save_tree, truncate_jsonl, write_text_atomic


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_every_kind_of_value_comes_back(tmp_path):
    base = torch.arange(12.0)
    tree = {
        "tensors": [torch.tensor(3.5), torch.zeros(0, 4), torch.ones(2, dtype=torch.bfloat16), torch.tensor([True, False])],
        "views": (base[:6], base[3:].reshape(3, 3), base.reshape(3, 4).t(), base),
        "rng": torch.get_rng_state(),
        "ints": torch.tensor([2**60], dtype=torch.int64),
        "numbers": [0, -3, 2**80, 0.1, 1.0, -0.0, float("inf"), float("nan")],
        "flags": {True: None, 2: "two", (1, "x"): [], 1.5: {}},
        "empty": [(), {}, "", "ünicode\n"],
    }
    save_tree(tmp_path / "a.safetensors", tree)
    assert same(load_tree(tmp_path / "a.safetensors"), tree)


def test_a_tree_without_tensors_and_a_bare_tensor(tmp_path):
    for tree in (7, None, [], {"a": "b"}, torch.zeros(3)):
        save_tree(tmp_path / "a", tree)
        assert same(load_tree(tmp_path / "a"), tree)


def test_an_optimizer_comes_back(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    save_tree(tmp_path / "a", optimizer.state_dict())
    again = torch.optim.AdamW([parameter], lr=0.1)
    again.load_state_dict(load_tree(tmp_path / "a"))
    assert same(dict(again.state_dict()), dict(optimizer.state_dict()))


keys = st.one_of(st.text(max_size=5), st.integers(), st.booleans(), st.none())
leaves = st.one_of(keys, st.floats(allow_nan=False), st.integers(0, 5).map(lambda n: torch.arange(n, dtype=torch.int16)))
trees = st.recursive(leaves, lambda s: st.lists(s, max_size=3) | st.dictionaries(keys, s, max_size=3) | st.tuples(s, s), max_leaves=8)


@settings(max_examples=100, deadline=None)
@given(trees)
def test_flatten_and_back(tree):
    skeleton, tensors = runs.flatten(tree)
    assert same(runs.unflatten(json.loads(json.dumps(skeleton)), tensors), tree)


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"tree\.a\[1\]: cannot save set; use tensors"):
        save_tree(tmp_path / "a", {"a": [1, {2}]})


def test_the_tree_is_a_copy(tmp_path):
    tensor = torch.zeros(3)
    _, tensors = runs.flatten(tensor)
    tensor += 1
    assert tensors[0].sum() == 0


def load_or_message(path):
    try:
        return "same" if same(load_tree(path), {"x": torch.arange(6), "y": [1.5, "s"]}) else "other"
    except RunError as error:
        return "refused" if path.name in str(error) else str(error)


def test_every_truncation_and_every_flipped_byte_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tree(path, {"x": torch.arange(6), "y": [1.5, "s"]})
    good = path.read_bytes()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(RunError, match=r"a\.safetensors: .*(restore|delete)"):
            load_tree(path)
    header = 8 + int.from_bytes(good[:8], "little")
    for place in [*range(8), *range(8, header, 5), *range(header, len(good))]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert load_or_message(path) in ("same", "refused")  # the same: a flip that changes nothing, as of padding
    for place in range(header, len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(RunError, match="checksum"):
            load_tree(path)


def test_a_missing_file_and_a_foreign_one(tmp_path):
    with pytest.raises(RunError, match="no such file"):
        load_tree(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "b"))
    with pytest.raises(RunError, match="not a file of this kind"):
        load_tree(tmp_path / "b")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    save_tree(path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(RunError, match=r"No space left on device.*intact: free space"):
        save_tree(path, 2)
    monkeypatch.undo()
    assert load_tree(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_text_atomic(path, "old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_refuses_a_line():
    with pytest.raises(RunError, match=r"/dev/full: cannot be written"):
        append_jsonl("/dev/full", {"a": 1})


def test_killed_while_writing(tmp_path):
    program = "import sys, itertools; from bitwright.runs import save_tree; import torch\n"
    program += "print('go', flush=True)\nfor i in itertools.count(): save_tree(sys.argv[1], [i, torch.full((20000,), i)])"
    path = tmp_path / "a"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step, tensor = load_tree(path)
    assert bool((tensor == step).all())


def test_lines_are_appended_read_and_cut(tmp_path):
    path = tmp_path / "deep" / "s.jsonl"
    for i in range(4):
        append_jsonl(path, {"i": i, "loss": float("nan"), "more": {"x": [1.5, float("inf")]}})
    assert read_jsonl(path)[2] == {"i": 2, "loss": None, "more": {"x": [1.5, None]}}
    with path.open("a") as file:
        file.write('{"i": 4, "lo')
    assert len(read_jsonl(path)) == 4
    truncate_jsonl(path, 2)
    assert [record["i"] for record in read_jsonl(path)] == [0, 1]
    append_jsonl(path, {"i": 2})
    assert [record["i"] for record in read_jsonl(path)] == [0, 1, 2]
    with pytest.raises(RunError, match="has 3 lines and the checkpoint beside it expects 5; restore it, or delete"):
        truncate_jsonl(path, 5)
    truncate_jsonl(path, 0)
    assert read_jsonl(path) == []
    truncate_jsonl(tmp_path / "none", 0)
    assert read_jsonl(tmp_path / "none") == []
    path.write_text("what\n")
    with pytest.raises(RunError, match="not JSON lines"):
        read_jsonl(path)


def test_a_run_opens_again_with_the_same_recipe(tmp_path):
    recipe = {"seed": 1, "model": {"name": "a", "weights": "/here/a.th"}, "budgets": ["a"], "t": (1, 2), "inf": float("inf")}
    run = Run.open(tmp_path / "r", recipe, free=["model.weights"])
    run.finish("search", seconds=1.5, loss=float("nan"))
    (run.path / "checkpoint").mkdir()
    (run.path / "checkpoint" / ".a.safetensors.partial").write_text("x")
    moved = (tmp_path / "r").rename(tmp_path / "moved")
    recipe["model"]["weights"] = "/there/a.th"
    again = Run.open(moved, recipe, free=["model.weights"])
    assert again.finished("search")
    assert not again.finished("finetune")
    assert again.manifest["stages"]["search"]["seconds"] == 1.5
    assert not list(moved.rglob("*.partial"))
    assert again.changed_versions() == {}
    again.reopen("search", "finetune")
    assert not Run.load(moved).finished("search")
    manifest = json.loads((moved / "manifest.json").read_text())
    assert set(manifest["versions"]) == {"python", "torch", "bitwright"}
    assert "/here" not in (moved / "manifest.json").read_text()
    assert str(tmp_path) not in (moved / "manifest.json").read_text()


def test_an_edited_recipe_is_refused_and_named(tmp_path):
    Run.open(tmp_path / "r", {"seed": 1, "search": {"method": "sdq", "options": {"a": 1}}}).finish("search")
    before = (tmp_path / "r" / "manifest.json").read_bytes()
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path / "r", {"seed": 2, "search": {"method": "sdq", "options": {"a": 1}}, "new": 3, "none": None})
    message = str(caught.value)
    assert "seed (was 1, now 2)" in message
    assert "new (was absent, now 3)" in message
    assert "none" not in message  # a key that is not given
    assert "method" not in message
    assert "another --out, or restore" in message
    assert (tmp_path / "r" / "manifest.json").read_bytes() == before


def test_a_run_opened_by_another_version_says_so(tmp_path, monkeypatch):
    Run.open(tmp_path / "r", {})
    monkeypatch.setattr(runs, "versions", lambda: {"python": "9", "torch": torch.__version__, "bitwright": "9"})
    assert Run.open(tmp_path / "r", {}).changed_versions()["python"][1] == "9"


@pytest.mark.parametrize("damage", ["{", '{"format": "bitwright-run-1"}', "[]", "null", "edited"])
def test_a_damaged_manifest_is_refused(tmp_path, damage):
    run = Run.open(tmp_path / "r", {"seed": 1})
    file = run.path / "manifest.json"
    file.write_text(file.read_text().replace('"seed": 1', '"seed": 2') if damage == "edited" else damage)
    with pytest.raises(RunError, match=r"manifest\.json: (damaged|altered).*restore it"):
        Run.open(tmp_path / "r", {"seed": 2})


def test_directories_that_are_no_runs(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"has files in it but no manifest\.json.*--out"):
        Run.open(tmp_path / "mine", {})
    with pytest.raises(RunError, match="is a file"):
        Run.open(tmp_path / "mine" / "thesis.tex", {})
    with pytest.raises(RunError, match="no run directory"):
        Run.load(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    Run.open(tmp_path / "empty", {})


def test_paths_stay_inside(tmp_path):
    run = Run.open(tmp_path / "r", {})
    assert run.inside("checkpoint", "a.safetensors").parent.is_dir()
    for bad in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(RunError, match="leads out of the run directory"):
            run.inside(bad)
