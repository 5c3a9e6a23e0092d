"""A folder and a zip are listed, read and stamped in place."""

import hashlib
import multiprocessing
import os
import pickle

import numpy as np
import pytest

from shards.source import Source
from tests.shards.sources import csv_source, image_bytes, write_files, write_zip
from tracekin.config import UserError


def test_a_folder_and_its_zip_hold_the_same_files(tmp_path):
    files = csv_source(5) | {"a/b/deep.png": image_bytes(8, "PNG"), ".hidden/x.png": b"x", "__MACOSX/y.png": b"y"}
    folder, archive = write_files(tmp_path / "s", files), write_zip(tmp_path / "s.zip", files)
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    first, second = Source(folder), Source(archive)
    assert first.names == second.names
    assert len(first.names) == 7
    assert (first.images, first.tables) == (second.images, second.tables)
    for name in first.names:
        for source in (first, second):
            read, opener = pickle.loads(pickle.dumps((source.reader(name), source.opener(name))))
            with opener() as file:
                file.seek(3)
                assert read()[3:] == file.read()
        assert first.reader(name)() == second.reader(name)()


def read_all(readers):
    return hashlib.sha256(b"".join(read() for read in readers)).hexdigest()


def test_forked_processes_do_not_disturb_each_other(tmp_path):
    """An open zip that parent and children shared would have one position in the file for all of them."""
    files = {f"{i}.png": np.random.default_rng(i).bytes(50_000) for i in range(40)}
    source = Source(write_zip(tmp_path / "s.zip", files))
    readers = [source.reader(name) for name in source.names]
    expected = read_all(readers)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(read_all, [readers] * 40, chunksize=1) == [expected] * 40


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_stamp_changes_with_its_own_file_only(tmp_path, kind):
    def stamps(files, time):
        if kind == "zip":
            source = Source(write_zip(tmp_path / "s.zip", files))
        else:
            source = Source(write_files(tmp_path / "s", files))
            for name in files:
                os.utime(tmp_path / "s" / name, ns=(time.get(name, 5), time.get(name, 5)))
        return {name: source.stamp(name) for name in source.names}

    files = {"a.png": b"same", "b.png": b"same"}
    before = stamps(files, {})
    assert before == stamps(files, {})
    after = stamps(files | {"b.png": b"else"}, {"b.png": 6})
    assert after["a.png"] == before["a.png"]
    assert after["b.png"] != before["b.png"]


def test_a_zip_stamp_is_that_of_the_content(tmp_path):
    first = Source(write_zip(tmp_path / "a.zip", {"x.png": b"1", "y.png": b"2"}))
    second = Source(write_zip(tmp_path / "b.zip", {"x.png": b"2", "y.png": b"1"}))
    assert first.stamp("x.png") == second.stamp("y.png") != second.stamp("x.png")


def test_a_file_that_has_gone_is_one_clear_line(tmp_path):
    source = Source(write_files(tmp_path / "s", {"a.png": b"a"}))
    (tmp_path / "s" / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png: No such file"):
        source.stamp("a.png")


def test_names_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / os.fsdecode(b"Andr\xe9.png")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"Andr.*no UTF-8; rename"):
        Source(tmp_path / "s")


def test_columns_without_a_name_and_commas_at_the_end_of_lines_are_overlooked(tmp_path):
    source = Source(write_files(tmp_path / "s", {"t.csv": ",a,b,,\n0,1,2,,\n1,3,4\n2,5,6,\n"}))
    assert source.table("t.csv", ["a"]) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}, {"a": "5", "b": "6"}]
