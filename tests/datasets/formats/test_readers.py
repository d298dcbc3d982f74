"""Every format is read as globox reads or wrote it, and as its own documentation has it."""

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import DATA
from PIL import Image

from cbam_mmdet.datasets.checks import complete
from cbam_mmdet.datasets.formats.as_coco import duplicates, write_coco_files
from cbam_mmdet.datasets.formats.recognize import read_folder
from cbam_mmdet.datasets.formats.write import write_data_set
from cbam_mmdet.errors import UserError

globox = pytest.importorskip('globox', reason="needs pip install '.[dev]'")

CLASSES = ('cat', 'big dog', 'zebra')


@pytest.fixture(scope='module')
def truth(tmp_path_factory):
    """Twelve images of several sizes and suffixes with random boxes, one image without: a folder, and globox's set."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp('truth')
    annotations = []
    for i in range(12):
        width, height = (int(n) for n in rng.integers(40, 90, 2))
        name = f'img_{i}.jpg'
        cv2.imwrite(str(root / name), rng.integers(0, 255, (height, width, 3), np.uint8))
        boxes = []
        for _ in range(i % 5):
            x1, y1 = rng.uniform(0, 20, 2)
            x2, y2 = x1 + rng.uniform(2, width - 21), y1 + rng.uniform(2, height - 21)
            label = CLASSES[rng.integers(3)]
            boxes.append(globox.BoundingBox(label=label, xmin=x1, ymin=y1, xmax=x2, ymax=y2))
        annotations.append(globox.Annotation(name, (width, height), boxes))
    return root, globox.AnnotationSet(annotations)


def copy_images(source, target):
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob('*.jpg'):
        (target / path.name).write_bytes(path.read_bytes())


def boxes_of(contents, tolerance=4):
    """(image, class, x, y, width, height) of every box, rounded: a multiset."""
    found = Counter()
    for content in contents:
        names = {category['id']: category['name'] for category in content['categories']}
        images = {image['id']: Path(image['file_name']).name for image in content['images']}
        for a in content['annotations']:
            box = tuple(round(value, tolerance) + 0.0 for value in a['bbox'])
            found[(images[a['image_id']], names[a['category_id']], *box)] += 1
    return found


def expected(annotations, tolerance=4):
    return Counter(
        (a.image_id, b.label, *(round(v, tolerance) + 0.0 for v in (b.xmin, b.ymin, b.width, b.height)))
        for a in annotations
        for b in a.boxes
    )


def all_of(found):
    return [found.splits['train'], found.splits['val']]


def sizes_of(found):
    return {Path(i['file_name']).name: (i['width'], i['height']) for c in all_of(found) for i in c['images']}


def true_sizes(annotations):
    return {a.image_id: a.image_size for a in annotations}


def test_yolo_of_ultralytics(truth, tmp_path):
    root, annotations = truth
    copy_images(root, tmp_path / 'images/train')
    ids = {name: i for i, name in enumerate(CLASSES)}
    (tmp_path / 'labels').mkdir()
    annotations.save_yolo_darknet(tmp_path / 'labels/train', label_to_id=ids)
    lines = ''.join(f'  {i}: {name}\n' for i, name in enumerate(CLASSES))
    (tmp_path / 'data.yaml').write_text(f'path: ../datasets/mine\ntrain: images/train\nnames:\n{lines}')
    found = read_folder(tmp_path)
    assert found.style == 'YOLO (data.yaml)'
    assert boxes_of(all_of(found), 2) == expected(annotations, 2)
    assert sizes_of(found) == true_sizes(annotations)  # with the images that have no box
    assert [c['name'] for c in found.splits['train']['categories']] == list(CLASSES)  # their order numbers them
    read = globox.AnnotationSet.from_yolo_darknet(tmp_path / 'labels/train', image_folder=tmp_path / 'images/train')
    names = {str(i): name for name, i in ids.items()}
    assert expected(read.map_labels(names), 3) == boxes_of(all_of(found), 3)


def test_yolo_of_darknet(truth, tmp_path):
    root, annotations = truth
    copy_images(root, tmp_path / 'obj')
    annotations.save_yolo_darknet(tmp_path / 'obj', label_to_id={name: i for i, name in enumerate(CLASSES)})
    (tmp_path / 'obj.names').write_text('\n'.join(CLASSES) + '\n')
    found = read_folder(tmp_path)
    assert found.style == 'YOLO (obj.names)'
    assert boxes_of(all_of(found), 2) == expected(annotations, 2)


def test_cvat(truth, tmp_path):
    root, annotations = truth
    copy_images(root, tmp_path / 'images')
    annotations.save_cvat(tmp_path / 'annotations.xml')
    found = read_folder(tmp_path)
    assert found.style == 'CVAT'
    assert boxes_of(all_of(found)) == expected(annotations)
    assert sizes_of(found) == true_sizes(annotations)
    assert expected(globox.AnnotationSet.from_cvat(tmp_path / 'annotations.xml')) == boxes_of(all_of(found))


def test_labelme(truth, tmp_path):
    root, annotations = truth
    copy_images(root, tmp_path)
    annotations.save_labelme(tmp_path)
    found = read_folder(tmp_path)
    assert found.style == 'LabelMe'
    assert boxes_of(all_of(found)) == expected(annotations)
    assert sizes_of(found) == true_sizes(annotations)
    assert expected(globox.AnnotationSet.from_labelme(tmp_path)) == boxes_of(all_of(found))


def test_coco_of_any_name(truth, tmp_path):
    root, annotations = truth
    copy_images(root, tmp_path / 'pictures')
    annotations.save_coco(tmp_path / 'labels.json', auto_ids=True)
    found = read_folder(tmp_path)
    assert found.style == 'COCO'
    assert boxes_of(all_of(found)) == expected(annotations)
    assert sizes_of(found) == true_sizes(annotations)


@pytest.mark.parametrize('folders', [('annotations', 'images'), ('annots', 'JPEGImages'), ('', '')])
def test_voc_without_image_sets(truth, tmp_path, folders):
    """VOC counts pixels from 1, and the last one is inside: globox keeps the numbers, which are shifted here."""
    root, annotations = truth
    copy_images(root, tmp_path / folders[1])
    annotations.save_pascal_voc(tmp_path / folders[0])
    found = read_folder(tmp_path)
    assert found.style == 'Pascal VOC'
    shifted = Counter(
        (name, label, *(round(v, 3) + 0.0 for v in (x - 1, y - 1, width + 1, height + 1)))
        for name, label, x, y, width, height in expected(annotations, 6).elements()
    )
    assert boxes_of(all_of(found), 3) == shifted
    assert sizes_of(found) == true_sizes(annotations)


def test_voc_of_a_size_that_is_zero(truth, tmp_path):
    copy_images(truth[0], tmp_path)
    truth[1].save_pascal_voc(tmp_path)
    for path in tmp_path.glob('*.xml'):
        text = path.read_text()
        width, height = truth[1][f'{path.stem}.jpg'].image_size
        path.write_text(text.replace(f'<width>{width}<', '<width>0<').replace(f'<height>{height}<', '<height>0<'))
    assert sizes_of(read_folder(tmp_path)) == true_sizes(truth[1])


def roboflow(root, annotations, target):
    """Roboflow's export: a folder and a file for each split, and a category before all others that has no box."""
    parts = {'train': [], 'valid': [], 'test': []}
    for i, annotation in enumerate(annotations):
        parts[('train', 'train', 'valid', 'test')[i % 4]].append(annotation)
    for split, part in parts.items():
        folder = target / split
        folder.mkdir(parents=True)
        for annotation in part:
            (folder / annotation.image_id).write_bytes((root / annotation.image_id).read_bytes())
        ids = {name: i for i, name in enumerate(CLASSES, start=1)}
        images = {a.image_id: i for i, a in enumerate(part)}
        content = globox.AnnotationSet(part).to_coco(label_to_id=ids, imageid_to_id=images)
        content['categories'] = [dict(id=0, name='animals', supercategory='none')] + [
            dict(id=i, name=name, supercategory='animals') for name, i in ids.items()
        ]
        (folder / '_annotations.coco.json').write_text(json.dumps(content))
    return {split: {a.image_id for a in part} for split, part in parts.items()}


def test_roboflow(truth, tmp_path):
    parts = roboflow(*truth, tmp_path)
    found = read_folder(tmp_path)
    assert {split: {Path(i['file_name']).name for i in c['images']} for split, c in found.splits.items()} == {
        'train': parts['train'], 'val': parts['valid'], 'test': parts['test'],
    }  # fmt: skip
    assert boxes_of(found.splits.values()) == expected(truth[1])
    assert [c['name'] for c in found.splits['train']['categories']] == list(CLASSES)
    assert any('animals' in note for note in found.notes)


def test_the_same_image_name_in_two_splits(tmp_path):
    """They are two images: globox, by names alone, would make one of them."""
    for split, shade in (('train', 50), ('valid', 200)):
        (tmp_path / split).mkdir()
        cv2.imwrite(str(tmp_path / split / '1.jpg'), np.full((30, 40, 3), shade, np.uint8))
        (tmp_path / split / '1.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'classes.txt').write_text('cat\n')
    found = read_folder(tmp_path)
    assert [found.splits[split]['images'][0]['file_name'] for split in ('train', 'val')] == [
        'train/1.jpg',
        'valid/1.jpg',
    ]


def test_polygons_become_boxes_in_yolo_cvat_and_labelme(tmp_path):
    corners = [(8, 6), (32, 9), (20, 24)]
    for style in ('yolo', 'cvat', 'labelme'):
        folder = tmp_path / style
        folder.mkdir()
        for name in 'ab':
            cv2.imwrite(str(folder / f'{name}.jpg'), np.zeros((30, 40, 3), np.uint8))
        if style == 'yolo':
            (folder / 'classes.txt').write_text('cat')
            line = '0 ' + ' '.join(f'{x / 40} {y / 30}' for x, y in corners)
            for name in 'ab':
                (folder / f'{name}.txt').write_text(line)
        elif style == 'cvat':
            points = ';'.join(f'{x},{y}' for x, y in corners)
            image = '<image name="{0}.jpg" width="40" height="30"><polygon label="cat" points="{1}"/></image>'
            nodes = ''.join(image.format(name, points) for name in 'ab')
            (folder / 'annotations.xml').write_text(f'<annotations>{nodes}</annotations>')
        else:
            shape = dict(label='cat', points=corners, shape_type='polygon')
            for name in 'ab':
                text = json.dumps(dict(imagePath=f'{name}.jpg', imageWidth=40, imageHeight=30, shapes=[shape]))
                (folder / f'{name}.json').write_text(text)
        for content in all_of(read_folder(folder)):
            assert content['annotations'][0]['bbox'] == pytest.approx([8, 6, 24, 18])


def test_a_turned_box_of_cvat_is_the_box_around_it(tmp_path):
    """By 90 degrees about its centre (20, 10), a box of 20 x 10 becomes one of 10 x 20."""
    for name in 'ab':
        cv2.imwrite(str(tmp_path / f'{name}.jpg'), np.zeros((30, 40, 3), np.uint8))
    box = '<box label="cat" xtl="10" ytl="5" xbr="30" ybr="15" rotation="90"/>'
    nodes = ''.join(f'<image name="{name}.jpg" width="40" height="30">{box}</image>' for name in 'ab')
    (tmp_path / 'annotations.xml').write_text(f'<annotations>{nodes}</annotations>')
    assert all_of(read_folder(tmp_path))[0]['annotations'][0]['bbox'] == pytest.approx([15, 0, 10, 20])


def test_yolo_on_a_turned_photograph_means_it_as_displayed(tmp_path):
    """Ultralytics' shares are those of the picture after the turn of its EXIF data."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    for name in 'ab':
        Image.new('RGB', (40, 30)).save(tmp_path / f'{name}.jpg', exif=exif)
        (tmp_path / f'{name}.txt').write_text('0 0.5 0.5 1 1')
    (tmp_path / 'classes.txt').write_text('cat')
    content = read_folder(tmp_path).splits['train']
    assert (content['images'][0]['width'], content['images'][0]['height']) == (30, 40)
    assert content['annotations'][0]['bbox'] == [0, 0, 30, 40]


def test_a_held_out_image_stays_held_out(tmp_path):
    """Whatever is added later; and a fifth of many is held out."""
    (tmp_path / 'classes.txt').write_text('cat')
    pixels = cv2.imencode('.png', np.zeros((2, 2, 3), np.uint8))[1].tobytes()
    held = []
    for count in (300, 600):
        for i in range(count):
            (tmp_path / f'photo {i}.png').write_bytes(pixels)
            (tmp_path / f'photo {i}.txt').write_text('')
        held.append({image['file_name'] for image in read_folder(tmp_path).splits['val']['images']})
    assert held[0] == {name for name in held[1] if int(name[6:-4]) < 300}
    assert 90 < len(held[1]) < 150


def test_duplicates_between_the_splits_are_named(truth, tmp_path):
    roboflow(*truth, tmp_path)
    first = next((tmp_path / 'train').glob('*.jpg'))
    (tmp_path / 'valid/copy.jpg').write_bytes(first.read_bytes())
    path = tmp_path / 'valid/_annotations.coco.json'
    content = json.loads(path.read_text())
    content['images'].append(dict(id=999, file_name='copy.jpg', width=1, height=1))
    path.write_text(json.dumps(content))
    [line] = duplicates(read_folder(tmp_path), tmp_path)
    assert line.startswith('1 images are in two splits') and 'copy.jpg' in line and first.name in line


def test_files_are_written_once_and_only_below_the_work_dir(truth, tmp_path):
    root = tmp_path / 'data'
    copy_images(truth[0], root)
    truth[1].save_labelme(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    files = write_coco_files(read_folder(root), tmp_path / 'run')
    written = {path: Path(path).stat().st_mtime_ns for path in files.values()}
    assert write_coco_files(read_folder(root), tmp_path / 'run') == files
    assert {path: Path(path).stat().st_mtime_ns for path in files.values()} == written
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before
    (root / 'img_1.json').write_text((root / 'img_1.json').read_text().replace('cat', 'lynx').replace('zebra', 'lynx'))
    assert write_coco_files(read_folder(root), tmp_path / 'run') != files  # those of the earlier run stay
    assert all(Path(path).is_file() for path in files.values())


def test_area_and_iscrowd_are_completed():
    content = dict(images=[], categories=[], annotations=[dict(id=1, bbox=[1, 2, 3, 4]), dict(id=2, area=5, iscrowd=1)])
    completed, count = complete(content)
    assert count == 1
    assert completed['annotations'] == [
        dict(id=1, bbox=[1, 2, 3, 4], area=12, iscrowd=0),
        dict(id=2, area=5, iscrowd=1),
    ]


@pytest.mark.parametrize(
    ('files', 'words'),
    [
        ({'a.jpg': None}, ['1 images', 'annotations are missing', 'tools/infer.py']),
        ({'notes.md': 'x'}, ['0 images', 'there is no image']),
        ({'a.jpg': None, 'a.txt': '0 .5 .5 1 1'}, ['1 .txt', "nearest is YOLO's layout", 'classes.txt']),
        ({'a.jpg': None, 'a.xml': '<kml/>'}, ['1 .xml', "nearest is Pascal VOC's layout", '<kml>']),
        ({'a.jpg': None, 'a.json': '{"x": 1}'}, ['1 .json', "nearest is COCO's layout", 'categories']),
        ({'a.jpg': None, 'a.json': '{"images": ['}, ['not valid JSON', 'a.json']),
        ({'a.jpg': None, 'data.yaml': 'names: [cat]\ntrain: pictures'}, ['data.yaml', "'pictures'", 'no such folder']),
        ({'a.jpg': None, 'data.yaml': 'names: [cat]\ntrain: .\nnc: 2'}, ['nc is 2', '1 classes']),
        ({'a.jpg': None, 'data.yaml': '!!python/object/apply:os.getcwd []'}, ['data.yaml', 'more than data']),
        ({'a.jpg': None, 'a.txt': '3 .5 .5 1 1', 'classes.txt': 'cat'}, ['a.txt, line 1', 'class 3', '1 classes']),
        ({'a.jpg': None, 'a.txt': '0 50 50 10 10', 'classes.txt': 'cat'}, ['a.txt, line 1', 'share of the image']),
        ({'a.jpg': None, 'a.txt': '0 .5 .5', 'classes.txt': 'cat'}, ['a.txt, line 1', '2 numbers']),
        ({'a.jpg': None, 'a.txt': '', 'classes.txt': 'cat\ncat'}, ['classes.txt', 'a name of its own']),
        ({'a.jpg': None, 'a.xml': '<annotations><track/></annotations>'}, ['tracks of a video', 'CVAT for images']),
        ({'a.jpg': None, 'b.xml': '<annotation/>'}, ['the images of its 1 .xml are not there']),
        ({'a.jpg': None, 'a.xml': '<annotation/>', 'a.json': '{"shapes": [], "imagePath": "a.jpg"}'}, ['leave one']),
        (
            {'train/a.jpg': None, 'train/a.txt': '', 'b.jpg': None, 'b.txt': '', 'classes.txt': 'x'},
            ['none of the splits'],
        ),
        ({'a.jpg': None, 'a.txt': '', 'classes.txt': 'cat'}, ['one image only']),
        ({'a.jpg': b'no image', 'a.txt': '', 'classes.txt': 'cat'}, ['image', 'a.jpg', 'cannot be read']),
    ],
)
def test_one_message_says_what_was_found_and_what_is_missing(tmp_path, files, words):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if text is None:
            cv2.imwrite(str(path), np.zeros((20, 20, 3), np.uint8))
        else:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_several_files_of_coco_are_chosen_from(truth, tmp_path):
    copy_images(truth[0], tmp_path)
    for name in ('red', 'blue'):
        truth[1].save_coco(tmp_path / f'{name}.json', auto_ids=True)
    with pytest.raises(UserError, match=r'2 annotation files.*--train-ann FILE and --val-ann FILE'):
        read_folder(tmp_path)
    found = read_folder(tmp_path, train_ann='red.json', val_ann='blue.json')
    assert boxes_of([found.splits['train']]) == boxes_of([found.splits['test']]) == expected(truth[1])
    with pytest.raises(UserError, match=r'green\.json'):
        read_folder(tmp_path, train_ann='green.json')


@pytest.mark.parametrize('name', ['raccoon', 'bccd', 'coco'])
def test_real_folders_as_they_are(name):
    """Counted by other means: the tags of the XML files, the lists of the JSON files."""
    if not (DATA / name).is_dir():
        pytest.skip(f'{DATA / name} is not there')
    found = read_folder(DATA / name)
    boxes = sum(len(c['annotations']) for c in all_of(found))
    images = sum(len(c['images']) for c in all_of(found))
    xml = [path.read_text() for path in (DATA / name).rglob('*.xml')]
    if xml:
        assert (images, boxes) == (len(xml), sum(text.count('<object>') for text in xml))
    else:
        contents = [json.loads(path.read_text()) for path in (DATA / name).rglob('instances_*.json')]
        assert boxes_of(contents) == boxes_of(all_of(found))
        assert images == sum(len(content['images']) for content in contents)


def small_yolo(root, images='images', labels='labels'):
    for split, names in (('train', 'abc'), ('val', 'd')):
        for name in names:
            for folder in (images, labels):
                (root / folder / split).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / images / split / f'{name}.jpg'), np.zeros((30, 40, 3), np.uint8))
            text = '\ufeff0 0.5 0.5 0.5 0.5\r\n'  # as some editors of Windows write it
            (root / labels / split / f'{name}.txt').write_bytes(text.encode())


@pytest.mark.parametrize(
    'text',
    [
        'train: images/train\nval: images/val\ntest:\nnames: [big cat]\nnc: 1',
        'path: C:\\Users\\me\\x\ntrain: images/train\nval: images/val\nnames: {0: big cat}',
        'train: /home/me/x/images/train\nval: /home/me/x/images/val\nnames: [big cat]',
        'train: ../images/train\nval: ../images/val\nnames: [big cat]',
    ],
)
@pytest.mark.parametrize('folders', [('images', 'labels'), ('Images', 'Labels')])
def test_yolo_as_people_have_it(tmp_path, text, folders):
    small_yolo(tmp_path, *folders)
    (tmp_path / 'data.yaml').write_text(text.replace('images/', f'{folders[0]}/'))
    found = read_folder(tmp_path)
    assert [len(found.splits[split]['annotations']) for split in ('train', 'val')] == [3, 1]
    assert found.splits['val']['annotations'][0]['bbox'] == [10, 7.5, 20, 15]


def test_lists_of_darknet_make_the_splits(tmp_path):
    small_yolo(tmp_path)
    (tmp_path / 'obj.names').write_text('cat')
    (tmp_path / 'obj.data').write_text(
        'classes = 1\ntrain = data/train.txt\nvalid = data/test.txt\nnames = data/obj.names\n'
    )
    (tmp_path / 'train.txt').write_text('data/images/train/a.jpg\ndata/images/val/d.jpg\n')
    (tmp_path / 'test.txt').write_text('data/images/train/b.jpg\n')
    splits = read_folder(tmp_path).splits
    names = {split: [Path(i['file_name']).stem for i in splits[split]['images']] for split in ('train', 'val')}
    assert names == {'train': ['a', 'd'], 'val': ['b']}


def test_names_that_yaml_does_not_read_as_text_are_refused(tmp_path):
    small_yolo(tmp_path)
    (tmp_path / 'data.yaml').write_text('train: images/train\nval: images/val\nnames: [yes, no]')
    with pytest.raises(UserError, match='put quotes around'):
        read_folder(tmp_path)


def test_images_that_are_in_no_image_set_are_counted(truth, tmp_path):
    copy_images(truth[0], tmp_path / 'JPEGImages')
    truth[1].save_pascal_voc(tmp_path / 'Annotations')
    (tmp_path / 'ImageSets/Main').mkdir(parents=True)
    (tmp_path / 'ImageSets/Main/train.txt').write_text('img_1\nimg_2\n')
    (tmp_path / 'ImageSets/Main/val.txt').write_text('img_3\n')
    assert '9 annotated images are in no image set, and are left out' in read_folder(tmp_path).notes


def coco_of(names):
    """A COCO content in which image i has i + 1 boxes."""
    images = [dict(id=i, file_name=name, width=40, height=30) for i, name in enumerate(names, start=1)]
    boxes = [dict(image_id=i, category_id=1, bbox=[j, j, 9, 9]) for i in range(1, len(names) + 1) for j in range(i + 1)]
    annotations = [dict(box, id=i) for i, box in enumerate(boxes, start=1)]
    return json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name='cat')]))


def write_pictures(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), np.full((30, 40, 3), i, np.uint8))


@pytest.mark.parametrize(
    ('folders', 'files'),
    [
        (('siteA/images', 'siteB/images'), ('siteA/annotations/x.json', 'siteB/annotations/x.json')),
        (('train_images', 'val_images'), ('train.json', 'val.json')),
        (('images/train', 'images/val'), ('annotations/train.json', 'annotations/val.json')),
        (('a', 'b'), ('a.json', 'b.json')),
    ],
)
def test_images_of_one_name_are_those_of_their_own_file(tmp_path, folders, files):
    write_pictures(tmp_path, *(f'{folder}/{i}.jpg' for folder in folders for i in range(3)))
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(coco_of(['0.jpg', '1.jpg', '2.jpg']))
    found = read_folder(tmp_path, train_ann=files[0], val_ann=files[1])
    for split, folder in zip(('train', 'val'), folders, strict=True):
        assert [i['file_name'] for i in found.splits[split]['images']] == [f'{folder}/{i}.jpg' for i in range(3)]


def test_an_image_that_may_be_either_of_two_is_refused(tmp_path):
    write_pictures(tmp_path, 'a/0.jpg', 'b/0.jpg')
    (tmp_path / 'labels.json').write_text(coco_of(['0.jpg']))
    with pytest.raises(UserError, match='has 2 of that name'):
        read_folder(tmp_path)


def test_an_image_of_another_split_is_not_taken_for_a_missing_one(tmp_path):
    write_pictures(tmp_path, 'train2017/0.jpg', 'val2017/0.jpg', 'val2017/1.jpg')
    for split in ('train', 'val'):
        (tmp_path / f'instances_{split}2017.json').write_text(coco_of(['0.jpg', '1.jpg']))
    found = read_folder(tmp_path)
    assert [i['file_name'] for i in found.splits['train']['images']] == ['train2017/0.jpg']
    assert any('1 images that instances_train2017.json lists are not there' in note for note in found.notes)


def voc_year(root, year, names, **sets):
    write_pictures(root, *(f'{year}/JPEGImages/{name}.jpg' for name in names))
    for folder in ('Annotations', 'ImageSets/Main'):
        (root / year / folder).mkdir(parents=True)
    box = '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
    for name in names:
        text = f'<annotation><object><name>cat</name>{box}</object></annotation>'
        (root / year / f'Annotations/{name}.xml').write_text(text)
    for name, members in sets.items():
        (root / year / f'ImageSets/Main/{name}.txt').write_text('\n'.join(members))


@pytest.mark.parametrize('suffix', ['', '.jpg'])
def test_two_years_of_voc_are_read_together(tmp_path, suffix):
    """The later year has no test set, and lists of the same name."""
    listed = [f'{name}{suffix}' for name in 'abcde']
    voc_year(tmp_path, 'VOC2007', 'abcde', trainval=listed[:3], test=listed[3:])
    voc_year(tmp_path, 'VOC2012', 'xyz', trainval='xyz')
    found = read_folder(tmp_path)
    assert [len(found.splits[split]['images']) for split in ('train', 'val')] == [6, 2]
    assert found.notes == ['the images (train) come from 2 folders: VOC2007/JPEGImages/ 3, VOC2012/JPEGImages/ 3']


def test_two_years_of_voc_with_sets_of_one_name(tmp_path):
    voc_year(tmp_path, 'VOC2007', 'abcd', train='ab', val='cd')
    voc_year(tmp_path, 'VOC2012', 'uvw', train='uv', val='w')
    splits = read_folder(tmp_path).splits
    assert [len(splits[split]['images']) for split in ('train', 'val')] == [4, 3]


@pytest.mark.parametrize(
    'files',
    [
        {'labels/train/classes.txt': 'cat\ndog', 'labels/val/classes.txt': 'dog\ncat'},
        {'custom.names': 'cat\ndog', 'coco.names': 'x\ny'},
        {'custom.names': 'cat\ndog', 'labels.txt': 'x\ny'},
    ],
)
def test_lists_of_classes_that_differ_are_refused(tmp_path, files):
    small_yolo(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match='several lists of classes that differ'):
        read_folder(tmp_path)


def test_the_list_that_a_data_file_names_is_taken(tmp_path):
    small_yolo(tmp_path)
    (tmp_path / 'a.names').write_text('x\ny')
    (tmp_path / 'custom.names').write_text('cat\ndog\n\n')
    (tmp_path / 'obj.data').write_text('names = data/custom.names')
    assert [c['name'] for c in read_folder(tmp_path).splits['train']['categories']] == ['cat', 'dog']


@pytest.mark.parametrize('names', ['cat\n\ndog', '["", cat, dog]'])
def test_a_blank_class_does_not_shift_the_others(tmp_path, names):
    small_yolo(tmp_path)
    if names.startswith('['):
        (tmp_path / 'data.yaml').write_text(f'train: images/train\nval: images/val\nnames: {names}')
    else:
        (tmp_path / 'classes.txt').write_text(names)
    with pytest.raises(UserError, match='is not the name of a class'):
        read_folder(tmp_path)


def test_a_yaml_that_does_not_fit_is_not_read_as_all_images(tmp_path):
    small_yolo(tmp_path)
    (tmp_path / 'data.yaml').write_text('train: ../train/images\nval: ../valid/images\nnames: [cat]')
    with pytest.raises(UserError, match=r"train is '\.\./train/images', and there is no such folder"):
        read_folder(tmp_path)


def test_a_test_split_that_shares_an_image_is_named_and_one_that_is_not_there_is_left_out(tmp_path):
    small_yolo(tmp_path)
    text = 'train: images/train\nval: images/val\ntest: {}\nnames: {{"0": cat}}'
    (tmp_path / 'data.yaml').write_text(text.format('../test/images'))
    assert 'data.yaml names a test split that is not there' in read_folder(tmp_path).notes
    (tmp_path / 'test.txt').write_text('images/val/d.jpg\nimages/train/a.jpg\n')
    (tmp_path / 'data.yaml').write_text(text.format('test.txt'))
    with pytest.raises(UserError, match='1 images are in train and in test'):
        read_folder(tmp_path)


def test_a_root_with_dots_in_it(tmp_path):
    small_yolo(tmp_path / 'data')
    (tmp_path / 'data/data.yaml').write_text('train: images/train\nval: images/val\nnames: [cat]')
    assert len(read_folder(f'{tmp_path}/data/../data').splits['train']['images']) == 3


def test_ultralytics_finds_the_labels_that_are_written(tmp_path):
    """Its rule: of an image's path the last /images/ becomes /labels/, and the suffix .txt."""
    root = tmp_path / 'source'
    names = ['images/a.jpg', 'images/a.png', 'images/sub/images/b.jpg', 'other/b.jpg']
    write_pictures(root, *names)
    (root / 'train.json').write_text(coco_of(names))
    (root / 'val.json').write_text(coco_of(names[:1]))
    write_data_set(read_folder(root), root, tmp_path / 'yolo', 'yolo')
    pictures = [path for path in (tmp_path / 'yolo/images/train').rglob('*') if path.suffix in ('.jpg', '.png')]
    counts = []
    for path in pictures:
        labels = Path('/labels/'.join(str(path).rsplit('/images/', 1))).with_suffix('.txt')
        counts.append(len(labels.read_text().splitlines()))
    assert sorted(counts) == [2, 3, 4, 5]  # image i has i + 1 boxes


def test_a_yaml_one_folder_deeper_is_named(tmp_path):
    write_pictures(tmp_path, 'set/images/0.jpg')
    (tmp_path / 'set/data.yaml').write_text('train: images\nnames: [cat]\n')
    with pytest.raises(UserError, match=rf'give --data-root {tmp_path}/set'):
        read_folder(tmp_path)


def test_label_files_without_an_image_are_named(tmp_path):
    write_pictures(tmp_path, 'images/0.jpg', 'images/1.jpg')
    (tmp_path / 'labels').mkdir()
    for name in ('0', 'cafe\u0301', 'classes'):  # the picture of the second may be called caf\u00e9
        (tmp_path / f'labels/{name}.txt').write_text('cat\n' if name == 'classes' else '0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'data.yaml').write_text('train: images\nnames: [cat]\n')
    notes = read_folder(tmp_path).notes
    assert '1 label files belong to no image: the first is labels/cafe\u0301.txt' in notes


def test_label_files_in_capitals(tmp_path):
    write_pictures(tmp_path, 'images/0.jpg', 'images/1.jpg')
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'labels/0.TXT').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'labels/1.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'data.yaml').write_text('train: images\nnames: [cat]\n')
    assert sum(len(content['annotations']) for content in all_of(read_folder(tmp_path))) == 2


def test_splits_by_folders_called_train_images_and_val_images(tmp_path):
    write_pictures(tmp_path, 'train_images/0.jpg', 'train_images/1.jpg', 'val_images/2.jpg', 'val_images/train_2.jpg')
    for image in [*tmp_path.glob('*/*.jpg')]:
        image.with_suffix('.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'classes.txt').write_text('cat\n')
    found = read_folder(tmp_path)
    names = {split: [image['file_name'] for image in found.splits[split]['images']] for split in ('train', 'val')}
    assert names == dict(
        train=['train_images/0.jpg', 'train_images/1.jpg'], val=['val_images/2.jpg', 'val_images/train_2.jpg']
    )


def test_a_file_for_validation_whose_images_are_all_among_those_of_training(tmp_path):
    write_pictures(tmp_path, *(f'train2017/{i}.jpg' for i in range(4)))
    (tmp_path / 'train.json').write_text(coco_of(['0.jpg', '1.jpg']))
    (tmp_path / 'minival.json').write_text(coco_of(['2.jpg', '3.jpg']))
    found = read_folder(tmp_path, val_ann='minival.json', train_ann='train.json')
    assert [image['file_name'] for image in found.splits['val']['images']] == ['train2017/2.jpg', 'train2017/3.jpg']
    (tmp_path / 'minival.json').rename(tmp_path / 'val.json')
    found = read_folder(tmp_path)
    assert [image['file_name'] for image in found.splits['val']['images']] == ['train2017/2.jpg', 'train2017/3.jpg']
    assert 'val.json is for the val split by its name, and its images are in train2017' in found.notes


def test_what_voc_cannot_hold_is_said(tmp_path):
    write_pictures(tmp_path, '0.jpg', '1.jpg')
    content = json.loads(coco_of(['0.jpg', '1.jpg']))
    content['annotations'][0]['bbox'] = [3, 3, 0.4, 5]
    content['categories'].append(dict(id=2, name='dog'))
    (tmp_path / 'train.json').write_text(json.dumps(content))
    notes = write_data_set(read_folder(tmp_path), tmp_path, tmp_path / 'voc', 'voc')
    assert any(note.startswith('1 boxes narrower than a pixel') for note in notes)
    assert any(note.endswith('no list of classes: dog') for note in notes)


def test_images_in_both_files_of_coco_are_named(tmp_path):
    write_pictures(tmp_path, '0.jpg', '1.jpg', '2.jpg')
    (tmp_path / 'train.json').write_text(coco_of(['0.jpg', '1.jpg']))
    (tmp_path / 'val.json').write_text(coco_of(['1.jpg', '2.jpg']))
    (line,) = duplicates(read_folder(tmp_path), tmp_path)
    assert line.startswith('1 images are in two splits') and '1.jpg (val) is 1.jpg (train)' in line


def test_an_image_of_another_camera_is_not_taken_for_a_missing_one(tmp_path):
    write_pictures(tmp_path, *(f'cam{c}/{i}.jpg' for c in (1, 2) for i in range(4) if (c, i) != (1, 0)))
    names = [f'cam{c}/{i}.jpg' for c in (1, 2) for i in range(4)]
    (tmp_path / 'train.json').write_text(coco_of(names))
    found = read_folder(tmp_path)
    assert sorted(i['file_name'] for content in all_of(found) for i in content['images']) == names[1:]
    assert any(note.startswith('1 images that train.json lists are not there') for note in found.notes)


def test_a_renamed_folder_of_images_is_said(tmp_path):
    write_pictures(tmp_path, *(f'pictures/{i}.jpg' for i in range(3)))
    (tmp_path / 'train.json').write_text(coco_of([f'/home/me/set/images/{i}.jpg' for i in range(3)]))
    found = read_folder(tmp_path)
    assert sum(len(content['images']) for content in all_of(found)) == 3
    assert any('no images in a folder images/' in note and 'in pictures/ are taken' in note for note in found.notes)


def test_an_xml_without_its_image_does_not_get_another_folders(tmp_path):
    write_pictures(tmp_path, *(f'cam{c}/img/{i}.jpg' for c in (1, 2) for i in range(4) if (c, i) != (1, 0)))
    box = '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
    for c, i in [(c, i) for c in (1, 2) for i in range(4) if (c, i) != (2, 0)]:
        path = tmp_path / f'cam{c}/xml/{i}.xml'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'<annotation><object><name>cat</name>{box}</object></annotation>')
    found = read_folder(tmp_path)
    names = sorted(i['file_name'] for content in all_of(found) for i in content['images'])
    assert names == [f'cam{c}/img/{i}.jpg' for c in (1, 2) for i in range(1, 4)]
    assert any(note.startswith('1 .xml are left out') for note in found.notes)


def test_image_sets_of_other_tasks_make_no_splits(tmp_path):
    names = [f'{i:06d}' for i in range(8)]
    voc_year(tmp_path, 'VOC2007', names, trainval=names[:5], test=names[5:])
    for task in ('Segmentation', 'Layout'):
        (tmp_path / 'VOC2007/ImageSets' / task).mkdir()
        for name, members in dict(trainval=names[6:], test=names[:1]).items():
            (tmp_path / f'VOC2007/ImageSets/{task}/{name}.txt').write_text('\n'.join(members))
    found = read_folder(tmp_path)
    assert [len(found.splits[split]['images']) for split in ('train', 'test')] == [5, 3]


def test_keypoints_of_yolo_are_no_polygons(tmp_path):
    write_pictures(tmp_path, 'images/0.jpg', 'images/1.jpg')
    (tmp_path / 'labels').mkdir()
    points = ' '.join('0.45 0.46' for _ in range(12))
    for i in range(2):
        (tmp_path / f'labels/{i}.txt').write_text(f'0 0.5 0.5 0.5 0.2 {points}\n')
    text = 'train: images\nnames: [tiger]\n'
    (tmp_path / 'data.yaml').write_text(f'{text}kpt_shape: [12, 2]\n')
    found = read_folder(tmp_path)
    assert all(a['bbox'] == [10, 12, 20, 6] for content in all_of(found) for a in content['annotations'])
    assert 'keypoints are left out' in found.notes
    for wrong, words in (('[12, 3]', 'in place of 4 and 36 of keypoints'), ('12', 'kpt_shape is 12')):
        (tmp_path / 'data.yaml').write_text(f'{text}kpt_shape: {wrong}\n')
        with pytest.raises(UserError, match=words):
            read_folder(tmp_path)


def test_darknets_lists_of_training_and_test(tmp_path):
    write_pictures(tmp_path, *(f'obj_Train_data/{i}.jpg' for i in range(4)), 'obj_Test_data/4.jpg')
    for image in [*tmp_path.glob('*/*.jpg')]:
        image.with_suffix('.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'obj.names').write_text('cat\n')
    (tmp_path / 'obj.data').write_text('train = data/Train.txt\ntest = data/Test.txt\nnames = data/obj.names\n')
    (tmp_path / 'Train.txt').write_text(''.join(f'data/obj_Train_data/{i}.jpg\n' for i in range(4)))
    (tmp_path / 'Test.txt').write_text('data/obj_Test_data/4.jpg\n')
    found = read_folder(tmp_path)
    assert [image['file_name'] for image in found.splits['test']['images']] == ['obj_Test_data/4.jpg']
    assert len(found.splits['train']['images']) == 4


@pytest.mark.parametrize('orientation', range(1, 9))
def test_boxes_of_a_stored_frame_are_turned_for_yolo(tmp_path, orientation):
    """Against Pillow, which turns a picture in which the box is white."""
    from PIL import Image, ImageOps

    picture = np.zeros((48, 64), np.uint8)
    picture[5:15, 8:32] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in 'ab':
        Image.fromarray(picture).save(tmp_path / f'{name}.png', exif=exif)
    content = json.loads(coco_of(['a.png', 'b.png']))
    for image in content['images']:
        image.update(width=64, height=48)
    for annotation in content['annotations']:
        annotation['bbox'] = [8, 5, 24, 10]
    (tmp_path / 'train.json').write_text(json.dumps(content))
    write_data_set(read_folder(tmp_path), tmp_path, tmp_path / 'yolo', 'yolo')
    back = read_folder(tmp_path / 'yolo').splits['train']
    box, image = back['annotations'][0]['bbox'], back['images'][0]
    if orientation < 5:  # width and height do not say which frame is meant: it is left as it is
        assert np.allclose(box, [8, 5, 24, 10], atol=1e-4)
        return
    turned = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'a.png')))
    ys, xs = np.nonzero(turned)
    assert (image['width'], image['height']) == turned.shape[::-1]
    assert np.allclose(box, [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1], atol=1e-4)


def test_folders_that_name_two_splits_are_refused(tmp_path):
    write_pictures(tmp_path, 'train/cat/0.jpg', 'val/train/1.jpg')
    for image in [*tmp_path.rglob('*.jpg')]:
        image.with_suffix('.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'classes.txt').write_text('cat\n')
    with pytest.raises(UserError, match=r'val/train/1.jpg is in folders of two splits \(train, val\)'):
        read_folder(tmp_path)


def test_lists_of_darknet_without_a_data_file(tmp_path):
    write_pictures(tmp_path, *(f'obj/{i}.jpg' for i in range(4)))
    for image in [*tmp_path.rglob('*.jpg')]:
        image.with_suffix('.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'obj.names').write_text('cat\n')
    (tmp_path / 'train.txt').write_text('obj/0.jpg\nobj/1.jpg\n')
    (tmp_path / 'valid.txt').write_text('obj/2.jpg\n')
    found = read_folder(tmp_path)
    assert [len(found.splits[split]['images']) for split in ('train', 'val')] == [2, 1]
    assert '1 images that no list names are left out' in found.notes
    (tmp_path / 'valid.txt').write_text('obj/1.jpg\nobj/2.jpg\n')
    with pytest.raises(UserError, match=r'train\.txt: 1 images are in train and in val: the first is obj/1\.jpg'):
        read_folder(tmp_path)


def test_links_to_one_folder_of_images(tmp_path):
    write_pictures(tmp_path, *(f'shared/{i}.jpg' for i in range(4)))
    for split, numbers in dict(train=(0, 1, 2), val=(3,)).items():
        (tmp_path / 'set' / split / 'labels').mkdir(parents=True)
        (tmp_path / 'set' / split / 'images').symlink_to(tmp_path / 'shared')
        for i in numbers:
            box = '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
            text = f'<annotation><object><name>cat</name>{box}</object></annotation>'
            (tmp_path / f'set/{split}/labels/{i}.xml').write_text(text)
    (tmp_path / 'set/circle').symlink_to(tmp_path / 'set')
    found = read_folder(tmp_path / 'set')
    names = {split: [image['file_name'] for image in found.splits[split]['images']] for split in ('train', 'val')}
    assert names == dict(train=[f'train/images/{i}.jpg' for i in range(3)], val=['val/images/3.jpg'])


def test_a_list_of_classes_that_differs_from_the_yaml_is_named(tmp_path):
    write_pictures(tmp_path, 'set/images/0.jpg', 'set/images/1.jpg')
    for i in range(2):
        (tmp_path / f'set/images/{i}.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'set/data.yaml').write_text('train: images\nnames: [cat, dog]\n')
    (tmp_path / 'set/classes.txt').write_text('dog\ncat\n')
    notes = read_folder(tmp_path / 'set').notes
    assert 'classes.txt lists other classes, or another order: data.yaml is taken' in notes
    (tmp_path / 'set/classes.txt').rename(tmp_path / 'classes.txt')
    with pytest.raises(UserError, match='give --data-root'):
        read_folder(tmp_path)


def test_an_ellipse_of_cvat_is_the_box_around_it(tmp_path):
    write_pictures(tmp_path, '0.jpg', '1.jpg')
    angle = np.linspace(0, 2 * np.pi, 100_000)
    x, y = 9 * np.cos(angle), 4 * np.sin(angle)  # turned by 30 degrees about (20, 15)
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    xs, ys = 20 + x * cos - y * sin, 15 + x * sin + y * cos
    shape = '<ellipse label="cat" cx="20" cy="15" rx="9" ry="4" rotation="30"/>'
    images = ''.join(f'<image name="{i}.jpg" width="40" height="30">{shape}</image>' for i in range(2))
    (tmp_path / 'annotations.xml').write_text(f'<annotations>{images}</annotations>')
    (box,) = (a['bbox'] for a in read_folder(tmp_path).splits['val']['annotations'])
    assert np.allclose(box, [xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)], atol=1e-4)


def test_a_photograph_in_mpo_is_turned_as_it_is_displayed(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    for name in 'ab':
        pictures = [Image.new('RGB', (40, 30), colour) for colour in ('red', 'blue')]
        pictures[0].save(tmp_path / f'{name}.jpg', 'MPO', save_all=True, append_images=pictures[1:], exif=exif)
        (tmp_path / f'{name}.txt').write_text('0 0.5 0.5 1 1')
    (tmp_path / 'classes.txt').write_text('cat')
    image = read_folder(tmp_path).splits['train']['images'][0]
    assert (image['height'], image['width']) == cv2.imread(str(tmp_path / image['file_name'])).shape[:2] == (40, 30)


def test_coordinates_of_voc_that_begin_at_0_are_named(tmp_path):
    voc_year(tmp_path, 'VOC2007', '01')
    assert not any('pixel 0' in note for note in read_folder(tmp_path).notes)
    path = tmp_path / 'VOC2007/Annotations/0.xml'
    path.write_text(path.read_text().replace('<xmin>1', '<xmin>0'))
    assert any(note.startswith('1 boxes begin at pixel 0 or before') for note in read_folder(tmp_path).notes)


def test_aliases_of_yaml_that_multiply_are_refused(tmp_path):
    """Printing such a list needs gigabytes; the file has 12 lines."""
    write_pictures(tmp_path, 'images/0.jpg', 'images/1.jpg')
    lines = ['a0: &a0 [x, x, x, x, x, x, x, x, x, x]']
    lines += [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, 9)]
    for names in ('{0: *a8}', '*a8', '&me [cat, *me]'):
        (tmp_path / 'data.yaml').write_text('\n'.join([*lines, 'train: images', f'names: {names}']))
        with pytest.raises(UserError, match='holds'):
            read_folder(tmp_path)
    (tmp_path / 'data.yaml').write_text('all: &all images\ntrain: *all\nnames: [cat]\n')
    (tmp_path / 'images/0.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    assert read_folder(tmp_path).splits['train']['images']


def test_pictures_of_the_page_have_their_boxes_where_the_annotation_means_them(tmp_path):
    """A turned photograph with boxes of its stored frame is drawn as stored; a resized one is named."""
    from PIL import Image

    from cbam_mmdet.visualization import data_page

    picture = np.zeros((48, 64, 3), np.uint8)
    picture[8:16, 16:48] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / '0.png', exif=exif)
    Image.fromarray(picture).resize((32, 24)).save(tmp_path / '1.png')
    content = json.loads(coco_of(['0.png', '1.png']))
    for image in content['images']:
        image.update(width=64, height=48)
    (tmp_path / 'train.json').write_text(json.dumps(content))
    found = read_folder(tmp_path)
    drawn = {}
    original = data_page._drawn
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            data_page,
            '_drawn',
            lambda pixels, image, *more: drawn.update({image['file_name']: pixels}) or original(pixels, image, *more),
        )
        data_page.write_data_page(found, tmp_path, tmp_path / 'page.html')
    assert np.array_equal(drawn['0.png'], picture)
    assert [note for note in found.notes if 'another size' in note and '1.png' in note and '0.png' not in note]


def test_masks_beside_the_images_are_not_taken_for_them(tmp_path):
    """Oxford-IIIT Pet's layout: the annotations' folder holds pictures of the same names, with another suffix."""
    write_pictures(
        tmp_path, *(f'images/{i}.jpg' for i in range(4)), *(f'annotations/trimaps/{i}.png' for i in range(4))
    )
    (tmp_path / 'annotations/xmls').mkdir()
    box = '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
    for i in range(4):
        text = f'<annotation><filename>{i}.jpg</filename><object><name>cat</name>{box}</object></annotation>'
        (tmp_path / f'annotations/xmls/{i}.xml').write_text(text)
    found = read_folder(tmp_path)
    names = sorted(image['file_name'] for content in all_of(found) for image in content['images'])
    assert names == [f'images/{i}.jpg' for i in range(4)]


@pytest.mark.parametrize('named', ['{split}/{i}.jpg', '{i}.jpg'])
def test_one_file_of_coco_for_folders_that_are_splits(tmp_path, named):
    places = [('train', 0), ('train', 1), ('val', 2), ('val', 3)]
    write_pictures(tmp_path, *(f'{split}/{i}.jpg' for split, i in places))
    (tmp_path / 'annotations.json').write_text(coco_of([named.format(split=split, i=i) for split, i in places]))
    found = read_folder(tmp_path)
    for split in ('train', 'val'):
        content = found.splits[split]
        assert [i['file_name'] for i in content['images']] == [f'{s}/{i}.jpg' for s, i in places if s == split]
        assert {a['image_id'] for a in content['annotations']} == {i['id'] for i in content['images']}
    write_pictures(tmp_path, 'more/4.jpg')
    (tmp_path / 'annotations.json').write_text(coco_of([*(f'{split}/{i}.jpg' for split, i in places), 'more/4.jpg']))
    with pytest.raises(UserError, match=r'more/4.jpg and others are not'):
        read_folder(tmp_path)


def test_splits_by_the_folders_of_the_annotations(tmp_path):
    write_pictures(tmp_path, *(f'images/{i}.jpg' for i in range(4)))
    box = '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
    for i in range(4):
        path = tmp_path / f'annotations/{"train" if i < 3 else "val"}/{i}.xml'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'<annotation><object><name>cat</name>{box}</object></annotation>')
    found = read_folder(tmp_path)
    assert [len(found.splits[split]['images']) for split in ('train', 'val')] == [3, 1]
    for path in [*tmp_path.rglob('*.xml')]:
        path.unlink()
    for split, numbers in dict(train=(0, 1, 2), val=(3,)).items():
        shape = '<box label="cat" xtl="1" ytl="1" xbr="9" ybr="9"/>'
        nodes = ''.join(f'<image name="{i}.jpg" width="40" height="30">{shape}</image>' for i in numbers)
        (tmp_path / f'{split}.xml').write_text(f'<annotations>{nodes}</annotations>')
    found = read_folder(tmp_path)
    assert [len(found.splits[split]['images']) for split in ('train', 'val')] == [3, 1]


def test_an_xml_that_names_another_image_is_named(tmp_path):
    voc_year(tmp_path, 'VOC2007', '012')
    path = tmp_path / 'VOC2007/Annotations/1.xml'
    path.write_text(path.read_text().replace('<annotation>', '<annotation><filename>0.jpg</filename>'))
    (note,) = (note for note in read_folder(tmp_path).notes if 'another image' in note)
    assert note.startswith('1 .xml name') and '1.xml names 0.jpg' in note


def test_boxes_outside_their_image_are_not_written_for_yolo(tmp_path):
    write_pictures(tmp_path, '0.jpg', '1.jpg')
    content = json.loads(coco_of(['0.jpg', '1.jpg']))
    for annotation, box in zip(content['annotations'], ([50, 3, 9, 9], [9, 9, -4, 5], [35, 3, 9, 9]), strict=False):
        annotation['bbox'] = box
    (tmp_path / 'train.json').write_text(json.dumps(content))
    notes = write_data_set(read_folder(tmp_path), tmp_path, tmp_path / 'yolo', 'yolo')
    assert '1 boxes of negative width or height are left out' in notes
    assert '1 boxes without size or outside their image are left out' in notes
    written = [a['bbox'] for c in all_of(read_folder(tmp_path / 'yolo')) for a in c['annotations']]
    assert len(written) == len(content['annotations']) - 2
    assert any(np.allclose(box, [35, 3, 5, 9], atol=1e-4) for box in written)


@pytest.mark.parametrize('name', ['"\\e[31mred"', '"a\\nb"', 'yes'])
def test_names_of_classes_that_cannot_be_printed_or_are_no_text(tmp_path, name):
    write_pictures(tmp_path, 'images/0.jpg', 'images/1.jpg')
    (tmp_path / 'images/0.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'data.yaml').write_text(f'train: images\nnames: [{name}, dog]\n')
    with pytest.raises(UserError, match=r'put quotes around|is not the name of a class'):
        read_folder(tmp_path)


def test_a_class_that_has_two_names_is_refused(tmp_path):
    write_pictures(tmp_path, 'images/0.jpg', 'images/1.jpg')
    (tmp_path / 'data.yaml').write_text('train: images\nnames: {0: cat, 1: dog, 1.0: bird}\n')
    with pytest.raises(UserError, match='a key is given twice'):
        read_folder(tmp_path)


def names_in(found):
    return sorted(image['file_name'] for content in all_of(found) for image in content['images'])


def labelme_of(name):
    shape = dict(label='cat', points=[[1, 1], [20, 20]], shape_type='rectangle')
    return json.dumps(dict(imagePath=name, imageWidth=40, imageHeight=30, shapes=[shape]))


def voc_of(name, label='cat', size=(40, 30)):
    box = '<bndbox><xmin>5</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>'
    width, height = size
    return (
        f'<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}</height></size>'
        f'<object><name>{label}</name>{box}</object></annotation>'
    )


@pytest.mark.parametrize('other', ['masks', 'thumbs'])
def test_a_missing_image_does_not_move_a_coco_set_to_another_folder(tmp_path, other):
    """images/0.jpg is missing. The other folder has all names, so which is meant is not known, but of masks."""
    write_pictures(tmp_path, *(f'images/{i}.jpg' for i in range(1, 6)), *(f'{other}/{i}.jpg' for i in range(6)))
    (tmp_path / 'a.json').write_text(coco_of([f'{i}.jpg' for i in range(6)]))
    if other == 'thumbs':
        with pytest.raises(UserError, match='has 2 of that name'):
            read_folder(tmp_path)
        return
    found = read_folder(tmp_path)
    assert names_in(found) == [f'images/{i}.jpg' for i in range(1, 6)]
    assert any('1 images that a.json lists are not there and are left out' in note for note in found.notes)


def test_an_image_of_another_folder_is_not_taken_for_a_missing_one_below_the_same_name(tmp_path):
    write_pictures(tmp_path, 'cam1/img/1.jpg', 'cam1/img/2.jpg', 'cam2/img/3.jpg')
    (tmp_path / 'a.json').write_text(coco_of([f'cam1/img/{i}.jpg' for i in (1, 2, 3)]))
    assert names_in(read_folder(tmp_path)) == ['cam1/img/1.jpg', 'cam1/img/2.jpg']


@pytest.mark.parametrize(('suffix', 'text'), [('.json', labelme_of), ('.xml', voc_of)])
def test_masks_are_not_taken_for_missing_images(tmp_path, suffix, text):
    write_pictures(tmp_path, 'images/1.jpg', 'images/2.jpg', 'masks/1.png', 'masks/2.png', 'masks/3.png')
    (tmp_path / 'labels').mkdir()
    for i in (1, 2, 3):
        (tmp_path / f'labels/{i}{suffix}').write_text(text(f'{i}.jpg'))
    found = read_folder(tmp_path)
    assert names_in(found) == ['images/1.jpg', 'images/2.jpg']
    assert any('whose image is not there' in note for note in found.notes)
    assert '3 images in masks/ are taken for masks, and left out' in found.notes


def test_photographs_of_masks_are_images(tmp_path):
    write_pictures(tmp_path, 'mask/1.jpg', 'mask/2.jpg', 'no_mask/3.jpg', 'no_mask/4.jpg')
    for image in tmp_path.glob('*/*.jpg'):
        image.with_suffix('.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'classes.txt').write_text('mask\n')
    assert len(names_in(read_folder(tmp_path))) == 4


@pytest.mark.parametrize('named', ['train/imgs/{i}.jpg', './images/train2017/{i}.jpg', '/home/me/images/set/a/{i}.jpg'])
def test_folders_that_are_called_otherwise_now(tmp_path, named):
    write_pictures(tmp_path, 'train/images/1.jpg', 'train/images/2.jpg')
    (tmp_path / 'a.json').write_text(coco_of([named.format(i=i) for i in (1, 2)]))
    found = read_folder(tmp_path)
    assert names_in(found) == ['train/images/1.jpg', 'train/images/2.jpg']
    assert any('which the annotations name' in note for note in found.notes)


def test_a_complete_folder_goes_before_small_pictures_of_some(tmp_path):
    write_pictures(tmp_path, *(f'images/{i}.jpg' for i in range(10)), *(f'thumbs/{i}.jpg' for i in range(6)))
    (tmp_path / 'a.json').write_text(coco_of([f'{i}.jpg' for i in range(10)]))
    assert names_in(read_folder(tmp_path)) == [f'images/{i}.jpg' for i in range(10)]


def test_folders_that_images_come_from_are_said(tmp_path):
    write_pictures(tmp_path, 'images/1.jpg', 'images/2.jpg', 'elsewhere/3.jpg')
    (tmp_path / 'train.json').write_text(coco_of(['1.jpg', '2.jpg', '3.jpg']))
    notes = read_folder(tmp_path, train_ann='train.json', val_ann='train.json').notes
    assert 'the images (train) come from 2 folders: images/ 2, elsewhere/ 1' in notes


@pytest.mark.parametrize('described', [True, False])
def test_a_single_list_of_darknet_is_followed(tmp_path, described):
    write_pictures(tmp_path, *(f'obj/{i}.jpg' for i in range(6)))
    for i in range(6):
        (tmp_path / f'obj/{i}.txt').write_text('0 0.5 0.5 0.2 0.2\n')
    (tmp_path / 'obj.names').write_text('cat\n')
    (tmp_path / 'train.txt').write_text('data/obj/1.jpg\ndata/obj/2.jpg\ndata/obj/2.jpg\n')
    if described:
        (tmp_path / 'obj.data').write_text('classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n')
    found = read_folder(tmp_path)
    assert names_in(found) == ['obj/1.jpg', 'obj/2.jpg']
    assert '4 images that no list names are left out' in found.notes
    (tmp_path / 'valid.txt').write_text((tmp_path / 'train.txt').read_text())
    if described:
        with (tmp_path / 'obj.data').open('a') as file:
            file.write('valid = data/valid.txt\n')
    same = read_folder(tmp_path)
    assert same.splits == found.splits
    assert {*same.notes} - {*found.notes} == {'the list to validate on has the training images, so it is left out'}


def test_blanks_around_a_class_name_of_voc_are_none_of_it(tmp_path):
    write_pictures(tmp_path, '1.jpg', '2.jpg')
    for i, label in ((1, 'cat'), (2, ' cat ')):
        (tmp_path / f'{i}.xml').write_text(voc_of(f'{i}.jpg', label))
    assert [category['name'] for category in read_folder(tmp_path).splits['train']['categories']] == ['cat']


def test_categories_of_one_name_are_refused(tmp_path):
    write_pictures(tmp_path, '1.jpg', '2.jpg')
    content = json.loads(coco_of(['1.jpg', '2.jpg']))
    content['categories'] = [dict(id=1, name='cat'), dict(id=2, name='cat ')]
    (tmp_path / 'a.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match="several categories are called 'cat'"):
        read_folder(tmp_path)


def test_roboflows_parent_may_have_the_name_of_the_class(tmp_path):
    write_pictures(tmp_path, '1.jpg', '2.jpg')
    content = json.loads(coco_of(['1.jpg', '2.jpg']))
    content['categories'] = [dict(id=0, name='cat', supercategory='none'), dict(id=1, name='cat', supercategory='cat')]
    (tmp_path / 'a.json').write_text(json.dumps(content))
    found = read_folder(tmp_path)
    assert [category['id'] for category in found.splits['train']['categories']] == [1]


def test_main_goes_before_lists_beside_it(tmp_path):
    voc_year(tmp_path, '.', 'abcd', train='abc', val='d')
    (tmp_path / 'ImageSets/train.txt').write_text('a\n')
    assert len(read_folder(tmp_path).splits['train']['images']) == 3


def test_a_file_that_is_listed_under_two_names_is_said(tmp_path):
    write_pictures(tmp_path, 'images/1.jpg', 'images/2.jpg')
    (tmp_path / 'a.json').write_text(coco_of(['1.jpg', 'images/1.jpg', '2.jpg']))
    assert 'a.json lists 1 files as several images: images/1.jpg' in read_folder(tmp_path).notes


@pytest.mark.parametrize('orientation', [None, 1, 3])
def test_sizes_that_are_not_those_of_the_images_cannot_be_written_for_yolo(tmp_path, orientation):
    """Its boxes are shares of the size. The .xml have width and height the other way round."""
    (tmp_path / 'in').mkdir()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    for name in ('1.jpg', '2.jpg'):
        Image.new('RGB', (40, 30)).save(tmp_path / 'in' / name, exif=exif)
    for i in (1, 2):
        (tmp_path / f'in/{i}.xml').write_text(voc_of(f'{i}.jpg', size=(30, 40)))
    found = read_folder(tmp_path / 'in')
    with pytest.raises(UserError, match='has 40 x 30 pixels, and its annotations say 30 x 40'):
        write_data_set(found, tmp_path / 'in', tmp_path / 'out', 'yolo')


@pytest.mark.parametrize('style', ['coco', 'voc', 'yolo'])
def test_corners_are_not_converted(tmp_path, style):
    write_pictures(tmp_path, 'in/1.jpg', 'in/2.jpg')
    content = json.loads(coco_of(['1.jpg', '2.jpg']))
    for annotation in content['annotations']:
        annotation['bbox'] = [18, 14, 38, 28]
    (tmp_path / 'in/a.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'would not if their bbox were \[x1, y1, x2, y2\]'):
        write_data_set(read_folder(tmp_path / 'in'), tmp_path / 'in', tmp_path / 'out', style)


def test_boxes_that_are_cut_at_the_border_are_counted(tmp_path):
    write_pictures(tmp_path, 'in/1.jpg', 'in/2.jpg')
    content = json.loads(coco_of(['1.jpg', '2.jpg']))
    content['annotations'][0]['bbox'] = [-5, 0, 20, 20]
    (tmp_path / 'in/a.json').write_text(json.dumps(content))
    notes = write_data_set(read_folder(tmp_path / 'in'), tmp_path / 'in', tmp_path / 'out', 'yolo')
    assert '1 boxes that reach beyond their image are cut at its border' in notes


def test_a_list_of_darknet_that_is_both_splits(tmp_path):
    """The validation images are then held out by their names."""
    small_yolo(tmp_path)
    (tmp_path / 'obj.names').write_text('cat')
    (tmp_path / 'obj.data').write_text('classes = 1\ntrain = train.txt\nvalid = train.txt\nnames = obj.names\n')
    (tmp_path / 'train.txt').write_text(''.join(f'images/train/{name}.jpg\n' for name in 'abc'))
    splits = read_folder(tmp_path).splits
    names = [{image['file_name'] for image in splits[split]['images']} for split in ('train', 'val')]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 3


def test_lists_of_darknet_that_share_images_are_refused(tmp_path):
    small_yolo(tmp_path)
    (tmp_path / 'obj.names').write_text('cat')
    (tmp_path / 'obj.data').write_text('classes = 1\ntrain = train.txt\nvalid = valid.txt\nnames = obj.names\n')
    (tmp_path / 'train.txt').write_text('images/train/a.jpg\nimages/train/b.jpg\n')
    (tmp_path / 'valid.txt').write_text('images/train/b.jpg\nimages/train/c.jpg\n')
    with pytest.raises(UserError, match='1 images are in train and in val'):
        read_folder(tmp_path)


@pytest.mark.parametrize('line', ['{}', '{} 1', '{}  -1', '{}.jpg', 'JPEGImages/{}.jpg', 'VOC2007/JPEGImages/{}'])
def test_lines_of_image_sets(tmp_path, line):
    """VOC's lists of one class add 1 or -1; others add folders and suffixes."""
    voc_year(tmp_path, 'VOC2007', 'abcd', train=[line.format(n) for n in 'abc'], val=[line.format('d')])
    splits = read_folder(tmp_path).splits
    assert [len(splits[split]['images']) for split in ('train', 'val')] == [3, 1]


def test_negative_boxes_are_not_written(tmp_path):
    write_pictures(tmp_path, 'in/1.jpg', 'in/2.jpg')
    content = json.loads(coco_of(['1.jpg', '2.jpg']))
    content['annotations'][0]['bbox'] = [30, 20, -9, 5]
    (tmp_path / 'in/a.json').write_text(json.dumps(content))
    notes = write_data_set(read_folder(tmp_path / 'in'), tmp_path / 'in', tmp_path / 'out', 'coco')
    assert '1 boxes of negative width or height are left out' in notes
    count = sum(len(c['annotations']) for c in read_folder(tmp_path / 'out').distinct().values())
    assert count == len(content['annotations']) - 1
