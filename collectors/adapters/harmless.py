"""Training goes on whatever happens to its telemetry."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

_LOG = logging.getLogger(__name__)


def harmless(action: Callable[..., Any]) -> Callable[..., Any]:
    """The action, which returns None where it raises; the first error of a kind is logged."""
    told: set[str] = set()

    @wraps(action)
    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if (kind := type(error).__name__) not in told:
                told.add(kind)
                what = f"{action.__module__}.{action.__name__}"
                _LOG.warning("%s failed (%s: %s); training goes on without that telemetry.", what, kind, error)
            return None

    return attempt
