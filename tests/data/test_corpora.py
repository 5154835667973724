import pytest

from litseek.data.corpora import Files, HubDataset, StandardLibrary
from litseek.errors import LitseekError


def test_standard_library_has_sources_and_topics_but_no_tests():
    names = [p.relative_to(StandardLibrary().root).as_posix() for p in StandardLibrary().paths()]
    assert {"json/decoder.py", "pydoc_data/topics.py", "os.py"} <= set(names)
    assert not [n for n in names if n.startswith("test/") or "site-packages" in n]
    assert len(StandardLibrary(tests=True).paths()) > len(names) + 300


def test_packages_keep_only_these_names():
    names = {d.name for d in StandardLibrary(packages=["json", "bisect"]).documents()}
    assert "bisect.py" in names and "json/__init__.py" in names
    assert all(n.startswith(("json/", "bisect")) for n in names)


def test_identity_changes_with_the_content(tmp_path):
    small, smaller = StandardLibrary(packages=["json"]), StandardLibrary(packages=["bisect"])
    assert small.identity() == StandardLibrary(packages=["json"]).identity() != smaller.identity()
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = Files(str(file)).identity()
    file.write_text("two, longer")
    assert Files(str(file)).identity() != before


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_dataset_reads_local_builders(tmp_path, streaming):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n{"text": "three"}\n')
    corpus = HubDataset("json", data_files=str(file), streaming=streaming, limit=3)
    assert [d.text for d in corpus.documents()] == ["one", "two"]
    with pytest.raises(LitseekError, match="no text in field 'body'; the fields are text"):
        list(HubDataset("json", data_files=str(file), field="body", streaming=streaming).documents())


def test_a_dataset_that_cannot_load_is_one_sentence(tmp_path):
    with pytest.raises(LitseekError, match="datasets cannot load"):
        HubDataset(str(tmp_path / "nothing")).load()


def test_a_damaged_row_of_a_stream_is_one_sentence(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{bad\n')
    with pytest.raises(LitseekError, match=r"^datasets cannot (load|go on reading) 'json': [^\n]+$"):
        list(HubDataset("json", data_files=str(file)).documents())
