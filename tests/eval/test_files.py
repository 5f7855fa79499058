"""Files of benchmarks and their images: where they are found, and what is said of missing or malformed ones."""

import base64
import csv
import hashlib
import io
import re

import pytest
from PIL import Image
from support.eval_data import WRITERS, mmbench, seed

from vtc.eval.files import DataError, DataFile, read_json, read_jsonl, read_tsv, require_fields
from vtc.eval.question import EncodedImage, ImageFile
from vtc.eval.tasks import TASKS
from vtc.images import ImageError

FILE = DataFile("questions", ("one/q.jsonl", "q.jsonl"), "download q.jsonl from the made-up site")


@pytest.mark.parametrize("layout", ["llava", "paper", "flat"])
def test_all_tasks_are_found_in_every_layout(tmp_path, layout):
    for write in WRITERS.values():
        write(tmp_path, layout)
    for name in WRITERS:
        task = TASKS[name](tmp_path)
        assert task.questions
        for question in task.questions:
            if question.image is not None:
                question.image.open()


@pytest.mark.parametrize("name", WRITERS)
def test_the_fingerprint_is_the_hash_of_the_questions(tmp_path, name):
    WRITERS[name](tmp_path)
    task = TASKS[name](tmp_path)
    assert task.fingerprint() == {"questions": hashlib.sha256(task.found["questions"].read_bytes()).hexdigest()}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("layout", ["llava", "paper", "flat"])
def test_each_missing_file_is_named_with_its_places_and_its_source(tmp_path, name, layout):
    WRITERS[name](tmp_path, layout)
    task = TASKS[name](tmp_path)
    for file in task.files:
        path = task.found[file.name]
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(DataError) as error:
            TASKS[name](tmp_path)
        assert str(error.value).startswith(f"found no {file.name} at {tmp_path / file.paths[0]}, ")
        assert all(str(tmp_path / place) in str(error.value) for place in file.paths)
        assert str(error.value).endswith(f"; {file.source}")
        (tmp_path / "elsewhere").rename(path)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("mmbench_cn", ("mmbench/mmbench_dev_cn_20231003.tsv",)),
        ("mmvet", ("mmvet/llava-mm-vet.jsonl", "mmvet/images")),
        ("mmvet", ("mm-vet/llava-mm-vet.jsonl", "mm-vet/mm-vet/images")),
        ("mmvet", ("mm-vet/llava-mm-vet.jsonl", "mmvet/mm-vet/images")),
    ],
)
def test_the_places_that_documents_name(tmp_path, name, places):
    WRITERS[name](tmp_path / "data")
    for file, place in zip(TASKS[name].files, places, strict=True):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        file.find(tmp_path / "data").rename(tmp_path / place)
    assert set(TASKS[name](tmp_path).found.values()) == {tmp_path / place for place in places}


def test_the_first_place_is_taken(tmp_path):
    (tmp_path / "q.jsonl").touch()
    assert FILE.find(tmp_path) == tmp_path / "q.jsonl"
    (tmp_path / "one").mkdir()
    (tmp_path / "one/q.jsonl").touch()
    assert FILE.find(tmp_path) == tmp_path / "one/q.jsonl"


def test_a_missing_image_is_found_when_it_is_opened(tmp_path):
    seed.write(tmp_path)
    (tmp_path / "seed_bench/SEED-Bench-image/1000000_2000000").unlink()
    task = TASKS["seed"](tmp_path)
    with pytest.raises(ImageError, match="1000000_2000000 does not exist; unpack the images"):
        task.questions[0].image.open()
    task.questions[1].image.open()


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b'{"a": "\xff"}'])
def test_json_that_cannot_be_read(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x.json is not JSON \(.*\); download it again"):
        read_json(tmp_path / "x.json")


def test_json_lines(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes('{"a": "1"}\r\n\n  \n{"a": "é\\n\u2028", "b": null}'.encode())
    assert read_jsonl(file, ["a"]) == [{"a": "1"}, {"a": "é\n\u2028", "b": None}]


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (b'{"a": 1, "b"', r"line 2 of .*x.jsonl is not JSON \(.*\); download the file again"),
        (b'{"a": "\xff", "b": 1}', r"line 2 of .*x.jsonl is not JSON \(.*\); download the file again"),
        (b'{"a": 1}', "line 2 of .*x.jsonl lacks b; is this the right file"),
        (b"[1]", "line 2 of .*x.jsonl is no JSON object, got list; is this the right file"),
    ],
)
def test_json_lines_that_cannot_be_read(tmp_path, second, problem):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1, "b": 2}\n' + second)
    with pytest.raises(DataError, match=problem):
        read_jsonl(file, ["a", "b"])


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("\n")
    with pytest.raises(DataError, match="x is empty; download it again"):
        read_jsonl(tmp_path / "x", [])
    (tmp_path / "x").write_text("a\tb\n")
    with pytest.raises(DataError, match="x has no rows; download it again"):
        read_tsv(tmp_path / "x", ["a"])


def test_fields_are_named(tmp_path):
    with pytest.raises(DataError, match="here lacks b, d; is this the right file"):
        require_fields({"a": 1, "c": 2}, ["a", "b", "c", "d"], "here")


def test_a_table_is_read_as_text_with_cells_of_any_size_and_content(tmp_path):
    file = tmp_path / "x.tsv"
    large = "A" * 200_000
    file.write_bytes(f'a\tb\tc\n1\t"x\ny\tz"\t1.0\n007\t"say ""é"""\t{large}\n\tNA\t\\n\n'.encode())
    before = csv.field_size_limit()
    assert before < len(large)
    rows = read_tsv(file, ["a"])
    assert csv.field_size_limit() == before
    assert [list(row.values()) for row in rows] == [
        ["1", "x\ny\tz", "1.0"],
        ["007", 'say "é"', large],
        ["", "NA", "\\n"],
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a\tb\n1\t2\n3", "row 2 of .* has not 2 cells; the file was cut: download it again"),
        (b"a\tb\n1\t2\t3\n", "row 1 of .* has not 2 cells"),
        (b'a\tb\n1\t2\n3\t"4', r"is malformed near line 2 \(.*\); download it again"),
        (b"a\tb\n1\t\xff\n", r"is malformed near line . \(.*\); download it again"),
        (b"a\tc\n1\t2\n", r"lacks the column\(s\) b, it has a, c; is this the right file"),
        (b"", r"lacks the column\(s\) a, b, it has none; is this the right file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, problem):
    (tmp_path / "x.tsv").write_bytes(content)
    before = csv.field_size_limit()
    with pytest.raises(DataError, match=problem):
        read_tsv(tmp_path / "x.tsv", ["a", "b"])
    assert csv.field_size_limit() == before


def test_a_cut_file_of_mmbench_is_refused_wherever_it_is_cut(tmp_path):
    mmbench.write(tmp_path)
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    content = path.read_bytes()
    for share in (0.999, 0.9, 0.5, 0.1, 0.0):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match=re.escape(str(path))):
            TASKS["mmbench"](tmp_path)


def encoded(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def test_an_image_is_opened_in_the_mode_of_its_file(tmp_path):
    for mode in ("P", "RGBA", "L", "RGB"):
        content = encoded(Image.new(mode, (3, 2)))
        (tmp_path / "image").write_bytes(content)
        assert ImageFile(tmp_path / "image").open().mode == mode
        image = EncodedImage(base64.b64encode(content).decode(), "row 1").open()
        assert (image.mode, image.size) == (mode, (3, 2))


@pytest.mark.parametrize("text", ["abc", "ab*cd", "/9j/4AA", "é"])
def test_text_that_is_no_base64(text):
    with pytest.raises(ImageError, match=r"row 1 is no image in base64 \(.*\); download the file again"):
        EncodedImage(text, "row 1").open()


def test_images_that_cannot_be_decoded(tmp_path):
    for content in (b"", b"text", encoded(Image.effect_noise((50, 50), 20), "JPEG")[:-300]):
        (tmp_path / "image").write_bytes(content)
        with pytest.raises(ImageError, match=r"the image .*image cannot be decoded \(.+\); copy or download it again"):
            ImageFile(tmp_path / "image").open()
        with pytest.raises(ImageError, match=r"the image row 1 cannot be decoded \(.+\)"):
            EncodedImage(base64.b64encode(content).decode(), "row 1").open()


def test_an_image_that_does_not_exist(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageError, match="does not exist; unpack the images"):
            ImageFile(path).open()
