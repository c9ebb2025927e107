"""The packed format: bitwise, small, its size known beforehand, and hostile files refused with a reason."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from bitwright import models
from bitwright.costs import Size, WeightBits
from bitwright.deployment import _show_verification
from bitwright.errors import ExportError
from bitwright.exporters import _container as container
from bitwright.exporters import available, export, get, verify
from bitwright.exporters._format import Content, Record
from bitwright.exporters._loading import _read
from bitwright.exporters.packed import Packed, load, packed_overhead, read_policy
from bitwright.policy import WIDTHS, Bits, Policy
from bitwright.quant import QuantLayer, QuantOptions, named_quant_layers, quantize
from bitwright.sites import trace

EXAMPLE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ZOO = Path(__file__).parents[2] / "zoo"
PATHS = ("stem", "depth", "up", "head", "last")


class OwnConv(nn.Conv2d):
    """A subclass: what takes its place must run the layer's operation."""


class Net(nn.Module):
    """One of each: grouped and transposed convolutions, odd sizes, both norms, an embedding, buffers of several types."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
        self.bn = nn.BatchNorm2d(6)
        self.depth = OwnConv(6, 6, 3, padding=1, groups=3, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 7)
        self.flat = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 5)
        self.table = nn.Embedding(2, 5)
        self.register_buffer("count", torch.tensor([1, 2]))
        self.register_buffer("on", torch.tensor(True))
        self.register_buffer("gain", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("unkept", torch.ones(2), persistent=False)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = self.plain(self.up(self.depth(x))).mean((2, 3))
        x = self.last(self.flat(self.head(x)))
        return x * self.gain[0].float() * self.on + self.table(self.count[0] * 0) * self.unkept[0]


def settle(model, seed=0):
    """Give a model statistics and parameters that are no defaults."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(generator=draw)
                module.running_var.uniform_(0.1, 3, generator=draw)
                if module.affine:
                    module.weight.normal_(generator=draw)
                    module.bias.normal_(generator=draw)
    return model.eval()


def net(seed=0):
    torch.manual_seed(seed)
    return settle(Net(), seed)


def train_a_little(model):
    """Move everything that learns off its start, as fine-tuning does."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=draw))
    return model


def policy(*pairs):
    return Policy(zip(PATHS, itertools.cycle(pairs), strict=False))


def quantized(rule=((3, 4), (2, 32), (8, 8), (1, 3), (16, 16)), seed=0, **options):
    model = quantize(net(seed), policy(*rule), calibration=EXAMPLE, options=QuantOptions(**options))
    return train_a_little(model)


def logits(model, x=EXAMPLE):
    with torch.no_grad():
        return model.eval()(x)


def test_it_is_registered():
    assert "packed" in available()
    assert not [name for name in available() if name.startswith("_")]
    assert get("packed") is Packed
    with pytest.raises(ExportError, match="no format 'pakced'; did you mean 'packed'"):
        get("pakced")
    with pytest.raises(ExportError, match="no option 'batchnrom' for packed; did you mean 'batchnorm'"):
        export(quantized(), "packed", "x", example=EXAMPLE, batchnrom="x")
    with pytest.raises(ExportError, match="option batchnorm='folded': expected 'as-trained' or 'eval-vectors'"):
        export(quantized(), "packed", "x", example=EXAMPLE, batchnorm="folded")


@pytest.mark.parametrize("batchnorm", ["as-trained", "eval-vectors"])
@pytest.mark.parametrize(
    "options",
    [{}, {"per_channel": False}, {"narrow": True}, {"entropy": True}, *({"quantizer": name} for name in ("entropy", "dorefa", "pact"))],
    ids=str,
)
def test_every_quantizer_is_bitwise(tmp_path, options, batchnorm):
    model = quantized(**options)
    wanted = logits(model)
    artefact = export(model, "packed", tmp_path / "deep" / "m.safetensors", example=EXAMPLE, batchnorm=batchnorm)
    other = net(seed=5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    loaded = load(artefact.path, other)
    assert torch.equal(logits(loaded), wanted)
    big = 30 * torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(logits(loaded, big), logits(model, big))
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert torch.equal(load(artefact.path, model)(EXAMPLE), wanted)  # the quantized network serves as the architecture too
    assert all(count <= 2 ** model.get_submodule(name).bits.w for name, count in artefact.levels.items())
    assert artefact.size == artefact.path.stat().st_size == sum(artefact.parts.values())
    assert json.loads(json.dumps(artefact.to_dict()))["bytes"] == artefact.size
    assert list(artefact.path.parent.iterdir()) == [artefact.path]


def test_the_loaded_network_is_plain_and_frozen(tmp_path):
    artefact = export(quantized(), "packed", tmp_path / "m", example=EXAMPLE)
    loaded = load(artefact.path, net())
    assert type(loaded.stem) is QuantLayer  # its input is quantized
    assert loaded.stem.weight_quantizer is None
    assert loaded.stem.input_quantizer.signed
    assert type(loaded.last) is nn.Linear
    assert loaded.stem.bits == (3, 4)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    weights = quantize(net(), policy((2, 32)))
    assert not list(named_quant_layers(load(export(weights, "packed", tmp_path / "w", example=EXAMPLE).path, net()).head))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)), min_size=5, max_size=5), st.booleans(), st.booleans())
def test_every_mix_of_widths_is_bitwise_and_within_its_size(tmp_path_factory, widths, per_channel, vectors):
    path = tmp_path_factory.mktemp("mix") / "m"
    mode = "eval-vectors" if vectors else "as-trained"
    model = quantized(widths, per_channel=per_channel)
    artefact = export(model, "packed", path, example=EXAMPLE, batchnorm=mode)  # raises unless bitwise
    float_net = net()
    sites = trace(float_net, EXAMPLE, skip=["table"])
    bits = Policy((site.name, policy(*widths)[site.name]) for site in sites.sites)
    bound = Size(packed_overhead(float_net, sites, batchnorm=mode)).total(sites.sites, bits)
    assert artefact.size <= bound
    ideal = sum(site.weights * bits[site.name].w for site in sites.sites) / 8 + artefact.parts["scales"] + artefact.parts["tensors"]
    assert bound <= 1.02 * ideal + 4000
    assert read_policy(path) == policy(*widths)


def resnet20(seed=0):
    torch.manual_seed(seed)
    return settle(models.build("cifar_resnet20"), seed)


@pytest.fixture(scope="module")
def resnet():
    """ResNet-20 at 1.93 average bits: (float network, sites, policy, quantized network)."""
    model, images = resnet20(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sites = trace(model, images)
    widths = {site.name: (8, 32) if site.name in (sites.first, sites.last) else (2, 32) for site in sites.sites}
    for name in ("layer3.0.conv1", "layer1.0.conv1", "layer1.1.conv1"):  # leaves 1.93
        widths[name] = (1, 32)
    found = Policy(widths)
    return model, sites, found, quantize(model, found), images


def test_resnet20_at_193_bits_is_as_small_as_promised(tmp_path, resnet):
    model, sites, found, qmodel, images = resnet
    average = WeightBits().total(sites.sites, found) / sum(site.weights for site in sites.sites)
    assert 1.93 <= average < 1.96
    wanted = logits(qmodel, images)
    for mode, limit in (("as-trained", 85_000), ("eval-vectors", 76_000)):
        options = {"policy": found, "reference": ("cifar_resnet20", {"num_classes": 10}), "batchnorm": mode}
        artefact = export(qmodel, "packed", tmp_path / mode, example=images, **options)
        assert artefact.size < limit
        assert torch.equal(logits(load(artefact.path), images), wanted)
        bound = Size(packed_overhead(model, sites, batchnorm=mode)).total(sites.sites, found)
        assert artefact.size <= bound <= artefact.size + 4 * 20
        ideal = sum(site.weights * found[site.name].w for site in sites.sites) / 8 + 4 * 698 + artefact.parts["tensors"]
        assert bound <= 1.02 * ideal + 4000


def test_building_by_name_leaves_the_random_state(tmp_path, resnet):
    _, _, found, qmodel, images = resnet
    artefact = export(qmodel, "packed", tmp_path / "m", example=images, policy=found, reference=("cifar_resnet20", {}))
    state = torch.get_rng_state()
    load(artefact.path)
    assert torch.equal(state, torch.get_rng_state())


def test_the_file_is_safetensors_with_the_policy_inside(tmp_path, resnet):
    _, _, found, qmodel, images = resnet
    artefact = export(qmodel, "packed", tmp_path / "m", example=images, policy=found, reference=("cifar_resnet20", {}))
    with safe_open(str(artefact.path), "pt") as file:
        assert set(file.keys()) == {"codes", "float32"}
        assert json.loads(file.metadata()["model"]) == ["cifar_resnet20", {}]
    assert read_policy(artefact.path) == found


def test_channels_last_and_training_mode_change_nothing(tmp_path):
    model = quantized().train()
    model.stem.weight.data = model.stem.weight.data.contiguous(memory_format=torch.channels_last)
    export(model, "packed", tmp_path / "m", example=EXAMPLE)
    assert model.training
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)


class Tied(nn.Module):
    """A weight used by two layers, a module used twice, and a quantized weight that is an embedding's too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.one, self.two = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.again, self.head = self.one, nn.Linear(4, 6, bias=False)
        self.two.weight = self.one.weight
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.two(self.again(self.one(self.embedding(x)))))


def test_shared_weights_are_written_once(tmp_path):
    torch.manual_seed(0)
    model, x = Tied(), torch.tensor([[0, 3, 5]])
    qmodel = quantize(model, Policy({"one": (3, 32), "two": (3, 32), "head": (2, 32)}))
    artefact = export(qmodel, "packed", tmp_path / "m", example=x)
    assert artefact.parts["codes"] == 16 * 3 // 8 + 24 * 2 // 8
    loaded = load(artefact.path, Tied())
    assert loaded.one.weight is loaded.two.weight
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)  # stays float
    assert torch.equal(logits(loaded, x), logits(qmodel, x))
    with torch.no_grad():
        qmodel.two.weight_quantizer.scale.mul_(2)  # learned apart: now they are different weights
    assert export(qmodel, "packed", tmp_path / "n", example=x).parts["codes"] == 2 * (16 * 3 // 8) + 24 * 2 // 8


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x, *, gain):
        return {"out": self.b(self.a(x) * gain), "gain": gain}


def test_examples_and_outputs_of_any_form(tmp_path):
    qmodel = quantize(Named(), Policy({"a": (2, 32), "b": (3, 32)}))
    export(qmodel, "packed", tmp_path / "m", example={"x": torch.randn(2, 3), "gain": torch.tensor(2.0)})
    bilinear = quantize(nn.Sequential(nn.Linear(3, 3)), Policy({"0": (2, 32)}))
    export(bilinear, "packed", tmp_path / "n", example=(torch.randn(2, 3),))


def test_sites_of_several_layers_keep_their_names(tmp_path):
    model = net()
    sites = trace(model, EXAMPLE, skip=["table"], tie=[("stem", "last")])
    found = Policy((site.name, (2, 32)) for site in sites.sites)
    qmodel = quantize(model, found, sites=sites.sites)
    artefact = export(qmodel, "packed", tmp_path / "m", example=EXAMPLE, policy=found)
    assert read_policy(artefact.path) == found
    assert len(found) == 4
    assert artefact.size <= Size(packed_overhead(model, sites)).total(sites.sites, found)


def spoil(name):
    model = quantized()
    if name == "policy":
        return model, {"policy": policy((5, 5))}
    if name == "nan":
        model.head.weight_quantizer.scale.data.fill_(float("nan"))
    if name == "nan bias":
        model.last.bias.data.fill_(float("nan"))
    if name == "double":
        model.stem.weight.data = model.stem.weight.data.double()
    if name == "complex":
        model.register_buffer("odd", torch.zeros(1, dtype=torch.complex64))
    if name == "float":
        model = net()
    if name == "bits":
        model.head.bits = Bits(4, 3)
    if name == "own activation":
        model.head.input_quantizer.__class__ = type("Mine", (type(model.head.input_quantizer),), {})
    if name == "own weights":
        model.stem.weight_quantizer.__class__ = type("Mine", (type(model.stem.weight_quantizer),), {})
    if name == "no quantizer":
        model.head.input_quantizer = None
    if name == "loaded":
        model.stem.weight_quantizer = None
    return model, {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("policy", "the policy says W5A5 for 'stem', which runs at W3A4; pass the policy it was quantized with"),
        ("nan", "the codes of 'head' do not give back its 1-bit weights; are its scales finite"),
        ("nan bias", "the network's own outputs on the example are nan"),
        ("double", r"the weight of 'stem' is torch.float64; convert the model with .float\(\) first"),
        ("complex", r"'odd' is torch.complex64, which a packed file cannot say"),
        ("float", r"no quantized layer; pass what quantize\(\) returned"),
        ("bits", "the codes of 'head' do not give back its 4-bit weights"),
        ("own activation", "'head' has A3 and a Mine on its input, which a packed file cannot say"),
        ("own weights", "'stem' has a Mine, which a packed file cannot say"),
        ("no quantizer", "'head' has A3 and no quantizer on its input"),
        ("loaded", "'stem' has W3 and no weight quantizer, as in a loaded network; export the fine-tuned one"),
    ],
)
def test_what_cannot_be_exported_says_why_and_leaves_no_file(tmp_path, name, message):
    model, more = spoil(name)
    with pytest.raises(ExportError, match=message):
        export(model, "packed", tmp_path / "m", example=EXAMPLE, **more)
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    (tmp_path / "m").write_text("old")
    monkeypatch.setattr("bitwright.exporters.packed.raw", lambda tensor: bytes(tensor.numel() * tensor.element_size()))
    with pytest.raises(ExportError, match=r"the file's network differs by .* on the example"):
        export(quantized(((8, 32),)), "packed", tmp_path / "m", example=EXAMPLE)
    assert (tmp_path / "m").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def written(tmp_path):
    return export(quantized(), "packed", tmp_path / "m.safetensors", example=EXAMPLE).path


def test_every_truncation_and_flipped_byte_is_refused(written):
    good, wanted = written.read_bytes(), logits(load(written, net()))
    header = 8 + int.from_bytes(good[:8], "little")
    for length in [*range(0, header, 97), *range(header, len(good), 41), len(good) - 1]:
        written.write_bytes(good[:length])
        with pytest.raises(ExportError, match=r"m\.safetensors: (truncated|damaged|not a packed file)"):
            load(written, net())
    written.write_bytes(good + b"\0")
    with pytest.raises(ExportError, match="extended"):
        load(written, net())
    for place in [*range(8), *range(8, header, 31), *range(header, len(good), 17)]:
        written.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        if place < header:
            assert refused_or_equal(written, wanted)  # such as a flip within the padding
        else:
            with pytest.raises(ExportError, match="checksum"):
                load(written, net())


def refused_or_equal(path, wanted):
    try:
        return torch.equal(logits(load(path, net())), wanted)
    except ExportError as error:
        return str(error).startswith(str(path)) and "\n" not in str(error)


def forge(path, change=None, blobs=None):
    """Write the file anew with a right checksum: only the meaning is wrong."""
    content, found = _read(path)
    metadata = (change or (lambda c: c))(content)
    metadata = metadata.to_metadata() if isinstance(metadata, Content) else metadata
    data = {name: (torch.uint8 if name == "codes" else container.BY_NAME[name], value) for name, value in found.items()}
    path.write_bytes(container.to_bytes(metadata, data | (blobs(found) if blobs else {})))


def slot0(**changes):
    return lambda c: dataclasses.replace(c, slots=(dataclasses.replace(c.slots[0], **changes), *c.slots[1:]))


def record0(**changes):
    return lambda c: dataclasses.replace(c, records=(dataclasses.replace(c.records[0], **changes), *c.records[1:]))


def meta(**changes):
    return lambda c: c.to_metadata() | changes


NAN = container.raw(torch.tensor([float("nan")]))


@pytest.mark.parametrize(
    ("change", "blobs", "message"),
    [
        (slot0(name="stam"), None, "a layer 'stam' that the model has not; pass the float architecture"),
        (slot0(name="bn"), None, "a layer 'bn' that the model has not"),
        (slot0(shape=(6, 3, 3, 4)), None, r"'stem' of shape \(6, 3, 3, 4\) and the model needs \(6, 3, 3, 3\)"),
        (slot0(shape=(10**9, 10**9)), None, "and the model needs"),
        (record0(bits=Bits(8, 4)), None, "damaged: '(codes|float32)' "),
        (record0(scale="t"), None, "damaged: 'float32' has"),
        (lambda c: dataclasses.replace(c, kept=c.kept[1:]), None, "no tensor 'count', unlike the model"),
        (lambda c: dataclasses.replace(c, vectors=("bn",)), None, "'bn"),
        (lambda c: dataclasses.replace(c, vectors=("stem",)), None, "a BatchNorm 'stem' that the model has not"),
        (lambda c: dataclasses.replace(c, records=c.records[1:]), None, "its layers and their records do not match"),
        (meta(format="other-1"), None, "its format is 'other-1', expected 'bitwright-packed-1'"),
        (meta(layout="{}"), None, "its metadata do not parse"),
        (meta(layout="zzz!"), None, "its metadata do not parse"),
        (meta(layout="[" * 100_000), None, "its metadata do not parse"),
        (meta(layers="99licu"), None, "no layer is written as '99licu'"),
        (meta(layers="17xicu"), None, "no layer is written as '17xicu'"),
        (meta(bits="0"), None, "its metadata do not parse"),
        (meta(model="["), None, "its metadata do not parse"),
        (None, lambda b: {"codes": (torch.uint8, b["codes"][:-1])}, "damaged: 'codes' ends after"),
        (None, lambda b: {"codes": (torch.uint8, b["codes"] + b"x")}, "and only .* are claimed"),
        (None, lambda b: {"float32": (torch.float32, NAN + b["float32"][4:])}, "a scale is negative, infinite or nan"),
        (None, lambda b: {"int64": (torch.int64, b"")}, "damaged: 'int64' ends after 0 bytes and 16 are claimed"),
    ],
)
def test_a_forged_file_is_refused_with_the_reason(written, change, blobs, message):
    forge(written, change, blobs)
    with pytest.raises(ExportError, match=message) as caught:
        load(written, net())
    assert str(caught.value).startswith(str(written))
    assert "\n" not in str(caught.value)


def test_codes_out_of_range(tmp_path):
    path = export(quantized(((3, 32),), narrow=True), "packed", tmp_path / "m", example=EXAMPLE).path
    forge(path, blobs=lambda b: {"codes": (torch.uint8, b"\xff" * len(b["codes"]))})
    with pytest.raises(ExportError, match="'stem' has codes out of the range of 3 bits"):
        load(path, net())


def test_a_tensor_of_another_type(written):
    forge(written, lambda c: dataclasses.replace(c, kept=tuple(dataclasses.replace(k, dtype=torch.float64) for k in c.kept)))
    with pytest.raises(ExportError, match="or another data type"):
        load(written, net())


def refer(reference):
    return lambda c: dataclasses.replace(c, reference=reference)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (None, "does not say which model it is for; pass the float architecture"),
        (("os:system", {"command": "x"}), "is for the model 'os:system', which is not one of ours, and names in files are not imported"),
        (("cifar_resnet20", {}), "a layer 'stem' that the model has not"),
        (("cifar_resnet20", {"num_classes": 10**12}), "such sizes are refused"),
        (("cifar_resnet20", {"wrong": 1}), "cannot be built"),
        (("cifar_resnet20", {"num_classes": "x"}), "cannot be built"),
    ],
)
def test_only_our_own_models_are_built(written, reference, message):
    forge(written, refer(reference))
    with pytest.raises(ExportError, match=message):
        load(written)


def test_another_architecture_is_refused(written):
    with pytest.raises(ExportError, match=r"has a layer 'stem' that the model has not"):
        load(written, resnet20())
    wider = net()
    wider.extra = nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"has no tensor 'extra.weight', unlike the model"):
        load(written, wider)


def test_missing_files(tmp_path):
    for call in (lambda path: load(path, net()), read_policy):
        with pytest.raises(ExportError, match=r"none: cannot be read \(No such file"):
            call(tmp_path / "none")


def test_a_record_is_read_as_it_was_written():
    for text in ("17licu", "79dhc-", "98----", "97---p", "09eht-"):
        assert str(Record.parse(text)) == text
    for text in ("", "17lic", "17---u", "97licu", "19licu", "18----", "27licp-"):
        with pytest.raises(ValueError, match="no layer is written as"):
            Record.parse(text)


def test_a_learned_activation_scale_that_crossed_zero_is_written_as_it_works(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(16, 6)
    quantized = quantize(net, Policy({"0": (4, 4), "2": (3, 2)}), calibration=x).eval()
    with torch.no_grad():
        for _, layer in named_quant_layers(quantized):
            layer.input_quantizer.scale.neg_()
    export(quantized, "packed", tmp_path / "net.safetensors", example=x)
    assert torch.equal(load(tmp_path / "net.safetensors", net)(x), quantized(x))


def flipped(codes):
    """Change all codes, as a damaged file with a checksum of its own has them."""
    return {"codes": (torch.uint8, bytes(255 - byte for byte in codes["codes"]))}


@pytest.mark.parametrize(("bits", "allowed"), [((4, 32), 1e-3), ((4, 8), 0.05)])
def test_the_answer_to_a_sample_is_in_the_file_and_compared(tmp_path, bits, allowed):
    path = export(quantized((bits,)), "packed", tmp_path / "m.safetensors", example=EXAMPLE).path
    found = verify(path, model=net())
    assert (found.samples, found.answer, found.allowed) == (2, 0.0, allowed)
    forge(path, blobs=flipped)
    with pytest.raises(ExportError, match=r"its output on the sample differs by .* from the network's own answer"):
        verify(path, model=net())


def test_another_answer_in_the_file_is_refused(written):
    forge(written, lambda c: dataclasses.replace(c, sample=dataclasses.replace(c.sample, shape=(2, 6))))
    with pytest.raises(ExportError, match=r"its output on the sample differs"):
        verify(written, model=net())
    forge(written, lambda c: dataclasses.replace(c, sample=dataclasses.replace(c.sample, inputs=(("", (2, 5, 6, 6), "float32"),))))
    with pytest.raises(ExportError, match=r"its network does not run on the sample in it"):
        verify(written, model=net())


@pytest.mark.parametrize("text", ["x", "=2x3:float32|2", "=99999x99999:float32|2|AAAAPw==", "=2x3:float32|2|?", "=2x3:float32|2|AAA="])
def test_a_malformed_sample_is_refused(written, text):
    forge(written, meta(sample=text))
    with pytest.raises(ExportError, match="its metadata do not parse"):
        load(written, net())


def test_older_files_without_a_sample_still_load_and_verify(written, capsys):
    wanted = logits(load(written, net()))
    forge(written, lambda c: {key: value for key, value in c.to_metadata().items() if key != "sample"})
    assert torch.equal(logits(load(written, net())), wanted)
    found = verify(written, model=net())
    assert (found.samples, found.answer) == (2, None)
    _show_verification(found)
    assert "run on 2 samples, no answer in it to compare with" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cifar10-resnet20-w2.0", "cifar10-resnet20-w2.5a4"])
def test_networks_of_the_zoo_give_the_answer_in_their_file(name):
    found = verify(ZOO / name / "model.safetensors")
    assert found.samples == 2
    assert found.answer is not None
    assert found.answer <= found.allowed


def test_a_sample_takes_the_same_room_whether_there_is_one_or_not(tmp_path):
    qmodel = quantize(Named(), Policy({"a": (2, 32), "b": (3, 32)}))
    some = export(qmodel, "packed", tmp_path / "m", example={"x": torch.randn(2, 3), "gain": torch.tensor(2.0)})
    none = export(qmodel, "packed", tmp_path / "n", example={"x": torch.randn(2, 3), "gain": 2.0})
    assert some.size == none.size
    assert (verify(some.path, to="packed", model=Named()).answer, _read(none.path)[0].sample) == (0.0, None)
    wide = quantize(nn.Sequential(nn.Linear(3, 1000)), Policy({"0": (2, 32)}))
    artefact = export(wide, "packed", tmp_path / "w", example=torch.randn(8, 3))
    assert len(_read(artefact.path)[0].sample.numbers) == 32
    assert verify(artefact.path, to="packed", model=nn.Sequential(nn.Linear(3, 1000))).answer == 0.0


def test_a_network_that_takes_no_sample_is_packed_without_one(tmp_path):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            if bool((x < 0).any()):
                raise ValueError("no negative values")
            return self.fc(x)

    artefact = export(quantize(Picky(), Policy({"fc": (2, 32)})), "packed", tmp_path / "m", example=torch.rand(2, 3))
    assert _read(artefact.path)[0].sample is None


def test_power_of_two_scales_are_refused_with_their_cause(tmp_path):
    """They are rounded, and biases with them, where the network computes; the file would keep what is rounded."""
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), EXAMPLE[0, 0]
    model = quantize(net, Policy({"0": (4, 8), "2": (4, 8)}), calibration=x, options=QuantOptions(scales="power_of_two"))
    with pytest.raises(
        ExportError, match=r"'0' rounds its steps to powers of two, and its bias .*; give --to onnx, or quantize with scales='free'"
    ):
        export(model, "packed", tmp_path / "m.safetensors", example=x)
