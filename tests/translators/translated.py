"""Small networks for translators, and policies of them."""

from collections import OrderedDict

import torch
from torch import nn

from bitwright.policy import Bits, Policy
from bitwright.sites import trace
from bitwright.translators import Subject


class Perceptron(nn.Module):
    """Linear layers with names that a careless pattern would confuse."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc10, self.fc = nn.Linear(32, 48), nn.Linear(48, 64), nn.Linear(64, 64)
        self.block = nn.ModuleDict({"fc": nn.Linear(64, 10)})

    def forward(self, x):
        return self.block["fc"](self.fc(self.fc10(self.fc1(x).relu()).relu()).relu())


class Convolutional(nn.Module):
    """Convolutions, one of them in a nested module, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.layer(self.conv1(x).relu()).mean((2, 3)))


def perceptron():
    torch.manual_seed(0)
    net = Perceptron().eval()
    return net, Subject(trace(net, torch.zeros(2, 32)).sites)


def convolutional():
    torch.manual_seed(0)
    net = Convolutional().eval()
    return net, Subject(trace(net, torch.zeros(2, 3, 8, 8)).sites)


def upsampling():
    """A convolution and a transposed one."""
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3, padding=1), relu=nn.ReLU(), up=nn.ConvTranspose2d(4, 2, 2, stride=2))).eval()
    return net, Subject(trace(net, torch.zeros(2, 3, 8, 8)).sites)


def upsampling_graph(path):
    """Write `upsampling` as a float ONNX graph by hand."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = [numpy_helper.from_array(value.numpy(), name) for name, value in upsampling()[0].state_dict().items()]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("ConvTranspose", ["b", "up.weight", "up.bias"], ["y"], name="up_1", strides=[2, 2]),
    ]
    shapes = {"x": ["N", 3, 8, 8], "y": ["N", 2, 16, 16]}
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in shapes.items()]
    model = helper.make_model(helper.make_graph(nodes, "float", *ends, weights), opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return str(path)


def policy_of(subject, *pairs):
    return Policy((site.name, Bits(*pair)) for site, pair in zip(subject.sites, pairs, strict=True))


def onnx_graph(path):
    """Write `Convolutional` as a float ONNX graph by hand, its weights under their own names."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    net, _ = convolutional()
    weights = [numpy_helper.from_array(value.numpy(), name) for name, value in net.state_dict().items()]
    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight", "conv1.bias"], ["a"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu1"),
        helper.make_node("Conv", ["b", "layer.0.weight", "layer.0.bias"], ["c"], name="layer_0", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"], name="relu2"),
        helper.make_node("ReduceMean", ["d", "axes"], ["e"], name="mean", keepdims=0),
        helper.make_node("Gemm", ["e", "fc.weight", "fc.bias"], ["y"], name="fc", transB=1),
    ]
    weights.append(helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]))
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in (("x", ["N", 3, 8, 8]), ("y", ["N", 10]))]
    graph = helper.make_graph(nodes, "float", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return str(path)
