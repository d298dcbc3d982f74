"""CBAM into a trained detector: python tools/insert_cbam.py PLAIN_CONFIG PLAIN_CHECKPOINT [--out-dir DIR]"""

import argparse

from mmengine.config import DictAction

from cbam_mmdet.cli import run_tool
from cbam_mmdet.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Write the config and the checkpoint of a trained detector with CBAM in its backbone, ready to fine-tune'
    )
    parser.add_argument('config', help="the plain detector's config")
    parser.add_argument('checkpoint', help='its weights: a file, or a work dir for its newest')
    parser.add_argument('--out-dir', default='work_dirs/with_cbam', metavar='DIR', help='default: %(default)s')
    parser.add_argument(
        '--cbam',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help="CBAM's arguments, e.g. gate=sigmoid reduction=8",
    )
    parser.add_argument(
        '--after',
        nargs='+',
        metavar='PATTERN',
        help="the modules to follow, e.g. 'layer4.*.bn3'; default: the backbone's usual place, without frozen stages",
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='settings of the config'
    )
    parser.add_argument('--seed', type=int, default=0, help="of CBAM's random weights")
    parser.add_argument('--trust-checkpoint', action='store_true', help='load a checkpoint that runs code')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    from cbam_mmdet.apis.insert import insert_cbam

    made = insert_cbam(
        cfg,
        args.checkpoint,
        args.out_dir,
        cbam=args.cbam,
        after=args.after,
        seed=args.seed,
        trust_checkpoint=args.trust_checkpoint,
    )
    print(f'{len(made.modules)} CBAM modules, {made.parameters / 1e6:.3f} M parameters:')
    for name in made.modules:
        print(f'  {name}')
    print(f'{made.config}\n{made.checkpoint}\npython tools/train.py {made.config}')


if __name__ == '__main__':
    run_tool(main)
