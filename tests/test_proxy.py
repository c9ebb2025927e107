"""Proxies: the network's stem, strides, head and statistics adapt, and the costs stay the target's."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from bitwright.cli import main
from bitwright.data import Data, TensorSplit
from bitwright.errors import DataError, SiteError
from bitwright.evaluation import evaluate
from bitwright.models import build
from bitwright.proxy import adapt, default_images, estimate_batchnorm, fold_stem, reduced, replace_head, shrink_strides
from bitwright.sites import trace
from bitwright.training import FinetuneOptions


def data(classes: int, shape: tuple[int, int, int], n: int = 60, name: str = "made") -> Data:
    generator = torch.Generator().manual_seed(classes)
    y = (torch.arange(n) // 3) % classes
    x = torch.rand(n, *shape, generator=generator) + y.view(-1, 1, 1, 1) / classes
    splits = [TensorSplit(x, y, classes=classes).subset(torch.arange(n)[k::3]) for k in range(3)]
    return Data(name, *splits, classes, shape)


@pytest.fixture(scope="module")
def target() -> nn.Module:
    torch.manual_seed(0)
    net = build("cifar_resnet20")
    estimate_batchnorm(net, data(10, (3, 32, 32)).fit)
    return net.eval()


@pytest.mark.parametrize(("classes", "shape"), [(7, (3, 32, 32)), (3, (1, 28, 28)), (12, (3, 16, 16)), (2, (4, 20, 24))])
def test_network_adapts_to_classes_size_and_channels(target: nn.Module, classes: int, shape: tuple[int, int, int]) -> None:
    traced = trace(target, torch.zeros(1, 3, 32, 32))
    before = copy.deepcopy(target.state_dict())
    proxy = adapt(target, traced, (3, 32, 32), data(classes, shape), None)
    assert proxy.model(proxy.data.example(2)).shape == (2, classes)
    assert proxy.sample_passes > 0
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    names = {name for name, _ in proxy.model.named_modules()}
    assert {layer for site in traced.sites for layer in site.layers} <= names


def test_grey_images_count_as_three_equal_channels(target: nn.Module) -> None:
    folded = copy.deepcopy(target)
    fold_stem(folded, "conv1", (3, 32, 32), (1, 32, 32))
    grey = torch.rand(2, 1, 32, 32)
    assert torch.allclose(folded.conv1(grey), target.conv1(grey.repeat(1, 3, 1, 1)), atol=1e-5)


def test_a_first_site_of_another_kind_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(SiteError, match="takes no images of 3 channels"):
        fold_stem(net, "1", (3, 2, 2), (1, 2, 2))


class Functional(nn.Module):
    """A stem that is no layer, and a head over tokens or over their mean."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.w, self.head, self.pooled = nn.Parameter(torch.rand(4, 1, 3, 3)), nn.Linear(4, 3), pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = nn.functional.conv2d(x, self.w, padding=1).flatten(2).mT
        return self.head(tokens.mean(1)) if self.pooled else self.head(tokens).mean(1)


def test_a_functional_stem_is_left_alone_and_refused_where_it_had_to_change() -> None:
    net = Functional(pooled=True)
    traced = trace(net, torch.zeros(1, 1, 8, 8))
    proxy = adapt(net, traced, (1, 8, 8), data(5, (1, 6, 6)), None)
    assert proxy.model(proxy.data.example(2)).shape == (2, 5)
    for shape in ((3, 8, 8), (1, 4, 4)):
        with pytest.raises(
            SiteError, match=f"proxy: site '{traced.first}' is a functional call, which cannot be adapted; write it as a layer"
        ):
            adapt(net, traced, (1, 8, 8), data(5, shape), None)


def test_a_head_over_tokens_is_refused() -> None:
    net = Functional(pooled=False)
    traced = trace(net, torch.zeros(1, 1, 8, 8))
    with pytest.raises(SiteError, match=r"layer 'head' sees features of shape \(64, 4\) for an image; pool them to one vector"):
        adapt(net, traced, (1, 8, 8), data(5, (1, 8, 8)), None)


def test_small_images_stride_less_in_the_stem() -> None:
    net = build("resnet18")
    shrink_strides(net, "conv1", (3, 224, 224), (3, 32, 32))
    assert net.conv1.stride == (1, 1)
    assert net.maxpool.stride == (1, 1)
    same = build("resnet18")
    shrink_strides(same, "conv1", (3, 224, 224), (3, 160, 160))
    assert same.conv1.stride == (2, 2)


def test_head_is_the_nearest_class_mean() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
    made = data(3, (1, 2, 2), 90)
    replace_head(net, "1", made)
    x, y = made.fit.batch(torch.arange(len(made.fit)))
    means = torch.stack([x.flatten(1)[y == k].mean(0) for k in range(3)])
    nearest = torch.cdist(x.flatten(1), means).argmin(1)
    assert torch.equal(net(x).argmax(1), nearest)


def test_a_convolutional_head_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(SiteError, match="other classes need a linear classifier"):
        replace_head(net, "0", data(3, (1, 4, 4)))


def test_images_are_resized_where_the_network_needs_its_own_size() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 64, 4))
    proxy = adapt(net, trace(net, torch.zeros(1, 1, 8, 8)), (1, 8, 8), data(3, (1, 12, 12)), None)
    assert proxy.data.shape == (1, 8, 8)
    assert proxy.data.fit.batch(torch.tensor([0]))[0].shape == (1, 1, 8, 8)
    assert proxy.model(proxy.data.example(2)).shape == (2, 3)


def test_an_impossible_proxy_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64, 4))
    traced = trace(net, torch.zeros(1, 1, 8, 8))
    net[1] = nn.Flatten(2)
    with pytest.raises(DataError, match="neither at their size nor at the target's"):
        adapt(net, traced, (1, 8, 8), data(3, (1, 12, 12)), None)


def test_training_on_the_proxy_is_counted_and_helps(target: nn.Module) -> None:
    traced = trace(target, torch.zeros(1, 3, 32, 32))
    made = data(4, (3, 16, 16), 120)
    plain, trained = (adapt(target, traced, (3, 32, 32), made, o) for o in (None, FinetuneOptions(epochs=3, batch_size=20, lr=0.02)))
    assert trained.sample_passes == plain.sample_passes + 3 * 3 * 40
    x, y = made.fit.batch(torch.arange(40))
    losses = [float(nn.functional.cross_entropy(proxy.model(x), y)) for proxy in (plain, trained)]
    assert losses[1] < losses[0]


def test_training_that_breaks_the_network_is_said(target: nn.Module) -> None:
    traced, made = trace(target, torch.zeros(1, 3, 32, 32)), data(4, (3, 32, 32), n=120)
    plain = adapt(target, traced, (3, 32, 32), made, None)
    before = evaluate(plain.model, made.selection).top1
    assert before > 0.4
    with pytest.warns(UserWarning, match=r"training the network on made has made it worse .* lower search\.proxy\.adapt\.lr \(now 100\)"):
        adapt(target, traced, (3, 32, 32), made, FinetuneOptions(epochs=2, batch_size=8, lr=100.0))


def test_batchnorm_statistics_become_the_proxys() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1, momentum=0.3))
    made = data(2, (1, 4, 4), 60)
    assert estimate_batchnorm(net, made.fit) == 20
    x, _ = made.fit.batch(torch.arange(20))
    assert torch.allclose(net[0].running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert net[0].momentum == 0.3
    assert not net[0].training


def test_too_many_images_are_refused() -> None:
    with pytest.raises(DataError, match="proxy: 1000 images of made were asked for; give 2 to"):
        reduced(data(2, (1, 4, 4)), 1000, 0)


def test_all_images_make_a_proxy_if_a_fifth_is_held_out() -> None:
    made = data(2, (1, 4, 4), 60)  # 20 images to fit, 20 held out
    whole = Data("made", made.fit.subset(torch.arange(20)), made.selection.take(5), made.test, 2, (1, 4, 4))
    assert [len(split) for split in (reduced(whole, 25, 0).fit, reduced(whole, 25, 0).selection)] == [20, 5]
    with pytest.raises(DataError, match="proxy: 26 images of made were asked for; give 2 to 25"):
        reduced(whole, 26, 0)
    with pytest.raises(DataError, match="40 images of made are 8 for selection, and 20 of 40 are held out; load them with held_out=8"):
        reduced(made, 40, 0)


def test_one_image_is_too_few_for_batchnorm_of_vectors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    traced, made = trace(net, torch.zeros(1, 1, 4, 4)), data(3, (1, 4, 4))
    with pytest.raises(DataError, match=r"proxy: of one image there are no BatchNorm statistics \(Expected .*\); give 3 images or more"):
        adapt(net, traced, (1, 4, 4), reduced(made, 2, 0), None)
    assert adapt(net, traced, (1, 4, 4), reduced(made, 3, 0), FinetuneOptions(epochs=1)).model(torch.zeros(2, 1, 4, 4)).shape == (2, 3)


def test_default_is_four_percent() -> None:
    assert default_images(data(2, (1, 4, 4), 3000)) == 80


TINY = ["--set", "float={epochs: 1, batch_size: 64, lr: 0.05, max_steps: 15}", "--set", "search.options={max_steps: 4, batch_size: 32}"]


def test_search_on_a_proxy_writes_a_certificate_and_resumes(tmp_path, capsys) -> None:
    run = str(tmp_path / "run")
    command = ["search", "digits-sdq", "--proxy", "digits:60", "--set", "search.method=seam", *TINY, "--out", run]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "not safe to transfer" in out or "safe to transfer from the proxy" in " ".join(out.split())
    content = json.loads((tmp_path / "run" / "certificate.json").read_text())
    found = json.loads((tmp_path / "run" / "search.json").read_text())
    assert found["proxy"]["images"] == 60
    assert found["sample_passes"] > found["proxy"]["adaptation_passes"] > 0
    assert isinstance(content["safe"], bool)
    assert main(["report", run]) == 0
    assert "Transfer from the proxy" in (tmp_path / "run" / "report.html").read_text()
    policy = (tmp_path / "run" / "policy.json").read_text()
    assert main(["search", run, "--again"]) == 0
    assert (tmp_path / "run" / "policy.json").read_text() == policy


def test_bad_proxies_are_one_clear_line(tmp_path, capsys) -> None:
    base = ["search", "digits-sdq", *TINY, "--out", str(tmp_path / "run")]
    for proxy, message in (
        ("digit", "no data set 'digit'"),
        ("digits:many", "search.proxy.images"),
        ("digits:1", "search.proxy.images"),
        ("digits:1348", "proxy: 1348 images of digits were asked for; give 2 to 1347"),
        ("digits:2000", "proxy: 2000 images of digits were asked for; give 2 to 1347"),
        ("digits:9999", "proxy: 9999 images of digits were asked for; give 2 to 1347"),
    ):
        assert main([*base, "--proxy", proxy]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
