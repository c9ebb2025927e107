"""The reference networks: names, sizes, weights from files, and networks from elsewhere."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitwright.errors import BitwrightError
from bitwright.models import available, build, load_weights
from bitwright.runs import save_tree

SHAPES = {"digits_cnn": (1, 8), "resnet8": (3, 32), "resnet18": (3, 224), "resnet50": (3, 224), "mobilenet_v2": (3, 224)}
PARAMETERS = {
    "digits_cnn": 17_890,
    "cifar_resnet20": 269_722,
    "cifar_resnet8": 75_290,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "resnet8": 78_186,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
}


@pytest.mark.parametrize("name", available())
def test_parameters_and_output_shape(name):
    channels, size = SHAPES.get(name, (3, 32))
    with torch.device("meta"):
        net = build(name, num_classes=7)
        assert net(torch.zeros(2, channels, size, size)).shape == (2, 7)
        assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


NAMES = {
    "cifar_resnet20": {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.weight", "linear.bias"},
    "resnet8": {"conv.0.weight", "conv.8.bias", "bn.6.running_mean", "fc.bias"},
    "resnet18": {"conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.bn2.running_var", "fc.weight"},
    "resnet50": {"layer1.0.downsample.1.bias", "layer4.2.conv3.weight", "layer3.5.bn3.weight"},
    "mobilenet_v2": {
        "features.0.0.weight",
        "features.1.conv.0.0.weight",
        "features.1.conv.1.weight",
        "features.1.conv.2.running_mean",
        "features.17.conv.1.0.weight",
        "features.17.conv.3.bias",
        "features.18.1.weight",
        "classifier.1.bias",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_public_checkpoints(name):
    with torch.device("meta"):
        assert NAMES[name] <= set(build(name).state_dict())


def test_only_expanding_shortcuts_have_weights():
    with torch.device("meta"):
        names = build("resnet18").state_dict()
    assert not any("layer1.0.downsample" in name or "layer2.1.downsample" in name for name in names)


def test_option_a_shortcut_pads_both_sides():
    block = build("cifar_resnet20").layer2[0]
    x = torch.randn(1, 16, 4, 4)
    out = block.shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out.shape == (1, 32, 2, 2)
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_fresh_weights_follow_the_seed():
    torch.manual_seed(3)
    one = build("digits_cnn").state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, one[name]) for name, value in build("digits_cnn").state_dict().items())


# ---------------------------------------------------------------- weights


def scrambled(seed):
    torch.manual_seed(seed)
    net = build("digits_cnn")
    for buffer in net.buffers():
        buffer.copy_(torch.rand(buffer.shape) * 9)
    return net


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("kind", ["safetensors", "npz", "th", "wrapped.pth", "legacy.pt"])
def test_weights_from_every_kind_of_file(tmp_path, kind):
    source, target, path = scrambled(0), scrambled(1), tmp_path / f"net.{kind}"
    state = source.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    elif kind == "th":
        torch.save(state, path)
    else:
        wrapped = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}
        torch.save(wrapped, path, _use_new_zipfile_serialization=kind != "legacy.pt")
    load_weights(target, path)
    assert same(source, target)


def test_the_float_network_of_a_run_is_a_file_of_weights(tmp_path):
    source, target, path = scrambled(0), scrambled(1), tmp_path / "float.safetensors"
    save_tree(path, dict(source.state_dict()))
    load_weights(target, path)
    assert same(source, target)
    save_tree(path, {"epoch": 3, "rows": []})
    with pytest.raises(BitwrightError, match=re.escape("holds no table of tensors; save model.state_dict()")):
        load_weights(target, path)


def test_batch_counts_may_be_missing(tmp_path):
    state = {name: value for name, value in scrambled(0).state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "net.safetensors")
    load_weights(build("digits_cnn"), tmp_path / "net.safetensors")


def broken(change):
    state = scrambled(0).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update({"fc2.weight": s.pop("fc.weight")}), "no 'fc.weight' .1 missing.; did you mean 'fc2.weight'?"),
        (lambda s: s.update({"fc.wait": torch.zeros(1)}), "the model has no 'fc.wait' .1 unexpected.; did you mean 'fc.weight'?"),
        (lambda s: s.update({"fc.weight": torch.zeros(100, 24)}), r"'fc.weight' has shape \[100, 24\], the model's is \[10, 24\]; "),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, match):
    path, target, before = tmp_path / "net.safetensors", scrambled(1), scrambled(1)
    save_file(broken(change), path)
    with pytest.raises(BitwrightError, match=match):
        load_weights(target, path)
    assert same(before, target)


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pth"])
def test_missing_and_truncated_files(tmp_path, kind):
    path, net = tmp_path / f"net.{kind}", scrambled(0)
    with pytest.raises(BitwrightError, match=r"no such file; check the path"):
        load_weights(net, path)
    state = net.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    else:
        torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BitwrightError, match=r"the file is damaged or holds more than tensors .*; fetch it again") as caught:
        load_weights(net, path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_weights(tmp_path):
    net = build("digits_cnn")
    torch.save(net, tmp_path / "whole.pth")
    with pytest.raises(BitwrightError, match=r"damaged or holds more than tensors"):
        load_weights(net, tmp_path / "whole.pth")
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BitwrightError, match=r"damaged or holds more than tensors"):
        load_weights(net, tmp_path / "objects.npz")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BitwrightError, match=re.escape("holds no table of tensors; save model.state_dict()")):
        load_weights(net, tmp_path / "list.pth")
    with pytest.raises(BitwrightError, match=r"unknown kind '.bin'; expected .safetensors, .npz, .th, .pt, .pth"):
        load_weights(net, tmp_path / "net.bin")


@pytest.mark.data
@pytest.mark.parametrize(("name", "file"), [("cifar_resnet20", "akamaster_resnet20-12fca82f.th"), ("resnet8", "mlperf_tiny_resnet8.npz")])
def test_public_checkpoints(name, file):
    root = os.environ.get("BITWRIGHT_DATA")
    if not root or not (Path(root) / "checkpoints" / file).exists():
        pytest.skip("needs BITWRIGHT_DATA with its checkpoints")
    net = build(name)
    load_weights(net, Path(root) / "checkpoints" / file)
    assert all(buffer.abs().sum() > 0 for key, buffer in net.named_buffers() if key.endswith("running_mean"))


# ---------------------------------------------------------------- models by name


def test_a_model_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_net_of_test.py").write_text(
        "from torch import nn\nclass Zoo:\n    @staticmethod\n    def small(n=3):\n        return nn.Linear(2, n)\n"
        "def text():\n    return 'no'\nCOUNT = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build("own_net_of_test:Zoo.small", n=5).out_features == 5
    with pytest.raises(BitwrightError, match=r"no 'smal' in own_net_of_test; did you mean 'small'\?"):
        build("own_net_of_test:Zoo.smal")
    with pytest.raises(BitwrightError, match=r"returned a str, not an nn.Module"):
        build("own_net_of_test:text")
    with pytest.raises(BitwrightError, match=r"'COUNT' is a int; name a function or class"):
        build("own_net_of_test:COUNT")
    with pytest.raises(BitwrightError, match=r"unexpected keyword argument 'm'; its arguments are: n"):
        build("own_net_of_test:Zoo.small", m=5)


def test_a_class_by_path():
    assert isinstance(build("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet19", r"no model 'resnet19'; did you mean 'resnet18'\?; or write package.module:function"),
        ("no_such_package_here:net", "cannot import no_such_package_here .*; install it, or check the spelling"),
        (":net", "expected package.module:function"),
    ],
)
def test_unknown_models(name, match):
    with pytest.raises(BitwrightError, match=match):
        build(name)


@pytest.mark.parametrize("prefix", ["timm", "torchvision"])
def test_libraries_that_are_not_installed(prefix, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, prefix, None)
    with pytest.raises(BitwrightError, match=re.escape("pip install 'bitwright[vision]'")):
        build(f"{prefix}:resnet18")


def test_wrong_arguments_and_depths():
    with pytest.raises(BitwrightError, match=r"unexpected keyword argument 'classes'; its arguments are: num_classes"):
        build("resnet18", classes=5)
    with pytest.raises(BitwrightError, match=r"depth 21 is not 6n.2; use 20, 32, 44, 56 or 110"):
        build("bitwright.models.cifar_resnet:CifarResNet", depth=21)
