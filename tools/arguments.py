"""The command lines of the tools: what they share is declared once. Only the standard library is imported here.

A tool parses its arguments before it imports the package, with which torch comes. So `--help`, a wrong argument and a
folder that does not exist are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

USER_ERROR = 2  # the exit code for a user's mistake, as argparse has it
INTERRUPTED = 130  # what a shell reports for Ctrl-C


class KeyValues(argparse.Action):
    """KEY=VALUE pairs, read by MMEngine's DictAction, which is imported only where there are some."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        for pair in values:
            if '=' not in pair:
                parser.error(
                    f'{option_string} takes KEY=VALUE pairs, with no space around the =, got {pair!r}. As an example, '
                    '--cfg-options takes train_cfg.max_epochs=3 load_from=a.pth, and --cbam takes gate=sigmoid'
                )
        from mmengine.config import DictAction

        try:
            DictAction(self.option_strings, self.dest, nargs='+')(parser, namespace, values, option_string)
        except (RecursionError, ValueError, AssertionError, IndexError):  # of brackets that it cannot pair
            parser.error(
                f'{option_string}: one of {" ".join(values)[:200]} cannot be read. Values are numbers, words, lists as '
                'in [1,2] and tuples as in "(1,2)"; the keys of a dict are given one by one, as in a.b=1 a.c=2'
            )


def score(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not a number from 0 to 1')
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not a positive number')
    return value


CONFIG = "config file, or 'cbam_mmdet::NAME.py' for one that the package ships"
CHECKPOINT = 'checkpoint file, or a work dir for its newest'
# Arguments of more than one tool -> what argparse is to know of them.
SHARED: dict[str, dict[str, Any]] = {
    'config': dict(help=CONFIG),
    'checkpoint': dict(help=CHECKPOINT),
    '--work-dir': dict(metavar='DIR'),
    '--out-dir': dict(metavar='DIR', help='where to write (default: %(default)s)'),
    '--data-root': dict(metavar='DIR', help="folder of the data set, in place of the config's"),
    '--classes': dict(
        metavar='A,B,C', help="the data set's own classes; 'auto' reads them from the training annotations"
    ),
    '--train-ann': dict(metavar='FILE', help='COCO annotation file to train on, in a data set with several'),
    '--val-ann': dict(metavar='FILE', help='COCO annotation file to validate and test on, in a data set with several'),
    '--cfg-options': dict(nargs='+', action=KeyValues, metavar='KEY=VALUE', help='settings of the config to override'),
    '--device': dict(help="'cpu', 'cuda:0', ... (default: the GPU if there is one)"),
    '--num-images': dict(type=count, metavar='N'),
    '--score-thr': dict(type=score, metavar='S', help='leave out detections with a lower score (default: %(default)s)'),
    '--trust-checkpoint': dict(
        action='store_true',
        help='load a checkpoint that holds more than tensors and plain data: this runs code from the file',
    ),
    '--any-variant': dict(
        action='store_true',
        help='load the weights of a CBAM also where the config has another gate, order or other pools than they were '
        'trained with',
    ),
    '--launcher': dict(choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher'),
}


class Parser(argparse.ArgumentParser):
    """A tool's parser; its description is the tool's docstring."""

    def __init__(self, doc: str, **options: Any) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """End with the usage and this message; of several processes with the same arguments the first says so."""
        if int(os.environ.get('LOCAL_RANK', 0)) > 0:
            sys.exit(USER_ERROR)
        super().error(message)

    def parse_detector_args(self) -> argparse.Namespace:
        """Parse CONFIG CHECKPOINT INPUT ..., or what was the order once, INPUT ... --config C --checkpoint P."""
        once = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        once.error = self.error  # type: ignore[method-assign]
        once.add_argument('--config')
        once.add_argument('--checkpoint')
        detector, others = once.parse_known_args()
        given = [value for value in (detector.config, detector.checkpoint) if value is not None]
        if len(given) == 1:
            self.error('--config and --checkpoint are given together, or in place of both: CONFIG CHECKPOINT INPUT ...')
        return self.parse_intermixed_args([*given, *others])

    def add_shared(self, *names: str, **changes: Any) -> None:
        """Add arguments of SHARED, each with these changes."""
        for name in names:
            self.add_argument(name, **SHARED[name] | changes)

    def add_launcher(self) -> None:
        """Add --launcher, and what older launchers of PyTorch pass besides."""
        self.add_shared('--launcher')
        self.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def run(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> NoReturn:
    """Run a tool with its parsed arguments, and exit with its code; a user's mistake ends in one message."""
    _require_data_root(getattr(args, 'data_root', None))
    if hasattr(args, 'local_rank'):
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        from cbam_mmdet.cli import run_tool
    except KeyboardInterrupt:  # in the first second
        print('\ninterrupted', file=sys.stderr)
        sys.exit(INTERRUPTED)
    run_tool(lambda: _main(main, args))


def _main(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int | None:
    if not getattr(args, 'any_variant', False):
        return main(args)
    from cbam_mmdet.models.variant import any_variant_loaded

    with any_variant_loaded():
        return main(args)


def _require_data_root(folder: str | None) -> None:
    # With several processes one of them says it, later.
    alone = int(os.environ.get('WORLD_SIZE', 1)) == 1 and 'SLURM_PROCID' not in os.environ
    if folder is None or not alone or '://' in folder or os.path.isdir(folder):
        return
    print(
        f'\nerror: --data-root {folder}: there is no folder {os.path.abspath(folder)}. Give the folder of a data set '
        'in the format of COCO, Pascal VOC, YOLO, CVAT or LabelMe (see docs/own_data.md). To see everything work '
        'without a data set of your own: make demo',
        file=sys.stderr,
    )
    sys.exit(USER_ERROR)
