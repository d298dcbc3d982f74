"""Training on several processes: the process group, with or without GPUs.

torchrun starts the processes (tools/dist_train.sh), and MMEngine's Runner works in them. This module adds a process
group without a GPU, where MMEngine only supports CUDA's, and work that one process does for all.
"""

from __future__ import annotations

import atexit
import ctypes
import datetime
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, get_rank, init_dist, is_distributed
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import distributed, nn

from cbam_mmdet.errors import UserError

T = TypeVar('T')
HOW = 'start several processes by tools/dist_train.sh CONFIG GPUS, tools/dist_test.sh or tools/slurm_train.sh'


def join_processes(cfg: Config, launcher: str) -> None:
    """Make the process group before anything is built, on CPUs with gloo.

    Args:
        cfg: the config. On CPUs its model wrapper gets device_ids=None.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: if the launcher did not start this process, or there are fewer GPUs than processes.
    """
    if launcher == 'none':
        if int(os.environ.get('WORLD_SIZE', 1)) > 1 and 'TORCHELASTIC_RUN_ID' in os.environ:
            raise UserError(f'torchrun started this with --launcher none: each process would train alone; {HOW}')
        return
    lacking = [name for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if launcher == 'pytorch' and lacking:
        raise UserError(f'--launcher pytorch: torchrun has not started this ({", ".join(lacking)} not set); {HOW}')
    if launcher == 'pytorch':
        _stop_when_launcher_dies()
    dist_cfg = dict(cfg.get('env_cfg', {}).get('dist_cfg', {}))
    if get_device() == 'cpu':
        if launcher != 'pytorch':
            raise UserError(f'--launcher {launcher}: torch sees no GPU here, and on CPUs only torchrun works; {HOW}')
        if not is_distributed():
            timeout = datetime.timedelta(seconds=dist_cfg.get('timeout', 1800))
            distributed.init_process_group('gloo', timeout=timeout)
        _name_no_devices(cfg)
    else:
        gpus, processes = torch.cuda.device_count(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if get_device() == 'cuda' and processes > gpus:
            raise UserError(f'{processes} processes were started here, but torch sees {gpus} GPU(s): one process a GPU')
        if not is_distributed():
            init_dist(launcher, **dist_cfg)


def _stop_when_launcher_dies() -> None:
    """Have the kernel send SIGTERM when torchrun dies. Or else this process would go on with the run alone."""
    prctl = getattr(ctypes.CDLL(None), 'prctl', None) if sys.platform == 'linux' else None
    pr_set_pdeathsig = 1  # of linux/prctl.h
    if prctl is not None:
        prctl(pr_set_pdeathsig, int(signal.SIGTERM))


def _name_no_devices(cfg: Config) -> None:
    # MMEngine passes device_ids=[LOCAL_RANK] to DDP, which refuses device_ids on a CPU.
    wrapper = ConfigDict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    if cfg.get('runner_type') == 'FlexibleRunner':
        strategy = cfg.setdefault('strategy', ConfigDict(type='DDPStrategy'))
        if strategy.type == 'DDPStrategy':
            strategy.model_wrapper = ConfigDict(wrapper, **(strategy.get('model_wrapper') or {}))
    else:
        wrapper.find_unused_parameters = cfg.get('find_unused_parameters', False)
        cfg.model_wrapper_cfg = ConfigDict(wrapper, **(cfg.get('model_wrapper_cfg') or {}))


def in_first_process(function: Callable[[], T]) -> T:
    """Call a function in the first process only, and pass its result or its UserError to all processes.

    Args:
        function: the function. Its result must be picklable.

    Returns:
        The result, in every process.

    Raises:
        UserError: in every process, if the function raised one.
    """
    if not is_distributed():
        return function()
    outcome: list[Any] = [None, None]
    if get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    result, message = outcome
    if message is not None:
        raise UserError(message)
    return result


def unwrapped(model: Any) -> nn.Module:
    """The model inside the wrappers of several processes (DDP and others) and of test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def end_process(code: int) -> NoReturn:
    """End this process, one of several, after the exit functions but without finalizing Python.

    multiprocessing ends its own processes in the same way. Gloo's threads may hold the tensors of the last collective
    slightly longer than the caller, and a thread needs the GIL to free them. If it asks for the GIL while Python
    finalizes, its stack is unwound through C++ code that forbids this. The process then ends with 'terminate called
    without an active exception' and exit code 134, although all work is done (pytorch/pytorch#190489).
    destroy_process_group joins these threads only if no DDP module holds the group.

    Args:
        code: the exit code. With 0, which says that all processes have finished, the process group is destroyed.
    """
    if code == 0 and distributed.is_initialized():
        distributed.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing's children call it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
