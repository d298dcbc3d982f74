"""The pages hold together: links, anchors and pictures resolve, lines are short, messages are those of the code."""

import ast
import re
import subprocess
import sys

import pytest
from pages import PAGES, ROOT, anchors, blocks, links, prose

MAX_COLUMNS = 120
GENERATED = '<!-- generated: '  # before a table that a tool prints: its rows are the tool's


def by_name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize('page', PAGES, ids=by_name)
def test_links_resolve(page):
    broken = []
    for target in links(page):
        if re.match(r'[a-z]+:', target):
            continue
        name, _, anchor = target.partition('#')
        file = (page.parent / name).resolve() if name else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('# A heading, and `code`\n[x](other.md#a) ![y](z.png)\n```\n# [no](link)\n```\n[r]: file.json\n')
    assert links(page) == ['other.md#a', 'z.png', 'file.json']
    assert anchors(page) == {'a-heading-and-code'}


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'CHANGELOG.md'], ids=by_name)
def test_lines_are_short(page):
    lines = page.read_text(encoding='utf-8').splitlines()
    generated = False
    for number, line in enumerate(lines, 1):
        generated = line.startswith((GENERATED, '|' if generated else GENERATED))
        assert generated or len(line) <= MAX_COLUMNS, f'{by_name(page)}:{number} has {len(line)} columns'


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines()) <= 130


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / 'zensical.toml').read_text(encoding='utf-8')
    missing = [page.name for page in PAGES if page.name != 'README.md' and f'"{page.name}"' not in navigation]
    assert not missing


def test_every_block_says_what_it_is():
    assert not [str(block) for page in PAGES for block in blocks(page) if not block.language]


def strings_of_the_code():
    """Every literal of the code, parts of f-strings joined by a mark."""
    found = []
    files = [*(ROOT / 'cbam_mmdet').rglob('*.py'), *(ROOT / 'tools').glob('*.py')]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.JoinedStr):
                found.append(''.join(part.value if isinstance(part, ast.Constant) else '\0' for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [*found, (ROOT / 'tools/setup_env.sh').read_text(encoding='utf-8')]


def test_messages_are_those_of_the_code():
    """What the page on troubleshooting quotes, `...` standing for any text, occurs in one string of the code."""
    table = re.findall(r'^\| `(.+?)` \|', prose(ROOT / 'docs/troubleshooting.md'), re.M)
    assert len(table) > 40
    code = strings_of_the_code()
    foreign = {"No module named 'mmcv._ext'"}  # Python's own
    patterns = {message: re.compile('.*'.join(map(re.escape, message.split('...'))), re.S) for message in table}
    assert not [m for m, pattern in patterns.items() if m not in foreign and not any(map(pattern.search, code))]


def test_site_builds_without_a_warning(tmp_path):
    """`make docs`, its pages at another place: the build is strict, and no link within the site is dead."""
    zensical = pytest.importorskip('zensical', reason="pip install '.[docs]'").__name__
    pages = tmp_path / 'build/pages'
    staged = subprocess.run(
        ['make', '--no-print-directory', 'docs-pages', f'PAGES={pages}'], cwd=ROOT, capture_output=True, text=True
    )
    assert staged.returncode == 0, staged.stderr
    config = (ROOT / 'zensical.toml').read_text(encoding='utf-8').replace('paths = ["."]', f'paths = ["{ROOT}"]')
    (tmp_path / 'zensical.toml').write_text(config, encoding='utf-8')
    command = [sys.executable, '-m', zensical, 'build', '--strict']
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert 'No issues found' in built.stdout + built.stderr
    assert 'griffe' not in built.stdout + built.stderr, 'a docstring that the reference cannot read'
    site = tmp_path / 'site'
    dead, remote = set(), set()
    for page in site.rglob('*.html'):
        html = page.read_text(encoding='utf-8')
        for target in re.findall(r'(?:href|src)="?([^"\s>]+)', html):
            internal = page.name != '404.html' and not re.match(r'[a-z]+:|#|//', target)
            if internal and not (page.parent / target.partition('#')[0]).exists():
                dead.add(f'{page.relative_to(site)}: {target}')
        remote |= set(re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="?(https?://[^"\s>]+)', html))
    assert not dead
    assert not remote, 'the site would load these from another host'
