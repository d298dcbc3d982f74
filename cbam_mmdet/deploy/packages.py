"""The packages that ONNX needs, and the message where they are missing."""

from __future__ import annotations

import importlib.util

from cbam_mmdet.errors import UserError


def require_packages(*names: str) -> None:
    """Check that packages are installed.

    Raises:
        UserError: if one is not.
    """
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"ONNX needs the package {lacking[0]}, which is not installed here (pip install 'cbam-mmdet[deploy]')"
        )
