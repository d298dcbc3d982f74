"""Shapes other than upright boxes: each becomes the box around it, in every format, or is counted as left out."""

import json

import numpy as np
import pytest
from test_readers import coco_of, labelme_of, voc_of, write_pictures

from cbam_mmdet.datasets.convert import voc_to_coco
from cbam_mmdet.datasets.formats.folder import read_json
from cbam_mmdet.datasets.formats.recognize import read_folder
from cbam_mmdet.errors import UserError

BOX, DEGREES = (10, 12, 16, 6), 30  # x, y, width, height, and a turn about its centre, as CVAT writes it


def around() -> list[float]:
    """The box around the turned BOX, by its four corners."""
    x, y, width, height = BOX
    angle = np.radians(DEGREES)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([x + width / 2, y + height / 2])
    offsets = np.array([(sx * width / 2, sy * height / 2) for sx in (-1, 1) for sy in (-1, 1)])
    corners = centre + offsets @ turn.T
    return [*corners.min(0), *np.ptp(corners, axis=0)]


def boxes(root):
    return [a['bbox'] for content in read_folder(root).distinct().values() for a in content['annotations']]


def write_voc(root, box, more):
    """Two images whose one object has this bndbox."""
    write_pictures(root, 'JPEGImages/0.jpg', 'JPEGImages/1.jpg')
    (root / 'Annotations').mkdir()
    corners = ''.join(
        f'<{key}>{value}</{key}>' for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
    )
    for i in range(2):
        text = voc_of(f'{i}.jpg')
        start, end = text.index('<bndbox>'), text.index('</object>')
        (root / f'Annotations/{i}.xml').write_text(f'{text[:start]}<bndbox>{corners}</bndbox>{more}{text[end:]}')


def test_a_turned_box_of_coco(tmp_path):
    write_pictures(tmp_path, 'images/0.jpg', 'images/1.jpg')
    content = json.loads(coco_of(['0.jpg', '1.jpg']))
    for annotation in content['annotations']:
        annotation.update(bbox=BOX, attributes=dict(occluded=False, rotation=DEGREES))
    (tmp_path / 'a.json').write_text(json.dumps(content))
    assert np.allclose(boxes(tmp_path), around())
    notes = read_folder(tmp_path).notes
    assert '5 boxes of a.json are turned (CVAT writes by how much): the box around each is taken' in notes


def test_a_turned_box_of_voc(tmp_path):
    """As CVAT writes it: the upright box, counted from 1 with the last pixel inside, and the turn beside it."""
    turn = f'<attributes><attribute><name>rotation</name><value>{DEGREES}</value></attribute></attributes>'
    x, y, width, height = BOX
    write_voc(tmp_path, (x + 1, y + 1, x + width, y + height), turn)
    assert np.allclose(boxes(tmp_path), around())
    (tmp_path / 'ImageSets/Main').mkdir(parents=True)
    (tmp_path / 'ImageSets/Main/train.txt').write_text('0\n1\n')
    converted = voc_to_coco(str(tmp_path / 'ImageSets/Main/train.txt'))
    assert np.allclose([a['bbox'] for a in converted['annotations']], around())


@pytest.mark.parametrize(
    ('shape', 'box'),
    [
        ('<mask label="cat" rle="1, 2" left="7" top="8" width="9" height="10"/>', [7, 8, 9, 10]),
        (
            '<cuboid label="cat" xtl1="5" ytl1="6" xbl1="5" ybl1="20" xtr1="15" ytr1="7" xbr1="15" ybr1="21" '
            'xtl2="18" ytl2="5" xbl2="18" ybl2="19" xtr2="9" ytr2="4" xbr2="9" ybr2="18"/>',
            [5, 4, 13, 17],
        ),
    ],
)
def test_masks_and_cuboids_of_cvat(tmp_path, shape, box):
    write_pictures(tmp_path, '0.jpg', '1.jpg')
    images = ''.join(f'<image name="{i}.jpg" width="40" height="30">{shape}</image>' for i in range(2))
    (tmp_path / 'annotations.xml').write_text(f'<annotations>{images}</annotations>')
    assert boxes(tmp_path) == [box, box]


def test_shapes_without_area_are_counted_by_their_kind(tmp_path):
    write_pictures(tmp_path, '0.jpg', '1.jpg')
    shapes = '<points label="cat" points="1,1"/><points label="cat" points="2,2"/><polyline label="cat" points="1,1"/>'
    images = ''.join(f'<image name="{i}.jpg" width="40" height="30">{shapes}</image>' for i in range(2))
    (tmp_path / 'annotations.xml').write_text(f'<annotations>{images}</annotations>')
    assert '6 shapes without an area that is known are left out: 4 points, 2 polyline' in read_folder(tmp_path).notes


def test_the_parts_of_one_object_of_labelme(tmp_path):
    """Two polygons of one label and group_id are one object that something covers in its middle."""
    write_pictures(tmp_path, '0.jpg', '1.jpg')

    def polygon(x, group, label='cat'):
        return dict(label=label, points=[[x, 2], [x + 5, 2], [x, 9]], shape_type='polygon', group_id=group)

    shapes = [polygon(1, 3), polygon(20, 3), polygon(20, 3, 'dog'), polygon(30, None), polygon(30, None)]
    for i in range(2):
        (tmp_path / f'{i}.json').write_text(json.dumps(dict(json.loads(labelme_of(f'{i}.jpg')), shapes=shapes)))
    found = read_folder(tmp_path)
    expected = [[1, 2, 24, 7], [20, 2, 5, 7], [30, 2, 5, 7], [30, 2, 5, 7]]
    assert boxes(tmp_path) == 2 * expected
    assert '2 shapes are parts of others, of their label and group_id: one box is around all' in found.notes


def test_an_oriented_rectangle_of_labelme(tmp_path):
    write_pictures(tmp_path, '0.jpg', '1.jpg')
    shape = dict(label='cat', points=[[10, 2], [20, 12], [15, 17], [5, 7]], shape_type='oriented_rectangle')
    for i in range(2):
        (tmp_path / f'{i}.json').write_text(json.dumps(dict(json.loads(labelme_of(f'{i}.jpg')), shapes=[shape])))
    assert boxes(tmp_path) == 2 * [[5, 2, 15, 15]]


def test_a_json_that_names_another_image_is_named(tmp_path):
    write_pictures(tmp_path, *(f'{i}.jpg' for i in range(3)))
    for i in range(3):
        (tmp_path / f'{i}.json').write_text(labelme_of('0.jpg' if i == 2 else f'{i}.jpg'))
    found = read_folder(tmp_path)
    names = sorted(image['file_name'] for c in found.distinct().values() for image in c['images'])
    assert names == ['0.jpg', '1.jpg', '2.jpg']
    assert '1 .json name another image than that of their own name, which is taken: 2.json names 0.jpg' in found.notes


@pytest.mark.parametrize('style', ['COCO', 'VOC'])
def test_boxes_that_are_shares_are_refused(tmp_path, style):
    if style == 'COCO':
        write_pictures(tmp_path, 'images/0.jpg', 'images/1.jpg')
        content = json.loads(coco_of(['0.jpg', '1.jpg']))
        for annotation in content['annotations']:
            annotation['bbox'] = [0.25, 0.3, 0.5, 0.4]
        (tmp_path / 'a.json').write_text(json.dumps(content))
    else:
        write_voc(tmp_path, (0.25, 0.3, 0.75, 0.7), '')
    with pytest.raises(UserError, match='shares of its width and height'):
        read_folder(tmp_path)


def test_images_in_formats_that_are_not_read_are_counted(tmp_path):
    write_pictures(tmp_path, '0.jpg', '1.jpg')
    for i in range(2):
        (tmp_path / f'{i}.json').write_text(labelme_of(f'{i}.jpg'))
    assert not any('other formats' in note for note in read_folder(tmp_path).notes)
    for name in ('2.HEIC', '3.heic', '4.jfif'):
        (tmp_path / name).write_bytes(b'')
    assert 'images in other formats are left out (2 .heic, 1 .jfif): convert them to .jpg or .png' in (
        read_folder(tmp_path).notes
    )


def test_a_key_that_stands_twice_in_a_json_file(tmp_path):
    """A reader takes the last value of one key, so boxes would be lost."""
    path = tmp_path / 'a.json'
    path.write_text('{"images": [], "images": []}')
    assert read_json(path) == dict(images=[])
    path.write_text('{"info": {"lr": 1, "lr": 2}}')
    assert read_json(path) == dict(info=dict(lr=2)), 'which is nothing of the annotations'
    path.write_text('{"annotations": [{"bbox": [1, 2], "bbox": [1]}]}')
    with pytest.raises(UserError, match="has the key 'bbox' twice in one object, with different values"):
        read_json(path)
