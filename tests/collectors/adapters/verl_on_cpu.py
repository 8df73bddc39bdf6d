"""A CPU platform for verl, which has none, added through its own registry. Import this before anything else of verl."""

from __future__ import annotations

import contextlib
import os
import types
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_MEMORY = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")
_MODULE = types.SimpleNamespace(
    **{name: lambda *_: 0 for name in _MEMORY}, empty_cache=lambda: None, synchronize=lambda *_: None,
    set_device=lambda *_: None, get_device_name=lambda *_: "CPU", is_available=lambda: True,
    mem_get_info=lambda *_: (1, 1),
)  # fmt: skip


@PlatformRegistry.register(platform="cpu")
class PlatformCpu(PlatformBase):
    """What verl asks of a device."""

    device_name, vendor_name, device_module = "cpu", "any", _MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "NO_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None

    def _nothing(self, *_: Any) -> None:
        return None

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = _nothing
