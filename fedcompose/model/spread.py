"""A composed model on several devices, where one is too small for it: accelerate says where, and moves what flows.

The model is put together first, in main memory, and spread then, so that experts lie with the linears that they change,
are counted when the room is shared out, and are merged into real weights. The router belongs to no device: what a
point asks of it comes to the point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedcompose.errors import ConfigError, MissingError
from fedcompose.model.placement import routed_modules

Devices = Mapping[str, int | str]  # by the name of a part of the model; "cpu": kept there, and computed by a GPU


def spread(model: Any) -> Any:
    """Put a model that lies in main memory on all GPUs of this machine, and what finds no room there stays.

    Raises: ConfigError: `DEVICES_NONE` where there is no GPU; MissingError: `DEVICES_FULL`.
    """
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    if not torch.cuda.is_available():
        raise ConfigError(
            "DEVICES_NONE",
            "there is no GPU here that the model could be spread over",
            fix="leave out --device-map",
        )
    for _, routed in routed_modules(model):  # what suits a CPU is no format for a GPU
        routed.experts.to(routed.linear.weight.dtype)
    whole = list(model._no_split_modules or ())
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    devices = infer_auto_device_map(model, memory, no_split_module_classes=whole)
    if "disk" in devices.values():
        raise MissingError(
            "DEVICES_FULL",
            "the model does not fit the GPUs and the memory of this machine",
            fix="a machine with more memory, or a release on a smaller base",
        )
    return place(model, devices)


def place(model: Any, devices: Devices) -> Any:
    """Put the parts of a model where `devices` says; all devices together compute what one would."""
    from accelerate import dispatch_model

    router = model._modules.pop("router", None)
    try:
        dispatch_model(model, {name: device for name, device in devices.items() if name != "router"})
    finally:
        if router is not None:
            model.router = router.to(model.device)
    return model


def is_spread(model: Any) -> bool:
    """Whether more than one device holds the model."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1
