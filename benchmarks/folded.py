"""A network from a graph file: convolutions with their BatchNorm folded in, as converters of mobile runtimes leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKGROUND = 1
"""Outputs before the 1,000 of ImageNet in TensorFlow's numbering; they are left out."""


class FoldedNetwork(nn.Module):
    """Runs the nodes of a graph one after another.

    The file is an npz: ``graph`` is JSON with ``input`` and ``nodes``; a node has ``op`` (conv, fc, add, gap, flatten, softmax), the
    numbers of its inputs ``inp`` and of its output ``out``, its ``act`` (relu, relu6 or none), and for layers ``p``, the name of its arrays
    ``p.w`` and ``p.b``; integer arrays come with ``_scale`` and ``_zp``. The last layer becomes a linear one without the background class.
    """

    def __init__(self, path: Path):
        super().__init__()
        with np.load(path, allow_pickle=False) as arrays:
            graph: dict[str, Any] = json.loads(str(arrays["graph"]))
            self.input, self.nodes = graph["input"], _without_tail(graph["nodes"])
            self.layers = nn.ModuleDict({f"layer{n['p']}": _layer(n, dict(arrays)) for n in self.nodes if n["op"] in ("conv", "fc")})
        head = self.nodes[-1]
        self.layers[f"layer{head['p']}"] = _head(self.layers[f"layer{head['p']}"])

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, 3, H, W], from -1 to 1, to logits [n, 1000]."""
        values = {self.input: x}
        for node in self.nodes:
            out = self._run(node, [values[k] for k in node["inp"]])
            act = node.get("act")
            values[node["out"]] = F.relu(out) if act == "relu" else F.relu6(out) if act == "relu6" else out
        return values[self.nodes[-1]["out"]]

    def _run(self, node: dict[str, Any], inputs: list[Tensor]) -> Tensor:
        x = inputs[0]
        match node["op"]:
            case "conv":
                padded = F.pad(x, tuple(node["pad"])) if any(node["pad"]) else x
                out: Tensor = self.layers[f"layer{node['p']}"](padded)
            case "fc":
                out = self.layers[f"layer{node['p']}"](x)
            case "add":
                out = x + inputs[1]
            case "gap":
                out = x.mean((2, 3))
            case other:
                raise ValueError(f"op '{other}' is unknown")
        return out


def _without_tail(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the nodes up to the last layer; raises `ValueError` unless only pooling comes between the convolutions and it."""
    end = max(k for k, node in enumerate(nodes) if node["op"] in ("conv", "fc"))
    if nodes[end - 1]["op"] != "gap" or any(node["op"] not in ("flatten", "softmax") for node in nodes[end + 1 :]):
        raise ValueError("the graph does not end with a global average pooling and one layer")
    return [*nodes[:end], {**nodes[end], "op": "fc"}]


def _head(layer: nn.Module) -> nn.Linear:
    """Return the last layer as a linear one without the background class; a 1x1 convolution of pooled features is the same."""
    weight, bias = layer.weight.detach().flatten(1)[BACKGROUND:], layer.bias.detach()[BACKGROUND:]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.weight.data, head.bias.data = weight.clone(), bias.clone()
    return head


def _layer(node: dict[str, Any], arrays: dict[str, Any]) -> nn.Module:
    """Return the layer of a node, its integers turned into floats."""
    name = node["p"]
    weight, bias = arrays[f"{name}.w"].astype(np.float64), arrays[f"{name}.b"].astype(np.float64)
    if f"{name}.w_scale" in arrays:
        shape = (-1,) + (1,) * (weight.ndim - 1)
        weight = (weight - arrays[f"{name}.w_zp"].reshape(shape)) * arrays[f"{name}.w_scale"].reshape(shape)
    if f"{name}.b_scale" in arrays:
        bias = bias * arrays[f"{name}.b_scale"]
    layer: nn.Conv2d | nn.Linear
    if weight.ndim == 4:
        groups = node["groups"]
        layer = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2:], tuple(node["stride"]), groups=groups)
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
    return layer
