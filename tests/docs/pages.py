"""The pages of README, CONTRIBUTING and docs/: their fenced blocks, links and headings."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]

FENCE = re.compile(r'^( *)(`{3,})(\w*) *\n(.*?)^\1\2 *$', re.M | re.S)
COMMENT = re.compile(r'<!-- *(.*?) *-->\s*$')
LINK = re.compile(r'(!?)\[[^\]]*\]\(([^)\s]+)\)')
REFERENCE = re.compile(r'^\[[^\]]+\]: (\S+)$', re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block, and the HTML comment on the line before it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding='utf-8')
    found = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()].rstrip('\n').rpartition('\n')[2]
        comment = COMMENT.match(before.strip())
        body = re.sub(f'^{fence[1]}', '', fence[4], flags=re.M)
        found.append(Block(page, text.count('\n', 0, fence.start()) + 1, fence[3], body, comment[1] if comment else ''))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks, each of which leaves as many empty lines."""
    return FENCE.sub(lambda fence: '\n' * fence[0].count('\n'), page.read_text(encoding='utf-8'))


def links(page: Path) -> list[str]:
    """The targets of a page's links and images."""
    text = re.sub(r'`[^`\n]*`', '', prose(page))
    return [target for _, target in LINK.findall(text)] + REFERENCE.findall(text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the generator and git forges make them."""
    found = set()
    for heading in re.findall(r'^#+ (.+)$', prose(page), re.M):
        plain = re.sub(r'[`*]', '', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading))
        found.add(re.sub(r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', plain.lower()).strip()))
    return found
