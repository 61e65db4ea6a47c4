"""Answer keys from class folders and from tables."""

from pathlib import Path

import pytest
from conftest import image_files

from retrieval.errors import InputError
from retrieval.server.answer_key import AnswerKey, key_of_folders, key_of_table


def test_class_folders_are_a_key():
    key = key_of_folders(image_files(["a/1.jpg"]), image_files(["a/2.jpg", "b/3.jpg"]))
    assert key == AnswerKey({"a/1.jpg": "a"}, {"a/2.jpg": "a", "b/3.jpg": "b"})


def test_a_table_of_answers_is_a_key(tmp_path):
    table = tmp_path / "answers.csv"
    table.write_text("\ufeffname,identity\n1.jpg, Ann\n\n2.jpg,Ann\n", encoding="utf-8")
    key = key_of_table(table, image_files(["1.jpg"]), image_files(["2.jpg", "3.jpg"]))
    assert key == AnswerKey({"1.jpg": "Ann"}, {"2.jpg": "Ann", "3.jpg": None})


TABLES = {
    "line 2: 'a,b,c' is not of the form name,identity": "name,identity\na,b,c\n",
    "line 1: there is no query or gallery image 9.jpg": "9.jpg,Ann\n",
    "line 2: 1.jpg is Ann on an earlier line": "1.jpg,Ann\n1.jpg,Bob\n",
    "lacks queries: 1 (1.jpg)": "2.jpg,Ann\n",
    "every score would be 0": "1.jpg,Ann\n2.jpg,Bob\n",
    "is not a CSV table in UTF-8": b"\xff,a\n",
}


@pytest.mark.parametrize("sentence", TABLES)
def test_a_table_that_is_none_says_where(tmp_path, sentence):
    table = tmp_path / "answers.csv"
    content = TABLES[sentence]
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as refused:
        key_of_table(table, image_files(["1.jpg"]), image_files(["2.jpg"]))
    assert sentence in str(refused.value)


@pytest.mark.parametrize("name", ["query/1.jpg", "gallery/2.jpg", "data/test/gallery/2.jpg"])
def test_a_name_with_the_images_folder_is_told_how_to_be_written(tmp_path, name):
    (tmp_path / "answers.csv").write_text(f"name,identity\n{name},Ann\n")
    with pytest.raises(InputError, match=f"line 2: .*image {name}: write {Path(name).name}$"):
        key_of_table(tmp_path / "answers.csv", image_files(["1.jpg"]), image_files(["2.jpg"]))


def test_a_name_of_a_query_and_a_gallery_image_can_have_no_line():
    with pytest.raises(InputError, match=r"rename 1\.jpg"):
        key_of_table(Path("none.csv"), image_files(["1.jpg"]), image_files(["1.jpg"]))
