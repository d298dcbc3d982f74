"""Every command and every piece of Python on the pages runs, on tiny data and with small models: no page can go stale.

A fenced block of `bash` is run as it stands, but for the substitutions and the options below. A block that cannot run
here has an HTML comment on the line before, `<!-- not run: REASON -->`; one that shows a failure has `<!-- fails:
REASON -->`. A block of `text` with the comment `<!-- printed -->` is compared with what the block before it printed;
`...` stands for anything.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import made_up
import pytest
from conftest import ROOT, forget_earlier_runs
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from pages import PAGES, blocks

from cbam_mmdet import CBAM

# What the pages write -> what the folder of the test has in its place.
SUBSTITUTES = {
    '/path/to/': './',
    'configs/ablation/*.py': 'configs/ablation/plain.py configs/ablation/cbam.py',
    'PLAIN_CONFIG': 'configs/demo/faster_rcnn.py',
    'PLAIN_CHECKPOINT': 'plain.pth',
    '_cbam.py 8 ': '_cbam.py 2 ',  # processes
    "'configs/demo/faster_rcnn_cbam.py', 'work_dirs/demo/epoch_24.pth'": (
        "'work_dirs/demo/faster_rcnn_cbam.py', 'work_dirs/demo/epoch_1.pth'"
    ),
}

ONE_EPOCH = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1']
NO_WORKERS = [
    f'{split}_dataloader.{option}'
    for split in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False')
]
THIN_RESNET = ['model.backbone.base_channels=4', 'model.neck.in_channels=[16,32,64,128]']
VOC_TRAIN = 'train_dataloader.dataset.dataset.datasets'
# Options that make a config's model and images small.
SMALL = {
    'configs/ablation': THIN_RESNET,
    'configs/demo/faster_rcnn': THIN_RESNET,
    'configs/demo/bccd': ['model.backbone.backbone.base_channels=8', 'model.neck.in_channels=[8,16,32,64]'],
    'configs/faster_rcnn_r50': [
        *THIN_RESNET, 'model.backbone.init_cfg=None', 'model.roi_head.bbox_head.fc_out_channels=16',
        'model.train_cfg.rpn_proposal.max_per_img=50', 'model.test_cfg.rpn.max_per_img=50',
    ],
    'configs/ssd': ['model.backbone.init_cfg=None', 'train_dataloader.batch_size=2'],
    'configs/imagenet': [
        'model.backbone.base_channels=8', 'model.head.in_channels=256', 'model.backbone.stem_channels=8',
        *(f'{split}_dataloader.dataset.indices=4' for split in ('train', 'val', 'test')),
    ],
}  # fmt: skip
SMALL_COCO = [
    'train_dataloader.dataset.pipeline.2.scale=(64,64)',
    *(f'{split}_dataloader.dataset.pipeline.1.scale=(64,64)' for split in ('val', 'test')),
    *(f'{split}_dataloader.dataset.indices=2' for split in ('train', 'val', 'test')),
]
SMALL_IMAGES = {
    'voc0712': [
        'train_dataloader.dataset.times=1',
        *(f'{VOC_TRAIN}.{i}.indices=2' for i in (0, 1)),
        *(f'{split}_dataloader.dataset.indices=2' for split in ('val', 'test')),
    ],
    'faster_rcnn_r50_cbam_voc0712': [
        *(f'{VOC_TRAIN}.{i}.pipeline.2.scale=(64,64)' for i in (0, 1)),
        *(f'{split}_dataloader.dataset.pipeline.1.scale=(64,64)' for split in ('val', 'test')),
    ],
    'configs/faster_rcnn_r50.py': SMALL_COCO,
    'configs/faster_rcnn_r50_cbam.py': SMALL_COCO,
}
TRAINS = {'train.py', 'test.py', 'ablate.py', 'dist_train.sh'}
# Further arguments, by tool.
ARGUMENTS = {
    'gradcam.py': ['--score-thr', '0', '--device', 'cpu'],
    'infer.py': ['--score-thr', '0', '--device', 'cpu'],
    'export.py': ['--num-images', '2'],
    'attention_maps.py': ['--device', 'cpu'],
    'report.py': ['--num-images', '1', '--device', 'cpu'],
    'ablate.py': ['--rounds', '1'],
    'complexity.py': ['--shape', '64', '64', '--device', 'cpu'],
    'make_shapes.py': ['--num-train', '4', '--num-val', '2', '--image-size', '64'],
}

# What the tools read from a config beyond MMDetection's own keys.
OWN_KEYS = {'auto_scale_lr', 'sync_bn', 'runner_type', 'strategy'}

# Pages whose commands take longer than a few seconds.
SLOW = ('CONTRIBUTING', 'ablations', 'deploy', 'index', 'own_data', 'scaling', 'see', 'speed', 'weights')


def by_speed(pages):
    return [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else []) for page in pages]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, shapes, trained):
    """Where the commands run: what the pages name, made up."""
    return made_up.write_all(tmp_path_factory.mktemp('pages'), shapes, trained)


def as_run(block):
    """A block's text, what the pages name replaced by what there is."""
    text = block.text
    for written, there in SUBSTITUTES.items():
        text = text.replace(written, there)
    return text


def shortened(words):
    """A command's words, with what makes it small; options on the page come last, so they win."""
    tool = next((Path(word).name for word in words if Path(word).name in TRAINS | ARGUMENTS.keys()), None)
    configs = [word for word in words if word.startswith('configs/')]
    if '--base' in words:  # what configs/ablation/ varies
        configs = [words[words.index('--base') + 1]]
    if tool is None or (tool in TRAINS and not configs) or '--help' in words:
        return words
    options = []
    if tool != 'complexity.py':
        options += [
            option for prefix, more in SMALL.items() if configs and configs[0].startswith(prefix) for option in more
        ]
    if tool in TRAINS:
        options += [option for part, more in SMALL_IMAGES.items() if part in configs[0] for option in more]
        options += [*ONE_EPOCH, *NO_WORKERS]
    words = [*words, *ARGUMENTS.get(tool, [])]
    if not options:
        return words
    if '--cfg-options' in words:
        at = words.index('--cfg-options') + 1
        return [*words[:at], *options, *words[at:]]
    return [*words, '--cfg-options', *options]


def commands(block):
    """The command lines of a block, continuation lines joined, each as its words; None where it needs a shell."""
    lines = [line for line in re.sub(r'\\\n\s*', ' ', as_run(block)).splitlines() if line.strip()]
    if any(not line.startswith(('.venv/bin/python tools/', 'tools/dist_')) for line in lines):
        return None
    return [shortened(shlex.split(line)) for line in lines]


def in_shell(script, folder):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable}
    done = subprocess.run(['bash', '-ec', script], cwd=folder, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def in_this_process(words, capfd):
    """`python -c CODE`, without the seconds that imports take."""
    capfd.readouterr()
    exec(compile(words[2], '-c', 'exec'), {})
    return 0, capfd.readouterr().out


def run(block, folder, run_tool, capfd):
    """Run a block in the folder; its exit code and what it printed."""
    if block.text.startswith('.venv/bin/python -c '):
        return in_this_process(shlex.split(as_run(block)), capfd)
    lines = commands(block)
    if lines is None:
        return in_shell(as_run(block), folder)
    output = ''
    for words in lines:
        if words[0] == '.venv/bin/python':
            result = run_tool(Path(words[1]).name, *words[2:])
            code, printed = result.code, result.out + result.err
        else:
            code, printed = in_shell(shlex.join(words), folder)
        output += printed
        if code:
            return code, output
    return 0, output


def assert_printed(expected, output, where):
    """Every line of the page occurs in the output, in this order; `...` stands for anything."""
    pattern = r'\s.*?'.join(re.escape(line.strip()).replace(r'\.\.\.', '.*') for line in expected.splitlines())
    assert re.search(pattern, output, re.S), f'{where} says\n{expected}\nand what was printed is\n{output[-3000:]}'


@pytest.mark.parametrize('page', by_speed(page for page in PAGES if any(b.language == 'bash' for b in blocks(page))))
def test_commands(page, folder, run_tool, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    output = ''
    for block in blocks(page):
        if block.language == 'bash' and not block.comment.startswith('not run: '):
            code, output = run(block, folder, run_tool, capfd)
            fails = block.comment.startswith('fails: ')
            assert code == (2 if fails else 0), f'{block} ended with {code}:\n{block.text}\n{output[-3000:]}'
        elif block.language == 'text' and block.comment == 'printed':
            assert_printed(block.text, output, block)


def test_blocks_that_are_not_run_say_why():
    """A comment before a block is one of those known here, with its reason."""
    known = re.compile(r'(not run|fails|generated): \S.{9,}|printed$')
    wrong = [str(b) for page in PAGES for b in blocks(page) if b.comment and not known.match(b.comment)]
    assert not wrong


PYTHON = [block for page in PAGES for block in blocks(page) if block.language == 'python']


def is_config(block):
    return not re.search(r'^(import|from) ', block.text, re.M)


@pytest.mark.parametrize('block', filter(is_config, PYTHON), ids=str)
def test_configs(block, tmp_path):
    """A piece of a config merges into a shipped one, has no unknown key; its backbone has the CBAMs named."""
    text = as_run(block)
    base = "_base_ = __import__('cbam_mmdet').config_path('faster_rcnn_r50_cbam.py')\n"
    file = tmp_path / 'piece.py'
    file.write_text(text if '_base_' in text else base + text)
    cfg = Config.fromfile(file)
    init_default_scope('mmdet')
    known = {*Config.fromfile(ROOT / 'configs/faster_rcnn_r50_cbam.py'), 'custom_imports', *OWN_KEYS}
    assert not set(re.findall(r'^(\w+) = ', text, re.M)) - known - {'_base_'}
    if 'model = ' in text or '_base_' in text:
        backbone = cfg.model.backbone
        backbone.init_cfg = None
        backbone.get('backbone', {}).pop('init_cfg', None)
        cbams = [m for m in MODELS.build(cfg.model).modules() if isinstance(m, CBAM)]
        assert len(cbams) >= 6


@pytest.mark.parametrize('block', [b for b in PYTHON if not is_config(b)], ids=str)
def test_programs(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    forget_earlier_runs()
    exec(compile(as_run(block), str(block), 'exec'), {})


def test_a_block_that_does_not_run_is_found(tmp_path, folder, run_tool, capfd, monkeypatch):
    """The test above fails where a page is wrong: a tool's argument, a shell's command, and what was printed."""
    page = tmp_path / 'page.md'
    page.write_text(
        '# Page\n\n```bash\n.venv/bin/python tools/make_shapes.py data/new --nmu-train 3\n```\n\n'
        '```bash\nls no-such-file\n```\n\n<!-- not run: it needs a cluster -->\n```bash\nsrun x\n```\n'
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr('pages.ROOT', tmp_path)
    wrong_argument, no_file, cluster = blocks(page)
    assert run(wrong_argument, folder, run_tool, capfd)[0] == 2
    assert run(no_file, folder, run_tool, capfd)[0] != 0
    assert cluster.comment == 'not run: it needs a cluster'
    with pytest.raises(AssertionError):
        assert_printed('a 1\nb ... 3\n', 'a 1\nb 2 4', 'page')
    assert_printed('a 1\nb ... 3\n', 'a 1\nb 2 3', 'page')
