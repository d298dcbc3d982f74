"""Compare a checkpoint with a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cbam_mmdet.engine.checkpoint.content import meta_of, weights_of
from cbam_mmdet.engine.checkpoint.missing_cbam import names_at_block_end
from cbam_mmdet.engine.checkpoint.sound import require_sound
from cbam_mmdet.engine.checkpoint.variants import positions_in
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM
from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.models.variant import is_any_variant_loaded
from cbam_mmdet.utils.text import abridge

POSITIONS = 'after_conv1', 'after_conv2', 'after_conv3'  # of a plugin in a residual block


def compare_state_dicts(checkpoint: Mapping, model: nn.Module, strict: bool, name: str) -> None:
    """Raise an error unless a checkpoint fits a model.

    Args:
        checkpoint: the loaded checkpoint: a state dict, or a dict that holds one as 'state_dict'.
        model: the model, without a DDP wrapper.
        strict: whether every key must fit. Otherwise at least one weight must fit.
        name: the checkpoint's name, for the message.

    Raises:
        UserError: if the checkpoint does not fit. The message names keys that are missing, unexpected, or of another
            shape, or the positions of CBAM in the blocks.
    """
    given = weights_of(checkpoint)
    if given is None:
        raise UserError(
            f'{name} holds no weights (a dict of tensors, or one with the key state_dict): it is not a checkpoint'
        )
    require_sound(given, name)
    expected = model.state_dict()
    _require_same_positions(checkpoint, model, name)
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    misshapen = [key for key in expected if key in given and getattr(given[key], 'shape', None) != expected[key].shape]
    fitting = len(expected) - len(missing) - len(misshapen)
    if not (missing or unexpected or misshapen) or (not strict and fitting):
        return
    details = []
    for what, keys in (('not in the checkpoint', missing), ('not in the model', unexpected)):
        if keys:
            details.append(f'{len(keys)} keys are {what} ({abridge(keys)})')
    if misshapen:
        key = misshapen[0]
        details.append(
            f'{len(misshapen)} keys have another shape ({key}: {tuple(given[key].shape)} in the checkpoint, '
            f'{tuple(expected[key].shape)} in the model)'
        )
    raise UserError(
        f'checkpoint {name} is of another architecture than the config: {fitting} of {len(expected)} keys fit; '
        f'{"; ".join(details)}. Give the config that it was trained with (a copy lies in its work dir).'
    )


def _require_same_positions(checkpoint: Mapping, model: nn.Module, name: str) -> None:
    """Refuse a CBAM that was trained elsewhere in its block: its weights have the same names and shapes there."""
    there, given = positions_in(meta_of(checkpoint).get('cfg')), weights_of(checkpoint) or {}
    here = {
        position
        for block_name, block in model.named_modules()
        for position in POSITIONS
        for plugin in getattr(block, f'{position}_plugin_names', ())
        if isinstance(getattr(block, plugin), CBAM) and _fits(getattr(block, plugin), given, f'{block_name}.{plugin}.')
    }
    for cbam, module in find_cbams(model).items():
        others = [name for name in names_at_block_end(model, cbam) if name != cbam]
        if f'{cbam}.channel.fc1.weight' not in given and any(_fits(module, given, f'{other}.') for other in others):
            here.add('after_conv3')  # it will be renamed
    if there and here - there and not is_any_variant_loaded():
        raise UserError(
            f'checkpoint {name} was trained with CBAM at position={abridge(sorted(there), quoted=True)} of the blocks, '
            f'and the config says {abridge(sorted(here), quoted=True)}: the same weights would compute something else. '
            'Set that position in the plugins of the config. To load them all the same: --any-variant'
        )


def _fits(module: nn.Module, given: Mapping, prefix: str) -> bool:
    """Whether the weights of this prefix have the names and shapes of the module's."""
    shapes = {prefix + key: value.shape for key, value in module.state_dict().items()}
    return all(getattr(given.get(key), 'shape', None) == shape for key, shape in shapes.items())
