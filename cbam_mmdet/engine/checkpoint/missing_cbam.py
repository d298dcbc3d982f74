"""Load a checkpoint without CBAM, or with its CBAMs under other names, into a model with CBAM."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import checkpoint as checkpoint_module
from torch import nn

from cbam_mmdet.compat.mmengine import state_dicts_loaded_by
from cbam_mmdet.engine.checkpoint.content import beginnings
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.utils.text import abridge


@contextlib.contextmanager
def summarize_missing_cbam() -> Iterator[None]:
    """Let MMEngine log the CBAMs that a checkpoint does not hold in one line, in place of all their keys.

    It still names other missing keys, and unexpected ones.
    """
    with state_dicts_loaded_by(functools.partial(_load_plain, checkpoint_module.load_state_dict)):
        yield


def names_at_block_end(model: nn.Module, name: str) -> list[str]:
    """The names that a CBAM may have that ends its residual block, if the model's CBAM of this name does.

    It is a child of the block (`plugins=`: layer1.0.cbam) or of its last norm (PluginBackbone: layer1.0.bn3.cbam), and
    computes the same in both places. A plugin after conv2 of a Bottleneck, say, comes behind a ReLU, unlike one of bn2.
    """
    block_name = re.sub(r'(\.bn[123])?\.cbam$', '', name)
    block = model.get_submodule(block_name)
    end = next((norm for norm in ('bn3', 'bn2') if hasattr(block, norm)), None)
    names = [f'{block_name}.cbam', f'{block_name}.{end}.cbam']
    inside = [*getattr(block, 'after_conv1_plugin_names', ()), *getattr(block, 'after_conv2_plugin_names', ())]
    return names if end and name in names and name.rpartition('.')[2] not in inside else []


def _cbam_at_block_ends(state_dict: Mapping, model: nn.Module, names: list[str]) -> Mapping:
    """Rename CBAMs at the ends of residual blocks to this model's names."""
    modules = {key: f'{key.rpartition(".cbam.")[0]}.cbam' for key in state_dict if '.cbam.' in key}
    held = set(modules.values())
    renamed = {}
    for name in names:
        others = held & {*names_at_block_end(model, name)} - set(names)
        if name not in held and len(others) == 1:
            renamed[others.pop()] = name
    if not renamed:
        return state_dict
    print_log(
        f'the checkpoint has {len(renamed)} CBAM modules under other names: '
        f'{next(iter(renamed))} is {next(iter(renamed.values()))}',
        logger='current',
    )
    made: Any = OrderedDict()
    metadata = getattr(state_dict, '_metadata', {})
    made._metadata = OrderedDict((renamed.get(name, name), value) for name, value in metadata.items())
    for key, value in state_dict.items():
        module = modules.get(key)
        made[renamed[module] + key[len(module) :] if module in renamed else key] = value
    return made


def _load_plain(
    load_state_dict: Callable, module: Any, state_dict: Mapping, strict: bool = False, logger: Any = None
) -> None:
    """Load with MMEngine's own function, and log how many CBAMs the state dict does not hold."""
    while is_model_wrapper(module):
        module = module.module
    names = list(find_cbams(module))
    if not strict:
        state_dict = _cbam_at_block_ends(state_dict, module, names)
    if strict:
        return load_state_dict(module, state_dict, strict, logger)
    lacking = tuple(f'{name}.' for name in names if not any(key.startswith(f'{name}.') for key in state_dict))

    def look(_: nn.Module, incompatible: Any) -> None:
        _require_any(module, incompatible.missing_keys, state_dict)
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(lacking)]

    hook = module.register_load_state_dict_post_hook(look)
    try:
        load_state_dict(module, state_dict, strict, logger)
    finally:
        hook.remove()
    if not lacking:
        return
    unit = sum(module.get_submodule(name[:-1]).unit for name in lacking)
    print_log(
        f'the checkpoint has no weights for {len(lacking)} CBAM modules of {len(names)}: they keep their initial ones'
        + (f' ({unit} of them are the exact identity)' if unit else ''),
        logger='current',
        level=logging.INFO,
    )


def _require_any(module: nn.Module, missing: list[str], state_dict: Mapping) -> None:
    """Refuse weights of which none is the module's, as those of a whole detector in a backbone's init_cfg.

    Raises:
        UserError: which says how the keys begin.
    """
    expected = {key for key in module.state_dict() if not key.endswith('num_batches_tracked')}
    if not expected or expected - {*missing}:
        return
    begins = beginnings(state_dict)
    fitting = [begin for begin in begins if any(key.removeprefix(begin) in expected for key in state_dict)]
    hint = f": init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix={fitting[0]!r})" if fitting else ''
    raise UserError(
        f'a checkpoint was given for {type(module).__name__}, and none of its weights is of the {len(expected)} there. '
        f"Its keys begin with {abridge(begins, 8)}. An init_cfg of type='Pretrained' takes a part of a checkpoint by "
        f'its prefix{hint}'
    )
