# Copyright 2026 The trl-udm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import functools
import gzip
import json
import logging

import fsspec
import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets

from trl_udm.data import loading
from trl_udm.data.files import load_rows
from trl_udm.data.geneval import generate_geneval_prompts


SINGLE = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
POSITION = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a bench left of a dog",
}
COUNTING = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 2}],
    "exclude": [{"class": "dog", "count": 3}],
    "prompt": "a photo of two dogs",
}
QUOTED = 'A sign that says "Grüße"'


@pytest.fixture
def load_prompts(tmp_path):
    return functools.partial(loading.load_prompts, cache_dir=str(tmp_path / "cache"))


def write_lines(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_geneval_metadata_is_read(tmp_path, load_prompts, streaming):
    path = write_lines(tmp_path / "evaluation_metadata.jsonl", SINGLE, POSITION, COUNTING)
    dataset = load_prompts(path, task="geneval", streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == [{**SINGLE, "exclude": []}, {**POSITION, "exclude": []}, COUNTING]
    assert dataset.features == generate_geneval_prompts(1).features


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_generated_prompts_survive_a_file(tmp_path, load_prompts, suffix, streaming):
    dataset = generate_geneval_prompts(50)
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        dataset.to_parquet(path)
    else:
        dataset.to_json(path, force_ascii=False)
    assert list(load_prompts(path, task="geneval", streaming=streaming)) == dataset.to_list()


@pytest.mark.parametrize("streaming", [False, True])
def test_text_lists_are_read_line_by_line(tmp_path, load_prompts, streaming):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"{QUOTED}\r\nOn the wall: “Floor 13½”\u2028in gold\n".encode("utf-8-sig"))
    prompts = [QUOTED, "On the wall: “Floor 13½”\u2028in gold"]
    assert list(load_prompts(path, streaming=streaming)) == [{"prompt": prompt} for prompt in prompts]
    assert list(load_prompts(path, task="ocr", streaming=streaming)) == [
        {"prompt": prompts[0], "target_text": "Grüße"},
        {"prompt": prompts[1], "target_text": "Floor 13½"},
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_target_column_goes_before_the_quotes_and_other_columns_stay(tmp_path, load_prompts, streaming):
    path = tmp_path / "prompts.csv"
    path.write_text('id,caption,target_text\n1,"A ""red"" door that reads PULL",PULL\n02,"A sign: ""Exit""",\n')
    dataset = load_prompts(path, task="ocr", prompt_column="caption", streaming=streaming)
    assert list(dataset) == [
        {"prompt": 'A "red" door that reads PULL', "target_text": "PULL", "id": "1"},
        {"prompt": 'A sign: "Exit"', "target_text": "Exit", "id": "02"},
    ]


# What pandas or Arrow would take for a missing value, a number, a date or a truth value
TEXTS = "NA null nan None N/A #N/A 007 1e5 1,000 -inf 0x1F 2024-01-02 TRUE".split()
TEXTS += [" x ", "two\nlines", "two\r\nlines", 'a "quoted" text', "\u65e5\u672c"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("values", [TEXTS, TEXTS[6:8], TEXTS[11:13]], ids=["all", "numbers", "dates"])
@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.json", "a.JSONL", "folder"])
def test_text_stays_as_it_is(tmp_path, load_prompts, name, values, streaming):
    path = tmp_path / name
    rows = [{"prompt": 'A "sign"', "target_text": value, "other": value} for value in values]
    if path.suffix.lower() in (".csv", ".tsv", ""):
        separator = "\t" if name == "a.TSV" else ","
        quoted = [[f'"{cell.replace(chr(34), 2 * chr(34))}"' for cell in row.values()] for row in rows]
        text = "\n".join(separator.join(row) for row in [list(rows[0]), *quoted])
        if name == "folder":
            path.mkdir()
            path = path / "train.csv"
        path.write_bytes(text.encode())
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    else:
        write_lines(path, *rows)
    assert list(load_prompts(tmp_path / name, task="ocr", streaming=streaming)) == rows
    assert load_rows(tmp_path / name, cache_dir=str(tmp_path / "cache")).to_list() == rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv.gz", ".json", ".jsonl", ".JSONL.gz", ".txt.xz"])
def test_encodings_and_compressions_are_recognized(tmp_path, load_prompts, suffix, encoding, ends, streaming):
    path = tmp_path / f"prompts{suffix}"
    row = json.dumps({"prompt": QUOTED}, ensure_ascii=False)
    cell = QUOTED.replace('"', '""')
    texts = {".txt": QUOTED, ".json": f"[{row}]", ".jsonl": row}
    text = texts.get("." + suffix.split(".")[1].lower(), f'prompt{ends}"{cell}"') + ends
    with fsspec.open(path, "wb", compression="infer") as file:
        file.write(text.encode(encoding))
    assert list(load_prompts(path, streaming=streaming)) == [{"prompt": QUOTED}]


def test_other_encodings_and_separators_can_be_named(tmp_path, load_prompts):
    path = tmp_path / "prompts.csv"
    path.write_bytes("prompt;n\nGrüße;1\n".encode("latin-1"))
    assert list(load_prompts(path, encoding="latin-1", delimiter=";")) == [{"prompt": "Grüße", "n": "1"}]


def test_columns_may_have_several_types_and_gaps(tmp_path, load_prompts):
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b", "x": "one", "y": [1, "two"]}, {"prompt": "c\0"}]
    dataset = load_prompts(write_lines(tmp_path / "prompts.jsonl", *rows), split="train[1:]")
    assert list(dataset) == [{"prompt": "b", "x": "one", "y": [1, "two"]}, {"prompt": "c\0", "x": None, "y": None}]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prompt_column_that_is_left_out_is_told(tmp_path, load_prompts, caplog, streaming):
    path = write_lines(tmp_path / "prompts.jsonl", {"prompt": "a", "caption": "b", "n": 1})
    with caplog.at_level(logging.WARNING):
        assert list(load_prompts(path, prompt_column="caption", streaming=streaming)) == [{"prompt": "b", "n": 1}]
    assert "The column `prompt` is left out, because `prompt_column` is 'caption'." in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *((f"a{suffix}", b"", "it has no row. A file may be .txt,") for suffix in (".txt", ".csv", ".json", ".jsonl")),
        ("a.csv", b"prompt,target_text\n", "it has no row"),
        ("a.json", b"[]", "it has no row"),
        ("a.csv", b"prompt\n\xe9\n", "it is not utf-8: .* byte 0xe9 .* Name its `encoding`, such as 'latin-1'"),
        ("a.txt", b"\xff\xfeab\x00", "it is not utf-16: "),
        ("a.txt.gz", b"text", "it cannot be decompressed: "),
        ("a.txt.gz", gzip.compress(b"a long text", mtime=0)[:-9], "it cannot be decompressed: "),
        ("a.csv", b"prompt,n,prompt\na,b,c\n", r"it has several columns of the names \['prompt'\]"),
        ("a.csv", b"prompt,n\na,b\nc,d,e\n", "it cannot be read at line 3: there are 3 cells for 2 columns"),
        ("a.csv", b'prompt\n"a\n', "it cannot be read at line 2: unexpected end of data"),
        ("a.xlsx", b"PK", r"it has another suffix. A file may be \.txt, .* \(each also compressed, .* or \.parquet"),
        ("a.parquet", b"PAR1", "it cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, load_prompts, name, content, message, streaming):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"`path_or_name` must name rows .* got '.*{name}': {message}"):
        list(load_prompts(path, streaming=streaming))


def test_options_of_other_sources_and_missing_files_are_refused(tmp_path, load_prompts):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_prompts(tmp_path / "none.jsonl")
    path = write_lines(tmp_path / "prompts.jsonl", {"prompt": "a"})
    with pytest.raises(TypeError, match=r"\['field'\] are options of other sources, got them for '.*prompts.jsonl'"):
        load_prompts(path, field="data")
    with pytest.raises(ValueError, match='Unknown split "test"'):
        load_prompts(path, split="test")


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_load_by_split(tmp_path, load_prompts, streaming):
    folder = tmp_path / "dataset"
    folder.mkdir()
    generate_geneval_prompts(10, {"colors": 1}).to_parquet(folder / "train.parquet")
    evaluation = generate_geneval_prompts(5, {"position": 1})
    evaluation.to_parquet(folder / "test.parquet")
    dataset = load_prompts(folder, task="geneval", split="test", streaming=streaming)
    assert list(dataset) == evaluation.to_list()


def test_tasks_can_be_joined(tmp_path, load_prompts):
    geneval = load_prompts(write_lines(tmp_path / "geneval.jsonl", POSITION), task="geneval")
    ocr = load_prompts(write_lines(tmp_path / "ocr.txt", QUOTED), task="ocr")
    joined = concatenate_datasets([geneval, ocr])
    assert joined[0] == {**POSITION, "exclude": [], "target_text": None}
    assert joined[1] == {"prompt": QUOTED, "target_text": "Grüße", "tag": None, "include": None, "exclude": None}


CAT = {**SINGLE, "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("geneval", [SINGLE, CAT], r"Row 1 \('a photo of a cat'\): `include\[0\].class` must be .* got 'cat'"),
        ("geneval", [SINGLE, {**SINGLE, "tag": 3}], r"Row 1 \('a photo of a bench'\): `tag` must be one of .* got 3"),
        ("geneval", [SINGLE, {**SINGLE, "prompt": ["x"]}], r"Row 1: `prompt` must be a string .* got \['x'\]"),
        ("geneval", [SINGLE, "{"], "Row 1: the line must be JSON, got '{': "),
        ("geneval", [SINGLE, "[1]"], r"Row 1: the line must be a JSON object, got '\[1\]'"),
        ("geneval", [SINGLE, ""], "Row 1: the line must be JSON, got ''"),
        (None, [SINGLE, {"prompt": " "}], "Row 1: `prompt` must be a string that is not blank, got ' '"),
        (None, [SINGLE, {"id": 1, "caption": "x"}], r"got None. The row has \['caption', 'id'\]: .* `prompt_column`"),
        (
            "ocr",
            [{"prompt": QUOTED}, SINGLE],
            "Row 1: `prompt` must have its target text in double quotes, got 'a photo",
        ),
        ("ocr", [{"prompt": QUOTED}, {"prompt": "x", "target_text": " "}], r"Row 1 \('x'\): `target_text` .* got ' '"),
        ("ocr", [{"prompt": QUOTED}, {"prompt": "x", "target_text": 7}], r"Row 1 \('x'\): `target_text` .* got 7"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, load_prompts, task, rows, message, streaming):
    path = write_lines(tmp_path / "prompts.jsonl", *rows)
    options = {"task": task, "streaming": streaming, "class_names": ["bench", "dog"]}
    if not streaming:
        with pytest.raises(ValueError, match=message):
            load_prompts(path, **options)
        return
    passing = iter(load_prompts(path, **options))
    assert next(passing)["prompt"] == rows[0]["prompt"]
    with pytest.raises(ValueError, match=message):
        next(passing)


def test_blank_lines_of_a_list_are_named(tmp_path, load_prompts):
    with pytest.raises(ValueError, match="Row 1: `prompt` must be a string that is not blank, got ''"):
        load_prompts(write_lines(tmp_path / "prompts.txt", "a bench", "", "a cow"))


def test_an_unknown_task_is_refused(load_prompts):
    with pytest.raises(ValueError, match="`task` must be 'geneval', 'ocr' or `None`, got 'shapes'"):
        load_prompts("prompts.txt", task="shapes")
