"""CBAM (Woo et al., ECCV 2018) as a backbone plugin of MMDetection.

Importing this package registers everything, also from a config: `custom_imports = dict(imports=['cbam_mmdet'])`.
"""

from cbam_mmdet.version import __version__

# Before anything imports mmcv.ops: where mmcv has no compiled operators, torchvision serves them.
from cbam_mmdet.compat.mmcv_ops import install_ops  # isort: skip

install_ops()

from cbam_mmdet.compat.mmengine import package_configs
from cbam_mmdet.compat.patches import PERMANENT
from cbam_mmdet.compat.torch import children_registered_with
from cbam_mmdet.datasets.transforms import loading
from cbam_mmdet.engine import hooks
from cbam_mmdet.models.cbam import CBAM, ChannelAttention, SpatialAttention
from cbam_mmdet.models.gates import record_gates
from cbam_mmdet.models.plugins.apply_child import apply_after_conversion
from cbam_mmdet.models.plugins.backbone import PluginBackbone
from cbam_mmdet.models.plugins.neck import PluginNeck
from cbam_mmdet.models.timm_features import TimmFeatures
from cbam_mmdet.utils.config import PREFIX, config_path

PERMANENT.enter_context(package_configs(PREFIX, config_path))
PERMANENT.enter_context(children_registered_with(apply_after_conversion))

METRICS = ('HotCocoMetric', 'SampleCocoMetric', 'VOCDetectionMetric')


def __getattr__(name: str) -> type:
    """A metric, imported when it is asked for: it imports MMDetection's metrics, which takes seconds.

    MMEngine asks for it where a config has `type='cbam_mmdet.HotCocoMetric'`.
    """
    if name in METRICS:
        from cbam_mmdet import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


__all__ = [
    'CBAM',
    'ChannelAttention',
    'HotCocoMetric',
    'PluginBackbone',
    'PluginNeck',
    'SampleCocoMetric',
    'SpatialAttention',
    'TimmFeatures',
    'VOCDetectionMetric',
    '__version__',
    'config_path',
    'hooks',
    'install_ops',
    'loading',
    'record_gates',
]
