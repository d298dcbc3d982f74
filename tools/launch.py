"""torchrun for tools/dist_*.sh: python tools/launch.py GPUS SCRIPT [ARGUMENTS of SCRIPT]

The nodes come from the environment (NNODES, NODE_RANK, MASTER_ADDR, PORT, or RDZV_ENDPOINT; see docs/scaling.md).
What is torchrun's stays so; added are messages for settings that do not fit, and the exit code: the script's own,
where torchrun has 1 and a traceback for whatever its processes end with. It imports nothing of the package, which
takes seconds to load.
"""

import argparse
import logging
import os
import re
import socket
import sys

FAILED, USER_ERROR = 1, 2  # as in cbam_mmdet/cli/tool.py
DEFAULT_PORT = 29500
WATCHED = 'torch.distributed.elastic.multiprocessing.api'


class SettingError(ValueError):
    """A variable of the environment, or GPUS, that does not fit."""


def torchrun_arguments(gpus: str, environment: dict[str, str]) -> list[str]:
    """torchrun's options for what dist_train.sh was given.

    Raises:
        SettingError: that names the variable, what is expected and what was given.
    """
    options = ['--nproc-per-node', str(_whole('GPUS', gpus, 1))]
    options += ['--max-restarts', str(_whole('MAX_RESTARTS', environment.get('MAX_RESTARTS', '0'), 0))]
    nodes, endpoint = environment.get('NNODES', '1'), environment.get('RDZV_ENDPOINT')
    if endpoint:
        if not re.fullmatch(r'[1-9]\d*(:[1-9]\d*)?', nodes):
            raise SettingError(f'NNODES={nodes}: with RDZV_ENDPOINT a number is expected, or a range such as 2:4')
        host, _, port = endpoint.rpartition(':')
        if not host:
            raise SettingError(f'RDZV_ENDPOINT={endpoint}: HOST:PORT is expected')
        address = _address('RDZV_ENDPOINT', host)
        here = _is_ours(address)
        return [
            *options, '--nnodes', nodes,
            '--rdzv-backend', 'c10d',
            '--rdzv-endpoint', f'{host}:{_whole("RDZV_ENDPOINT", port, 1)}',
            '--rdzv-id', environment.get('RDZV_ID', 'cbam_mmdet'),
            '--rdzv-conf', f'is_host={int(here)}',
            # The address that the others see; a host name may stand for 127.0.1.1.
            '--local-addr', environment.get('LOCAL_ADDR') or (address if here else _address_towards(address)),
        ]  # fmt: skip
    count = _whole('NNODES', nodes, 1)
    if count == 1:
        if 'PORT' not in environment:
            return [*options, '--standalone']
        port = str(_whole('PORT', environment['PORT'], 1))
        return [*options, '--master-addr', environment.get('MASTER_ADDR', '127.0.0.1'), '--master-port', port]
    lacking = [name for name in ('NODE_RANK', 'MASTER_ADDR') if not environment.get(name)]
    if lacking:
        raise SettingError(
            f'NNODES={count}, but {" and ".join(lacking)} not set: NODE_RANK is 0 to {count - 1}, one a node, '
            'MASTER_ADDR the address of node 0, the same for all; or set RDZV_ENDPOINT=HOST:PORT in their place'
        )
    rank = _whole('NODE_RANK', environment['NODE_RANK'], 0)
    if rank >= count:
        raise SettingError(f'NODE_RANK={rank}: with NNODES={count} it is 0 to {count - 1}')
    _address('MASTER_ADDR', environment['MASTER_ADDR'])
    return [
        *options, '--nnodes', str(count), '--node-rank', str(rank),
        '--master-addr', environment['MASTER_ADDR'],
        '--master-port', str(_whole('PORT', environment.get('PORT', str(DEFAULT_PORT)), 1)),
    ]  # fmt: skip


def _whole(name: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise SettingError(f'{name}={value}: a whole number of at least {least} is expected')
    return int(value)


def _address(name: str, host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise SettingError(f'{name}: the host {host} is not known here ({error.strerror})') from error


def _is_ours(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _address_towards(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise SettingError(f'RDZV_ENDPOINT: no way to {address} from here ({error.strerror})') from error
        return probe.getsockname()[0]


def _is_news(record: logging.LogRecord) -> bool:
    """Not that it ends the other processes, nor the end of one that has given its reason itself."""
    text = record.getMessage()
    return 'closing signal' not in text and f'exitcode: {USER_ERROR})' not in text


def launch(options: list[str], command: list[str]) -> int:
    """Run the command in every process.

    Returns:
        0; or USER_ERROR if a process of this node ended with it; FAILED if the nodes do not come together; or the
        code of the first that failed (128 + N for signal N).
    """
    from torch import distributed  # takes seconds
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.getLogger(WATCHED).addFilter(_is_news)
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # torchrun's default, of which it warns
    if os.environ.get('RDZV_ENDPOINT'):
        # The store that torchrun's agents share since 2.5 is announced once: a node that comes back later would wait
        # for it forever.
        os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'
    try:
        run.run(run.parse_args([*options, *command]))
    except ChildFailedError as error:
        by_time = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        # A process that lost contact has failed because another one did.
        first = next((failure for failure in by_time if failure.exitcode == USER_ERROR), by_time[0])
        if isinstance(first.message, dict):  # it has written its error file
            print(f'\nerror: {first.message["message"]}', file=sys.stderr, flush=True)
        return 128 - first.exitcode if first.exitcode < 0 else first.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    except (getattr(distributed, 'DistError', RendezvousError), RendezvousError) as error:  # DistError: since torch 2.2
        reason = str(error).splitlines()[0]
        print(
            f'error: the rendezvous of the nodes failed ({type(error).__name__}: {reason}). Another node is gone, '
            'did not start in time, or cannot be reached at this address and port: start the same command again on '
            'all nodes',
            file=sys.stderr,
        )
        return FAILED
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description='Run a tool in several processes, by torchrun')
    parser.add_argument('gpus', help='processes on this machine, one a GPU')
    parser.add_argument('command', nargs=argparse.REMAINDER, metavar='SCRIPT ...', help='the tool and its arguments')
    args = parser.parse_args()
    try:
        options = torchrun_arguments(args.gpus, dict(os.environ))
        trains = any(argument.endswith('train.py') for argument in args.command[:1])
        resumes = any(argument.startswith('--resume') for argument in args.command)
        if trains and not resumes and '--max-restarts 0' not in ' '.join(options):
            raise SettingError('MAX_RESTARTS without --resume auto: a restart would begin the training anew')
    except SettingError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.exit(launch(options, args.command))


if __name__ == '__main__':
    main()
