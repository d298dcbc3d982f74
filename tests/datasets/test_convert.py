"""VOC to COCO and back: the same objects, and what MMDetection loads from either."""

import json
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
from conftest import DATA
from mmdet.datasets import CocoDataset, VOCDataset

from cbam_mmdet.datasets import CLASSES, ensure_shapes
from cbam_mmdet.datasets.convert import coco_to_voc
from cbam_mmdet.errors import UserError

BCCD = DATA / 'bccd'


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """The same pictures in both layouts, 20 of them, with difficult objects in VOC's."""
    root = tmp_path_factory.mktemp('both')
    for style in ('coco', 'voc'):
        ensure_shapes(root, num_train=20, num_val=2, image_size=64, style=style, progress=False)
    return root


def objects(folder, names):
    """By regular expressions instead of an XML parser."""
    found = {}
    for name in names:
        text = (folder / f'Annotations/{name}.xml').read_text()
        items = []
        for part in text.split('<object>')[1:]:
            box = [int(re.search(rf'<{key}>(.*?)<', part)[1]) for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            difficult = re.search('<difficult>(.)<', part)
            items.append((re.search('<name>(.*?)<', part)[1], *box, difficult[1] if difficult else '0'))
        found[name] = (re.findall('<(?:width|height)>(.*?)<', text), items)
    return found


def there_and_back(run_tool, folder, image_set, tmp_path):
    source = folder / f'ImageSets/Main/{image_set}.txt'
    coco, back = tmp_path / 'coco.json', tmp_path / f'back/ImageSets/Main/{image_set}.txt'
    for arguments in ((source, coco), (coco, back)):
        result = run_tool('convert_annotations.py', *arguments)
        assert result.code == 0, result.err
    names = source.read_text().split()
    assert back.read_text().split() == names
    before, after = objects(folder, names), objects(tmp_path / 'back', names)
    assert before == after
    return coco, [item for _, items in before.values() for item in items]


def test_round_trip_is_the_identity(run_tool, both, tmp_path):
    coco, items = there_and_back(run_tool, both / 'VOC2007', 'trainval', tmp_path)
    assert {difficult for *_, difficult in items} == {'0', '1'}
    crowds = [a['iscrowd'] for a in json.loads(coco.read_text())['annotations']]
    assert crowds == [int(difficult) for *_, difficult in items]


@pytest.mark.skipif(not BCCD.is_dir(), reason='the BCCD images are not there')
def test_round_trip_on_real_data(run_tool, tmp_path):
    """With its two boxes that have no size."""
    _, items = there_and_back(run_tool, BCCD / 'VOC2007', 'trainval', tmp_path)
    assert len(items) == 3943


def test_coco_of_the_same_pictures(run_tool, both, tmp_path):
    """The shapes' own COCO file has the same boxes."""
    run_tool('convert_annotations.py', both / 'VOC2007/ImageSets/Main/trainval.txt', tmp_path / 'coco.json')
    ours, theirs = (
        json.loads(path.read_text()) for path in (tmp_path / 'coco.json', both / 'annotations/instances_train2017.json')
    )

    def boxes(content):
        names = {c['id']: c['name'] for c in content['categories']}
        files = {i['id']: (i['file_name'], i['width'], i['height']) for i in content['images']}
        return sorted((files[a['image_id']], names[a['category_id']], a['bbox']) for a in content['annotations'])

    assert boxes(ours) == boxes(theirs)
    assert all(a['area'] == a['bbox'][2] * a['bbox'][3] for a in ours['annotations'])


def test_what_mmdetection_loads_from_either(run_tool, both, tmp_path):
    """The same but for the far edge: its VOCDataset takes the last pixel inside for the edge itself."""
    run_tool('convert_annotations.py', both / 'VOC2007/ImageSets/Main/trainval.txt', tmp_path / 'coco.json')
    voc = VOCDataset(
        data_root=str(both), ann_file='VOC2007/ImageSets/Main/trainval.txt', data_prefix=dict(sub_data_root='VOC2007/'),
        metainfo=dict(classes=tuple(sorted(CLASSES))), pipeline=[],
    )  # fmt: skip
    coco = CocoDataset(
        ann_file=str(tmp_path / 'coco.json'), data_prefix=dict(img=str(both / 'VOC2007/JPEGImages')),
        metainfo=dict(classes=tuple(sorted(CLASSES))), pipeline=[],
    )  # fmt: skip
    assert len(voc) == len(coco) == 20
    for ours, theirs in zip(voc, coco, strict=True):
        assert ours['img_path'] == theirs['img_path']
        assert [i['bbox_label'] for i in ours['instances']] == [i['bbox_label'] for i in theirs['instances']]
        assert [i['ignore_flag'] for i in ours['instances']] == [i['ignore_flag'] for i in theirs['instances']]
        for a, b in zip(ours['instances'], theirs['instances'], strict=True):
            assert [a['bbox'][0], a['bbox'][1], a['bbox'][2] + 1, a['bbox'][3] + 1] == b['bbox']


def test_mistakes(run_tool, both, tmp_path):
    def refused(*arguments):
        result = run_tool('convert_annotations.py', *arguments)
        assert result.code == 2 and 'Traceback' not in result.err
        return result.err

    image_set, coco = both / 'VOC2007/ImageSets/Main/test.txt', both / 'annotations/instances_val2017.json'
    assert 'or the reverse' in refused(image_set, tmp_path / 'out.txt')
    assert 'none.json does not exist' in refused(tmp_path / 'none.json', tmp_path / 'out.txt')
    assert 'exists already' in refused(image_set, coco)
    assert '.xml exists already' in refused(coco, both / 'VOC2007/ImageSets/Main/other.txt')
    content = json.loads(coco.read_text())
    content['images'][1]['file_name'] = f'sub/{content["images"][0]["file_name"]}'
    (tmp_path / 'twice.json').write_text(json.dumps(content))
    assert 'share their name' in refused(tmp_path / 'twice.json', tmp_path / 'a/ImageSets/Main/c.txt')
    content['annotations'][0]['category_id'] = 99
    (tmp_path / 'wrong.json').write_text(json.dumps(content))
    assert 'its category_id 99 is not among the categories' in refused(
        tmp_path / 'wrong.json', tmp_path / 'a/ImageSets/Main/c.txt'
    )


@pytest.mark.parametrize('name, file_name', [
    ('a\0b', 'a.jpg'), ('a\rb', 'a.jpg'), ('\ud800', 'a.jpg'), ('a', 'a\nb.jpg'), ('a', ' a.jpg'), ('a', 'a\x85b.jpg'),
])  # fmt: skip
def test_names_that_voc_would_change_are_refused(name, file_name):
    content = dict(
        images=[dict(id=1, file_name=file_name, width=9, height=9)],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 3, 3])],
        categories=[dict(id=1, name=name)],
    )
    with pytest.raises(UserError, match="in VOC's"):
        coco_to_voc(content)


@pytest.mark.parametrize('name', ['<&>"', ' a ', 'ä', '$x$', '{{a}}', 'a\tb', 'a\nb'])
def test_other_names_come_back(name):
    content = dict(
        images=[dict(id=1, file_name='a b.c.jpg', width=9, height=9)],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 3, 3])],
        categories=[dict(id=1, name=name)],
    )
    ((stem, root),) = coco_to_voc(content).items()
    assert stem == 'a b.c' and ET.fromstring(ET.tostring(root)).findtext('object/name') == name


def test_a_folder_of_several_annotation_files(run_tool, shapes, tmp_path):
    """The message that refuses it names two options, which this tool has."""
    source = shutil.copytree(shapes, tmp_path / 'source')
    for name in ('a', 'b'):
        shutil.copy(source / 'annotations/instances_train2017.json', source / f'{name}.json')
    refused = run_tool('convert_annotations.py', source, tmp_path / 'new', '--to', 'yolo')
    assert refused.code == 2 and 'choose with --train-ann FILE and --val-ann FILE' in refused.err
    chosen = ['--train-ann', source / 'a.json', '--val-ann', source / 'annotations/instances_val2017.json']
    made = run_tool('convert_annotations.py', source, tmp_path / 'new', '--to', 'yolo', *chosen)
    assert made.code == 0, made.err
    assert 'images: 8 (train), 4 (val)' in made.out


def test_an_image_set_elsewhere_is_refused(run_tool, tmp_path, monkeypatch):
    """Its XML files would be written two folders above it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.json').write_text('{"images": [], "annotations": [], "categories": []}')
    result = run_tool('convert_annotations.py', 'a.json', 'out.txt')
    assert result.code == 2 and "VOC's image sets are DIR/ImageSets/Main/NAME.txt" in result.err
