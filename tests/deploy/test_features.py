"""tools/export.py --out FILE.pt2: a program that runs where only torch is installed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEMO, SMALL, cfg_options
from torch import nn

from cbam_mmdet.apis.infer import load_detector
from cbam_mmdet.compat.torch import HAS_CUSTOM_OPERATORS
from cbam_mmdet.deploy.features import export_features
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import load_config

needs_export = pytest.mark.skipif(not HAS_CUSTOM_OPERATORS, reason='torch.export needs torch 2.4')
HEIGHT, WIDTH = 96, 128

# A process that knows nothing of this package, nor of OpenMMLab's.
ALONE = """
import json, sys
for name in ('cbam_mmdet', 'mmdet', 'mmcv', 'mmengine'):
    sys.modules[name] = None
import numpy, torch
said = {'facts.json': ''}
program = torch.export.load(sys.argv[1], extra_files=said).module()
images = torch.from_numpy(numpy.load(sys.argv[2]))
numpy.savez(sys.argv[3], *[feature.detach().numpy() for feature in program(images)])
print(json.dumps(json.loads(said['facts.json'])['classes']))
"""


@needs_export
@pytest.mark.parametrize('batch', [1, 3])
def test_it_gives_the_features_of_the_detector(run_tool, trained, shapes, tmp_path, batch):
    file, images, out = tmp_path / 'features.pt2', tmp_path / 'images.npy', tmp_path / 'out.npz'
    where = ['--data-root', shapes, '--out', file, '--fixed-size', HEIGHT, WIDTH, *cfg_options(SMALL)]
    result = run_tool('export.py', DEMO, trained, *where)
    assert result.code == 0, result.err
    np.save(images, np.random.default_rng(0).integers(0, 256, (batch, HEIGHT, WIDTH, 3), dtype=np.uint8))
    made = subprocess.run([sys.executable, '-c', ALONE, file, images, out], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr

    model = load_detector(load_config(str(DEMO), SMALL), str(trained), 'cpu')
    assert json.loads(made.stdout) == list(model.dataset_meta['classes'])
    inputs = [torch.from_numpy(image).permute(2, 0, 1) for image in np.load(images)]
    with torch.no_grad():
        theirs = model.extract_feat(model.data_preprocessor(dict(inputs=inputs))['inputs'])
    ours = np.load(out)
    assert len(ours.files) == len(theirs) > 1
    for name, feature in zip(ours.files, theirs, strict=True):
        np.testing.assert_allclose(ours[name], feature.numpy(), rtol=1e-4, atol=1e-5 * float(feature.abs().max()))


@pytest.mark.parametrize(
    ('more', 'message'),
    [([], 'give --fixed-size H W'), (['--fixed-size', '96', '128', '--fp16'], 'does not go with --float-input and')],
)
def test_bad_arguments(run_tool, trained, tmp_path, more, message):
    result = run_tool('export.py', DEMO, trained, '--out', tmp_path / 'a.pt2', *more)
    assert result.code == 2 and message in result.err and 'Traceback' not in result.err


@needs_export
def test_a_network_that_cannot_be_followed(trained, shapes, tmp_path):
    class Counts(nn.Module):
        def forward(self, x):
            return [x * int(x.sum().item())] if x.sum() > 0 else [x]

    model = load_detector(load_config(str(DEMO), SMALL), str(trained), 'cpu')
    model.backbone = Counts()
    image = next((shapes / 'val2017').iterdir())
    with pytest.raises(UserError, match=r'torch\.export cannot follow Counts and FPN'):
        export_features(model, tmp_path / 'a.pt2', (HEIGHT, WIDTH), [image])
    assert not (tmp_path / 'a.pt2').exists()
