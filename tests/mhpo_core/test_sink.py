"""The sink protocol and the recorder that implements it take the same calls."""

from __future__ import annotations

import inspect

import pytest

from collectors import Recorder
from mhpo_core.sink import Sink

METHODS = [name for name, _ in inspect.getmembers(Sink, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("method", METHODS)
def test_the_recorder_takes_every_argument_of_the_protocol(method):
    promised = inspect.signature(getattr(Sink, method)).parameters
    taken = inspect.signature(getattr(Recorder, method)).parameters
    for name, parameter in promised.items():
        assert taken[name].default == parameter.default
        # what the protocol lets callers pass by name or by place must be passable so
        assert taken[name].kind in (parameter.kind, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = {n for n, p in taken.items() if p.default is inspect.Parameter.empty}
    assert required <= set(promised)
