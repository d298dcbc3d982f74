"""The shipped configs: they build, differ from their twins in CBAM alone, and work from anywhere.

They also work with MMDetection's own tools.
"""

import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import mmdet
import pytest
import torch
from conftest import DEMO, ROOT, tiny
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from cbam_mmdet import CBAM, config_path
from cbam_mmdet.compat.startup import disable, enable
from cbam_mmdet.datasets import METAINFO, ensure_shapes
from cbam_mmdet.engine.record import base_differences, shipped_config
from cbam_mmdet.errors import UserError

FILES = sorted(path.relative_to(ROOT / 'configs').as_posix() for path in (ROOT / 'configs').rglob('*.py'))
BASES = [name for name in FILES if name.startswith('_base_/')]  # they only define names for the others
WHOLE = [name for name in FILES if name not in BASES]
CONFIGS = [name for name in WHOLE if not name.startswith('imagenet/')]  # of detectors
TWINS = [(name, re.sub('_cbam(_heads|_in1k)?', '', name)) for name in CONFIGS if '_cbam' in name]
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim/tools'


def build(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    return MODELS.build(cfg.model)


def test_there_are_configs():
    assert len(CONFIGS) >= 30
    assert len(TWINS) >= 14


@pytest.mark.parametrize('name', WHOLE)
def test_every_config_is_whole(name):
    """It stands on nothing that is missing, and says what is trained, on what, and by which figures it is judged."""
    if name.startswith('imagenet/'):
        pytest.importorskip('mmpretrain', reason="an optional extra: pip install '.[backbones]'")
    cfg = Config.fromfile(ROOT / 'configs' / name)
    for key in ('model', 'train_dataloader', 'val_evaluator', 'optim_wrapper', 'param_scheduler', 'train_cfg'):
        assert cfg[key], key
    assert 'cbam_mmdet' in cfg.custom_imports.imports


def names_of_bases():
    return {key for name in BASES for key in Config.fromfile(ROOT / 'configs' / name)}


def test_base_files_only_define_names():
    """MMEngine refuses a key that two bases have, so their names are no settings and no variables of MMDetection's."""
    settings = set(inspect.signature(Runner.__init__).parameters) | {'custom_imports', 'env_cfg', 'auto_scale_lr'}
    mmdet_configs = Path(mmdet.__file__).parent / '.mim/configs'
    taken = {
        key
        for path in [*mmdet_configs.glob('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'), *mmdet_configs.glob('ssd/*.py')]
        for key in Config.fromfile(path)
    }
    assert {'model', 'train_pipeline'} <= taken
    assert len(names_of_bases()) >= 4
    assert not names_of_bases() & (settings | taken)


def test_lists_of_shipped_configs_leave_base_files_out():
    with pytest.raises(UserError) as error:
        config_path('no_such_config.py')
    assert str(error.value).split('It has: ')[1].split(', ') == WHOLE
    assert Path(config_path('_base_/cbam.py')).is_file(), 'but a config can name them as its base'
    # The report finds the config of a work dir by the name of its file, and configs/_base_/cbam.py has the same.
    assert Path(shipped_config('cbam.py')).parent.name == 'ablation'
    assert shipped_config('coco_detection.py') is None


def without_plugins(model):
    """The config of the plain model, and the types of its plugins."""
    types = []
    for part in ('backbone', 'neck'):
        types += [plugin['cfg']['type'] for plugin in model[part].pop('plugins', None) or []]
        if model[part]['type'] in ('PluginBackbone', 'PluginNeck'):
            model[part] = model[part][part]
    return model, types


@pytest.mark.parametrize(('name', 'twin'), TWINS)
def test_differs_from_its_twin_in_cbam_alone(name, twin):
    ours, plain = (Config.fromfile(ROOT / 'configs' / n).to_dict() for n in (name, twin))
    assert 'plugins' not in plain['model']['backbone']
    ours['model'], types = without_plugins(ours['model'])
    assert types == ['CBAM']
    if 'in1k' in name:  # its ImageNet weights have CBAM in them
        weights = [cfg['model']['backbone'].pop('init_cfg') for cfg in (ours, plain)]
        assert ['cbam_resnet50' in init_cfg['checkpoint'] for init_cfg in weights] == [True, False]
    assert {key: value for key, value in ours.items() if key not in names_of_bases()} == {
        key: value for key, value in plain.items() if key not in names_of_bases()
    }


@pytest.mark.parametrize(('name', 'twin'), TWINS)
def test_a_report_says_that_cbam_is_all_that_changes(name, twin):
    """Its base is the plain twin, so the settings that a report lists are those of CBAM and of its wrapper."""
    path = str(ROOT / 'configs' / name)
    bases, changes = base_differences(Config.fromfile(path), path)
    assert bases[0] == f'cbam_mmdet::{twin}'
    assert "'CBAM'" in [change.after for change in changes]
    place = r'model\.neck\.' if 'heads' in name else r'model\.backbone\.'
    assert all(re.match(place, change.name) for change in changes)


@pytest.mark.parametrize(('name', 'twin'), [(name, twin) for name, twin in TWINS if not name.startswith('demo')])
def test_plain_checkpoint_loads_and_every_cbam_trains(name, twin):
    """Also in the stages that MMDetection's configs freeze."""
    model, plain = build(name), build(twin)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing and all('cbam' in key for key in missing)
    model.train()
    cbams = [module for module in model.modules() if isinstance(module, CBAM)]
    assert cbams and all(p.requires_grad for cbam in cbams for p in cbam.parameters())
    if 'rcnn' in name:
        stem = model.backbone.timm_model.conv_stem if 'effnet' in name else model.backbone.conv1
        assert not any(p.requires_grad for p in stem.parameters()), 'the stem stays frozen'


@pytest.mark.parametrize('name', ['ssd300_vgg16_cbam_coco.py', 'ssd300_r50_cbam_voc0712.py'])
def test_ssd_predicts(name):
    """MMDetection's own fails with "'SSDHead' object has no attribute 'loss_cls'"."""
    model = build(name).eval()
    sample = DetDataSample(metainfo=dict(img_shape=(300, 300), ori_shape=(300, 300), scale_factor=(1, 1)))
    if hasattr(model.neck, 'l2_norm'):
        torch.nn.init.constant_(model.neck.l2_norm.weight, 20)
    with torch.no_grad():
        (result,) = model.predict(torch.randn(1, 3, 300, 300), [sample])
    found = result.pred_instances
    assert 0 < len(found) <= 200
    assert found.labels.max() < model.bbox_head.num_classes
    assert ((found.scores >= 0.02) & (found.scores <= 1)).all()


STAGES = {'r18': (2, 2, 2, 2), 'r50': (3, 4, 6, 3), 'r101': (3, 4, 23, 3), 'x101': (3, 4, 23, 3)}


@pytest.mark.parametrize('name', [name for name, _ in TWINS if re.match('[^/]*_(r18|r50|r101|x101)_', name)])
def test_cbam_is_in_every_block(name):
    """After the block's last norm: in the block by MMDetection's plugins, or as the norm's child by PluginBackbone."""
    backbone = build(name).backbone
    kind = re.search('_(r18|r50|r101|x101)_', name).group(1)
    stages = [getattr(backbone, f'layer{i}') for i in (1, 2, 3, 4) if hasattr(backbone, f'layer{i}')]
    assert len(stages) == (3 if 'ssd' in name else 4)
    for blocks, depth in zip(stages, STAGES[kind], strict=False):
        assert len(blocks) == depth
        for block in blocks:
            assert isinstance(block.bn2.cbam if kind == 'r18' else block.cbam, CBAM)


def test_cbam_is_in_every_block_that_trains():
    blocks = build('faster_rcnn_effnet_lite0_cbam.py').backbone.timm_model.blocks
    assert [[isinstance(getattr(block, 'bn3', block.bn2)._modules.get('cbam'), CBAM) for block in stage]
            for stage in blocks] == [[i >= 2] * count for i, count in enumerate((1, 2, 2, 3, 3, 4, 1))]  # fmt: skip


@pytest.mark.parametrize('name', [name for name, _ in TWINS if 'vgg16_cbam_coco' in name or 'vgg16_cbam_voc' in name])
def test_cbam_follows_the_last_relu_of_each_convolution_stage(name):
    features = build(name).backbone.features
    with_cbam = [i for i, layer in enumerate(features) if hasattr(layer, 'cbam')]
    pools = [i for i, layer in enumerate(features) if isinstance(layer, torch.nn.MaxPool2d)]
    assert with_cbam == [i - 1 for i in pools] and len(pools) == 5
    assert all(isinstance(features[i], torch.nn.ReLU) for i in with_cbam)
    assert [features[i].cbam.channel.fc1.in_features for i in with_cbam] == [64, 128, 256, 512, 512]


def test_cbam_before_the_heads_refines_each_map_that_they_see():
    model, plain = build('ssd300_vgg16_cbam_heads_voc0712.py').eval(), build('ssd300_vgg16_voc0712.py').eval()
    torch.nn.init.constant_(plain.neck.l2_norm.weight, 20)  # MMDetection leaves it uninitialized before init_weights()
    model.load_state_dict(plain.state_dict(), strict=False)
    cbams = [getattr(model.neck, f'cbam{i}') for i in range(6)]
    for parameter in (p for cbam in cbams for p in cbam.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        maps = plain.extract_feat(x)
        assert [m.shape[-1] for m in maps] == [38, 19, 10, 5, 3, 1]
        for refined, cbam, plain_map in zip(model.extract_feat(x), cbams, maps, strict=True):
            assert torch.equal(refined, cbam(plain_map))


def test_ssd_on_a_resnet_gives_the_maps_that_its_anchors_expect():
    model = build('ssd300_r50_cbam_voc0712.py')
    with torch.no_grad():
        maps = model.extract_feat(torch.randn(1, 3, 300, 300))
    assert [tuple(m.shape[1:3]) for m in maps] == [(512, 38), (1024, 19), (512, 10), (256, 5), (256, 3), (256, 1)]
    anchors = model.bbox_head.prior_generator.grid_priors([m.shape[-2:] for m in maps], device='cpu')
    outputs = model.bbox_head(maps)
    for scores, priors, m in zip(outputs[0], anchors, maps, strict=True):
        assert scores.shape[1] // 21 * m.shape[-1] ** 2 == len(priors)


@pytest.mark.parametrize('name', [name for name in CONFIGS if re.fullmatch(r'faster_rcnn_.*voc0712\.py', name)])
def test_voc_config(name, tmp_path):
    """The published backbone's depth, small boxes not ignored in training, and both metrics."""
    ensure_shapes(tmp_path, num_train=12, num_val=1, image_size=64, style='voc', progress=False)
    cfg = Config.fromfile(ROOT / 'configs' / name)
    depth = re.search(r'_r(\d+)_', name)[1]
    backbone = cfg.model.backbone.get('backbone') or cfg.model.backbone
    assert backbone.depth == int(depth)
    if 'in1k' not in name:
        assert backbone.init_cfg.checkpoint == f'torchvision://resnet{depth}'
    assert backbone.frozen_stages == 0
    init_default_scope('mmdet')
    first, second = cfg.train_dataloader.dataset.dataset.datasets
    assert [part.ann_file[:8] for part in (first, second)] == ['VOC2007/', 'VOC2012/']
    dataset = DATASETS.build({**first, 'data_root': str(tmp_path), 'metainfo': METAINFO, 'pipeline': []})
    sides = [
        min(x2 - x1, y2 - y1)
        for item in dataset
        for i in item['instances']
        for x1, y1, x2, y2 in [i['bbox']]
        if not i['ignore_flag']
    ]
    assert min(sides) < 32


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'cbam_in1k' in name])
def test_pretrained_with_cbam(name):
    """What pytorchcv's weights were trained with: the paper's gate, torchvision's stride and normalization."""
    cfg = Config.fromfile(ROOT / 'configs' / name)
    (plugin,) = cfg.model.backbone.plugins
    assert plugin == dict(cfg=dict(type='CBAM', reduction=16, gate='sigmoid'), position='after_conv3')
    assert cfg.model.backbone.style == 'pytorch'
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == pytest.approx([255 * value for value in (0.485, 0.456, 0.406)])
    assert preprocessor.std == pytest.approx([255 * value for value in (0.229, 0.224, 0.225)])
    assert preprocessor.bgr_to_rgb


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'cbam_in1k' in name])
def test_the_weights_are_where_pytorchcv_says(name):
    store = pytest.importorskip('pytorchcv.models.common.model_store', reason="needs pip install '.[dev]'")
    error, checksum, release = store.get_model_name_suffix_data('cbam_resnet50')
    file = f'cbam_resnet50-{error}-{checksum[:8]}.pth.zip'
    init_cfg = Config.fromfile(ROOT / 'configs' / name).model.backbone.init_cfg
    assert init_cfg == dict(
        type='Pretrained', checkpoint=f'{store.imgclsmob_repo_url}/releases/download/{release}/{file}'
    )


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'voc0712' in name or 'bccd' in name])
def test_voc_is_scored_in_all_ways(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert [metric.type for metric in evaluator] == ['VOCDetectionMetric', 'SampleCocoMetric']
        assert all(METRICS.build(metric) for metric in evaluator)


def test_cbam_sits_after_the_last_norm_before_the_addition():
    block = build('faster_rcnn_r50_cbam.py').backbone.layer1[1].eval()
    for parameter in block.cbam.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 256, 8, 8)
    branch = x
    for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
        branch = norm(conv(branch)).relu()
    expected = (block.cbam(block.norm3(block.conv3(branch))) + x).relu()
    torch.testing.assert_close(block(x), expected)


def test_freshly_built_detector_equals_the_plain_one(tmp_path):
    """With gate='unit' the same weights give the same features, bit for bit."""
    ours, plain = build('faster_rcnn_r50_cbam.py').eval(), build('faster_rcnn_r50.py').eval()
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing and all('.cbam.' in key for key in missing)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for mine, theirs in zip(ours.extract_feat(x), plain.extract_feat(x), strict=True):
            assert torch.equal(mine, theirs)


def test_base_by_package_name_from_an_unrelated_folder(tmp_path):
    (tmp_path / 'own.py').write_text(
        "_base_ = 'cbam_mmdet::faster_rcnn_r50_cbam.py'\nmodel = dict(backbone=dict(depth=101))\n"
    )
    (tmp_path / 'demo.py').write_text("_base_ = ['cbam_mmdet::demo/faster_rcnn_cbam.py']\n")
    code = (
        'import cbam_mmdet; from mmengine.config import Config; '
        'c = Config.fromfile("own.py"); print(c.model.backbone.depth, c.model.backbone.plugins[0].cfg.type, '
        'Config.fromfile("demo.py").image_size)'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == '101 CBAM (128, 128)', result.stderr


def test_base_by_path_for_programs_that_do_not_import_the_package(tmp_path):
    """MMEngine evaluates the expression before anything of ours is imported."""
    (tmp_path / 'own.py').write_text("_base_ = __import__('cbam_mmdet').config_path('faster_rcnn_r50_cbam.py')\n")
    code = 'from mmengine.config import Config; print(Config.fromfile("own.py").model.backbone.plugins[0].cfg.type)'
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == 'CBAM', result.stderr


def test_the_wheel_holds_configs_and_tools(tmp_path):
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, '.']
    copy = tmp_path / 'source'
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip('not a git checkout')
    for name in files.stdout.split():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'cbam_mmdet/.mim/configs/{name}' for name in FILES} <= names
    assert {
        'cbam_mmdet/.mim/tools/train.py',
        'cbam_mmdet/.mim/model-index.yml',
        'cbam_mmdet/datasets/shapes.py',
    } <= names
    assert not any(name.startswith(('tests/', 'tools/')) for name in names)


def options_for_mmdet(work_dir, shapes):
    """MMDetection's train.py has no --data-root."""
    options = [str(o) for o in tiny(work_dir, shapes) if o not in ('--data-root', shapes)]
    loaders = [f'{s}_dataloader.dataset.data_root={shapes}/' for s in ('train', 'val', 'test')]
    files = [f'{s}_evaluator.ann_file={shapes}/annotations/instances_val2017.json' for s in ('val', 'test')]
    return [*options, *loaders, *files]


def run_elsewhere(site_packages, cwd, code, *arguments):
    """Run code in a fresh process that has not imported this package, but has the startup files."""
    code = f'import site; site.addsitedir({str(site_packages)!r})\n{code}'
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_mmdetections_own_train_and_test_run_our_config(shapes, tmp_path):
    """A config of one's own over a shipped one, which neither program imports before it reads it."""
    options = options_for_mmdet(tmp_path / 'work', shapes)
    own = tmp_path / 'own.py'
    own.write_text("_base_ = 'cbam_mmdet::demo/faster_rcnn_cbam.py'\n")
    code = 'import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    for tool in (['train.py', own], ['test.py', own, tmp_path / 'work/epoch_1.pth']):
        result = run_elsewhere(enable(tmp_path), tmp_path, code, MMDET_TOOLS / tool[0], *tool[1:], *options)
        assert result.returncode == 0, result.stderr[-2000:]
        assert re.search(r'coco/bbox_mAP: 0\.\d+', result.stdout)


INFERENCER = """
import sys
from mmdet.apis import DetInferencer
config, checkpoint, image = sys.argv[1:]
detect = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
(prediction,) = detect(image, no_save_vis=True)['predictions']
print('boxes:', len(prediction['bboxes']))
"""


def test_det_inferencer_in_a_program_of_its_own(trained, shapes, tmp_path):
    """It imports mmcv.ops before any config is read; the config is the copy that the work dir keeps."""
    (config,) = trained.glob('*.py')
    image = next((shapes / 'val2017').iterdir())
    result = run_elsewhere(enable(tmp_path), tmp_path, INFERENCER, config, trained / 'epoch_1.pth', image)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(re.search(r'boxes: (\d+)', result.stdout)[1]) > 0


@pytest.mark.parametrize('first', ['import cbam_mmdet', 'import mmdet.apis', 'import mmcv.ops'])
def test_startup_files_serve_whichever_import_comes_first(tmp_path, first):
    loud = 'import warnings; warnings.filterwarnings("error", message="mmcv._ext")'
    code = f'{loud}; {first}; import cbam_mmdet, mmcv.ops; print("served")'
    result = run_elsewhere(enable(tmp_path), tmp_path, code)
    assert result.stdout.splitlines()[-1:] == ['served'], result.stderr


def test_startup_files_can_be_taken_back(tmp_path):
    assert {p.suffix for p in enable(tmp_path).iterdir()} == {'.py', '.pth'}
    assert not list(disable(tmp_path).iterdir())
