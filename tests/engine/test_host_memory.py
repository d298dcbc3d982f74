"""Freed memory is kept: the second of two equal tensors touches no fresh page. In processes of their own."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

# The file by itself: the package takes seconds to import.
SCRIPT = """
import importlib.util, resource, sys, torch
spec = importlib.util.spec_from_file_location('host_memory', sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
kept = module.keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason='it is left alone where PyTorch has a GPU')
@pytest.mark.skipif(sys.platform != 'linux', reason='it is for glibc')
@pytest.mark.parametrize('environment', [{}, {'CBAM_KEEP_MEMORY': '0'}, {'MALLOC_TRIM_THRESHOLD_': '1000000'}], ids=str)
def test_pages_are_touched_once(environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_') and k != 'CBAM_KEEP_MEMORY'}
    command = [sys.executable, '-c', SCRIPT, str(ROOT / 'cbam_mmdet/engine/host_memory.py')]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept == str(not environment)
    pages = 5 * 2**26 // os.sysconf('SC_PAGE_SIZE')
    assert int(faults) < pages / 20 if kept == 'True' else int(faults) > pages / 1000
