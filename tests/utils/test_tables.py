"""A table in its three forms, against text written by hand."""

import csv

from cbam_mmdet.utils.tables import MINUS, Change, Column, Table, change, code


def test_markdown_and_csv_of_the_same_cells():
    header = ['name', 'count', Column('share', '.1%'), Column('cost', number=True), Column('place', code), 'empty']
    rows = [['a|b', 3, 0.12345, '1.5 M', 'layer*', None], ['c', 4000, None, 'failed', None, None]]
    assert Table(header, rows, nothing='-').markdown().splitlines() == [
        '| name | count | share | cost | place | empty |',
        '| --- | ---: | ---: | ---: | --- | ---: |',
        '| a\\|b | 3 | 12.3% | 1.5 M | `layer*` | - |',
        '| c | 4000 | - | failed | - | - |',
    ]
    written = list(csv.reader(Table(header, rows).csv().splitlines()))
    assert written == [
        ['name', 'count', 'share', 'cost', 'place', 'empty'],
        ['a|b', '3', '0.12345', '1.5 M', 'layer*', ''],
        ['c', '4000', '', 'failed', '', ''],
    ]


def test_names_are_no_html_in_markdown():
    table = Table(['name', Column('as code', code)], [['<img src=x>&', '<b>']])
    assert table.markdown().splitlines()[2] == '| &lt;img src=x>& | `<b>` |'


def test_floats_have_three_decimals_and_changes_their_sign():
    table = Table(
        ['', 'before', 'after', 'difference'], [['x', 0.5, 0.25, change(0.5, 0.25)], ['y', 1.0, 1.0, Change()]]
    )
    assert table.markdown().splitlines()[2:] == [
        f'| x | 0.500 | 0.250 | {MINUS}0.250 |',
        '| y | 1.000 | 1.000 | 0.000 |',
    ]
    assert table.csv().splitlines()[1] == 'x,0.5,0.25,-0.25'
    assert change(None, 1.0) is None and change(1.0, None) is None


def test_html_escapes_and_colours_a_change_where_more_is_better():
    rows = [['<b>', 1.0, change(0.0, 1.0)], ['y', 2.0, change(3.0, 2.0)]]
    page = Table(['name', 'value', 'difference'], rows, 'some', 'a & b').html()
    assert '<caption id="table-some">a &amp; b</caption>' in page
    assert '<th scope="row">&lt;b&gt;</th><td class="number">1.000</td><td class="number better">+1.000</td>' in page
    assert f'<td class="number worse">{MINUS}1.000</td>' in page
    assert 'worse' not in Table(['name', 'value', 'difference'], rows, better=False).html()


def test_a_row_for_each_record():
    columns = {'name': str.upper, Column('length', '04'): len}
    assert Table.of(['ab', 'c'], columns).markdown().splitlines()[2:] == ['| AB | 0002 |', '| C | 0001 |']
