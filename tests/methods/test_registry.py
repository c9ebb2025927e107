"""The registry: the folder, entry points of other packages, and classes by their path."""

from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint

import pytest

import bitwright.methods
from bitwright.driver import SearchMethod
from bitwright.errors import RecipeError
from bitwright.methods import available, get_method
from bitwright.methods.uniform import Uniform


def test_every_file_is_a_method_named_like_it():
    found = available()
    assert {"uniform", "random", "fisher", "sdq"} <= set(found)
    for name, kind in found.items():
        assert get_method(name) is kind
        assert kind().name == name
        assert kind.ranking in {"loss", "last"}
        assert dataclasses.fields(kind) is not None
        assert kind.__dataclass_params__.frozen


def test_a_class_by_its_path():
    assert get_method("bitwright.methods.uniform:Uniform") is Uniform


def test_entry_points_add_methods(monkeypatch):
    entry = EntryPoint("mine", "bitwright.methods.uniform:Uniform", bitwright.methods.GROUP)
    monkeypatch.setattr(bitwright.methods, "entry_points", lambda group, name="mine": [entry] if name == "mine" else [])
    assert get_method("mine") is Uniform
    assert available()["mine"] is Uniform


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unifrom", r"unknown method 'unifrom'; did you mean 'uniform'\?, or package.module:Class for one of your own"),
        ("no_such_package:Thing", r"method 'no_such_package:Thing' cannot be imported \(No module named 'no_such_package'\)"),
        ("bitwright.methods.uniform:Nothing", "cannot be imported .*has no attribute 'Nothing'"),
        (":Nothing", "cannot be imported"),
        ("bitwright.methods.uniform:State", "method 'bitwright.methods.uniform:State' is no search method; give a class that derives"),
        ("bitwright.driver:SearchMethod", "is no search method"),
    ],
)
def test_what_is_no_method_is_refused(name, message):
    with pytest.raises(RecipeError, match=message):
        get_method(name)


def test_a_file_without_a_method_is_named(monkeypatch):
    monkeypatch.setattr(bitwright.methods, "_names", lambda: ["functional"])
    monkeypatch.setattr(bitwright.methods, "__name__", "bitwright.quant")
    with pytest.raises(RecipeError, match=r"bitwright\.quant\.functional: holds no SearchMethod"):
        get_method("functional")


def test_the_base_class_cannot_be_used():
    with pytest.raises(TypeError):
        SearchMethod()
