"""Serve mmcv's operators in every Python program of an environment, also in those that never import this package.

`import cbam_mmdet` before mmdet is all that a program of one's own needs. MMDetection's `tools/test.py`, `from
mmdet.apis import DetInferencer` or a spawned worker import mmcv.ops before a config's `custom_imports` has a say; for
them :func:`enable` writes two small files into site-packages: a `.pth` file, which Python reads at its start, and the
finders that it imports. One stands last in line: it is asked for `mmcv._ext` only after everything else has failed to
find one. The other waits for MMEngine's configs, so that a base may be one of ours, `cbam_mmdet::NAME.py`.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from cbam_mmdet.errors import UserError

NAME = 'cbam_mmdet_startup'
FINDER = '''"""Written by cbam_mmdet/compat/startup.py: lets torchvision serve mmcv._ext where there is none.

It also lets the base of a config be one of cbam_mmdet's.
"""

import sys
from importlib.machinery import PathFinder


class Finder:
    asked = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != 'mmcv._ext' or cls.asked:
            return None
        cls.asked = True  # the import below looks for mmcv._ext itself
        try:
            from cbam_mmdet import install_ops

            install_ops()
        except ModuleNotFoundError as error:
            if error.name != 'cbam_mmdet':
                raise
            return None  # uninstalled since
        finally:
            cls.asked = False
        return sys.modules[name].__spec__


class ConfigFinder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != 'mmengine.config.config':
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), know_configs(module.Config))
        return spec


def know_configs(config):
    """Until cbam_mmdet is imported, which sees to it by itself."""
    original = config._get_cfg_path

    def get_cfg_path(cfg_path, filename):
        prefix, _, name = cfg_path.rpartition('::')
        if prefix != 'cbam_mmdet':
            return original(cfg_path, filename)
        from cbam_mmdet import config_path

        return config_path(name), None

    config._get_cfg_path = staticmethod(get_cfg_path)


sys.meta_path.append(Finder)
sys.meta_path.insert(0, ConfigFinder)
'''


def enable(site_packages: Path | str | None = None) -> Path:
    """Serve mmcv's operators in every program of this environment.

    Args:
        site_packages: where to write; by default this environment's.

    Returns:
        The folder written to.

    Raises:
        UserError: if it cannot be written.
    """
    folder = _folder(site_packages)
    try:
        (folder / f'{NAME}.py').write_text(FINDER)
        (folder / f'{NAME}.pth').write_text(f'import {NAME}\n')
    except OSError as error:
        raise UserError(f'cannot write to {folder}: {error.strerror}') from error
    return folder


def disable(site_packages: Path | str | None = None) -> Path:
    """Take back what :func:`enable` wrote."""
    folder = _folder(site_packages)
    for suffix in ('.pth', '.py'):
        (folder / f'{NAME}{suffix}').unlink(missing_ok=True)
    return folder


def _folder(site_packages: Path | str | None) -> Path:
    return Path(site_packages or sysconfig.get_paths()['purelib'])
