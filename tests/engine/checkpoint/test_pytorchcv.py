"""ImageNet networks of pytorchcv: their keys, what they compute, and the zip archives that they are published in."""

import functools
import http.server
import pickle
import threading
import zipfile

import cv2
import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, WritesAFile
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from test_keys import UNIT, backbone, official

from cbam_mmdet.apis.convert import convert_checkpoint
from cbam_mmdet.engine.checkpoint.files import find_checkpoint
from cbam_mmdet.engine.checkpoint.keys import from_official, from_pytorchcv
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint, safe_loading
from cbam_mmdet.errors import UserError

WHY = "needs pip install '.[dev]'"
DEPTHS = (18, 34, 50, 101, 152)
NAME = 'cbam_resnet18-0000-00000000.pth'
IMAGES = DATA / 'coco/val2017'

# What the library's state dicts hold, written out: theirs -> here, one of each kind.
STEM = {
    'features.init_block.conv.conv.weight': 'conv1.weight',
    'features.init_block.conv.bn.running_var': 'bn1.running_var',
    'output.weight': 'fc.weight',
    'output.bias': 'fc.bias',
}
BASIC = {
    'features.stage1.unit1.body.conv1.conv.weight': 'layer1.0.conv1.weight',
    'features.stage1.unit2.body.conv2.bn.bias': 'layer1.1.bn2.bias',
    'features.stage2.unit1.identity_conv.conv.weight': 'layer2.0.downsample.0.weight',
    'features.stage2.unit1.identity_conv.bn.running_mean': 'layer2.0.downsample.1.running_mean',
    'features.stage4.unit2.cbam.ch_gate.mlp.fc1.weight': 'layer4.1.bn2.cbam.channel.fc1.weight',
    'features.stage4.unit2.cbam.ch_gate.mlp.fc2.bias': 'layer4.1.bn2.cbam.channel.fc2.bias',
    'features.stage4.unit2.cbam.sp_gate.conv.conv.weight': 'layer4.1.bn2.cbam.spatial.conv.weight',
    'features.stage4.unit2.cbam.sp_gate.conv.bn.weight': 'layer4.1.bn2.cbam.spatial.bn.weight',
}
BOTTLENECK = {
    'features.stage3.unit6.body.conv3.conv.weight': 'layer3.5.conv3.weight',
    'features.stage3.unit6.body.conv3.bn.num_batches_tracked': 'layer3.5.bn3.num_batches_tracked',
    'features.stage1.unit1.identity_conv.conv.weight': 'layer1.0.downsample.0.weight',
    'features.stage1.unit1.cbam.ch_gate.mlp.fc1.bias': 'layer1.0.cbam.channel.fc1.bias',
    'features.stage1.unit1.cbam.sp_gate.conv.bn.running_mean': 'layer1.0.cbam.spatial.bn.running_mean',
}


def renamed(depth):
    """The random weights of test_keys.official under pytorchcv's names: no library is needed for them."""
    parts = {
        'cbam.ChannelGate.mlp.1': 'cbam.ch_gate.mlp.fc1', 'cbam.ChannelGate.mlp.3': 'cbam.ch_gate.mlp.fc2',
        'cbam.SpatialGate.spatial.conv': 'cbam.sp_gate.conv.conv',
        'cbam.SpatialGate.spatial.bn': 'cbam.sp_gate.conv.bn',
        'downsample.0': 'identity_conv.conv', 'downsample.1': 'identity_conv.bn',
    }  # fmt: skip
    state = {}
    for key, value in official(depth).items():
        module, _, kind = key.removeprefix('module.').rpartition('.')
        if module.startswith('layer'):
            stage, unit, part = module.removeprefix('layer').split('.', 2)
            if part[:-1] in ('conv', 'bn'):
                part = f'body.conv{part[-1]}.{part[:-1]}'
            module = f'features.stage{stage}.unit{int(unit) + 1}.{parts.get(part, part)}'
        else:
            stem = dict(conv1='features.init_block.conv.conv', bn1='features.init_block.conv.bn', fc='output')
            module = stem[module]
        state[f'{module}.{kind}'] = value
    return state


def network(depth):
    """The library's own network, with random weights and random statistics of every BatchNorm."""
    models = pytest.importorskip('pytorchcv.models.cbamresnet', reason=WHY)
    torch.manual_seed(depth)
    made = getattr(models, f'cbam_resnet{depth}')().eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return made


def stages_of(network, x):
    """The output of each of the library's four stages."""
    x, maps = network.features.init_block(x), []
    for number in range(1, 5):
        x = getattr(network.features, f'stage{number}')(x)
        maps.append(x)
    return maps


@pytest.fixture
def serve(tmp_path):
    """Serves a folder; the URL of a file in it."""
    folder = tmp_path / 'served'
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    thread.join()
    server.server_close()


def zipped(path, state, name=NAME):
    """An archive as pytorchcv publishes it: one .pth file in it."""
    torch.save(state, path.parent / name)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.write(path.parent / name, name)
    (path.parent / name).unlink()
    return path


# Keys


@pytest.mark.parametrize(('depth', 'names'), [(18, STEM | BASIC), (50, STEM | BOTTLENECK)])
def test_the_names(depth, names):
    """As they stand in the library's state dicts, which need not be installed."""
    origins = from_pytorchcv(renamed(depth)).origins
    assert {origins[new]: new for new in names.values()} == names


@pytest.mark.parametrize('depth', [18, 50])
def test_the_same_weights_as_the_authors_names_give(depth):
    ours, expected = from_pytorchcv(renamed(depth)).state_dict, from_official(official(depth)).state_dict
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


@pytest.mark.parametrize('depth', DEPTHS)
def test_no_key_of_any_depth_is_left_over(depth):
    models = pytest.importorskip('pytorchcv.models.cbamresnet', reason=WHY)
    with torch.device('meta'):
        theirs = getattr(models, f'cbam_resnet{depth}')().state_dict()
    model = backbone(depth)
    made = from_pytorchcv(theirs)
    assert sorted(made.origins.values()) == sorted(theirs)
    assert set(made.state_dict) == {*model.state_dict(), 'fc.weight', 'fc.bias'}
    assert all(made.state_dict[key].shape == value.shape for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'features.extra': torch.zeros(1)}, '1 keys no such network has: features.extra'),
        ({'conv1.weight': torch.zeros(64, 3, 7, 7)}, '1 keys no such network has: conv1.weight'),
        (
            {'features.stage2.unit2.body.conv1.bn.weight': None},
            "pytorchcv's ResNet-18 with CBAM: 1 keys missing: features.stage2.unit2.body.conv1.bn.weight",
        ),
        ({'output.weight': torch.zeros(10, 512)}, r'output.weight \(\(10, 512\), expected \(1000, 512\)\)'),
        ({'features.stage1.unit3.body.conv1.conv.weight': torch.zeros(1)}, '50, 101 or 152: stages of 3, 2, 2, 2'),
    ],
)
def test_faults_are_named_by_their_names(change, message):
    state = renamed(18)
    for key, value in change.items():
        state[key] = value
        if value is None:
            del state[key]
    with pytest.raises(UserError, match=message):
        from_pytorchcv(state)


# What they compute


@pytest.mark.parametrize('depth', [18, 50])
def test_the_features_of_all_stages(depth, tmp_path):
    """In double precision, in which nothing but the order of summation differs, and as the loader gives them."""
    theirs = network(depth)
    torch.save(theirs.state_dict(), tmp_path / NAME)
    ours = backbone(depth, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / NAME)))
    with safe_loading():
        ours.init_weights()
    ours.double().eval()
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = stages_of(theirs.double(), x), ours(x)
    assert [len(maps) for maps in (expected, actual)] == [4, 4]
    for mine, other in zip(actual, expected, strict=True):
        assert other.std() > 0.01
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def test_the_classifier_gives_the_same_top_1_on_photographs(tmp_path):
    """By mmpretrain's classifier of configs/imagenet/, which takes the converted file whole."""
    pytest.importorskip('mmpretrain', reason="an optional extra: pip install '.[backbones]'")
    files = sorted(IMAGES.glob('*.jpg'))[:50]
    if len(files) < 50:
        pytest.skip(f'{IMAGES} has no 50 images')
    theirs = network(50)
    torch.save(theirs.state_dict(), tmp_path / NAME)
    convert_checkpoint(str(tmp_path / NAME), str(tmp_path / 'ours.pth'))
    cfg = Config.fromfile(ROOT / 'configs/imagenet/resnet50_cbam_in1k.py')
    init_default_scope('mmpretrain')
    ours = MODELS.build({**cfg.model, 'type': 'mmpretrain.ImageClassifier', 'data_preprocessor': cfg.data_preprocessor})
    ours.load_state_dict(load_checkpoint(str(tmp_path / 'ours.pth'))['state_dict'])
    ours.eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    labels = []
    for file in files:
        bgr = torch.from_numpy(np.ascontiguousarray(cv2.resize(cv2.imread(str(file)), (224, 224)).transpose(2, 0, 1)))
        with torch.no_grad():
            expected = theirs(((bgr.flip(0) / 255 - mean) / std)[None])[0]
            actual = ours(ours.data_preprocessor(dict(inputs=[bgr]))['inputs'], mode='tensor')[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        labels.append((int(actual.argmax()), int(expected.argmax())))
    assert all(mine == other for mine, other in labels)
    assert len({label for _, label in labels}) > 1, 'one class for all images would show nothing'


def test_they_are_of_the_papers_variant(tmp_path):
    zipped(tmp_path / f'{NAME}.zip', renamed(50))
    convert_checkpoint(str(tmp_path / f'{NAME}.zip'), str(tmp_path / 'ours.pth'))
    for source in (
        dict(type='Pretrained', checkpoint=str(tmp_path / f'{NAME}.zip')),
        dict(type='Pretrained', checkpoint=str(tmp_path / 'ours.pth'), prefix='backbone.'),
    ):
        plugins = [dict(UNIT, position='after_conv3')]
        model = MODELS.build(dict(type='ResNet', depth=50, plugins=plugins, init_cfg=source))
        with safe_loading(), pytest.raises(UserError, match="trained with gate='sigmoid'"):
            model.init_weights()


# The file


def assert_loaded(model):
    weights = from_pytorchcv(renamed(18)).state_dict
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_zip_by_its_path(tmp_path):
    path = str(zipped(tmp_path / f'{NAME}.zip', renamed(18)))
    assert find_checkpoint(path) == path
    model = backbone(18, init_cfg=dict(type='Pretrained', checkpoint=path))
    with safe_loading():
        model.init_weights()
    assert_loaded(model)


@pytest.mark.parametrize('end', ['', '.zip'])
def test_a_url(serve, monkeypatch, tmp_path, end):
    folder, address = serve
    if end:
        zipped(folder / f'{NAME}.zip', renamed(18))
    else:
        torch.save(renamed(18), folder / NAME)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    model = backbone(18, init_cfg=dict(type='Pretrained', checkpoint=f'{address}/{NAME}{end}'))
    with safe_loading():
        model.init_weights()
    assert_loaded(model)
    assert (tmp_path / f'home/hub/checkpoints/{NAME}{end}').is_file(), 'kept for the next start'


def test_the_tool_takes_the_url_of_a_zip(serve, run_tool, monkeypatch, tmp_path):
    folder, address = serve
    zipped(folder / f'{NAME}.zip', renamed(18))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    result = run_tool('convert_checkpoint.py', f'{address}/{NAME}.zip', tmp_path / 'ours.pth')
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    theirs = 'features.stage1.unit1.cbam.ch_gate.mlp.fc1.weight'
    assert f'{theirs} -> backbone.layer1.0.bn2.cbam.channel.fc1.weight (4, 64)' in lines
    assert 'output.bias -> head.fc.bias (1000,)' in lines and 'none left over' in lines[-1]
    assert any('123.675' in line for line in lines)
    missing = run_tool('convert_checkpoint.py', f'{address}/none.zip', tmp_path / 'ours.pth')
    assert missing.code == 2 and 'a download failed' in missing.err and 'Traceback' not in missing.err


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ({}, r'with 0 .pth files in it.*holds nothing'),
        ({'read.me': b'no weights'}, r'with 0 .pth files in it.*read.me'),
        ({'a.pth': b'', 'b.pth': b''}, r'with 2 .pth files in it.*a.pth, b.pth'),
        ({'a.pth': bytes(2**24)}, 'would unpack to 16777216: weights cannot be compressed so far'),
        ({'a.pth': b'no weights'}, 'cannot be read'),
        ({'../../a.pth': b'no weights'}, 'cannot be read'),
    ],
    ids=['empty', 'no weights', 'two files', 'bomb', 'text', 'leads out'],
)
def test_other_zips_are_refused_by_one_message(run_tool, tmp_path, members, message):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=message):
        load_checkpoint(str(tmp_path / 'a.zip'))
    result = run_tool('convert_checkpoint.py', tmp_path / 'a.zip', tmp_path / 'out.pth')
    assert result.code == 2 and 'Traceback' not in result.err
    assert {path.name for path in tmp_path.iterdir()} == {'a.zip'}


def test_a_zip_that_lies_about_its_sizes(tmp_path):
    """The size in its directory is what is read at most, whatever the data would unpack to."""
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.pth', bytes(2**24))
    content = (tmp_path / 'a.zip').read_bytes()
    (tmp_path / 'a.zip').write_bytes(content.replace((2**24).to_bytes(4, 'little'), (9).to_bytes(4, 'little')))
    with pytest.raises(UserError, match='cannot be read'):
        load_checkpoint(str(tmp_path / 'a.zip'))


def test_code_in_a_zip_is_not_run(tmp_path):
    for protocol in (None, 2):  # as torch writes it, and as it did before 1.6
        weights = dict(renamed(18), extra=WritesAFile(tmp_path / 'written'))
        if protocol is None:
            zipped(tmp_path / 'a.zip', weights)
        else:
            with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
                archive.writestr('a.pth', pickle.dumps(weights['extra'], protocol=protocol))
        with pytest.raises(UserError, match=r'holds more than tensors|cannot be read'):
            load_checkpoint(str(tmp_path / 'a.zip'))
        assert not (tmp_path / 'written').exists()
    zipped(tmp_path / 'a.zip', dict(extra=WritesAFile(tmp_path / 'written')))
    load_checkpoint(str(tmp_path / 'a.zip'), trust=True)
    assert (tmp_path / 'written').read_text() == 'code ran', 'that the file is what it should be'
