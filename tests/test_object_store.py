"""Tables in an object store: Lance and fsspec against an S3 server of this machine."""

import threading

import fsspec
import pytest

from rayinterp.errors import UserError
from rayinterp.preflight import check_run_dir
from rayinterp.run import freeze
from rayinterp.tables import Tables, to_arrow
from rayinterp.usage import read_manifest, update_manifest
from tests.conftest import planted_config
from tests.s3_server import BUCKET, s3_server


@pytest.fixture(scope="module")
def server():
    """One for all tests: Lance keeps a bucket's endpoint for as long as the process lives."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
        yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def run_dir(server, request):
    return f"s3://{BUCKET}/{request.node.name}"


def files(tables, table):
    """Data files that there are."""
    filesystem, path = fsspec.core.url_to_fs(f"{tables.uri(table)}/data")
    filesystem.invalidate_cache()
    return filesystem.ls(path)


def test_no_row_of_writers_side_by_side_is_lost(run_dir):
    tables = Tables(run_dir)
    tables.create_empty("saes")

    def write(start):
        for number in range(start, start + 4):
            tables.append("saes", [{"sae": f"layer_{number}", "num_features": number}])

    writers = [threading.Thread(target=write, args=(start,)) for start in (0, 4, 8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(tables.read("saes")["num_features"].to_pylist()) == list(range(12))


def test_units_are_committed_and_what_no_version_names_is_cleaned_up(run_dir):
    tables = Tables(run_dir)
    tables.create_empty("windows")
    row = {"sequence_id": 1, "document_id": 1, "text": "a", "digest": b"0" * 16}
    kept = tables.write_fragments("windows", to_arrow("windows", [row | {"file_number": 0}]))
    tables.write_fragments("windows", to_arrow("windows", [row | {"file_number": 1}]))  # its writer is killed here
    tables.commit("windows", kept)
    assert tables.finished_units("windows") == {0}
    assert len(files(tables, "windows")) == 2
    tables.finish("windows")
    assert len(files(tables, "windows")) == 1 and tables.count("windows") == 1


def test_a_run_directory_says_what_made_it(run_dir):
    check_run_dir(run_dir)
    freeze(planted_config(run_dir))
    update_manifest(run_dir, lambda manifest: manifest.update(stages={"corpus": {"sequences": 3}}))
    assert read_manifest(run_dir)["stages"] == {"corpus": {"sequences": 3}}
    Tables(run_dir).create_empty("sequences")
    with pytest.raises(UserError, match=r"corpus\.num_sequences: 3000 -> 10"):
        freeze(planted_config(run_dir, "corpus.num_sequences=10"))


def test_a_bucket_that_is_not_there_is_one_sentence(server):
    with pytest.raises(UserError, match="run_dir 's3://elsewhere/run' cannot be written to"):
        check_run_dir("s3://elsewhere/run")
