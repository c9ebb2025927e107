"""The reference networks, and any other by ``package.module:function``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from bitwright.errors import BitwrightError, nearest
from bitwright.models.cifar_resnet import CifarResNet
from bitwright.models.digits import DigitsCNN
from bitwright.models.mobilenetv2 import MobileNetV2
from bitwright.models.resnet import resnet18, resnet50
from bitwright.models.resnet8 import ResNet8
from bitwright.models.weights import load_weights, read_weights
from bitwright.outside import import_from_here

__all__ = ["available", "build", "load_weights", "read_weights"]

Factory = Callable[..., nn.Module]


def available() -> dict[str, Factory]:
    """Return the networks of this package by name.

    >>> list(available())[:3]
    ['digits_cnn', 'cifar_resnet20', 'cifar_resnet32']
    """
    return {
        "digits_cnn": DigitsCNN,
        **{f"cifar_resnet{depth}": functools.partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110, 8)},
        "resnet8": ResNet8,
        "resnet18": resnet18,
        "resnet50": resnet50,
        "mobilenet_v2": MobileNetV2,
    }


def build(name: str, **arguments: Any) -> nn.Module:
    """Return a network with fresh weights.

    Args:
        name: a name of `available`, ``package.module:function`` (the working directory is looked into as well), or
            ``timm:NAME`` or ``torchvision:NAME`` where that library is installed.
        arguments: passed to the function that makes it, e.g. ``num_classes=100``.

    Raises:
        BitwrightError: the name or an argument is unknown, or what the function returns is no ``nn.Module``.

    >>> sum(p.numel() for p in build("cifar_resnet20").parameters())
    269722
    """
    factory = _factory(name)
    _check_arguments(name, factory, arguments)
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise BitwrightError(f"model '{name}': returned a {type(model).__name__}, not an nn.Module; name a function that returns one")
    return model


def _factory(name: str) -> Factory:
    source, colon, item = name.partition(":")
    if not colon:
        known = available()
        if name not in known:
            raise BitwrightError(f"no model '{name}'; {nearest(name, known)}; or write package.module:function")
        return known[name]
    if source == "timm":
        return functools.partial(_import(name, "timm").create_model, item)
    if source == "torchvision":
        return functools.partial(_import(name, "torchvision.models").get_model, item)
    if not source or not item:
        raise BitwrightError(f"model '{name}': expected package.module:function")
    found: Any = _import(name, source)
    for part in item.split("."):
        if part not in dir(found):
            raise BitwrightError(f"model '{name}': no '{part}' in {source}; {nearest(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise BitwrightError(f"model '{name}': '{item}' is a {type(found).__name__}; name a function or class that returns an nn.Module")
    factory: Factory = found
    return factory


def _import(name: str, module: str) -> Any:
    """Import a module as Python run in the working directory would."""
    try:
        return import_from_here(module)
    except ImportError as error:
        vision = module.partition(".")[0] in {"timm", "torchvision"}
        ask = "pip install 'bitwright[vision]'" if vision else "install it, or check the spelling"
        raise BitwrightError(f"model '{name}': cannot import {module} ({error}); {ask}") from error


def _check_arguments(name: str, factory: Factory, arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some built-in callables have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        raise BitwrightError(f"model '{name}': {error}; its arguments are: {', '.join(known) or 'none'}") from None
