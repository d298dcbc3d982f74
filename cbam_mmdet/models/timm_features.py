"""TimmFeatures: the feature maps of a timm network, as the backbone of a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.utils.text import abridge, brief


@MODELS.register_module()
class TimmFeatures(BaseModule):
    """A timm network without its classifier. It returns a feature map for each chosen stage.

    mmpretrain's TIMMBackbone does the same where mmpretrain is installed, but it freezes neither stages nor norms. In
    both, the network is the child `timm_model`. Here it is whole up to the last map, under timm's own names.

    Args:
        model_name: timm's name, e.g. 'tf_efficientnet_lite0'.
        out_indices: the maps to return, by timm's numbers. In most networks map i has the stride 2 ** (i + 1).
        frozen_stages: everything up to and including map i does not train, and its norms keep their running
            statistics. -1 freezes nothing.
        norm_eval: every BatchNorm keeps its running statistics, as in MMDetection's ResNet.
        init_cfg: of MMEngine. `Pretrained` takes a file with timm's keys. Its classifier is left out.
        **others: of timm.create_model. Files of weights are left to `init_cfg`, which runs no code from them.

    Attributes:
        channels: of each map that is returned.

    Raises:
        UserError: (a ValueError) if timm is missing, for a name that it does not know, and for maps or arguments that
            the network does not have.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (1, 2, 3, 4),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | None = None,
        **others: Any,
    ):
        super().__init__(init_cfg)
        self.model_name = model_name
        self.timm_model = _network(model_name, others)
        maps: Any = self.timm_model.feature_info
        chosen = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
        known, whole = range(len(maps)), all(type(i) is int for i in (*chosen, frozen_stages))
        if not (whole and chosen and set(chosen) <= {*known} and list(chosen) == sorted(set(chosen))) or not (
            -1 <= frozen_stages <= max(chosen)
        ):
            strides = ', '.join(f'{i} (stride {each["reduction"]})' for i, each in enumerate(maps))
            raise UserError(
                f'TimmFeatures: got out_indices={out_indices!r}, frozen_stages={frozen_stages!r}, expected some of the '
                f'maps of {model_name}, {strides}, in ascending order, and -1 or a map up to the last of them'
            )
        self.out_indices, self.frozen_stages, self.norm_eval = chosen, frozen_stages, norm_eval
        self.channels = tuple(maps[i]['num_chs'] for i in chosen)
        self._frozen = self._names_up_to(maps[frozen_stages]['module']) if frozen_stages >= 0 else {}
        self._whole = {*self.timm_model.state_dict()}
        self.timm_model.prune_intermediate_layers(chosen, prune_norm=True, prune_head=True)
        self._own = [name for name, _ in self.timm_model.named_parameters()]  # plugins will be put into it
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) -> for each chosen map (N, C, ceil(H / stride), ceil(W / stride))."""
        return tuple(
            self.timm_model.forward_intermediates(
                x, indices=self.out_indices, output_fmt='NCHW', intermediates_only=True
            )
        )

    def init_weights(self) -> None:
        """As `init_cfg` says. The keys of a file are those of the network inside.

        Raises:
            UserError: if the weights of a file are another network's.
        """
        if self.init_cfg:
            self._require_all(lambda: initialize(self.timm_model, self.init_cfg))
        self._is_init = True

    def _require_all(self, load: Callable[[], None]) -> None:
        """Load, and compare what was in the file, if there was one, with this network's weights."""
        files: list[list[str]] = []  # the keys of each
        hook = self.timm_model._register_load_state_dict_pre_hook(lambda weights, *_: files.append([*weights]))
        before = {name: weight._version for name, weight in self.timm_model.named_parameters()}  # counts the changes
        load()
        hook.remove()
        if not files:
            return
        weights = dict(self.timm_model.named_parameters())
        left = [name for name in self._own if weights[name]._version == before[name]]
        classifier = self.timm_model.default_cfg.get('classifier') or ()
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        known = self._whole | {*self.timm_model.state_dict()}
        others = [name for keys in files for name in keys if name not in known and not name.startswith(heads)]
        for names, what in ((left, 'lacks'), (others, 'holds, beside those,')):
            if names:
                raise UserError(
                    f'the file of weights {what} {len(names)} weights ({abridge(names, 3)}), which do not fit '
                    f"{self.model_name}: it is another network's, or has keys that are not timm's"
                )

    def train(self, mode: bool = True) -> TimmFeatures:
        """As for every module, but for what is frozen."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        self._freeze()
        return self

    def _freeze(self) -> None:
        for name, whole in self._frozen.items():
            module = self.timm_model.get_submodule(name)
            if whole:  # with the plugins that were put into it
                module.requires_grad_(False)
                for inner in module.modules():
                    inner.training = False
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)

    def _names_up_to(self, last: str) -> dict[str, bool]:
        """The modules, as registered, up to the end of this one, and whether they lie there as a whole.

        Raises:
            UserError: if timm names a module that is not there.
        """
        names = [name for name, _ in self.timm_model.named_modules()]
        inside = [i for i, name in enumerate(names) if f'{name}.'.startswith(f'{last}.')]
        if not inside:
            raise UserError(
                f'TimmFeatures: frozen_stages={self.frozen_stages}: this network cannot be frozen by stages'
            )
        after = names[inside[-1] + 1 :]
        holds_later = {name for name in names if any(later.startswith(f'{name}.') or not name for later in after)}
        return {name: name not in holds_later for name in names[: inside[-1] + 1]}


def _network(model_name: str, others: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"TimmFeatures: {error}. Its networks are timm's: pip install timm") from error
    if files := {'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay'} & {*others}:
        raise UserError(f"TimmFeatures takes no {min(files)}: init_cfg=dict(type='Pretrained', checkpoint=FILE)")
    if not isinstance(model_name, str) or not timm.is_model(model_name):
        raise UserError(f'TimmFeatures: timm has no {model_name!r}{did_you_mean(str(model_name), timm.list_models())}')
    try:
        network = timm.create_model(model_name, num_classes=0, **others)
    except (AssertionError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f'TimmFeatures: timm cannot build {model_name} with {others}: {type(error).__name__}: {brief(error)}'
        ) from error
    if not hasattr(network, 'forward_intermediates'):
        raise UserError(f'TimmFeatures: {model_name} returns no feature maps in this version of timm: choose another')
    return network
