"""Random numbers that depend on the seed and on what they are for, never on what was drawn before.

A resumed run therefore continues bit for bit without any generator state in its checkpoint.
"""

from __future__ import annotations

import hashlib

import torch


def seeded(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A fresh generator on the device for this key, for instance (seed, "sample", iteration)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
