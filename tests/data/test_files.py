import bz2
import gzip
import json
import lzma

import pytest

from litseek.data.corpora import Files
from litseek.data.files import read_jsonl, rows
from litseek.errors import LitseekError

PACKERS = {"": lambda b: b, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("packer", PACKERS)
def test_text_and_jsonl_read_plain_and_packed(tmp_path, packer):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in ("one", "two\u2028still two\r", "", "three"))
    (tmp_path / f"a.jsonl{packer}").write_bytes(PACKERS[packer](lines.encode()))
    (tmp_path / f"b.txt{packer}").write_bytes(PACKERS[packer](b"whole\ntext"))
    found = [d.text for d in Files([str(tmp_path / "*")]).documents()]
    assert found == ["one", "two\u2028still two\r", "three", "whole\ntext"]


def test_csv_parquet_and_arrow_read_by_field(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"body": ["one", "two"], "id": [1, 2]})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "b.csv")
    assert [d.text for d in Files([str(tmp_path / "*")], field="body").documents()] == ["one", "two"] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [("{bad", r"a.jsonl:3: not a line of JSON"), ("[1]", r"a.jsonl:3: a row must be a JSON object, not list")],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n' + line + '\n{"text": "y"}\n')
    with pytest.raises(LitseekError, match=message):
        list(read_jsonl(path))


def test_a_row_without_the_field_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x"}\n')
    with pytest.raises(LitseekError, match=r"a.jsonl:1: no field 'text'; this row has content"):
        list(Files(str(path)).documents())
    path.write_text('{"text": 3}\n')
    with pytest.raises(LitseekError, match=r"a.jsonl:1: field 'text' holds int"):
        list(Files(str(path)).documents())


@pytest.mark.parametrize("packer", [".gz", ".xz"])
def test_a_file_cut_short_is_named(tmp_path, packer):
    data = PACKERS[packer](b"".join(b'{"text": "%d"}\n' % i for i in range(5000)))
    path = tmp_path / f"a.jsonl{packer}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LitseekError, match=r"a.jsonl.*damaged or cut short after line \d+"):
        list(rows(path))


def test_unknown_kinds_and_missing_files_are_refused_at_once(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(LitseekError, match=r"a.bin: cannot tell the kind"):
        Files(str(tmp_path / "a.bin"))
    with pytest.raises(LitseekError, match=r"matches no file"):
        Files(str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"data.files is empty"):
        Files([])


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LitseekError, match=r"a.txt: not UTF-8 text \(byte 3\)"):
        list(Files(str(tmp_path / "a.txt")).documents())
