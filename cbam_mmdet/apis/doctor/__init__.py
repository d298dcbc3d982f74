"""The examination of an environment: what is installed, what serves what, and whether it computes what it should.

This file, installed.py and measure.py import the standard library alone: they report what cannot be imported.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cbam_mmdet.apis.doctor import measure
from cbam_mmdet.apis.doctor.case import Case, Skip, in_one_line, without_paths
from cbam_mmdet.apis.doctor.installed import Fact, facts

# Modules of this folder whose function cases(devices) yields self-tests, and what each is about.
SECTIONS = {'operators': "mmcv's operators", 'attention': 'CBAM', 'whole': 'the whole'}
OK, WRONG, SKIPPED = 'ok', 'WRONG', 'skipped'


@dataclass(frozen=True)
class Result:
    """How a self-test ended: 'ok', 'WRONG' or 'skipped', with what is wrong or why, and what to do."""

    name: str
    status: str
    detail: str = ''
    remedy: str = ''
    seconds: float = 0.0


@dataclass
class Report:
    """All that the doctor found."""

    facts: list[Fact]
    results: list[Result] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> list[Result]:
        absent = [Result(fact.name, WRONG, fact.value, fact.remedy) for fact in self.facts if fact.remedy]
        return [*absent, *(result for result in self.results if result.status == WRONG)]

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return dict(
            well=not self.wrong,
            installed={fact.name: fact.value for fact in self.facts},
            self_tests=[asdict(result) for result in self.results],
            measurements=self.measurements,
        )


def examine(broken: Exception | None = None, benchmarks: Path | None = None) -> Report:
    """List what is installed, and run all self-tests on each device.

    Args:
        broken: what `import cbam_mmdet` raised, if it did.
        benchmarks: the folder of the scripts that measure, to run these as well.
    """
    results = []
    if broken is not None:
        detail = in_one_line(broken)
        remedy = 'mend what the message names, or install the stack again: pip install ".[mmdet]" -c constraints.txt'
        results.append(Result('import cbam_mmdet', WRONG, detail, remedy))
    devices = _devices()
    for module, title in SECTIONS.items():
        try:
            cases = importlib.import_module(f'{__name__}.{module}').cases(devices)
            results += [run(case) for case in cases]
        except Exception as error:  # a package that is missing or broken: of any kind
            remedy = 'the message names what is missing or broken: install it again'
            results.append(Result(title, WRONG, in_one_line(error), remedy))
    report = Report(facts(), results)
    if benchmarks is not None:
        results += [run(case) for case in measure.cases(benchmarks, len(devices) > 1, report.measurements)]
    return report


def run(case: Case) -> Result:
    """Run a self-test, whatever it raises."""
    start = time.perf_counter()
    remedy = ''
    try:
        status, detail = OK, case.test()
        if detail:
            status, remedy = WRONG, case.remedy
    except Skip as reason:
        status, detail = SKIPPED, str(reason)
    except Exception as error:
        status, detail, remedy = WRONG, in_one_line(error), case.remedy
    return Result(case.name, status, without_paths(detail or ''), remedy, round(time.perf_counter() - start, 3))


def as_text(report: Report) -> str:
    """The page that the tool prints."""
    width = max(len(fact.name) for fact in report.facts)
    lines = ['What is installed', *(f'  {fact.name:{width}}  {fact.value}' for fact in report.facts), '', 'Self-tests']
    for result in report.results:
        detail = f': {result.detail}' if result.detail else ''
        lines.append(f'  {result.status:7}  {result.name}{detail}')
    lines.append('')
    for name, record in report.measurements.items():
        lines += [f'Measured: {name}', *(f'  {line}' for line in _columns(record['rows'])), '']
    tests, wrong = len(report.results), report.wrong
    seconds = sum(result.seconds for result in report.results)
    skipped = sum(result.status == SKIPPED for result in report.results)
    if not wrong:
        return '\n'.join([*lines, f'All is well: {tests - skipped} checks in {seconds:.1f} s, {skipped} skipped.'])
    lines.append(f'{len(wrong)} things are wrong. What to do:' if len(wrong) > 1 else 'One thing is wrong. What to do:')
    return '\n'.join([*lines, *(f'  {result.name}: {result.remedy}' for result in wrong)])


def _columns(rows: list[dict]) -> list[str]:
    """Rows with the same keys, in columns."""
    cells = [[*rows[0]], *([*map(str, row.values())] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ['  '.join(f'{cell:{width}}' for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _devices() -> list[str]:
    try:
        import torch

        return ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    except Exception:  # the facts say so
        return ['cpu']
