"""CBAM into a trained detector: python tools/insert_cbam.py PLAIN_CONFIG PLAIN_CHECKPOINT [--out-dir DIR]

Writes the config and the checkpoint of the same detector with CBAM in its backbone, ready to fine-tune.
"""

import argparse
import shlex

from arguments import KeyValues, Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_shared('config', help="the plain detector's config")
    parser.add_shared('checkpoint', help='its weights: a file, or a work dir for its newest')
    parser.add_shared('--out-dir', default='work_dirs/with_cbam')
    parser.add_argument(
        '--cbam',
        nargs='+',
        action=KeyValues,
        metavar='KEY=VALUE',
        help="CBAM's arguments, e.g. gate=sigmoid reduction=8",
    )
    parser.add_argument(
        '--after',
        nargs='+',
        metavar='PATTERN',
        help="the modules to follow, e.g. 'layer4.*.bn3'; default: the backbone's usual place, without frozen stages",
    )
    parser.add_argument('--seed', type=int, default=0, help="of CBAM's random weights")
    parser.add_shared('--trust-checkpoint', '--cfg-options')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.engine.checkpoint.files import find_checkpoint
    from cbam_mmdet.utils.config import load_config

    checkpoint = find_checkpoint(args.checkpoint)
    cfg = load_config(args.config, args.cfg_options)
    from cbam_mmdet.apis.insert import insert_cbam  # MMDetection takes seconds to import

    made = insert_cbam(
        cfg,
        checkpoint,
        args.out_dir,
        cbam=args.cbam,
        after=args.after,
        seed=args.seed,
        trust_checkpoint=args.trust_checkpoint,
    )
    print(f'{len(made.modules)} CBAM modules, {made.parameters / 1e6:.3f} M parameters:')
    for name in made.modules:
        print(f'  {name}')
    print(f'{made.config}\n{made.checkpoint}\npython tools/train.py {shlex.quote(str(made.config))}')


if __name__ == '__main__':
    run(main, parse_args())
