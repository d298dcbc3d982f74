"""The built-in demo data set. It imports neither torch nor mmdet."""

from cbam_mmdet.datasets.shapes import (
    CLASSES,
    METAINFO,
    PALETTE,
    ShapeObject,
    count_objects,
    draw_image,
    draw_scene,
    ensure_shapes,
)

__all__ = [
    'CLASSES',
    'METAINFO',
    'PALETTE',
    'ShapeObject',
    'count_objects',
    'draw_image',
    'draw_scene',
    'ensure_shapes',
]
