"""Images as data URIs, which are part of the page."""

from __future__ import annotations

import base64

import cv2
import matplotlib
import numpy as np

WIDEST = 480  # pixels of a picture in the page


def jpeg_uri(image: np.ndarray, widest: int = WIDEST) -> str:
    """The data URI of an image, (H, W, 3) BGR, which is resized if it is wider than so many pixels."""
    scale = min(1, widest / image.shape[1])
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
    return _uri('jpeg', cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 82])[1])


def map_uri(values: np.ndarray, low: float, high: float) -> str:
    """The data URI of a map, (H, W), with colours from the value `low` to `high`."""
    scaled = (values - low) / max(high - low, 1e-6)
    rgb = (matplotlib.colormaps['viridis'](scaled)[..., :3] * 255).round().astype(np.uint8)
    return _uri('png', cv2.imencode('.png', rgb[..., ::-1])[1])


def _uri(kind: str, data: np.ndarray) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}'
