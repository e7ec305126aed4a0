from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from rayinterp.errors import UserError
from rayinterp.tables import KEYS, SCHEMAS, Committer, FragmentCommitter, Tables, embeddings_schema, sql_in, to_arrow
from tests.tables_equal import assert_tables_equal


def call(n, **columns):
    return {"request_hash": str(n), "feature_key": "a/1", **columns}


def test_a_node_that_does_not_see_the_run_directory_writes_nothing(tmp_path):
    """Lance would make the table there, and the driver commit files that nobody else can read."""
    rows = to_arrow("embeddings", [{"sequence_id": 1, "shard": 1}])
    with pytest.raises(UserError, match="holds no table embeddings on node"):
        Tables(str(tmp_path / "elsewhere")).write_fragments("embeddings", rows)
    assert not (tmp_path / "elsewhere").exists()


def test_every_column_has_a_sentence_and_every_key_is_a_column():
    assert SCHEMAS.keys() == KEYS.keys()
    for name, schema in SCHEMAS.items():
        assert set(KEYS[name]) <= set(schema.names)
        for field in schema:
            assert field.metadata[b"description"].endswith(b".") or b":" in field.metadata[b"description"], field


def test_the_first_write_of_a_key_wins(tmp_path):
    tables = Tables(str(tmp_path))
    tables.append("llm_calls", [call(1, response="first")])
    tables.append("llm_calls", [call(1, response="second"), call(2, response="new")])
    rows = {row["request_hash"]: row["response"] for row in tables.read("llm_calls").to_pylist()}
    assert rows == {"1": "first", "2": "new"}


def test_a_key_that_comes_twice_in_one_batch_is_written_once(tmp_path):
    tables = Tables(str(tmp_path))
    for expected in (1, 2):
        tables.append("llm_calls", [call(expected, response="a"), call(expected, response="b")])
        assert tables.read("llm_calls")["response"].to_pylist() == ["a"] * expected


def test_rows_can_be_added_without_a_look_at_keys(tmp_path):
    tables = Tables(str(tmp_path))
    for n in (1, 2):
        tables.add("llm_calls", [call(n, response="a")])
    assert tables.read("llm_calls")["request_hash"].to_pylist() == ["1", "2"]
    tables.append("llm_calls", [call(2), call(3)])
    assert tables.count("llm_calls") == 3


def test_a_committer_keeps_its_tables_compact(tmp_path, monkeypatch):
    monkeypatch.setattr("rayinterp.tables.COMMITS_BETWEEN_COMPACTIONS", 5)
    tables = Tables(str(tmp_path))
    monkeypatch.setattr("rayinterp.tables.KEPT_FOR_WRITERS", timedelta(0))  # else all of the last minutes stay
    committer = Committer(tables)
    for i in range(12):
        committer.add({"llm_calls": [call(i)]})
        committer.flush()
    assert tables.count("llm_calls") == 12
    assert len(tables.open("llm_calls").versions()) <= 6


def test_an_unknown_column_is_refused():
    with pytest.raises(KeyError, match="respnse"):
        to_arrow("llm_calls", [call(1, respnse="x")])


def test_reading_a_table_that_does_not_exist_gives_no_rows(tmp_path):
    tables = Tables(str(tmp_path))
    assert not tables.exists("scores")
    assert tables.count("scores") == 0
    assert tables.read("scores", ["value"]).num_rows == 0
    assert tables.distinct("scores", "feature_key") == set()


def test_fragments_are_invisible_until_committed_and_orphans_are_cleaned(tmp_path):
    tables = Tables(str(tmp_path))
    tables.create_empty("sequences")
    rows = to_arrow("sequences", [{"sequence_id": i, "shard": 0, "row": i} for i in range(4)])
    kept = tables.write_fragments("sequences", rows.slice(0, 2))
    tables.write_fragments("sequences", rows.slice(2, 2))
    assert tables.count("sequences") == 0
    tables.commit("sequences", kept)
    assert sorted(tables.read("sequences")["sequence_id"].to_pylist()) == [0, 1]
    tables.finish("sequences")
    assert len(list((tmp_path / "sequences.lance" / "data").iterdir())) == 1
    assert tables.open("sequences").version == max(v["version"] for v in tables.open("sequences").versions())
    assert len(tables.open("sequences").versions()) == 1


def test_stream_commit_yields_rows_only_when_they_are_visible(tmp_path, ray_session):
    import ray.data

    tables = Tables(str(tmp_path))
    tables.create_empty("embeddings")

    def write(item):
        rows = to_arrow("embeddings", [{"sequence_id": int(item["id"]), "shard": int(item["id"])}])
        return {"unit": item["id"], "fragments": tables.write_fragments("embeddings", rows)}

    dataset = ray.data.from_items([{"id": i} for i in range(6)]).map(write)
    units = []
    for row in tables.stream_commit("embeddings", dataset):
        assert row["unit"] in tables.finished_units("embeddings")
        units.append(row["unit"])
    assert sorted(units) == list(range(6))
    assert tables.count("embeddings") == 6


def test_a_row_that_does_not_pass_the_check_is_not_committed(tmp_path, ray_session):
    import ray.data

    tables = Tables(str(tmp_path))
    tables.create_empty("embeddings")

    def write(item):
        rows = to_arrow("embeddings", [{"sequence_id": int(item["id"]), "shard": int(item["id"])}])
        return {"unit": item["id"], "fragments": tables.write_fragments("embeddings", rows)}

    def check(row):
        if row["unit"] == 1:
            raise UserError("not this one")

    dataset = ray.data.from_items([{"id": i} for i in range(2)]).map(write)
    with pytest.raises(UserError, match="not this one"):
        list(tables.stream_commit("embeddings", dataset, check=check))
    assert 1 not in tables.finished_units("embeddings")


def test_a_unit_that_comes_twice_is_committed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("rayinterp.tables.COMMIT_SECONDS", 60.0)
    tables = Tables(str(tmp_path))
    tables.create_empty("embeddings")

    def fragments(unit):
        return tables.write_fragments("embeddings", to_arrow("embeddings", [{"sequence_id": unit, "shard": unit}]))

    committer = FragmentCommitter(tables, "embeddings")
    committer.add(1, fragments(1))
    committer.add(1, fragments(1))
    assert committer.flush() == [1]
    assert committer.add(1, fragments(1)) == [1]
    another = FragmentCommitter(tables, "embeddings")
    another.flush({7: fragments(7)})
    assert committer.flush({7: fragments(7), 8: fragments(8)}) == [7, 8], "what another driver's committer wrote"
    restarted = FragmentCommitter(tables, "embeddings")
    assert restarted.add(1, fragments(1)) == [1]
    restarted.add(2, fragments(2))
    restarted.flush()
    assert sorted(tables.read("embeddings")["shard"].to_pylist()) == [1, 2, 7, 8]


def test_what_fails_while_rows_are_made_is_raised_as_it_was(tmp_path):
    tables = Tables(str(tmp_path))
    tables.create_empty("windows")

    def batches():
        yield pa.RecordBatch.from_pylist([{"file_number": 0}], SCHEMAS["windows"])
        raise UserError("the reason")

    with pytest.raises(UserError, match="the reason"):
        tables.write_fragments("windows", batches())
    with pytest.raises(UserError, match="the reason"):
        tables.create("windows", batches())
    assert tables.count("windows") == 0


def test_integers_in_lists_are_compared_exactly(tmp_path):
    tables = [Tables(str(tmp_path / name)) for name in "ab"]
    for table, last in zip(tables, (0, 1), strict=True):
        table.append("features", [{"feature_key": "a/1", "top_sequence_ids": [3 << 44 | last]}])
    with pytest.raises(AssertionError, match="top_sequence_ids"):
        assert_tables_equal(*tables, ["features"])


def test_many_commits_are_compacted_while_workers_hold_files_that_are_not_committed(tmp_path, monkeypatch):
    monkeypatch.setattr("rayinterp.tables.COMMITS_BETWEEN_COMPACTIONS", 4)
    monkeypatch.setattr("rayinterp.tables.KEPT_FOR_WRITERS", timedelta(0))
    tables = Tables(str(tmp_path))
    tables.create_empty("embeddings")

    def fragments(unit):
        return tables.write_fragments("embeddings", to_arrow("embeddings", [{"sequence_id": unit, "shard": unit}]))

    committer, in_flight = FragmentCommitter(tables, "embeddings"), fragments(99)
    for unit in range(13):
        committer.add(unit, fragments(unit))
        committer.flush()
    assert len(tables.open("embeddings").versions()) <= 4
    assert len(tables.open("embeddings").get_fragments()) <= 3
    committer.add(99, in_flight)
    committer.flush()
    assert sorted(tables.read("embeddings")["shard"].to_pylist()) == [*range(13), 99]


def test_fragments_are_streamed_in_the_order_of_their_unit(tmp_path, monkeypatch):
    monkeypatch.setattr("rayinterp.tables.COMMITS_BETWEEN_COMPACTIONS", 1)
    tables = Tables(str(tmp_path))
    tables.create_empty("windows")
    assert list(tables.sorted_batches("windows", ["sequence_id"], "file_number")) == []
    committer = FragmentCommitter(tables, "windows", compact=False)
    for number in (2, 0, 1):
        rows = [{"file_number": number, "sequence_id": 10 * number + i} for i in range(3)]
        committer.flush({number: tables.write_fragments("windows", to_arrow("windows", rows))})
    batches = tables.sorted_batches("windows", ["sequence_id"], "file_number")
    assert [i for batch in batches for i in batch.column(0).to_pylist()] == [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_a_table_is_finished_when_its_index_is_there_and_dropped_when_told(tmp_path):
    tables = Tables(str(tmp_path))
    assert not tables.is_finished("records")
    tables.append("records", [{"feature_key": "a/1", "split": "train", "source": "random", "rank": 0}])
    assert not tables.is_finished("records")
    tables.finish("records")
    assert tables.is_finished("records")
    tables.drop("records")
    tables.drop("records")
    assert not tables.exists("records")


def test_committer_writes_the_nodes_before_the_winner(tmp_path, monkeypatch):
    written = []
    committer = Committer(Tables(str(tmp_path)))
    monkeypatch.setattr(Tables, "append", lambda self, table, rows: written.append((table, len(rows))))
    committer.add({"explanations": [{}], "candidates": [{}, {}], "llm_calls": [{}]})
    committer.flush()
    assert written == [("llm_calls", 1), ("candidates", 2), ("explanations", 1)]


def test_what_has_waited_is_committed_though_nothing_more_comes(tmp_path, monkeypatch):
    tables = Tables(str(tmp_path))
    committer = Committer(tables)
    committer.add({"llm_calls": [call(1)]})
    committer.tick()
    assert tables.count("llm_calls") == 0
    monkeypatch.setattr("rayinterp.tables.COMMIT_SECONDS", 0.0)
    committer.tick()
    committer.flush()
    assert tables.count("llm_calls") == 1


def test_a_flush_writes_what_an_earlier_commit_could_not(tmp_path, monkeypatch):
    tables, append, down = Tables(str(tmp_path)), Tables.append, [True]

    def failing(self, table, rows):
        if down and down.pop():
            raise OSError("the store does not answer")
        append(self, table, rows)

    monkeypatch.setattr(Tables, "append", failing)
    monkeypatch.setattr("rayinterp.tables.COMMIT_SECONDS", 0.0)
    committer = Committer(tables)
    committer.add({"llm_calls": [call(1)]})  # begins the commit that fails
    committer.flush()
    assert tables.count("llm_calls") == 1


def test_ray_reads_the_same_rows(tmp_path, ray_session):
    tables = Tables(str(tmp_path))
    tables.append("llm_calls", [call(i) for i in range(5)])
    rows = tables.ray_dataset("llm_calls", ["request_hash"], "request_hash != '3'").take_all()
    assert sorted(row["request_hash"] for row in rows) == ["0", "1", "2", "4"]


def test_embeddings_are_of_fixed_size():
    schema = embeddings_schema(3, pa.float16())
    assert schema.field("vector").type == pa.list_(pa.float16(), 3)
    assert np.float16 == schema.field("vector").type.value_type.to_pandas_dtype()


def test_sql_in_quotes():
    assert sql_in("a", ["x'y", "z"]) == "a in ('x''y', 'z')"
    assert sql_in("a", [1, 2]) == "a in (1, 2)"
    assert sql_in("a", []) == "false"


def test_what_a_reader_has_opened_stays_while_a_committer_compacts(tmp_path):
    tables = Tables(str(tmp_path))
    rows = [{"simulator": "s@1", "rule_hash": "r", "sequence_id": i, "log_probs": [0.0] * 6} for i in range(30)]
    for row in rows:
        tables.append("simulations", [row])
    tables.finish("simulations", in_use=True)
    opened = tables.open("simulations")
    tables.append("simulations", [{**rows[0], "sequence_id": 99}])
    tables.finish("simulations", in_use=True)
    assert opened.to_table(filter="sequence_id in (3, 4)").num_rows == 2
    tables.finish("simulations")
    assert len(tables.open("simulations").versions()) == 1


def test_a_table_of_an_earlier_version_gains_the_columns_that_it_lacks(tmp_path, monkeypatch):
    tables = Tables(str(tmp_path))
    row = {"feature_key": "a/1", "explainer": "e", "control": "", "simulator": "s", "source": "x", "split": "test"}
    schema, name = SCHEMAS["scores"], "false_negatives_per_sequence"
    monkeypatch.setitem(SCHEMAS, "scores", schema.remove(schema.get_field_index(name)))
    tables.append("scores", [{**row, "scorer": "r2", "value": 0.5}])
    monkeypatch.setitem(SCHEMAS, "scores", schema)
    for columns in (None, ["value", name], [name]):
        read = tables.read("scores", columns, "scorer = 'r2'")
        assert read[name].to_pylist() == [None] and set(read.column_names) == set(columns or schema.names)
    tables.append("scores", [{**row, "scorer": "auroc", name: 1.5}])
    found = {r["scorer"]: (r["value"], r[name]) for r in tables.read("scores").to_pylist()}
    assert found == {"r2": (0.5, None), "auroc": (None, 1.5)}
    tables.delete("scores", "scorer = 'r2'")
    tables.finish("scores")
    assert tables.read("scores", [name])[name].to_pylist() == [1.5]


def test_a_table_of_before_is_read_and_grows_the_new_columns(tmp_path):
    import lance

    tables = Tables(str(tmp_path))
    old = to_arrow("llm_calls", [call(1, response="old")]).drop_columns(["stage"])
    lance.write_dataset(old, tables.uri("llm_calls"))
    assert tables.read("llm_calls", ["stage", "response"]).to_pylist() == [{"stage": None, "response": "old"}]
    tables.append("llm_calls", [call(2, response="new", stage="score")])
    rows = {row["request_hash"]: row["stage"] for row in tables.read("llm_calls").to_pylist()}
    assert rows == {"1": None, "2": "score"}
    assert tables.read("llm_calls").schema.names == SCHEMAS["llm_calls"].names
