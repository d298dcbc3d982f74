"""The name that work dirs of 0.1.0 import; now cbam_mmdet.compat.ssd_head."""

import cbam_mmdet.compat.ssd_head  # noqa: F401
