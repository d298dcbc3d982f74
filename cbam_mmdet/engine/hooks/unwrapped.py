"""The model inside its wrappers."""

from __future__ import annotations

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
