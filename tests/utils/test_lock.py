"""One process at a time holds a folder's lock, and a dead one does not."""

import os
import signal
import time

import pytest
from conftest import FORKS, in_a_fork

from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.lock import locked


def hold(folder, ready):
    with locked(folder, ''):
        if os.fork() == 0:  # a worker that outlives it, as DataLoader's may
            time.sleep(20)
            os._exit(0)
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    ready = FORKS.Event()
    process = FORKS.Process(target=in_a_fork, args=(hold, tmp_path, ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_another_process_is_named(tmp_path, holder):
    with pytest.raises(UserError, match=f'{tmp_path} is in use by process {holder.pid} on .*: wait'), \
            locked(tmp_path, 'wait'):  # fmt: skip
        pass


def test_a_link_is_not_written_through(tmp_path):
    other = tmp_path / 'precious.txt'
    other.write_text('all of it')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work/.lock').symlink_to(other)
    with pytest.raises(UserError, match=r'\.lock is a symbolic link'), locked(tmp_path / 'work', ''):
        pass
    assert other.read_text() == 'all of it'


def test_a_killed_process_holds_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locked(tmp_path, ''):
        pass
    assert not list(tmp_path.iterdir())
