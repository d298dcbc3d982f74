"""CBAM (Woo et al., ECCV 2018) as a backbone plugin of MMDetection.

Importing this package registers everything, also from a config: `custom_imports = dict(imports=['cbam_mmdet'])`.
"""

from .version import __version__

# Before anything imports mmcv.ops: where mmcv has no compiled operators, torchvision serves them.
from .mmcv_ops import install_ops  # isort: skip

install_ops()

from . import datasets, hooks  # noqa: E402
from .cbam import CBAM, ChannelAttention, SpatialAttention  # noqa: E402
from .config import config_path, enable_package_configs  # noqa: E402
from .datasets import loading  # noqa: E402
from .gates import record_gates  # noqa: E402
from .plugin_backbone import PluginBackbone, PluginNeck  # noqa: E402

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
