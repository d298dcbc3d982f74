"""Work dirs of 0.1.0 hold a copy of their config, which imports the modules of then."""

import subprocess
import sys
from importlib.util import find_spec

from conftest import ROOT

# What the shipped configs of 0.1.0 imported, and what its tools added to a work dir's copy; and what each is to bring.
NAMES = {
    'cbam_mmdet': "mmdet.registry.MODELS.get('CBAM')",
    'cbam_mmdet.evaluation': "mmdet.registry.METRICS.get('VOCDetectionMetric')",
    'cbam_mmdet.ssd_head': "hasattr(mmdet.models.dense_heads.SSDHead, 'loss_cls')",
    'cbam_mmdet.datasets.voc': "mmdet.registry.DATASETS.get('AnySuffixVOCDataset')",
    'cbam_mmdet.classification': "mmpretrain.registry.METRICS.get('TopKError')",
}


def test_copies_of_old_configs_are_read(tmp_path):
    lines = ['from mmengine.config import Config']
    here = {name: brings for name, brings in NAMES.items() if 'mmpretrain' not in brings or find_spec('mmpretrain')}
    for i, (name, brings) in enumerate(here.items()):
        config = tmp_path / f'copy_{i}.py'
        config.write_text(f'custom_imports = dict(allow_failed_imports=False, imports=[{name!r}])\nmodel = dict()\n')
        package = brings.split('(')[-1 if brings.startswith('hasattr') else 0].split('.')[0]
        module = 'mmdet.models.dense_heads' if brings.startswith('hasattr') else f'{package}.registry'
        lines += [f'Config.fromfile({str(config)!r})', f'import {module}', f'print({name!r}, bool({brings}))']
    done = subprocess.run([sys.executable, '-c', '\n'.join(lines)], cwd=ROOT, capture_output=True, text=True)
    for name in here:
        assert f'{name} True' in done.stdout.splitlines(), done.stdout + done.stderr
