import pytest

from litseek.data.cache import cached
from litseek.errors import LitseekError


def test_it_builds_once_per_dependency(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "x").write_text("done")

    first = cached(tmp_path, "thing", {"a": 1}, build)
    assert cached(tmp_path, "thing", {"a": 1}, build) == first
    assert (first / "x").read_text() == "done"
    assert cached(tmp_path, "thing", {"a": 2}, build) != first
    assert len(built) == 2


def test_an_interrupted_build_leaves_nothing_behind(tmp_path):
    def dies(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "thing", 1, dies)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_builders_wins(tmp_path):
    def build(folder):
        cached(tmp_path, "thing", 1, lambda f: (f / "x").write_text("other"))
        (folder / "x").write_text("mine")

    assert (cached(tmp_path, "thing", 1, build) / "x").read_text() == "other"


def test_a_full_disk_is_one_sentence(tmp_path):
    def build(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(LitseekError, match="cannot write the data cache: No space left on device"):
        cached(tmp_path, "thing", 1, build)
