import gzip
import json
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from rayinterp.config import CorpusConfig
from rayinterp.documents import Dropped, list_files, read_documents
from rayinterp.errors import UserError


def config(**values):
    return CorpusConfig(**{"dataset": "x", "sequence_length": 8, **values})


def document(text):
    return {"text": text, "meta": {"pile_set_name": "books"}}


def lines(*texts):
    return "".join(json.dumps(document(text)) + "\n" for text in texts).encode()


def read(path, **values):
    dropped = Dropped()
    return [d["text"] for d in read_documents(str(path), config(**values), 0, dropped)], dropped


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_every_format_is_read(tmp_path, ending):
    path = tmp_path / f"part.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([document("one"), document("two")]), path)
    else:
        encode = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}.get(ending, bytes)
        path.write_bytes(encode(b"one" if ending == "txt" else lines("one", "two")))
    (file,) = list_files(config(dataset=str(tmp_path)))
    texts, dropped = read(file)
    assert texts == (["one"] if ending == "txt" else ["one", "two"])
    assert not dropped.counts


def test_a_file_of_several_zstd_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(lines(text)) for text in ("one", "two", "three")))
    assert read(path)[0] == ["one", "two", "three"]


@pytest.mark.parametrize(("ending", "encode"), [("jsonl.zst", zstandard.compress), ("jsonl.gz", gzip.compress)])
def test_a_file_that_is_cut_off_gives_what_comes_before_and_is_named(tmp_path, ending, encode):
    path = tmp_path / f"a.{ending}"
    texts = [f"{i:06d}" for i in range(50_000)]
    whole = encode(lines(*texts))
    path.write_bytes(whole[: len(whole) // 2])
    found, dropped = read(path)
    assert 0 < len(found) < len(texts)
    assert found == texts[: len(found)]
    assert dropped.counts["corrupt_file"] == 1
    assert str(path) in dropped.named[-1] and "EOFError" in dropped.named[-1]


def test_bytes_that_are_no_archive_are_named(tmp_path):
    for ending in ("jsonl.zst", "jsonl.gz", "parquet"):
        path = tmp_path / f"a.{ending}"
        path.write_bytes(b"this is not what its name says" * 10)
        found, dropped = read(path)
        assert found == [] and dropped.counts == {"corrupt_file": 1}, ending


def test_a_damaged_row_group_does_not_take_the_others_along(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{i:08d} some text that fills a page" for i in range(300)]
    pq.write_table(pa.Table.from_pylist([document(t) for t in texts]), path, row_group_size=100, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.data_page_offset
    raw[start : start + 60] = b"\xff" * 60
    path.write_bytes(bytes(raw))
    found, dropped = read(path)
    assert found == texts[:100] + texts[200:]
    assert dropped.counts == {"corrupt_row_group": 1}
    assert "row group 1" in dropped.named[0]


def test_damaged_lines_are_counted_with_file_and_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("one") + b'{"text": \n' + b"[1, 2]\n" + b'{"text": "\xff\xfe"}\n\n' + lines("two"))
    found, dropped = read(path)
    assert found == ["one", "two"]
    assert dropped.named == [f"corrupt_line: {path}:{number}" for number in (2, 3, 4)]


def test_text_that_no_encoding_can_write_is_damage_of_its_place_alone(tmp_path):
    path = tmp_path / "a.parquet"
    as_text = pa.table({"text": pa.array(["one", "xy", "two"])})
    pq.write_table(as_text, path, row_group_size=1, compression="none", use_dictionary=False, write_statistics=False)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"xy", b"\xff\xfe"))
    found, dropped = read(path)
    assert found == ["one", "two"]
    assert dropped.counts == {"corrupt_row_group": 1}


def test_json_nested_a_thousand_deep_is_a_corrupt_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ' + b"[" * 200_000 + b"\n" + lines("one"))
    found, dropped = read(path)
    assert (found, dropped.counts) == (["one"], {"corrupt_line": 1})


def test_what_comes_before_junk_at_the_end_is_kept(tmp_path):
    texts = [f"{i:06d}" for i in range(20_000)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(*texts)) + b"junk")
    found, dropped = read(path)
    assert found == texts
    assert dropped.counts["corrupt_file"] == 1


def test_a_flipped_byte_loses_little_of_what_comes_before(tmp_path):
    rng = random.Random(0)
    texts = [f"{rng.random()}" for _ in range(100_000)]
    path = tmp_path / "a.jsonl.zst"
    raw = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(lines(*texts)))
    place = len(raw) * 3 // 4
    raw[place : place + 8] = bytes(8)
    path.write_bytes(raw)
    found, dropped = read(path)
    assert len(found) > len(texts) // 4
    assert dropped.counts["corrupt_file"] == 1


def test_folders_that_are_called_like_files_and_names_with_brackets(tmp_path):
    folder = tmp_path / "data[1]" / "part.parquet"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([document("one")]), folder / "0.parquet")
    (file,) = list_files(config(dataset=str(tmp_path / "data[1]")))
    assert read(file)[0] == ["one"]


def test_a_file_that_is_not_there_is_an_error_and_not_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.jsonl")


def test_files_are_read_through_any_filesystem():
    with fsspec.open("memory://pile/train/00.jsonl.zst", "wb") as file:
        file.write(zstandard.compress(lines("one", "two")))
    (found,) = list_files(config(dataset="memory://pile", files="train/*.jsonl.zst"))
    assert found == "memory:///pile/train/00.jsonl.zst"
    assert read(found)[0] == ["one", "two"]


def test_hugging_face_datasets_are_streamed_shard_by_shard(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(lines(f"{number}a", f"{number}b"))
    options = {"dataset": str(tmp_path), "reader": "datasets"}
    files = list_files(config(**options))
    assert len(files) == 3
    assert [text for file in files for text in read(file, **options)[0]] == ["0a", "0b", "1a", "1b", "2a", "2b"]


def test_an_unknown_dataset_is_refused_by_field(tmp_path):
    with pytest.raises(UserError, match=r"corpus\.dataset .*hf_split 'test'.*check the names"):
        list_files(config(dataset=str(tmp_path), reader="datasets", hf_split="test"))


@pytest.mark.parametrize("values", [{"hf_config": "en"}, {"hf_split": "test"}, {"reader": "datasets", "files": "*"}])
def test_an_option_that_would_not_take_effect_is_refused(values):
    with pytest.raises(ValidationError, match=r"takes? effect"):
        config(**values)


def test_a_folder_without_readable_files_is_refused(tmp_path):
    (tmp_path / "notes.pdf").write_text("x")
    with pytest.raises(UserError, match=r"corpus\.dataset"):
        list_files(config(dataset=str(tmp_path)))
