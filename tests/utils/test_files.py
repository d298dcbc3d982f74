"""Files that are named by their content."""

from cbam_mmdet.utils.files import write_by_content


def test_a_file_that_was_changed_is_written_anew(tmp_path):
    folder = write_by_content(tmp_path, {'a.json': b'[1, 2]'})
    (folder / 'a.json').write_bytes(b'[1]')
    assert write_by_content(tmp_path, {'a.json': b'[1, 2]'}) == folder
    assert (folder / 'a.json').read_bytes() == b'[1, 2]'
    assert write_by_content(tmp_path, {'a.json': b'[1]'}) != folder
