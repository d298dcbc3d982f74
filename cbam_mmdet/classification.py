"""The name that work dirs of 0.1.0 import; now cbam_mmdet.evaluation.classification."""

import cbam_mmdet.evaluation.classification  # noqa: F401
