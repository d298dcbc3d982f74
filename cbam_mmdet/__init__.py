"""CBAM (Woo et al., ECCV 2018) as a backbone plugin of MMDetection.

Importing this package registers everything, also from a config: `custom_imports = dict(imports=['cbam_mmdet'])`.
"""

from cbam_mmdet.version import __version__

# Before anything imports mmcv.ops: where mmcv has no compiled operators, torchvision serves them.
from cbam_mmdet.compat.mmcv_ops import install_ops  # isort: skip

install_ops()

from cbam_mmdet import datasets  # noqa: E402
from cbam_mmdet.datasets.transforms import loading  # noqa: E402
from cbam_mmdet.engine import hooks  # noqa: E402
from cbam_mmdet.models.cbam import CBAM, ChannelAttention, SpatialAttention  # noqa: E402
from cbam_mmdet.models.gates import record_gates  # noqa: E402
from cbam_mmdet.models.plugins.backbone import PluginBackbone  # noqa: E402
from cbam_mmdet.models.plugins.neck import PluginNeck  # noqa: E402
from cbam_mmdet.utils.config import config_path, enable_package_configs  # noqa: E402

enable_package_configs()

__all__ = [
    'CBAM',
    'ChannelAttention',
    'PluginBackbone',
    'PluginNeck',
    'SpatialAttention',
    '__version__',
    'config_path',
    'datasets',
    'hooks',
    'install_ops',
    'loading',
    'record_gates',
]
