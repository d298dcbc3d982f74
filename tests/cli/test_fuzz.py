"""Damaged inputs, at random: each is read, or refused by a UserError; nothing else, and nothing is written.

Hypothesis draws the damages, the same ones each time, and makes one that fails as small as it can. By default it tries
a hundred of each kind, with CBAM_FUZZ=5000 so many.
"""

import copy
import datetime
import io
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import randoms

from cbam_mmdet.apis.runner import prepare
from cbam_mmdet.datasets import ensure_shapes
from cbam_mmdet.datasets.checks import check_data
from cbam_mmdet.datasets.classes import set_classes
from cbam_mmdet.datasets.pointing import point_at_data
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.engine.checkpoint.files import find_checkpoint
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.engine.record import read_record
from cbam_mmdet.engine.run_reader import read_results
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import load_config
from cbam_mmdet.utils.numbers import LEAST

VOC = str(ROOT / 'configs/faster_rcnn_r18_cbam_voc0712.py')
COUNT = int(os.environ.get('CBAM_FUZZ', 100))
HANG = datetime.timedelta(seconds=60)
ODD = (
    None, True, -1, 0, 10**30, -(10**400), 0.5, float('nan'), float('inf'), -float('inf'), '', ' ', 'circle', '\0',
    '../../x', '/', '$x^2', '{{ fileDirname }}', '<script>', '\ud800', [], [[]], {}, [1, 2], [None] * 4, {'id': 1},
    [-1e308, 1e308, 1, 1],
)  # fmt: skip


def has_arguments(tool):
    return 'def parse_args' in tool.read_text()


def places(node):
    """(container, key) of everything in a tree of dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from places(value)


def damage(rng, content):
    """A copy with one to three values changed, taken out, or copied over another."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        spots = list(places(content))
        if not spots:
            break
        container, key = rng.choice(spots)
        kind = rng.random()
        if kind < 0.2:
            del container[key]
        elif kind < 0.4:
            other, at = rng.choice(spots)
            container[key] = copy.deepcopy(other.get(at) if isinstance(other, dict) else other[at])
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return content


def damage_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data))
        kind = rng.random()
        if kind < 0.3:
            del data[at : at + rng.randint(1, 64)]
        elif kind < 0.5:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            data[at] = rng.randrange(256)
        if not data:
            return b''
    return bytes(data)


def is_refused(function):
    """Whether it raises a UserError. Whatever else it raises is a failure."""
    try:
        function()
    except UserError as error:
        assert str(error) and 'Traceback' not in str(error)
        return True
    return False


def fuzz(run, least_refused=0.2):
    """Run run(rng), which returns a function to try, COUNT times."""
    refused = []

    @settings(
        max_examples=COUNT, derandomize=True, database=None, deadline=HANG, suppress_health_check=list(HealthCheck)
    )
    @given(randoms(note_method_calls=True))
    def try_one(rng):
        refused.append(is_refused(run(rng)))

    try_one()
    assert len(refused) * least_refused < sum(refused), 'the damages are no damages'


@pytest.fixture(autouse=True)
def nothing_is_written_elsewhere(tmp_path_factory, monkeypatch):
    """Not in the current folder, nor above it by a name such as ../../x."""
    top = tmp_path_factory.mktemp('elsewhere')
    current = top / 'a/b/c'
    current.mkdir(parents=True)
    monkeypatch.chdir(current)
    yield
    assert [path.name for path in sorted(top.rglob('*'))] == ['a', 'b', 'c']


@pytest.fixture
def demo(own_shapes):
    cfg = load_config(DEMO)
    prepare(cfg, str(own_shapes), None, str(own_shapes / 'work'), 'none')
    return cfg


@pytest.mark.parametrize('checked', [True, False])
def test_coco_annotations(demo, own_shapes, checked):
    path = own_shapes / 'annotations/instances_train2017.json'
    content = json.loads(path.read_text())
    content['annotations'] = content['annotations'][:6]

    def run(rng):
        text = json.dumps(damage(rng, content))
        if rng.random() < 0.2:
            text = damage_bytes(rng, text.encode()).decode(errors='surrogateescape')
        path.write_bytes(text.encode(errors='surrogateescape'))
        cfg = copy.deepcopy(demo)
        return lambda: check_data(cfg, ['train']) if checked else set_classes(cfg, 'auto')

    fuzz(run, 0.2 if checked else 0.02)


@pytest.mark.parametrize('checked', [True, False])
def test_voc_annotations(tmp_path, checked):
    root = ensure_shapes(tmp_path / 'voc', num_train=3, num_val=1, image_size=32, style='voc', progress=False)
    cfg = load_config(VOC)
    point_at_data(cfg, str(root), 'auto')
    files = [next(root.glob('*/Annotations/*.xml')), next(root.glob('*/ImageSets/Main/trainval.txt'))]
    whole = {path: path.read_bytes() for path in files}

    def run(rng):
        for path, data in whole.items():
            path.write_bytes(data)
        path = rng.choice(files)
        words = re.split(rb'(?<=>)|(?=<)|\n', whole[path])
        if rng.random() < 0.5:  # tags and texts as a whole
            at = rng.randrange(len(words))
            other = str(rng.choice(ODD)).encode(errors='surrogatepass')
            words[at] = rng.choice([b'', rng.choice(words), other])
            path.write_bytes(b'\n'.join(words))
        else:
            path.write_bytes(damage_bytes(rng, whole[path]))
        return lambda: check_data(copy.deepcopy(cfg), ['train']) if checked else set_classes(copy.deepcopy(cfg), 'auto')

    fuzz(run, 0.1)


@pytest.mark.parametrize('tool', sorted(path.name for path in (ROOT / 'tools').glob('*.py') if has_arguments(path)))
def test_command_lines(tool, monkeypatch, capsys):
    """Words in any order: they are taken, or argparse's message ends the tool."""
    monkeypatch.syspath_prepend(ROOT / 'tools')
    parse = runpy.run_path(str(ROOT / 'tools' / tool))['parse_args']
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, 'argv', [tool, '--help'])
        parse()
    monkeypatch.setattr(sys, 'stderr', io.StringIO())  # takes what is no UTF-8, as the true one does
    words = [*re.findall(r'--[a-z-]+', capsys.readouterr().out), 'a.py', 'b.pth', 'c=1', 'c=[', 'c={', '=', '-', '--']
    # What a shell can hand over: no NUL, and what is no UTF-8 as Python decodes it.
    words += [os.fsdecode(str(value).encode(errors='replace').replace(b'\0', b'\xff')) for value in ODD]

    def run(rng):
        monkeypatch.setattr(sys, 'argv', [tool, *(rng.choice(words) for _ in range(rng.randint(0, 6)))])

        def as_an_error():
            try:
                parse()
            except SystemExit as end:
                assert end.code in (0, 2), end.code
                raise UserError('argparse said why') from end

        return as_an_error

    fuzz(run)


@pytest.mark.parametrize('kind', range(10))
def test_coco_annotations_of_odd_kinds(demo, own_shapes, kind):
    path = own_shapes / 'annotations/instances_train2017.json'
    texts = ('[' * 200_000, '{"images": ' * 5000, '1' * 5000, '"x"', '', '\x00', '{"images": [], "annotations": []}',
             'nan', '{"images": [null], "annotations": [null], "categories": [null]}', '\ufeff{}')  # fmt: skip
    path.write_text(texts[kind])
    assert is_refused(lambda: check_data(demo, ['train']))
    assert is_refused(lambda: set_classes(demo, 'auto'))


def test_numbers_of_a_config(demo):
    names = [name for name in LEAST if demo.get(name.split('.')[0])]

    def run(rng):
        cfg = copy.deepcopy(demo)
        for _ in range(rng.randint(1, 2)):
            *path, last = rng.choice(names).split('.')
            node = cfg
            for key in path:
                node = node[key]
            node[last] = copy.deepcopy(rng.choice(ODD[1:]))
        return lambda: prepare(cfg, None, None, None, 'none')

    fuzz(run, 0.5)


def test_records_of_a_run(trained, tmp_path):
    content = json.loads(next(trained.glob('*/vis_data/run.json')).read_text())
    path = tmp_path / 'vis_data/run.json'
    path.parent.mkdir()

    def run(rng):
        path.write_text(json.dumps(damage(rng, content)))
        return lambda: read_record(tmp_path)

    fuzz(run)


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.bmp', '.tiff', '.webp'])
def test_images(tmp_path, suffix):
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 3)).astype(np.uint8)
    data, path = cv2.imencode(suffix, image)[1].tobytes(), tmp_path / f'a{suffix}'

    def run(rng):
        path.write_bytes(damage_bytes(rng, data[:200] if rng.random() < 0.1 else data))
        return lambda: read_image(str(path), size=rng.choice([None, (16, 24), (24, 16), (1, 1)]))

    fuzz(run, 0.0 if suffix == '.bmp' else 0.02)


@pytest.mark.parametrize('zipped', [True, False])
def test_checkpoints(tmp_path, zipped):
    path = tmp_path / 'a.pth'
    content = dict(meta=dict(iter=1, cfg='a = 1'), state_dict={'a.weight': torch.ones(3)}, message_hub={}, optimizer={})
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    pickled = zipfile.ZipFile(path).read('a/data.pkl') if zipped else None

    def run(rng):
        path.write_bytes(damage_bytes(rng, data))
        if zipped and rng.random() < 0.5:  # a whole archive of a damaged pickle
            with zipfile.ZipFile(path, 'w') as archive:
                archive.writestr('a/data.pkl', damage_bytes(rng, pickled))
                archive.writestr('a/data/0', bytes(12))
                archive.writestr('a/version', '3\n')
        return lambda: load_checkpoint(find_checkpoint(str(path)))

    fuzz(run)


def test_results(tmp_path):
    path = tmp_path / 'a.pkl'
    data = pickle.dumps([dict(img_id=1, pred_instances=dict(bboxes=torch.ones(2, 4), labels=np.arange(2)))])

    def run(rng):
        path.write_bytes(damage_bytes(rng, data))
        return lambda: read_results(path)

    fuzz(run)


def test_configs(tmp_path):
    """The text of one is code. Of JSON and YAML, data."""
    for suffix in ('json', 'yaml'):
        text = json.dumps(dict(model=dict(type='A', b=[1, 2]), custom_imports=None, train_cfg=dict(max_epochs=1)))
        path = tmp_path / f'a.{suffix}'

        def run(rng, path=path, text=text):
            path.write_bytes(damage_bytes(rng, text.encode()))
            return lambda: load_config(str(path))

        fuzz(run, 0.02)


def test_a_yaml_file_calls_nothing(tmp_path, run_tool):
    written = tmp_path / 'written'
    path = tmp_path / 'a.yaml'
    path.write_text(
        f'model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{written}"]]'
    )
    result = run_tool('train.py', path)
    assert result.code == 2 and 'could not determine a constructor for the tag' in result.err
    assert not written.exists()


@pytest.mark.parametrize('suffix', ['json', 'yaml'])
def test_a_type_in_a_data_file_calls_nothing_that_is_not_registered(suffix, tmp_path, run_tool):
    written, path = tmp_path / 'written', tmp_path / f'a.{suffix}'
    call = dict(type='os.system', command=f'touch {written}')
    path.write_text(json.dumps(dict(model=dict(type='mmdet.RetinaNet', backbone=call), default_scope='mmdet')))
    result = run_tool('complexity.py', path, '--shape', 64, 64)
    assert result.code == 2 and "model.backbone.type='os.system'" in result.err
    assert not written.exists()


@pytest.mark.parametrize(
    'data',
    [b'\x76\x2f\x31\x01', b'#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 99999999 +X 99999999\n'],
    ids=['EXR', 'HDR'],
)
def test_an_image_of_which_opencv_alone_knows_the_format(data, tmp_path):
    (tmp_path / 'a.jpg').write_bytes(data + bytes(200))
    with pytest.raises(UserError, match='cannot be decoded by OpenCV'):
        read_image(str(tmp_path / 'a.jpg'))


@pytest.mark.parametrize('suffix', ['json', 'yaml'])
def test_a_dump_of_a_shipped_config_loads_in_a_new_process(suffix, tmp_path):
    path, seen = tmp_path / f'a.{suffix}', tmp_path / 'seen.py'
    load_config(str(DEMO)).dump(path)
    program = f'from cbam_mmdet.utils.config import load_config; load_config({str(path)!r}).dump({str(seen)!r})'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, actual = load_config(str(DEMO)), load_config(str(seen))
    pipeline, dumped = expected.test_dataloader.dataset.pipeline, actual.test_dataloader.dataset.pipeline
    assert dumped[1] == pipeline[1] and isinstance(dumped[1].scale, tuple)
    assert json.dumps(actual.to_dict(), sort_keys=True) == json.dumps(expected.to_dict(), sort_keys=True)


def test_a_data_file_names_registered_classes(tmp_path):
    path = tmp_path / 'a.json'
    model = dict(type='mmdet.RetinaNet', backbone=dict(type='cbam_mmdet.PluginBackbone'))
    parts = dict(optim_wrapper=dict(type='mmengine.OptimWrapper', optimizer=dict(type='SGD')))
    path.write_text(json.dumps(dict(model=model, **parts)))
    assert load_config(str(path)).model.type == 'mmdet.RetinaNet'
    # MMCV evaluates the last kind, where it is that of an NMS.
    for name in ('mmdet.os.system', 'mmengine.load', 'cbam_mmdet.errors.os.system', '__import__("os")'):
        path.write_text(json.dumps(dict(model=dict(type=name), **parts)))
        with pytest.raises(UserError, match=re.escape(f"model.type='{name}'")):
            load_config(str(path))
