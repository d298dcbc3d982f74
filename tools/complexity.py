"""Count parameters and FLOPs: python tools/complexity.py CONFIG ... | --paper

A table of configs with CBAM's part in each, and for each stage; or the paper's table of classification networks
beside ours.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        'configs',
        nargs='*',
        metavar='CONFIG',
        help="config files, or 'cbam_mmdet::NAME.py' for those that the package ships",
    )
    parser.add_argument('--paper', action='store_true', help="the paper's table of classification networks beside ours")
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help="the image's size (default: by each config's test pipeline)",
    )
    parser.add_argument(
        '--throughput',
        nargs='?',
        type=int,
        const=10,
        default=0,
        metavar='N',
        help='images/s, the median of N (%(const)s)',
    )
    parser.add_argument('--memory', action='store_true', help='peak memory of inference and of training')
    parser.add_shared('--device', help="for these two: 'cpu', 'cuda:0', ... (default: the GPU if there is one)")
    parser.add_argument('--out', nargs='+', default=[], metavar='FILE', help='write the table, too: FILE.md, FILE.csv')
    parser.add_shared('--cfg-options')
    args = parser.parse_args()
    if bool(args.configs) == args.paper:
        parser.error('give configs, or --paper')
    if args.throughput < 0 or (args.shape and min(args.shape) < 1):
        parser.error('--throughput and --shape take positive numbers')
    for path in args.out:
        if not path.endswith(('.md', '.csv')):
            parser.error(f'--out {path}: the name must end with .md or .csv')
    return args


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.utils.config import load_config

    configs = {path: load_config(path, args.cfg_options) for path in args.configs}
    with contextlib.redirect_stdout(sys.stderr):  # MMDetection prints when imported; stdout is for the table
        from cbam_mmdet.analysis import complexity, paper_table

    if args.paper:
        rows = paper_table.count_networks()
        text, table = f'{paper_table.markdown(rows)}\n{paper_table.NOTES}', paper_table.as_csv(rows)
    else:
        rows = complexity.measure_all(
            configs,
            args.shape,
            rounds=args.throughput,
            memory=args.memory,
            device=args.device,
        )
        text, table = complexity.report(rows, args.throughput, args.device), complexity.as_csv(rows)
    print(text, end='')
    for path in args.out:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(table if path.endswith('.csv') else text, encoding='utf-8')


if __name__ == '__main__':
    run(main, parse_args())
