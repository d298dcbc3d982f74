"""Several processes: started by the scripts themselves, on the CPU, and compared with one process."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gradients
import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, SERVED, Result, run_forks, tiny
from torch import distributed, nn

from cbam_mmdet.compat.torch import HAS_CUSTOM_OPERATORS
from cbam_mmdet.datasets import ensure_shapes
from cbam_mmdet.engine.hooks.one_model import ValidateOneModelHook

ENVIRONMENT = {
    **os.environ, 'PYTHON': sys.executable, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
}  # fmt: skip


def script(name, *args, cwd=ROOT, **variables):
    """Run tools/NAME to its end."""
    command = ['bash', str(ROOT / 'tools' / name), *map(str, args)]
    done = subprocess.run(
        command, cwd=cwd, env={**ENVIRONMENT, **variables}, capture_output=True, text=True, timeout=300
    )
    return Result(done.returncode, done.stdout, done.stderr)


def scalars(work_dir):
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def odd_shapes(tmp_path_factory):
    """8 images to train on, 5 to test: 5 do not divide by two."""
    return ensure_shapes(tmp_path_factory.mktemp('odd'), num_train=8, num_val=5, image_size=64, progress=False)


@pytest.fixture(scope='module')
def two_processes(odd_shapes, tmp_path_factory):
    """A work dir that dist_train.sh filled, from another folder, and what it printed.

    Everything that a large run needs at once: bf16, gradient accumulation, activation checkpointing, a scaled
    learning rate. mmcv's compiled NMS takes no bf16.
    """
    bf16 = ['--amp', 'bf16'] if SERVED else []
    work_dir = tmp_path_factory.mktemp('work') / 'two'
    options = tiny(
        work_dir, odd_shapes, 'train_dataloader.batch_size=2', 'param_scheduler=[]', 'default_hooks.logger.interval=1',
        'optim_wrapper.accumulative_counts=2', 'model.backbone.with_cp=True', 'auto_scale_lr.base_batch_size=2',
    )  # fmt: skip
    result = script('dist_train.sh', DEMO, 2, *bf16, '--auto-scale-lr', *options, cwd=work_dir.parent)
    assert result.code == 0, result.err[-3000:]
    return work_dir, result


def test_two_processes_train(two_processes):
    work_dir, result = two_processes
    rows = [row for row in scalars(work_dir) if 'loss' in row]
    assert len(rows) == 2, '8 images in 2 processes of batch 2 are 2 iterations'
    assert all(np.isfinite(row['loss']) for row in rows)
    assert rows[0]['lr'] == pytest.approx(2e-3), 'lr 1e-3 is for a batch of 2, here it is 2 x 2'
    weights = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    steps = {int(state['step']) for state in weights['optimizer']['state'].values()}
    assert steps == {1}, 'two iterations accumulated are one step'
    said = (result.out + result.err).count('instances_train2017.json: 8 images')
    assert said == 1, 'the check is made and told by one process'


def test_two_processes_test_as_one_does(two_processes, odd_shapes, tmp_path, run_tool):
    work_dir, _ = two_processes
    found, figures = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        # Singly, so that the same image meets the same arithmetic.
        options = ['--out', folder / 'out.pkl', *tiny(folder, odd_shapes, 'test_dataloader.batch_size=1')]
        options += ['model.test_cfg.rcnn.score_thr=0.0']
        if processes == 1:
            result = run_tool('test.py', DEMO, work_dir, *options)
        else:
            result = script('dist_test.sh', DEMO, work_dir, 2, *options, cwd=tmp_path)
        assert result.code == 0, result.err[-3000:]
        found.append(pickle.loads((folder / 'out.pkl').read_bytes()))
        scored = json.loads(next(folder.glob('*/*.json')).read_text())
        figures.append({key: value for key, value in scored.items() if 'mAP' in key})
    one, two = found
    assert [sample['img_id'] for sample in two] == [sample['img_id'] for sample in one], 'none twice, none dropped'
    assert len({sample['img_id'] for sample in two}) == 5
    for a, b in zip(one, two, strict=True):
        assert len(a['pred_instances']['scores']) > 0
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(a['pred_instances'][key], b['pred_instances'][key])
    assert figures[0] == figures[1]
    assert figures[0]


@pytest.fixture(scope='module')
def gradients_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gradients')
    run_forks(gradients.step_in_a_group, *[(rank, 2, folder) for rank in range(2)])
    return torch.load(folder / 'gradients.pt')


@pytest.mark.parametrize('place', gradients.PLACES)
def test_gradients_are_those_of_one_process(gradients_of_two, place):
    for one, two in zip(gradients.step(place), gradients_of_two[place], strict=True):
        assert one.keys() == two.keys()
        assert any('cbam.spatial.bn' in name for name in one)
        for name in one:
            error, size = (one[name] - two[name]).abs().max(), one[name].abs().max()
            assert error <= 1e-5 * size, f'{name}: {error:.1e} of {size:.1e}'


def validate_in_a_group(rank, folder):
    """A model whose statistics differ from process to process, which an EMA has replaced for the validation."""
    distributed.init_process_group('gloo', init_method=f'file://{folder}/group', rank=rank, world_size=2)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
    weights = [p.clone() for p in model.parameters()]
    for buffer in model.buffers():
        buffer.fill_(rank + 1)
    ValidateOneModelHook().before_val_epoch(SimpleNamespace(model=model))
    assert all((buffer == 1).all() for buffer in model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_processes_validate_the_model_that_is_saved(tmp_path):
    run_forks(validate_in_a_group, *[(rank, tmp_path) for rank in range(2)])


def test_same_seed_same_curve(run_tool, shapes, tmp_path):
    runs = []
    for name in ('first', 'second'):
        options = tiny(tmp_path / name, shapes, 'default_hooks.logger.interval=1', 'train_cfg.max_epochs=2')
        assert run_tool('train.py', DEMO, *options).code == 0
        losses = [{k: v for k, v in row.items() if 'loss' in k} for row in scalars(tmp_path / name) if 'loss' in row]
        runs.append((losses, torch.load(tmp_path / name / 'epoch_2.pth', weights_only=False)['state_dict']))
    (first, first_weights), (second, second_weights) = runs
    assert len(first) == 4
    assert first == second, 'bit for bit'
    assert len({row['loss'] for row in first}) == 4, 'a curve, not one value'
    assert all(torch.equal(first_weights[name], second_weights[name]) for name in first_weights)


ENDING = """
import atexit, os, sys, threading, time
import torch
from cbam_mmdet.engine.distributed import end_process

class SlowToGo:  # gives the thread its turn while Python finalizes
    def __del__(self):
        os.write(1, b'Python finalizes\\n')
        time.sleep(1)

def work():
    while True:
        torch.ones(100, 100) @ torch.ones(100, 100)

slow = SlowToGo()
if sys.argv[1] == 'thread':
    threading.Thread(target=work, daemon=True).start()
atexit.register(print, 'exit function')
if sys.argv[2] == 'sys.exit':
    sys.exit(3)
end_process(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ('thread', 'end', 'code', 'printed'),
    [
        ('thread', '0', 0, 'exit function\n'),
        ('thread', '3', 3, 'exit function\n'),
        # That the program can tell. With the thread, sys.exit may end in SIGABRT, as it does with torch 2.11.
        pytest.param(
            'no thread',
            'sys.exit',
            3,
            'exit function\nPython finalizes\n',
            marks=pytest.mark.skipif(not HAS_CUSTOM_OPERATORS, reason='torch 2.1 keeps the object from its end'),
        ),
    ],
)
def test_a_process_ends_before_a_thread_can_want_the_gil_of_a_python_that_finalizes(
    thread, end, code, printed, tmp_path
):
    done = subprocess.run(
        [sys.executable, '-c', ENDING, thread, end],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (code, printed), done.stderr[-3000:]


def test_a_container_that_says_it_is_one_process_of_one(tmp_path):
    """WORLD_SIZE alone joins no group: a tool ends as any program, and leaves the one that called it alone."""
    program = 'from cbam_mmdet.cli import run_tool\ntry: run_tool(lambda: 3)\nexcept SystemExit as end: print(end.code)'
    environment = dict(ENVIRONMENT, WORLD_SIZE='1', RANK='0')
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, '3\n'), done.stderr[-3000:]


@pytest.mark.slow
def test_same_seed_same_curve_in_two_processes(shapes, tmp_path):
    curves = []
    for name in ('first', 'second'):
        options = tiny(tmp_path / name, shapes, 'default_hooks.logger.interval=1', 'train_dataloader.batch_size=2')
        result = script('dist_train.sh', DEMO, 2, *options)
        assert result.code == 0, result.err[-3000:]
        curves.append([row['loss'] for row in scalars(tmp_path / name) if 'loss' in row])
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2


@pytest.mark.parametrize('option, message', [
    (['--data-root', '/nowhere'], 'no folder /nowhere/'),  # found by the first process
    # By each process, before they know of each other.
    pytest.param(['--cfg-options', 'no-pair'], 'KEY=VALUE', marks=pytest.mark.slow),
    # torch's SyncBatchNorm refuses CPUs, in both processes.
    pytest.param(['--cfg-options', 'sync_bn=torch'], 'SyncBN needs a GPU', marks=pytest.mark.slow),
])  # fmt: skip
def test_one_mistake_one_message(option, message, shapes, tmp_path):
    result = script('dist_train.sh', DEMO, 2, '--work-dir', tmp_path, '--data-root', shapes, *option)
    assert result.code == 2, result.err
    assert result.err.count('error: ') == 1
    assert message in result.err
    assert 'Traceback' not in result.err
    # torch 2.1 warns of an argument that later versions want.
    assert 'torch.distributed' not in re.sub('.*master_addr is only used for static.*', '', result.err)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason="the kernel's notice of a dead parent is Linux's")
def test_the_death_of_the_launcher_ends_all(shapes, tmp_path):
    """They would go on, and the next start would find the work dir in use."""
    options = tiny(tmp_path / 'work', shapes, 'default_hooks.logger.interval=1', schedule={'train_cfg.max_epochs': 500})
    command = ['bash', ROOT / 'tools/dist_train.sh', DEMO, 2, *options]
    with (tmp_path / 'log').open('w') as log:
        launcher = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stdout=log, stderr=log)

    def wait_for(condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert condition(), (tmp_path / 'log').read_text()[-2000:]

    def ranks():
        commands = (Path(f'/proc/{pid}/cmdline') for pid in os.listdir('/proc') if pid.isdigit())
        return [path for path in commands if str(tmp_path).encode() in read(path) and b'launch.py' not in read(path)]

    def read(path):
        try:
            return path.read_bytes()
        except OSError:  # it has ended
            return b''

    wait_for(lambda: 'Epoch(train)' in (tmp_path / 'log').read_text(), 200)
    assert len(ranks()) >= 2
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not ranks(), 60)
    assert (tmp_path / 'work/last_checkpoint').exists(), 'saved before it ended'


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_all(own_shapes, tmp_path):
    for image in sorted((own_shapes / 'val2017').iterdir())[1:2]:  # the second image goes to the second process
        image.write_bytes(image.read_bytes()[:100])
    result = script('dist_train.sh', DEMO, 2, *tiny(tmp_path, own_shapes, 'val_dataloader.batch_size=1'))
    assert result.code == 2, result.err
    assert result.err.count('error: ') == 1
    assert image.name in result.err
    assert 'Traceback' not in result.err


@pytest.mark.slow
def test_the_reason_is_printed_also_before_a_restart(tmp_path):
    """torchrun keeps the error files of the last attempt alone."""
    tool = tmp_path / 'fails_once.py'
    tool.write_text(
        'import os\n'
        'from cbam_mmdet.cli import run_tool\n'
        'from cbam_mmdet.errors import UserError\n'
        'def main():\n'
        '    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":\n'
        '        raise UserError("the reason of the first attempt")\n'
        'run_tool(main)\n'
    )
    command = [sys.executable, str(ROOT / 'tools/launch.py'), '1', str(tool)]
    for restarts, code in ((1, 0), (0, 2)):
        environment = dict(os.environ, MAX_RESTARTS=str(restarts), PYTHONPATH=str(ROOT))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stderr.count('error: the reason of the first attempt') == 1


@pytest.mark.parametrize('name, args, variables, message', [
    ('dist_train.sh', ['c.py'], {}, 'usage: dist_train.sh CONFIG GPUS'),
    ('dist_test.sh', ['c.py', '2'], {}, 'usage: dist_test.sh CONFIG CHECKPOINT GPUS'),
    ('slurm_train.sh', ['p', 'j', 'c.py'], {}, 'usage: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR'),
    ('slurm_test.sh', ['p', 'j', 'c.py'], {}, 'usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT'),
    ('slurm_train.sh', ['p', 'j', 'c.py', 'w'], {'GPUS': '12'}, 'GPUS=12 is no multiple of GPUS_PER_NODE=8'),
    ('slurm_train.sh', ['p', 'j', 'c.py', 'w'], {'CPUS_PER_TASK': 'x'}, 'CPUS_PER_TASK=x'),
])  # fmt: skip
def test_wrong_arguments(name, args, variables, message, tmp_path):
    result = script(name, *args, cwd=tmp_path, **variables)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize('gpus, environment, expected', [
    ('4', {}, '--nproc-per-node 4 --max-restarts 0 --standalone'),
    ('4', {'PORT': '29600'}, '--nproc-per-node 4 --max-restarts 0 --master-addr 127.0.0.1 --master-port 29600'),
    ('8', {'NNODES': '2', 'NODE_RANK': '1', 'MASTER_ADDR': '127.0.0.1'},
     '--nproc-per-node 8 --max-restarts 0 --nnodes 2 --node-rank 1 --master-addr 127.0.0.1 --master-port 29500'),
    ('8', {'NNODES': '2:4', 'RDZV_ENDPOINT': '127.0.0.1:29400', 'RDZV_ID': 'job7', 'MAX_RESTARTS': '3'},
     '--nproc-per-node 8 --max-restarts 3 --nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:29400 '
     '--rdzv-id job7 --rdzv-conf is_host=1 --local-addr 127.0.0.1'),
    ('two', {}, 'GPUS=two'),
    ('0', {}, 'GPUS=0'),
    ('8', {'MAX_RESTARTS': '-1'}, 'MAX_RESTARTS=-1'),
    ('8', {'NNODES': '2'}, 'NODE_RANK and MASTER_ADDR not set'),
    ('8', {'NNODES': '2', 'NODE_RANK': '2', 'MASTER_ADDR': '127.0.0.1'}, 'NODE_RANK=2'),
    ('8', {'RDZV_ENDPOINT': '29400'}, 'HOST:PORT is expected'),
    ('8', {'RDZV_ENDPOINT': 'host.invalid:29400'}, 'host.invalid is not known'),
])  # fmt: skip
def test_what_torchrun_is_given(gpus, environment, expected):
    import runpy

    launch = runpy.run_path(str(ROOT / 'tools/launch.py'))
    if expected.startswith('--'):
        assert launch['torchrun_arguments'](gpus, environment) == expected.split()
    else:
        with pytest.raises(launch['SettingError'], match=expected):
            launch['torchrun_arguments'](gpus, environment)


def test_slurm_asks_for_nodes_and_starts_one_torchrun_on_each(tmp_path):
    """With stand-ins for srun, scontrol and python, that print what they are given."""
    stand_ins = {
        'srun': 'while [ "$1" != bash ]; do echo "srun $1"; shift; done\n'
        'SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=x "$@"',
        'scontrol': 'printf "node1\\nnode2\\n"',
        'python': 'echo "python $*"; echo "NNODES=$NNODES RDZV_ENDPOINT=$RDZV_ENDPOINT RDZV_ID=$RDZV_ID"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path / name).chmod(0o755)
    variables = dict(GPUS='16', PATH=f'{tmp_path}:{os.environ["PATH"]}', PYTHON=str(tmp_path / 'python'))
    arguments = ['part', 'job', 'c.py', 'work', '--amp']
    result = script('slurm_train.sh', *arguments, cwd=tmp_path, SRUN_ARGS='--qos=high', **variables)
    assert result.code == 0, result.err
    asked = {line.split()[1] for line in result.out.splitlines() if line.startswith('srun ')}
    assert {'--partition=part', '--job-name=job', '--nodes=2', '--ntasks=2', '--ntasks-per-node=1'} <= asked
    assert {'--gres=gpu:8', '--cpus-per-task=40', '--qos=high'} <= asked
    tools = ROOT / 'tools'
    started = f'python {tools}/launch.py 8 {tools}/train.py c.py --launcher pytorch --work-dir work --amp'
    assert started in result.out.splitlines()
    assert 'NNODES=2 RDZV_ENDPOINT=node1:20007 RDZV_ID=7.0' in result.out
    result = script('slurm_test.sh', 'part', 'job', 'c.py', 'w.pth', cwd=tmp_path, **variables)
    assert f'python {tools}/launch.py 8 {tools}/test.py c.py w.pth --launcher pytorch' in result.out.splitlines()


def test_launcher_without_torchrun(run_tool, shapes, tmp_path):
    result = run_tool('train.py', DEMO, '--launcher', 'pytorch', *tiny(tmp_path, shapes))
    assert result.code == 2
    assert 'tools/dist_train.sh' in result.err


def test_resume_auto_starts_anew_where_there_is_nothing(run_tool, shapes, tmp_path):
    assert run_tool('train.py', DEMO, '--resume', 'auto', *tiny(tmp_path, shapes)).code == 0
    assert (tmp_path / 'epoch_1.pth').is_file()


@pytest.fixture
def nodes():
    """Two machines, as network namespaces with an address each: a list of (name, interface, address)."""
    pairs = [(f'cbam{os.getpid()}n{i}', f'cb{os.getpid()}v{i}', f'10.231.77.{i}') for i in (1, 2)]
    (first, link, _), (second, other, _) = pairs
    commands = [f'netns add {first}', f'netns add {second}']
    commands += [f'link add {link} netns {first} type veth peer name {other} netns {second}']
    for name, interface, address in pairs:
        commands += [f'-n {name} addr add {address}/24 dev {interface}']
        commands += [f'-n {name} link set {interface} up', f'-n {name} link set lo up']
    try:
        if not shutil.which('ip'):
            pytest.skip('no `ip` on this machine: network namespaces cannot be made')
        for command in commands:
            done = subprocess.run(['ip', *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f'network namespaces cannot be made here: ip {command}: {done.stderr.strip()}')
        yield pairs
    finally:
        for name, *_ in pairs if shutil.which('ip') else []:
            kill(name)
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def kill(node):
    """SIGKILL to every process of a node."""
    pids = subprocess.run(['ip', 'netns', 'pids', node], capture_output=True, text=True).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    return len(pids)


@pytest.mark.slow
def test_two_nodes_and_the_death_of_one(nodes, odd_shapes, tmp_path):
    work_dir, epochs = tmp_path / 'work', 12

    def start(i, attempt):
        name, interface, _ = nodes[i]
        variables = dict(
            NNODES='2', RDZV_ENDPOINT=f'{nodes[0][2]}:29400', MAX_RESTARTS='2', GLOO_SOCKET_IFNAME=interface
        )
        options = tiny(work_dir, odd_shapes, f'train_cfg.max_epochs={epochs}', 'default_hooks.checkpoint.interval=1')
        options += ['default_hooks.checkpoint.max_keep_ckpts=-1', 'train_cfg.val_interval=100']
        command = ['ip', 'netns', 'exec', name, 'bash', ROOT / 'tools/dist_train.sh', DEMO, '1', '--resume', 'auto']
        with open(tmp_path / f'node{i}_{attempt}.log', 'w') as log:
            return subprocess.Popen(
                [*map(str, command), *map(str, options)], env={**ENVIRONMENT, **variables}, stdout=log, stderr=log
            )

    def log(name):
        return (tmp_path / name).read_text()

    first, second = start(0, 'a'), start(1, 'a')
    deadline = time.monotonic() + 200
    while not (work_dir / 'epoch_2.pth').exists():
        assert time.monotonic() < deadline and first.poll() is None, log('node0_a.log')[-3000:]
        time.sleep(0.1)
    assert kill(nodes[1][0]) >= 2, 'torchrun and the process that it started'
    assert second.wait(30) != 0
    assert not (work_dir / f'epoch_{epochs}.pth').exists(), 'it died in the middle'
    second = start(1, 'b')
    assert second.wait(250) == 0, log('node1_b.log')[-3000:]
    assert first.wait(60) == 0, log('node0_a.log')[-3000:]
    assert (work_dir / f'epoch_{epochs}.pth').is_file()
    told = log('node0_a.log') + log('node1_b.log')
    assert 'lost contact' in told
    assert 'resumed epoch: ' in told and 'resumed epoch: 0' not in told
    runs = [json.loads(line) for path in work_dir.glob('*/vis_data/scalars.json') for line in path.open()]
    steps = {row['step'] for row in runs if 'loss' in row}  # one an epoch: 8 images in 2 processes of batch 4
    assert steps == set(range(1, epochs + 1)), 'none is left out'
