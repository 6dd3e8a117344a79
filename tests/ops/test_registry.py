"""Choosing the ops, with and without the native extension."""

import sys

import pytest

from puna.errors import RequestError
from puna.ops.reference import ReferenceOps
from puna.ops.registry import make_ops


def test_without_the_extension_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "puna.ops.native_ops", None)  # importing it now raises ImportError
    with pytest.warns(UserWarning, match="slow reference ops"):
        assert isinstance(make_ops(), ReferenceOps)
    with pytest.raises(ImportError):
        make_ops("native")


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(RequestError, match="known: native, reference"):
        make_ops("gpu")
    with pytest.raises(RequestError, match="threads"):
        make_ops("reference", threads=0)


def test_the_default_is_native_where_it_is_built() -> None:
    pytest.importorskip("puna._native")
    assert make_ops(threads=1).name == "native"
