"""Load an image, or name the one that cannot be loaded."""

from __future__ import annotations

import io
import warnings

import mmcv
import mmengine.fileio as fileio
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS
from PIL import Image

from cbam_mmdet.errors import UserError

# The last bytes of a complete JPEG and of a complete PNG.
END_MARKERS = (b'\xff\xd9', b'IEND\xaeB`\x82')


@TRANSFORMS.register_module()
class LoadCheckedImage(LoadImageFromFile):
    """MMCV's LoadImageFromFile, which names the file when it is missing, truncated or not an image.

    OpenCV fills the missing part of a truncated JPEG with grey and reports nothing. So a file without its end marker is
    decoded a second time by Pillow, which reports it.

    Args:
        on_error: 'raise', or 'skip' to log the file's name once and return None, for which MMEngine's data sets take
            another image.
        **kwargs: those of LoadImageFromFile.

    Raises:
        UserError: in `transform`, for an image that cannot be read, if on_error is 'raise'.
    """

    def __init__(self, on_error: str = 'raise', **kwargs) -> None:
        super().__init__(**kwargs)
        self.on_error = on_error
        self.reported: set[str] = set()

    @classmethod
    def like(cls, loader: LoadImageFromFile, on_error: str) -> LoadCheckedImage:
        """A transform with the settings of another loader."""
        keys = ('to_float32', 'color_type', 'imdecode_backend', 'backend_args')
        return cls(on_error, **{key: getattr(loader, key) for key in keys})

    def transform(self, results: dict) -> dict | None:
        path = results['img_path']
        try:
            image = read_image(path, self.color_type, self.imdecode_backend, self.backend_args)
            _check_size(path, image, results)
        except UserError as error:
            if self.on_error == 'raise':
                raise
            if path not in self.reported:
                self.reported.add(path)
                print_log(f"{error} Skipped (broken_images='skip').", logger='current', level=30)
            return None
        results['img'] = image.astype(np.float32) if self.to_float32 else image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results


def _check_size(path: str, image: np.ndarray, annotated: dict) -> None:
    # Both orientations pass, because OpenCV rotates an image by its EXIF data and annotation files may not.
    expected = annotated.get('height'), annotated.get('width')
    if None not in expected and sorted(expected) != sorted(image.shape[:2]):
        raise UserError(
            f'image {path} has {image.shape[1]}x{image.shape[0]} pixels, '
            f'its annotation says {expected[1]}x{expected[0]}: was one of them resized? The boxes would not fit.'
        )


def read_image(
    path: str, color_type: str = 'color', backend: str = 'cv2', backend_args: dict | None = None
) -> np.ndarray:
    """Read an image, by default as (H, W, 3) uint8, BGR.

    Raises:
        UserError: if the file is missing, truncated or not an image. The message names it.
    """
    try:
        data = fileio.get(path, backend_args=backend_args)
    except OSError as error:
        raise UserError(f'image {path} cannot be read: {error.strerror or error}.') from error
    if not data:
        raise UserError(f'image {path} is empty.')
    image = mmcv.imfrombytes(data, flag=color_type, backend=backend) if _is_complete(path, data) else None
    if image is None:
        raise UserError(f'image {path} is not an image that OpenCV can read.')
    return image


def _is_complete(path: str, data: bytes) -> bool:
    if data.rstrip(b'\0').endswith(END_MARKERS):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            Image.open(io.BytesIO(data)).load()
    except Image.UnidentifiedImageError:
        return _opencv_alone_reads(data)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for broken files
        raise UserError(f'image {path} is truncated or damaged ({error}).') from error
    return True


def _opencv_alone_reads(data: bytes) -> bool:
    """Whether OpenCV reads an image whose format Pillow does not know (HDR, EXR, PFM)."""
    return mmcv.imfrombytes(data) is not None
