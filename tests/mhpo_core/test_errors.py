"""The exception tree: one base, each class also what a caller who does not know it would catch."""

from __future__ import annotations

import inspect

import pytest

import mhpo_core
from mhpo_core import errors

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]


def test_the_base_is_public():
    assert mhpo_core.MhpoError is errors.MhpoError and len(CLASSES) > 1


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not errors.MhpoError])
def test_every_cause_is_caught_by_the_base_and_by_a_builtin(cls):
    assert issubclass(cls, errors.MhpoError) and cls.__doc__
    assert issubclass(cls, ValueError) != issubclass(cls, RuntimeError)
    with pytest.raises(errors.MhpoError, match="^what was given$"):
        raise cls("what was given")


@pytest.mark.parametrize("name", mhpo_core.__all__)
def test_every_exported_name_exists_and_is_documented(name):
    assert getattr(mhpo_core, name).__doc__
