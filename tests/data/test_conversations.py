import json

import pytest

from litseek.data.conversations import ConversationFiles, Docstrings, HubConversations, Problems
from litseek.errors import LitseekError


def test_docstrings_become_questions_and_answers():
    found = {q["content"]: a["content"] for q, a in Docstrings(packages=["json", "textwrap"])}
    (dedent,) = [a for q, a in found.items() if "textwrap.dedent" in q]
    assert dedent.startswith("Remove any common leading whitespace")
    assert any("json.decoder.JSONDecoder.raw_decode" in q for q in found)
    assert not any("._" in q for q in found), "private names are left out"
    assert all(0 < len(a) <= 400 for a in found.values())


def test_docstrings_respect_limit_and_length():
    assert len(list(Docstrings(packages=["json", "email"], limit=5))) == 5
    assert all(len(c[1]["content"]) <= 60 for c in Docstrings(packages=["email"], max_chars=60))
    assert list(Docstrings(packages=["json"])) == list(Docstrings(packages=["json"]))


def test_conversations_come_from_files_and_datasets(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{n}", "response": f"a{n}"}) + "\n" for n in range(4)))
    first = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]
    from_files = list(ConversationFiles(str(file), limit=3))
    assert from_files[0] == first and len(from_files) == 3
    assert list(HubConversations("json", data_files=str(file), limit=3)) == from_files
    file.write_text('{"prompt": "q"}\n')
    with pytest.raises(LitseekError, match=r"a.jsonl:1: no conversation"):
        list(ConversationFiles(str(file)))


def test_problems_take_the_first_of_an_endless_list():
    from litseek.data.arithmetic import Arithmetic

    problems = Problems(Arithmetic("sft"), count=3)
    found = list(problems)
    assert len(found) == 3 and found == list(problems)
    assert [m["role"] for m in found[0]] == ["user", "assistant"]
