import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from rayinterp.config import CorpusConfig
from rayinterp.corpus import cut_file, digest, first_of_each, number_shards, quotas, run_corpus, split_of, windows
from rayinterp.documents import Dropped
from rayinterp.errors import UserError
from rayinterp.planted import PlantedTokenizer
from rayinterp.run import open_run, run_stage
from rayinterp.tables import SCHEMAS, Tables
from tests.conftest import planted_config
from tests.tables_equal import assert_tables_equal


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
    dropped = Dropped()
    rows = list(cut_file(3, str(path), quota, Characters(), config(**values), 0, dropped))
    return rows, +dropped.counts


def test_more_files_than_ids_have_room_for_are_refused(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "abcdefgh" * 4}) + "\n")
    arguments = (str(path), 9, Characters(), config(), 0, Dropped())
    assert next(cut_file((1 << 19) - 1, *arguments))["sequence_id"] < 2**63
    with pytest.raises(UserError, match="more than 524,288 files"):
        next(cut_file(1 << 19, *arguments))


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


def windows_table(token_ids):
    rows = [
        {"file_number": 0, "sequence_id": i, "document_id": i, "subset": "a", "split": "train", "token_ids": ids}
        for i, ids in enumerate(token_ids)
    ]
    return pa.Table.from_pylist(
        [{**r, "text": "x", "digest": digest(str(r["token_ids"]))} for r in rows], SCHEMAS["windows"]
    )


def test_the_first_of_equal_windows_stays_and_the_rest_are_numbered_through():
    table = windows_table([[1, 2], [2, 1], [1, 2], [3], [2, 1], [4]])
    keep = first_of_each(table["digest"].combine_chunks())
    assert keep.tolist() == [True, True, False, True, False, True]
    batches = number_shards(iter(table.to_batches(max_chunksize=2)), keep, shard_size=3)
    numbered = pa.Table.from_batches(batches)
    assert numbered["sequence_id"].to_pylist() == [0, 1, 3, 5]
    assert list(zip(numbered["shard"].to_pylist(), numbered["row"].to_pylist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (1, 0)
    ]  # fmt: skip


def test_a_copy_that_differs_in_white_space_is_the_same_text():
    assert digest(" the  end\nof it") == digest("the end of it ") != digest("the end of\nits")


def test_quotas_add_up():
    assert quotas(10, 4) == [3, 3, 2, 2]


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


SENTENCE = "the sailor sees the harbor near the ship . "


def write_files(folder, damage=True):
    """Three files of planted words; with `damage`, a bad line in the first and the third cut off."""
    folder.mkdir()
    words = [f"the {w} finds a lemon near the " for w in ("sailor", "tide", "ship", "river", "bank", "wind", "lamp")]
    for number in range(3):
        lines = [json.dumps({"text": (words[number + i] + SENTENCE) * 4}) for i in range(5)]
        if damage and number == 0:
            lines.insert(2, '{"text": "unfinished')
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    if damage:
        import gzip

        whole = gzip.compress((folder / "2.jsonl").read_bytes())
        (folder / "2.jsonl").unlink()
        (folder / "2.jsonl.gz").write_bytes(whole[: len(whole) - 12])


def test_damage_is_counted_and_named_and_the_rest_is_kept(tmp_path, ray_session):
    write_files(tmp_path / "in")
    corpus = f"{{dataset: {tmp_path / 'in'}, num_sequences: 60, sequence_length: 8, shard_size: 4}}"
    tables = Tables(str(tmp_path / "run"))
    counts = run_corpus(planted_config(tmp_path / "run", f"corpus={corpus}"), tables)
    assert counts["corrupt_line"] == counts["corrupt_file"] == 1
    assert counts["duplicate"] > 0
    rows = {row["file_number"]: row for row in tables.read("corpus_files").to_pylist()}
    assert rows[0]["damaged"] == [f"corrupt_line: file://{tmp_path}/in/0.jsonl:3"]
    assert rows[1]["damaged"] == []
    (damage,) = rows[2]["damaged"]
    assert damage.startswith(f"corrupt_file: file://{tmp_path}/in/2.jsonl.gz (EOFError")
    assert tables.count("sequences") == counts["sequences"] > 0
    assert not tables.exists("windows")


def test_a_corpus_that_was_cut_in_half_goes_on_with_the_files_that_are_left(tmp_path, ray_session, monkeypatch):
    write_files(tmp_path / "in", damage=False)
    corpus = f"{{dataset: {tmp_path / 'in'}, num_sequences: 60, sequence_length: 8, shard_size: 4}}"
    whole, halved = Tables(str(tmp_path / "whole")), Tables(str(tmp_path / "halved"))
    run_corpus(planted_config(tmp_path / "whole", f"corpus={corpus}"), whole)
    config = planted_config(tmp_path / "halved", f"corpus={corpus}")

    def killed(self, table, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            run_corpus(config, halved)
    assert halved.count("corpus_files") == 3 and not halved.exists("sequences")
    halved.open("corpus_files").delete("file_number = 1")  # its windows are there, the row that says so is not
    run_corpus(config, halved)
    assert_tables_equal(whole, halved, ["sequences", "corpus_files"])


def test_a_corpus_without_a_sequence_is_refused_and_the_way_out_works(tmp_path, ray_session):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps({"text": "the ship near the harbor near a door ."}))
    tables = Tables(str(tmp_path / "run"))

    def config(length):
        return planted_config(tmp_path / "run", f"corpus={{dataset: {tmp_path / 'in'}, sequence_length: {length}}}")

    with pytest.raises(UserError, match=r"document_too_short.*corpus\.sequence_length"):
        run_stage(open_run(config(16), ("corpus",)), "corpus")
    run_stage(open_run(config(8), ("corpus",)), "corpus")
    assert tables.count("sequences") == 1


def test_a_half_cut_corpus_is_not_gone_on_with_by_another_config_or_from_other_files(tmp_path, ray_session):
    write_files(tmp_path / "in", damage=False)
    corpus = f"{{dataset: {tmp_path / 'in'}, num_sequences: 200, sequence_length: 8}}"
    config = planted_config(tmp_path / "run", f"corpus={corpus}")
    run = open_run(config, ("corpus",))
    run_stage(run, "corpus")
    run.tables.drop("sequences")  # as if it had been killed before the last step
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        open_run(planted_config(tmp_path / "run", f"corpus={corpus}", "seed=1"), ("corpus",))
    (tmp_path / "in" / "0.jsonl").rename(tmp_path / "in" / "9.jsonl")
    with pytest.raises(UserError, match=r"input file 0 was .*0\.jsonl and is .*1\.jsonl"):
        run_stage(open_run(config, ("corpus",)), "corpus")


def test_several_files_give_the_same_corpus_by_one_worker_and_by_two(tmp_path, ray_session):
    write_files(tmp_path / "in", damage=False)
    (tmp_path / "in" / "3.jsonl").write_text((tmp_path / "in" / "0.jsonl").read_text() * 3)
    corpus = f"{{dataset: {tmp_path / 'in'}, num_sequences: 90, sequence_length: 8, shard_size: 4}}"
    one, two = Tables(str(tmp_path / "one")), Tables(str(tmp_path / "two"))
    run_corpus(planted_config(tmp_path / "one", f"corpus={corpus}"), one)
    resources = "resources.corpus={num_actors: 2, num_cpus: 0.5}"
    run_corpus(planted_config(tmp_path / "two", f"corpus={corpus}", resources), two)
    assert_tables_equal(one, two, ["sequences", "corpus_files"])


def test_a_document_that_is_no_unicode_is_counted(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "abcdefgh\\ud83d"}\n{"text": "abcdefgh", "meta": {"pile_set_name": "\\ud83d"}}\n')
    dropped = Dropped()
    (row,) = cut_file(0, str(path), 9, Characters(), config(), 0, dropped)
    assert dropped.counts["document_not_unicode"] == 1
    assert row["subset"] == "?"
