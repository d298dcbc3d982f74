"""tools/report.py: its numbers are pycocotools', and a browser shows the page without a network."""

import base64
import csv
import html
import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from coco_records import coco_records
from conftest import DEMO, ROOT, pretend_tested, run_in_this_process, tiny
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tide import KINDS, tide

from cbam_mmdet.engine.run_reader import read_runs
from cbam_mmdet.visualization.report import evaluation
from cbam_mmdet.visualization.report.page import _notes

PLAIN = str(ROOT / 'configs/demo/faster_rcnn.py')
SECTIONS = [
    'run', 'results', 'classes', 'errors', 'curves', 'precision-recall', 'detections', 'attention', 'complexity',
]  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_hotcoco = pytest.mark.skipif(
    not importlib.util.find_spec('hotcoco'), reason="make setup installs it, or: pip install '.[fast-eval]'"
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason='no Chromium here: apt-get install chromium')


def run_once(name, *args):
    assert run_in_this_process(name, *args) == 0


def write_detections(shapes, path):
    """As tools/test.py --out: two thirds of the objects, a little off, some of another class, and false detections."""
    truth, random = COCO(str(shapes / 'annotations/instances_val2017.json')), np.random.default_rng(0)
    samples = []
    for image in truth.loadImgs(truth.getImgIds()):
        boxes, labels = [], []
        for it in truth.loadAnns(truth.getAnnIds(image['id'])):
            x, y, w, h = it['bbox']
            if random.random() < 0.67:
                boxes.append(np.array([x, y, x + w, y + h]) + random.normal(0, 0.06 * min(w, h), 4))
                labels.append(it['category_id'] - 1 if random.random() < 0.8 else random.integers(6))
        boxes.append(np.array([1, 1, 9 + random.integers(9), 9]))
        labels.append(random.integers(6))
        found = dict(
            bboxes=torch.tensor(np.array(boxes), dtype=torch.float32),
            labels=torch.tensor(labels),
            scores=torch.tensor(random.random(len(labels)), dtype=torch.float32),
        )
        shape = (image['height'], image['width'])
        samples.append(dict(img_id=image['id'], ori_shape=shape, img_shape=shape, pred_instances=found))
    path.write_bytes(pickle.dumps(samples))


@pytest.fixture(scope='module')
def compared(trained, shapes, tmp_path_factory):
    """The report of two short runs: the plain twin, whose detections are made for it, and CBAM, with a results.pkl.

    After one epoch nothing is found, so these detections are invented.
    """
    folder = tmp_path_factory.mktemp('compared')
    plain, cbam = folder / 'plain', folder / 'cbam'
    shutil.copytree(trained, cbam)
    run_once('train.py', PLAIN, *tiny(plain, shapes, 'model.test_cfg.rcnn.score_thr=0.0'))
    write_detections(shapes, cbam / 'results.pkl')
    pretend_tested(cbam)
    other = shutil.copy(shapes / 'annotations/instances_val2017.json', folder / 'other.json')
    for config in cbam.glob('29990101_000000/*.py'):
        config.write_text(re.sub("'[^']*/instances_val2017.json'", repr(str(other)), config.read_text()))
    run_once('report.py', plain, cbam, '--num-images', 3, '--score-thr', 0.05, '--device', 'cpu')
    return folder


def test_a_test_with_other_settings_does_not_stand_for_the_run(trained, tmp_path, monkeypatch):
    """Its detections are those of another detector: they are made anew."""
    work = shutil.copytree(trained, tmp_path / 'work')
    pretend_tested(work)
    [config] = work.glob('29990101_000000/*.py')
    text, found = config.read_text(), []
    (work / 'results.pkl').touch()
    monkeypatch.setattr(evaluation, 'read_results', lambda path: found.append(Path(path).parent))
    monkeypatch.setattr(evaluation, 'test', lambda *args, **kwargs: None)
    for change in ('test_cfg"]["rcnn"]["max_per_img"] = 1', 'train_cfg"]["rcnn"]["pos_weight"] = 1'):
        config.write_text(f'{text}\nmodel["{change}\n')
        [run] = read_runs([work])
        evaluation._detections(run, str(work / 'epoch_1.pth'), None, False, str(tmp_path / 'new'))
    assert found == [tmp_path / 'new', work]  # what only a training reads makes no other detector


@pytest.fixture(scope='module')
def page(compared):
    return (compared / 'plain/report/report.html').read_text()


def table(compared, name):
    with (compared / f'plain/report/tables/{name}.csv').open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def truth(compared, shapes):
    """pycocotools' own evaluation of the detections in CBAM's results.pkl."""
    objects = COCO(str(shapes / 'annotations/instances_val2017.json'))
    evaluation = COCOeval(objects, objects.loadRes(coco_records(compared / 'cbam/results.pkl')), 'bbox')
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation


def known(value):
    return float(value) if value else -1.0  # as pycocotools says that there is nothing to find


def test_figures_are_those_of_pycocotools(compared, truth):
    rows = table(compared, 'coco')
    np.testing.assert_allclose([known(row['cbam']) for row in rows], truth.stats, atol=1e-6)
    assert 0.1 < truth.stats[0] < 0.9, 'there is something to compare'
    names = [category['name'] for category in truth.cocoGt.loadCats(truth.params.catIds)]
    for i, row in enumerate(table(compared, 'classes-1')):
        assert row['class'] == names[i]
        for column, area in (('AP', 0), ('small', 1), ('medium', 2), ('large', 3)):
            precision = truth.eval['precision'][:, :, i, area, 2]
            expected = precision[precision > -1].mean() if (precision > -1).any() else -1
            assert known(row[column]) == pytest.approx(expected, abs=1e-6)
        assert int(row['objects']) == len(truth.cocoGt.getAnnIds(catIds=[truth.params.catIds[i]]))


def test_differences_have_their_sign(compared, page):
    for row in table(compared, 'coco'):
        values = [row[name] for name in ('plain', 'cbam', 'difference')]
        if all(values):
            plain, cbam, change = map(float, values)
            assert change == pytest.approx(cbam - plain)
            if abs(change) >= 5e-4:
                cell = f'{change:+.3f}'.replace('-', '\N{MINUS SIGN}')
                assert f'{"better" if change > 0 else "worse"}">{cell}</td>' in page
    costs = {row['figure']: row for row in table(compared, 'complexity')}
    assert float(costs['CBAMs']['plain']) == 0 < float(costs['CBAMs']['cbam'])


@needs_hotcoco
def test_kinds_of_errors_are_those_of_tide(compared, page, truth):
    objects = [(it['image_id'], it['category_id'], tuple(it['bbox'])) for it in truth.cocoGt.anns.values()]
    found = [(it['image_id'], it['category_id'], it['score'], tuple(it['bbox'])) for it in truth.cocoDt.anns.values()]
    counts, gains = tide(objects, found)
    assert sum(count > 0 for count in counts.values()) >= 3
    for name, expected in (('error-counts', counts), ('errors', gains)):
        rows = table(compared, name)
        assert [row['error'] for row in rows] == list(KINDS)
        for row in rows:
            assert float(row['cbam']) == pytest.approx(expected[row['error']], abs=1e-9)
            assert float(row['difference']) == pytest.approx(float(row['cbam']) - float(row['plain']), abs=1e-9)
    cells = re.findall(r'<tr><th scope="row">missed</th>(.+?)</tr>', page)
    assert len(cells) == 3, 'a row of the counts of outcomes, and two of the errors'
    assert not any('better' in cell or 'worse' in cell for cell in cells)


def test_without_hotcoco_the_section_of_errors_says_so(compared, monkeypatch):
    """The other figures are pycocotools' then."""
    monkeypatch.setitem(sys.modules, 'hotcoco', None)
    out = compared / 'without'
    run_once('report.py', compared / 'cbam', '--out-dir', out, '--num-images', 1, '--device', 'cpu')
    section = re.search(r'<section id="errors".+?</section>', (out / 'report.html').read_text(), re.S)[0]
    assert "pip install 'hotcoco>=1.3'" in html.unescape(section) and '<table>' not in section
    assert 'distinct whole numbers' in section and 'log' not in section, 'the report silences the evaluation'
    assert not list((out / 'tables').glob('error*'))
    with (out / 'tables/coco.csv').open() as file:
        figures = {row['figure']: row['cbam'] for row in csv.DictReader(file)}
    assert figures == {row['figure']: row['cbam'] for row in table(compared, 'coco')}


def test_curves_are_those_of_the_log(compared, page):
    log = next((compared / 'cbam').glob('*/vis_data/scalars.json')).read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    last = [row['loss'] for row in rows if 'loss' in row][-1]
    chart = re.search(r'aria-label="loss: ([^"]+)"', page)[1]
    assert f'cbam: {last:.3g} at' in chart
    validated = next(row['coco/bbox_mAP'] for row in rows if 'coco/bbox_mAP' in row)
    assert f'cbam: {validated:.3g} at' in re.search(r'aria-label="COCO&#39;s mAP: ([^"]+)"', page)[1]


def test_precision_recall_curves_are_those_of_pycocotools(page, truth):
    from cbam_mmdet.visualization.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

    figures = re.findall(r'<figcaption>([^<]+)</figcaption><svg class="chart"(.+?)</svg>', page, re.S)
    drawn = {title: re.findall(r'<polyline class="run-1" points="([^"]+)"', svg) for title, svg in figures}
    precision = truth.eval['precision'][0, :, :, 0, 2]  # at an IoU of 0.5: (recalls, classes)
    names = [category['name'] for category in truth.cocoGt.loadCats(truth.params.catIds)]
    expected = {name: curve for name, curve in zip(names, precision.T, strict=True) if curve[0] > -1}
    expected['mean of the classes'] = np.mean(list(expected.values()), 0)
    for title, curve in expected.items():
        points = np.array([point.split(',') for point in drawn[title][0].split()], float)
        recall = (points[:, 0] - LEFT) / (WIDTH - LEFT - RIGHT)
        height = 1.02 * (1 - (points[:, 1] - TOP) / (HEIGHT - TOP - BOTTOM))
        np.testing.assert_allclose(np.interp(truth.params.recThrs, recall, height), curve, atol=2e-3)


def test_misses_are_counted_and_the_worst_come_first(compared, page, truth):
    both = re.findall(r'aria-label="[^"]*missed: (\d+)', html.unescape(page))
    assert len(both) == 6, 'three images of two runs'
    sums = [int(a) + int(b) for a, b in zip(both[::2], both[1::2], strict=True)]
    assert sums == sorted(sums, reverse=True)
    counts = {row['']: int(row['cbam']) for row in table(compared, 'counts')}
    found = 0
    for part in truth.evalImgs:
        if part and part['aRng'] == truth.params.areaRng[0]:
            scores = dict(zip(part['dtIds'], part['dtScores'], strict=True))
            found += sum(bool(match) and scores[int(match)] >= 0.05 for match in part['gtMatches'][0])
    assert counts['found'] == found
    assert counts['missed'] == counts['objects'] - found == len(truth.cocoGt.anns) - found


def test_what_was_run(compared, page, shapes):
    settings = {row['setting']: row for row in table(compared, 'settings')}
    assert settings['model.backbone.plugins.0.cfg.type']['cbam'] == "'CBAM'"
    facts = {row['']: row for row in table(compared, 'runs')}
    assert facts['Config']['cbam'] == DEMO
    assert 'train.py' in facts['Command']['cbam'] and 'torch ' in facts['Versions']['cbam']
    assert facts['Seed']['plain'] and facts['Machine']['plain'] and facts['Training data']['plain']
    assert facts['Detections']['plain'] == 'made for this report'
    assert facts['Detections']['cbam'].startswith('results.pkl')
    assert facts['Test data'] == {
        **facts['Test data'],
        'plain': f'{shapes}/annotations/instances_val2017.json',
        'cbam': f'{compared}/other.json',  # what the detections are of, not what the run was to be tested on
    }
    base = table(compared, 'settings-1')
    assert any(row['setting'] == 'train_cfg.max_epochs' and row['cbam'] == '1' for row in base), (
        '--cfg-options are seen'
    )


def test_unequal_lengths_are_said(page):
    assert 'differ for that alone' not in page
    runs = [
        SimpleNamespace(name=name, record=SimpleNamespace(facts={'Length': f'{length} iterations'}), outcomes={},
                        scores=SimpleNamespace(classes=('a',)))
        for name, length in (('plain', 10), ('short', 5), ('cbam', 10))
    ]  # fmt: skip
    assert _notes(runs) == [
        'short was trained for 5 iterations, and plain for 10 iterations: their figures may differ for that alone.'
    ]


def test_gates_are_those_of_a_forward_pass(compared, page, shapes):
    from mmdet.apis import inference_detector

    from cbam_mmdet.apis.infer import load_detector
    from cbam_mmdet.datasets.transforms.arrays import array_pipeline
    from cbam_mmdet.datasets.transforms.loading import read_image
    from cbam_mmdet.utils.config import load_config
    from cbam_mmdet.visualization.attention import gates_over

    config = next((compared / 'cbam').glob('*.py'))
    model = load_detector(load_config(str(config)), str(compared / 'cbam'), 'cpu')
    image = str(sorted((shapes / 'val2017').iterdir())[0])
    gates = gates_over(model, read_image(image), array_pipeline(model.cfg))
    name, module = next((n, m) for n, m in model.named_modules() if n in gates)
    seen = []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].clone(), output.clone())))
    inference_detector(model, image)
    hook.remove()
    (x, y), gate = seen[0], gates[name]
    expected = x * gate.channel[0][:, None, None] * gate.spatial[0]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert [row['CBAM'] for row in table(compared, 'gates-1')] == list(gates)
    assert page.count('Spatial gate of') == 3 * len(gates)


def test_tables_and_figures_lie_beside_it(compared):
    report = compared / 'plain/report'
    for name in ('coco', 'voc', 'classes', 'complexity'):
        assert (report / f'tables/{name}.md').read_text().count('|') > 10
        assert table(compared, name)
    for name in ('loss', 'coco_bbox_mAP', 'precision-recall', 'detections', 'attention-1'):
        assert cv2.imread(str(report / f'figures/{name}.png')).std() > 5
        assert (report / f'figures/{name}.pdf').read_bytes().startswith(b'%PDF')


@pytest.fixture(scope='module')
def browse(tmp_path_factory):
    """Open a file in Chromium: the document after loading, the messages of its console, and the addresses asked for."""

    def browse(path, *flags):
        folder = tmp_path_factory.mktemp('chromium')
        net_log = folder / 'net.json'
        done = subprocess.run(
            [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
             '--disable-background-networking', '--disable-component-update', '--disable-sync',
             '--virtual-time-budget=3000', '--host-resolver-rules=MAP * ~NOTFOUND', '--enable-logging=stderr',
             f'--user-data-dir={folder}/profile', f'--log-net-log={net_log}', '--dump-dom', *flags, path.as_uri()],
            capture_output=True, text=True, timeout=100, check=True,
        )  # fmt: skip
        console = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
        events = [event.get('params', {}) for event in json.loads(net_log.read_text())['events']]
        # Without an initiator it is the browser itself, which looks for updates.
        asked = {p['url'] for p in events if p.get('initiator') not in (None, 'not an origin')}
        return done.stdout, console, asked

    return browse


MEASURE = """
const out = {};
for (const frame of document.querySelectorAll('iframe')) {
  const page = frame.contentDocument, root = page.documentElement;
  const tables = [...page.querySelectorAll('.frame')];
  out[frame.width] = {
    width: root.scrollWidth,
    sections: [...page.querySelectorAll('section')].filter(s => s.getBoundingClientRect().height > 60).map(s => s.id),
    outside: tables.filter(t => t.getBoundingClientRect().right > root.clientWidth + 1).length,
    scroll: tables.filter(t => t.scrollWidth > t.clientWidth).length,
    frozen: tables.filter(t => t.scrollWidth > t.clientWidth && (t.scrollLeft = 9, t.scrollLeft == 0)).length,
    unreachable: tables.filter(t => t.tabIndex != 0 || !t.querySelector('caption').textContent).length,
    broken: [...page.images].filter(i => !i.complete || !i.naturalWidth).length,
    unnamed: page.querySelectorAll('img:not([alt]), svg[role=img]:not([aria-label])').length,
    dangling: [...page.querySelectorAll('a[href^="#"]')].filter(a => !page.querySelector(a.hash)).length,
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    resources: frame.contentWindow.performance.getEntriesByType('resource').map(e => e.name)
      .filter(n => !n.startsWith('data:')),
  };
}
document.body.innerHTML = '<pre>' + btoa(JSON.stringify(out)) + '</pre>';
"""


@needs_chromium
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_in_a_browser(page, browse, tmp_path, scheme):
    """In frames of a phone's and a laptop's width, within a page that measures them."""
    frames = ''.join(
        f'<iframe width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe>' for width in (390, 1400)
    )
    holder = tmp_path / 'holder.html'
    holder.write_text(f'<!doctype html><body>{frames}<script>onload = () => {{{MEASURE}}}</script></body>')
    dom, console, asked = browse(holder, *(['--force-dark-mode'] if scheme == 'dark' else []))
    assert console == []
    assert asked == set()
    seen = json.loads(base64.b64decode(re.search(r'<pre>(.+?)</pre>', dom)[1]))
    for width in (390, 1400):
        measured = seen[str(width)]
        assert measured['width'] <= width
        assert measured['sections'] == SECTIONS
        for fault in ('outside', 'frozen', 'unreachable', 'broken', 'unnamed', 'dangling'):
            assert measured[fault] == 0, fault
        assert measured['resources'] == []
        red = int(re.match(r'rgb\((\d+)', measured['background'])[1])
        assert red > 200 if scheme == 'light' else red < 60
    assert seen['390']['scroll'] > 0, 'there are tables wider than a phone'


@needs_chromium
def test_browser_finds_a_fault(browse, tmp_path):
    """What the test above relies on: that console errors and requests are noticed."""
    path = tmp_path / 'bad.html'
    path.write_text('<img src="http://example.invalid/a.png"><script>console.error("oh")</script>')
    _, console, asked = browse(path)
    assert any('oh' in line for line in console)
    assert asked == {'http://example.invalid/a.png'}


def test_bad_input(run_tool, trained, tmp_path):
    empty = tmp_path / 'empty'
    empty.mkdir()
    bare = shutil.copytree(trained, tmp_path / 'bare', ignore=shutil.ignore_patterns('*.pth', 'last_checkpoint'))
    for arguments, words in (
        ([tmp_path / 'nowhere'], 'is not a folder'),
        ([empty], 'holds no log of a training run'),
        ([trained, empty], 'holds no log of a training run'),
        ([bare], 'without a checkpoint'),
        ([trained, trained], 'given twice'),
    ):
        result = run_tool('report.py', *arguments)
        assert result.code == 2
        message = [line for line in result.err.splitlines() if line.startswith('error: ')]
        assert len(message) == 1 and words in message[0] and str(arguments[-1]) in message[0]
        assert 'Traceback' not in result.err
