"""The doctor finds this environment well, and what is broken on purpose ends it with 1, a line and what to do."""

import dataclasses
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SERVED, needs_served_operators
from passes_cases import DEVICE, FUSED

from cbam_mmdet.apis import doctor
from cbam_mmdet.apis.doctor import attention, installed, measure, operators
from cbam_mmdet.apis.doctor.case import without_paths
from cbam_mmdet.compat.mmcv_ops import OPERATORS
from cbam_mmdet.ops import c_passes, torch_passes


def line_of(page, name):
    return next(line for line in page.splitlines() if name in line)


def only(monkeypatch, *sections):
    monkeypatch.setattr(doctor, 'SECTIONS', {name: doctor.SECTIONS[name] for name in sections})


def halved(function):
    """The function with its first result, or the tensors that it writes, wrong."""

    def wrong(*args, **kwargs):
        before = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        result = function(*args, **kwargs)
        for arg, old in zip(args, before, strict=True):
            if torch.is_tensor(arg) and not torch.equal(arg, old):
                arg.mul_(0.5)
        if torch.is_tensor(result):
            return result[: len(result) // 2] if result.dtype == torch.int64 else result * 0.5
        if isinstance(result, tuple):
            return result[0] * 0.5, *result[1:]
        return result[:-1] if isinstance(result, list) else result

    return wrong


def test_this_environment_is_well(run_tool, tmp_path):
    result = run_tool('doctor.py', '--json', tmp_path / 'doctor.json')
    assert result.code == 0, result.out
    content = json.loads((tmp_path / 'doctor.json').read_text())
    assert content['well'] and content['installed']['torch'] == torch.__version__.partition('+')[0]
    status = {test['name']: test['status'] for test in content['self_tests']}
    assert set(status.values()) <= {'ok', 'skipped'} and {f'{name}, cpu' for name in operators.TESTS} <= set(status)
    assert status["CBAM, impl='auto', its variants, cpu"] == 'ok'
    assert 'All is well' in result.out
    assert ('served by cbam_mmdet' if SERVED else 'compiled') in line_of(result.out, "mmcv's operators")
    for folder in (str(Path.home()), sys.prefix, str(ROOT), str(tmp_path.parent)):
        assert folder not in result.out and folder not in str(content)


@needs_served_operators
@pytest.mark.parametrize('name', OPERATORS)
def test_every_served_operator_is_tested(name, monkeypatch):
    extension = sys.modules['mmcv._ext']
    monkeypatch.setattr(extension, name, halved(getattr(extension, name)))
    assert 'WRONG' in {doctor.run(case).status for case in operators.cases(['cpu'])}


@needs_served_operators
def test_a_broken_served_operator(run_tool, monkeypatch):
    only(monkeypatch, 'operators')
    extension = sys.modules['mmcv._ext']
    monkeypatch.setattr(extension, 'roi_align_backward', halved(extension.roi_align_backward))
    result = run_tool('doctor.py')
    assert result.code == 1
    line = line_of(result.out, 'WRONG')
    assert 'roi_align, cpu' in line and 'the gradient of input 1 differs by 5.0e-01' in line
    assert 'install a torchvision made for this torch' in result.out.splitlines()[-1]
    assert 'ok       nms, cpu' in result.out


def test_a_broken_c_library(run_tool, monkeypatch):
    only(monkeypatch, 'attention')
    right = torch_passes.EAGER_FUNCTIONS
    wrong = dataclasses.replace(right, backward_maps=halved(right.backward_maps))
    monkeypatch.setattr(c_passes, 'EAGER_FUNCTIONS', wrong)
    monkeypatch.setattr(c_passes, 'unavailable', lambda: None)
    monkeypatch.setattr(c_passes, 'library', lambda: Path('/secret/place/cbam_cpu.so'))
    result = run_tool('doctor.py')
    assert result.code == 1
    line = line_of(result.out, 'WRONG')
    assert 'C library, cpu' in line and "backward_maps' ds" in line
    assert 'CBAM, C library, cpu: set CBAM_CPU_KERNEL=0' in result.out
    assert 'built: cbam_cpu.so' in result.out and 'secret' not in result.out

    monkeypatch.setattr(c_passes, 'unavailable', lambda: c_passes.NOT_BUILT)
    result = run_tool('doctor.py')
    assert result.code == 0, 'PyTorch serves in its place'
    assert 'not used: it was not built' in line_of(result.out, 'CPU kernel')
    assert 'skipped' in line_of(result.out, 'C library, cpu')

    monkeypatch.setattr(c_passes, 'unavailable', lambda: 'cannot be loaded: invalid ELF header')
    result = run_tool('doctor.py')
    assert result.code == 1
    assert 'it cannot be loaded: invalid ELF header' in line_of(result.out, 'WRONG')


@pytest.mark.parametrize('impl', [FUSED])
def test_a_broken_triton_kernel(impl, run_tool, monkeypatch):
    """Under the interpreter: tests/ops/test_triton_passes.py runs it."""
    from cbam_mmdet.ops import triton_passes

    only(monkeypatch, 'attention')
    right = triton_passes.EAGER_FUNCTIONS
    wrong = dataclasses.replace(right, refine=halved(right.refine))
    monkeypatch.setattr(triton_passes, 'EAGER_FUNCTIONS', wrong)
    result = run_tool('doctor.py')
    assert result.code == 1
    line = line_of(result.out, 'WRONG')
    assert f'Triton, {DEVICE}' in line and 'refine of' in line
    assert "impl='auto' does without these kernels" in result.out.splitlines()[-1]
    assert 'ok' in line_of(result.out, f'tail of a block, {DEVICE}')


def test_a_gradient_that_is_wrong_in_the_whole_alone_is_found():
    """The whole CBAM is compared, beside each pass alone."""
    module = attention._module(True)

    def compute(x, channel, spatial, order):
        y = attention.cbam_reference(x, channel, spatial, order)
        return y.detach() * 2 - y  # the right value, with its gradient turned round

    double = attention._compare(lambda *args: compute(*args) * 1, module, 'cpu', torch.float64, torch.contiguous_format)
    assert 'the gradient of x differs by 2.0e+00' in double


def test_what_is_not_installed_is_wrong(run_tool, monkeypatch):
    only(monkeypatch)
    version = metadata.version

    def without_mmdet(name):
        if 'mmdet' in name:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(installed.metadata, 'version', without_mmdet)
    monkeypatch.setitem(installed.PACKAGES, 'mmdet', (('mmdet',), True))
    result = run_tool('doctor.py')
    assert result.code == 1 and 'not installed' in line_of(result.out, ' mmdet ')
    assert 'mmdet: pip install mmdet' in result.out


def test_a_detector_without_mmdet_is_a_line(run_tool, monkeypatch):
    only(monkeypatch, 'whole')
    monkeypatch.setitem(sys.modules, 'mmdet.structures', None)
    result = run_tool('doctor.py')
    assert result.code == 1 and 'ModuleNotFoundError: import of mmdet.structures' in line_of(result.out, 'WRONG')


@pytest.mark.parametrize('missing', ['mmengine', 'torch'])
def test_a_package_that_cannot_be_imported_is_a_line(missing):
    program = f"""
import runpy, sys
sys.modules['{missing}'] = None
sys.path.insert(0, {str(ROOT / 'tools')!r})
sys.argv = ['doctor.py']
runpy.run_path({str(ROOT / 'tools/doctor.py')!r}, run_name='__main__')
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    line = line_of(done.stdout, 'WRONG    import cbam_mmdet')
    assert missing in line and 'Traceback' not in done.stdout + done.stderr
    assert 'import cbam_mmdet: mend what the message names' in done.stdout and 'Python   ' in done.stdout


SCRIPT = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index('--out') + 1])
out.with_suffix('.json').write_text(json.dumps(dict(
    command=' '.join(['python', 'benchmarks/cbam_op.py', *sys.argv[1:]]), rows=[dict(what='ours', ms=1.5)], plot={})))
"""


def test_measurements(tmp_path, run_tool, monkeypatch):
    (tmp_path / 'cbam_op.py').write_text(SCRIPT)
    (tmp_path / 'network.py').write_text('raise SystemExit("no memory left")')
    plan = {'op': ('cbam_op.py', '--rounds 1'), 'network': ('network.py', ''), 'other': ('other.py', '')}
    monkeypatch.setattr(measure, 'ON_CPU', plan)
    only(monkeypatch)
    report = doctor.Report([])
    for case in measure.cases(tmp_path, False, report.measurements):
        report.results.append(doctor.run(case))
    assert [result.status for result in report.results] == ['ok', 'WRONG', 'skipped']
    assert report.results[1].detail.endswith('it ended with 1: no memory left')
    assert report.measurements == {'op': dict(command='python benchmarks/cbam_op.py --rounds 1', rows=[
        dict(what='ours', ms=1.5)])}  # fmt: skip
    report.facts.append(doctor.Fact('Python', '3'))
    assert 'what  ms\n  ours  1.5' in doctor.as_text(report)

    (case,) = [case for case in measure.cases(tmp_path / 'none', False, {}) if case.name.endswith(': op')]
    assert 'not installed with the package' in doctor.run(case).detail


def test_texts_name_no_folder_of_the_user():
    text = f"cannot open '{Path.home()}/a.so', {sys.prefix}/lib/b.so, {ROOT}/c.so, /scratch/me/d.so: https://x.org/y/z"
    shown = "cannot open '~/a.so', environment/lib/b.so, cbam-mmdet/c.so, .../d.so: https://x.org/y/z"
    assert without_paths(text) == shown
    assert len(without_paths('x' * 1000)) < 400
