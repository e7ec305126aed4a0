import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rayinterp.config import CorpusConfig
from rayinterp.corpus import cut_file, list_files, number_shards, quotas, read_documents, split_of, windows
from rayinterp.errors import UserError
from rayinterp.planted import PlantedTokenizer


class Characters:
    """One token per character."""

    all_special_ids = (ord("#"),)

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


def config(**values):
    return CorpusConfig(**{"dataset": "x", "sequence_length": 8, **values})


def document(text):
    return {"text": text, "meta": {"pile_set_name": "books"}}


def cut(tmp_path, documents, quota=100, **values):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps(document(text)) for text in documents))
    return cut_file(3, str(path), quota, Characters(), config(**values), seed=0)


def test_windows_tile_a_document_and_the_rest_is_dropped():
    dropped = Counter()
    found = windows(document("abcdefgh12345678xyz"), Characters(), config(), 0, dropped)
    assert [(number, text) for number, _, text in found] == [(0, "abcdefgh"), (1, "12345678")]


def test_what_is_left_out_is_counted(tmp_path):
    rows, dropped = cut(tmp_path, ["abcdefgh", "short", "", "caf\u00e9 au lait", "abc#efgh", "abcdefgh"])
    assert [row["text"] for row in rows] == ["abcdefgh"]
    assert dropped == {
        "document_too_short": 1,
        "document_without_text": 1,
        "not_ascii": 1,
        "special_token": 1,
        "duplicate": 1,
        "short_of_quota": 99,
    }


def test_non_ascii_text_is_kept_when_asked_for(tmp_path):
    rows, _ = cut(tmp_path, ["caf\u00e9 au lait"], ascii_only=False)
    assert rows[0]["text"] == "caf\u00e9 au "


def test_a_long_document_gives_a_seeded_sample_not_its_beginning(tmp_path):
    text = "".join(f"{i:08d}" for i in range(200))
    first, dropped = cut(tmp_path, [text], max_sequences_per_document=5)
    again, _ = cut(tmp_path, [text], max_sequences_per_document=5)
    assert first == again
    assert dropped["over_document_cap"] == 195
    assert [row["text"] for row in first] != [f"{i:08d}" for i in range(5)]


def test_copies_of_a_document_share_id_and_split_and_ids_are_unique(tmp_path):
    rows, _ = cut(tmp_path, ["abcdefgh12345678", "ABCDEFGH", "abcdefgh12345678!!!!!!!!"])
    assert len({row["sequence_id"] for row in rows}) == len(rows)
    assert all(row["sequence_id"] >> 44 == 3 for row in rows)
    assert rows[0]["document_id"] == rows[1]["document_id"]
    assert rows[0]["split"] == rows[1]["split"]


def test_splits_follow_their_shares_and_the_seed():
    splits = Counter(split_of(0, i, (0.4, 0.3, 0.3)) for i in range(20_000))
    assert splits["train"] == pytest.approx(8000, abs=250)
    assert splits["valid"] == pytest.approx(6000, abs=250)
    assert any(split_of(0, i, (0.4, 0.3, 0.3)) != split_of(1, i, (0.4, 0.3, 0.3)) for i in range(20))


def test_the_smallest_id_of_equal_windows_stays_whatever_the_order():
    columns = {
        "sequence_id": [30, 10, 20],
        "document_id": [3, 1, 2],
        "subset": ["a", "a", "b"],
        "split": ["train", "test", "valid"],
        "token_ids": [[1, 2], [1, 2], [2, 1]],
        "text": ["x", "x", "y"],
    }
    table, duplicates = number_shards(pa.table(columns), shard_size=1)
    assert duplicates == 1
    assert table["sequence_id"].to_pylist() == [10, 20]
    assert list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)) == [(0, 0), (1, 0)]


def test_quotas_add_up():
    assert quotas(10, 4) == [3, 3, 2, 2]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_every_format_is_read(tmp_path, ending):
    path = tmp_path / f"part.{ending}"
    lines = "".join(json.dumps(document(text)) + "\n" for text in ("one", "two"))
    if ending == "jsonl":
        path.write_text(lines)
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif ending == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines.encode()))
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist([document("one"), document("two")]), path)
    else:
        path.write_text("one")
    files = list_files(config(dataset=str(tmp_path)))
    assert len(files) == 1
    texts = [d["text"] for d in read_documents(files[0], seed=0)]
    assert texts == (["one"] if ending == "txt" else ["one", "two"])


def test_a_folder_without_readable_files_is_refused(tmp_path):
    (tmp_path / "notes.pdf").write_text("x")
    with pytest.raises(UserError, match=r"corpus\.dataset"):
        list_files(config(dataset=str(tmp_path)))


def test_the_planted_tokenizer_round_trips():
    tokenizer = PlantedTokenizer()
    ids = tokenizer.encode("the river . bank")
    assert tokenizer.decode(ids) == " the river . bank"
    assert np.all(np.asarray(ids) >= 0)


def test_run_corpus_fills_the_contract(planted_run):
    rows = planted_run.tables.read("sequences").to_pylist()
    size = planted_run.config.corpus.shard_size
    assert len(rows) == planted_run.config.corpus.num_sequences
    assert {len(row["token_ids"]) for row in rows} == {planted_run.config.corpus.sequence_length}
    assert len({tuple(row["token_ids"]) for row in rows}) == len(rows)
    ordered = sorted(rows, key=lambda row: row["sequence_id"])
    assert [(row["shard"], row["row"]) for row in ordered] == [(i // size, i % size) for i in range(len(rows))]
    splits = {}
    for row in rows:
        assert splits.setdefault(row["document_id"], row["split"]) == row["split"]
