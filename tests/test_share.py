"""Runs that are pushed and pulled: everything arrives as it was, or nothing is changed and one message says why."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import yaml

from rayinterp.config import to_yaml
from rayinterp.errors import UserError
from rayinterp.run import open_run, run_stage
from rayinterp.share import artifact as share_artifact
from rayinterp.share import folder as share_folder
from rayinterp.share import hub as share_hub
from rayinterp.share import listing as share_listing
from rayinterp.share.folder import Folder
from rayinterp.share.listing import LISTING, PART_LISTING, SEEN, safe_path
from rayinterp.share.pull import pull
from rayinterp.share.push import push
from rayinterp.share.source import TABLES_TO_RECORDS
from rayinterp.tables import SCHEMAS, Tables
from rayinterp.usage import read_manifest
from tests.conftest import CONFIGS, UPSTREAM_TABLES, planted_config
from tests.tables_equal import assert_tables_equal

FILES = {
    "sequences.lance/data/a.lance": b"tokens" * 1000,
    "sequences.lance/_versions/1.manifest": b"version 1",
    "records.lance/data/b.lance": b"records",
    "explanations.lance/data/c.lance": b"explanations",
    "report.html": b"<p>report</p>",
    "experiments/figure.svg": b"<svg/>",
}
MANIFEST = {
    "stages": {"corpus": {"sequences": 3}, "explain": {"ok": 3}},
    "usage": {"corpus": {"seconds": 1, "gpu_hours": 0}, "explain": {"seconds": 99, "gpu_hours": 9}},
}


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def contents(folder):
    """Files by path, but for a run directory's own notes on its targets."""
    files = {str(p.relative_to(folder)): p for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    return {path: p.read_bytes() for path, p in files.items() if path != SEEN}


@pytest.fixture
def run(tmp_path):
    """What a run directory looks like from outside."""
    folder = tmp_path / "run"
    config = to_yaml(planted_config(folder)).encode()
    write(folder, {**FILES, "run.yaml": config, "manifest.json": json.dumps(MANIFEST).encode()})
    return folder


@pytest.fixture(params=["folder", "memory"])
def target(request, tmp_path):
    if request.param == "folder":
        yield str(tmp_path / "target")
    else:
        yield "memory://target/run"
        fsspec.filesystem("memory").store.clear()


def open_listing(target):
    filesystem, root = fsspec.core.url_to_fs(target)
    return json.loads(filesystem.cat_file(f"{root}/{LISTING}"))


def change_listing(target, change):
    filesystem, root = fsspec.core.url_to_fs(target)
    listing = open_listing(target)
    change(listing)
    filesystem.pipe_file(f"{root}/{LISTING}", json.dumps(listing).encode())


def test_a_whole_run_arrives_as_it_was(run, target, tmp_path):
    before = contents(run)
    write(run, {"sequences.lance/data/on-its-way.lance.part": b"half", ".write-probe": b""})
    assert push(str(run), target).num_files == len(FILES) + 2
    assert pull(target, str(tmp_path / "pulled")).num_bytes == sum(map(len, before.values()))
    pulled = contents(tmp_path / "pulled")
    listing = open_listing(target)
    assert pulled == before
    assert listing["format"] == share_listing.FORMAT
    assert {f["path"]: (f["size"], f["sha256"]) for f in listing["files"]} == {
        path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in before.items()
    }


def test_records_alone_bring_what_searches_start_from_and_no_bill_of_others(run, target, tmp_path):
    push(str(run), target, only_records=True)
    pull(target, str(tmp_path / "pulled"))
    kept = {path for path in FILES if path.startswith(("sequences", "records"))}
    assert contents(tmp_path / "pulled").keys() == kept | {"run.yaml", "manifest.json"}
    manifest = read_manifest(str(tmp_path / "pulled"))
    assert manifest == {"stages": {"corpus": {"sequences": 3}}, "usage": {"corpus": {"seconds": 1, "gpu_hours": 0}}}


def test_the_tables_to_records_are_those_that_later_stages_read():
    assert set(TABLES_TO_RECORDS) == set(UPSTREAM_TABLES) <= set(SCHEMAS)


def test_a_second_push_sends_what_is_new_and_takes_away_what_is_gone(run, target, tmp_path):
    push(str(run), target)
    (run / "records.lance/data/b.lance").unlink()
    write(run, {"records.lance/data/compacted.lance": b"both"})
    assert push(str(run), target)[::2] == (1, len(FILES) + 1)
    pull(target, str(tmp_path / "pulled"))
    assert contents(tmp_path / "pulled") == contents(run)
    assert push(str(run), target).num_files == 0


@pytest.fixture
def breaks_after(monkeypatch):
    """After some more files, what copies them fails as a lost connection does."""
    copy, copied = share_folder.copy, []

    def arm(count):
        def failing(origin, file, folder):
            if len(copied) == count:
                raise ConnectionError("connection lost")
            copied.append(file.path)
            copy(origin, file, folder)

        copied.clear()
        monkeypatch.setattr(share_folder, "copy", failing)

    monkeypatch.setattr(share_folder, "AT_ONCE", 1)
    yield arm, copied


def test_an_interrupted_push_goes_on_and_is_not_pulled_meanwhile(run, target, tmp_path, breaks_after):
    arm, copied = breaks_after
    arm(3)
    with pytest.raises(UserError, match="connection lost"):
        push(str(run), target)
    with pytest.raises(UserError, match="did not come to its end; push again"):
        pull(target, str(tmp_path / "early"))
    assert not (tmp_path / "early").exists()
    first = set(copied)
    arm(100)
    assert push(str(run), target)[::2] == (len(FILES) + 2 - 3, 3)
    assert not first & set(copied)
    arm(100)
    pull(target, str(tmp_path / "pulled"))
    assert contents(tmp_path / "pulled").keys() == contents(run).keys()
    filesystem, root = fsspec.core.url_to_fs(target)
    assert not filesystem.exists(f"{root}/{PART_LISTING}")


def test_a_push_that_stops_over_an_older_one_leaves_nothing_that_looks_whole(run, target, tmp_path, breaks_after):
    push(str(run), target)
    write(run, {"report.html": b"another", "sequences.lance/data/new.lance": b"new"})
    breaks_after[0](1)
    with pytest.raises(UserError, match="connection lost"):
        push(str(run), target)
    with pytest.raises(UserError, match="push again"):
        pull(target, str(tmp_path / "pulled"))


def test_an_interrupted_pull_goes_on(run, target, tmp_path, breaks_after):
    arm, copied = breaks_after
    push(str(run), target)
    arm(4)
    with pytest.raises(UserError, match="connection lost"):
        pull(target, str(tmp_path / "pulled"))
    assert copied[0] == "run.yaml"
    assert not (tmp_path / "pulled" / SEEN).exists()
    first = set(copied)
    arm(100)
    assert pull(target, str(tmp_path / "pulled"))[::2] == (len(FILES) + 2 - 4, 4)
    assert not first & set(copied)
    assert contents(tmp_path / "pulled") == contents(run)


def test_a_push_takes_nothing_away_that_somebody_else_has_pushed(run, target, tmp_path):
    push(str(run), target)
    theirs = tmp_path / "theirs"
    kept = {path: content for path, content in FILES.items() if not path.startswith("explanations")}
    config = to_yaml(planted_config(theirs, "name=theirs")).encode()
    write(theirs, {**kept, "explanations.lance/data/d.lance": b"others", "run.yaml": config, "manifest.json": b"{}"})
    before = open_listing(target)
    with pytest.raises(UserError, match=r"explanations\.lance/data/c\.lance is one.*pull from it first"):
        push(str(theirs), target)
    assert open_listing(target) == before
    # What adds alone is welcome, and so is what was seen there first.
    mine = tmp_path / "mine"
    pull(target, str(mine))
    write(mine, {"scores.lance/data/e.lance": b"scores", "report.html": b"with scores"})
    push(str(mine), f"{target}/")
    with pytest.raises(UserError, match="pull from it first"):
        push(str(run), target)
    assert pull(target, str(run)).num_files == 2
    assert push(str(run), target).num_files == 0


def test_records_alone_do_not_take_the_place_of_a_whole_run(run, target):
    push(str(run), target)
    before = open_listing(target)
    with pytest.raises(UserError, match="holds a whole run"):
        push(str(run), target, only_records=True)
    assert open_listing(target) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"tokens" * 999, "5,994 bytes of 6,000"), (b"TOKENS" * 1000, "another content"), (None, "not there")],
)
def test_a_damaged_file_is_named_and_nothing_of_it_kept(run, target, tmp_path, content, said):
    push(str(run), target)
    filesystem, root = fsspec.core.url_to_fs(target)
    path = "sequences.lance/data/a.lance"
    if content is None:
        filesystem.rm_file(f"{root}/{path}")
    else:
        filesystem.pipe_file(f"{root}/{path}", content)
    with pytest.raises(UserError, match=rf"{path}: {said}.*delete it there and push again"):
        pull(target, str(tmp_path / "pulled"))
    there = contents(tmp_path / "pulled")
    assert path not in there and not (tmp_path / "pulled" / SEEN).exists()
    assert not [name for name in there if name.endswith(".part")]
    # The way out that the message names.
    if content is not None:
        filesystem.rm_file(f"{root}/{path}")
    push(str(run), target)
    pull(target, str(tmp_path / "pulled"))
    assert contents(tmp_path / "pulled")[path] == FILES[path]


def test_no_more_is_written_than_is_listed(run, target, tmp_path, monkeypatch):
    push(str(run), target)
    monkeypatch.setattr(share_listing, "CHUNK", 100)
    filesystem, root = fsspec.core.url_to_fs(target)
    filesystem.pipe_file(f"{root}/report.html", b"x" * 10_000)
    written = []
    kept = Folder.at
    monkeypatch.setattr(Folder, "at", lambda self, path: written.append(path) or kept(self, path))
    with pytest.raises(UserError, match=r"report\.html: 100 bytes of 13"):
        pull(target, str(tmp_path / "pulled"))


@pytest.mark.parametrize(
    "path",
    [
        *("../outside", "a/../../outside", "/etc/outside", "..", "a/..", "C:\\outside", "a\\..\\b", "a//b"),
        *("./a", "", ".", "a\n", "a\x1b[31m", "share.json", "share.seen.json", 7, None),
    ],
)  # fmt: skip
def test_a_path_that_leads_elsewhere_refuses_the_whole_listing(run, target, tmp_path, path):
    with pytest.raises(ValueError):
        safe_path(path)
    push(str(run), target)
    change_listing(target, lambda listing: listing["files"][0].update(path=path))
    with pytest.raises(UserError, match="is refused"):
        pull(target, str(tmp_path / "in" / "pulled"))
    assert not (tmp_path / "in").exists()
    with pytest.raises(UserError, match="is refused"):  # a push would delete what a listing names
        push(str(run), target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda listing: listing.update(format=2), "install a later one"),
        (lambda listing: listing["files"].append(listing["files"][0]), "a path twice"),
        (lambda listing: listing["files"][0].update(sha256="../x"), "no hash"),
        (lambda listing: listing["files"][0].pop("size"), "size"),
        (lambda listing: listing.pop("files"), "files"),
    ],
)
def test_a_listing_that_is_none_is_refused(run, target, tmp_path, change, said):
    push(str(run), target)
    change_listing(target, change)
    with pytest.raises(UserError, match=said):
        pull(target, str(tmp_path / "pulled"))
    assert not (tmp_path / "pulled").exists()


def test_links_are_not_followed(run, tmp_path):
    secret = tmp_path / "secret"
    write(secret, {"key": b"sk-secret"})
    (run / "records.lance/key").symlink_to(secret / "key")
    with pytest.raises(UserError, match="symbolic link"):
        push(str(run), str(tmp_path / "target"))
    (run / "records.lance/key").unlink()
    push(str(run), str(tmp_path / "target"))
    (tmp_path / "target/report.html").unlink()
    (tmp_path / "target/report.html").symlink_to(secret / "key")
    with pytest.raises(UserError, match="symbolic link"):
        pull(str(tmp_path / "target"), str(tmp_path / "pulled"))
    pulled = tmp_path / "another"
    pulled.mkdir()
    (pulled / "sequences.lance").symlink_to(secret)
    (tmp_path / "target/report.html").unlink()
    push(str(run), str(tmp_path / "target"))
    with pytest.raises(UserError, match="symbolic link"):
        pull(str(tmp_path / "target"), str(pulled))
    assert contents(secret).keys() == {"key"}


def test_another_run_is_neither_pulled_over_nor_pushed_over(run, target, tmp_path):
    push(str(run), target)
    other = tmp_path / "other"
    write(other, {"run.yaml": to_yaml(planted_config(other, "seed=7")).encode()})
    before = contents(other)
    with pytest.raises(UserError, match=r"seed: 7 -> 0"):
        pull(target, str(other))
    with pytest.raises(UserError, match=r"seed: 0 -> 7"):
        push(str(other), target)
    assert contents(other) == before
    assert len(open_listing(target)["files"]) == len(FILES) + 2


def test_what_a_directory_has_done_since_is_not_overwritten(run, target, tmp_path):
    pulled = tmp_path / "pulled"
    push(str(run), target)
    pull(target, str(pulled))
    config = yaml.safe_load((pulled / "run.yaml").read_text()) | {"name": "mine"}
    write(pulled, {"run.yaml": yaml.safe_dump(config).encode()})
    write(run, {"report.html": b"newer", "manifest.json": b"{}"})
    push(str(run), target)
    assert pull(target, str(pulled)).num_files == 2
    assert (pulled / "report.html").read_bytes() == b"newer", "not touched since it was pulled"
    assert yaml.safe_load((pulled / "run.yaml").read_text())["name"] == "mine"
    write(pulled, {"sequences.lance/_versions/1.manifest": b"a history of its own"})
    with pytest.raises(UserError, match=r"1\.manifest has another content.*pull into another directory"):
        pull(target, str(pulled))


def test_a_table_with_versions_of_its_own_is_not_hidden_by_one_that_is_pulled(run, target, tmp_path):
    pulled = tmp_path / "pulled"
    push(str(run), target)
    pull(target, str(pulled))
    write(pulled, {"explanations.lance/_versions/2.manifest": b"mine", "explanations.lance/data/mine.lance": b"paid"})
    before = contents(pulled)
    assert pull(target, str(pulled)).num_files == 0
    assert contents(pulled).keys() == before.keys()
    write(run, {"explanations.lance/_versions/3.manifest": b"theirs", "explanations.lance/data/d.lance": b"theirs"})
    push(str(run), target)
    with pytest.raises(UserError, match=r"explanations\.lance/.* was written since the last pull"):
        pull(target, str(pulled))
    assert contents(pulled) == before


def test_a_pulled_table_that_was_made_anew_replaces_the_old_one(run, target, tmp_path):
    pulled = tmp_path / "pulled"
    write(run, {"records.lance/_versions/9.manifest": b"version 9"})
    push(str(run), target)
    pull(target, str(pulled))
    (run / "records.lance/_versions/9.manifest").unlink()
    write(run, {"records.lance/_versions/2.manifest": b"made anew"})
    push(str(run), target)
    pull(target, str(pulled))
    assert contents(pulled) == contents(run)


def test_a_table_that_is_written_to_meanwhile_is_noticed(run, target, tmp_path, monkeypatch):
    copy = share_folder.copy

    def and_commit(origin, file, folder):
        copy(origin, file, folder)
        write(run, {"records.lance/_versions/2.manifest": b"version 2"})

    monkeypatch.setattr(share_folder, "copy", and_commit)
    with pytest.raises(UserError, match=r"changed while it was pushed \(records.lance/_versions/2.manifest\)"):
        push(str(run), target)
    with pytest.raises(UserError, match="push again"):
        pull(target, str(tmp_path / "pulled"))
    monkeypatch.setattr(
        share_folder, "copy", lambda origin, file, folder: (run / file.path).unlink() or copy(origin, file, folder)
    )
    with pytest.raises(UserError, match="changed while it was pushed"):
        push(str(run), target)


def test_what_is_no_run_or_no_push_is_said(run, tmp_path):
    with pytest.raises(UserError, match=r"no run directory: it holds no run\.yaml"):
        push(str(tmp_path / "nowhere"), str(tmp_path / "target"))
    with pytest.raises(UserError, match=r"holds nothing that was pushed \(no share\.json\)"):
        pull(str(tmp_path / "nowhere"), str(tmp_path / "pulled"))
    with pytest.raises(UserError, match="lie within each other"):
        push(str(run), str(run / "copy"))
    with pytest.raises(UserError, match="nosuch"):
        push(str(run), "nosuch://bucket")


@pytest.mark.parametrize(
    "url", ["s3://id:sk-canary@bucket/run", "https://h/run?token=sk-canary", "wandb://a/b/c?sk-canary"]
)
def test_a_target_with_a_key_in_it_is_refused_and_not_repeated(run, tmp_path, url):
    for move in (lambda: push(str(run), url), lambda: pull(url, str(tmp_path / "pulled"))):
        with pytest.raises(UserError, match="password or a query") as error:
            move()
        assert "canary" not in str(error.value)


# the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository in a folder, which takes commits as its client makes them."""
    import huggingface_hub

    root = tmp_path / "hub"
    made = []

    class Api:
        def create_repo(self, repository, **options):
            made.append((repository, options))

        def create_commit(self, repository, operations, *, commit_message, repo_type):
            made.append([operation.path_in_repo for operation in operations])
            for operation in operations:
                path = root / operation.path_in_repo
                if isinstance(operation, huggingface_hub.CommitOperationDelete):
                    path.unlink()
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with operation.as_file() as stream:
                        path.write_bytes(stream.read())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        share_hub,
        "hub_folder",
        lambda target: Folder(fsspec.filesystem("file"), str(root / share_hub.hub_place(target)[1].rstrip("/"))),
    )
    return SimpleNamespace(root=root, made=made)


def test_the_hub_gets_one_commit_and_a_private_repository(run, hub, tmp_path):
    target = "hf://datasets/owner/name/gemma"
    push(str(run), target, only_records=True)
    (repository, options), paths = hub.made
    assert repository == "owner/name" and options["private"] and options["repo_type"] == "dataset"
    assert all(path.startswith("gemma/") for path in paths) and paths[-1] == f"gemma/{LISTING}"
    pull(target, str(tmp_path / "pulled"))
    assert read_manifest(str(tmp_path / "pulled"))["usage"].keys() == {"corpus"}
    (run / "records.lance/data/b.lance").unlink()
    write(run, {"records.lance/data/compacted.lance": b"both"})
    assert push(str(run), target, only_records=True).num_files == 1
    assert hub.made[-1] == [
        f"gemma/{p}" for p in ("records.lance/data/compacted.lance", LISTING, "records.lance/data/b.lance")
    ]
    (run / SEEN).unlink()
    (run / "records.lance/data/compacted.lance").unlink()
    with pytest.raises(UserError, match="pull from it first"):
        push(str(run), target, only_records=True)


@pytest.mark.parametrize(
    "target", ["hf://owner/name", "hf://datasets/name", "hf://datasets/o/n/../m", "hf://spaces/o/n"]
)
def test_only_dataset_repositories_are_taken(run, target, tmp_path):
    with pytest.raises(UserError, match="hf://datasets/OWNER/NAME"):
        push(str(run), target)
    with pytest.raises(UserError, match="hf://datasets/OWNER/NAME"):
        pull(target, str(tmp_path / "pulled"))


def test_a_hub_that_does_not_answer_is_one_message(run, monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(self, *arguments, **options):
        raise ConnectionError("no route to host")

    assert issubclass(HfHubHTTPError, OSError), "what `_reachable` relies on"
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(UserError, match="cannot be reached"):
        push(str(run), "hf://datasets/owner/name")


# W&B


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B writes what it would send into a folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    (tmp_path / "wandb").mkdir()
    return tmp_path / "wandb"


def test_an_artifact_holds_every_file_and_nothing_of_the_machine(run, offline):
    push(str(run), "wandb://me/project/gemma")
    (logged,) = offline.rglob("run-*.wandb")
    recorded = logged.read_bytes()
    for path in (*FILES, "run.yaml", "manifest.json", LISTING):
        assert path.encode() in recorded, path
    assert b"rayinterp-run" in recorded
    assert b"k" * 40 not in b"".join(contents(offline).values())
    assert not list(offline.rglob("wandb-metadata.json"))


def test_an_artifact_is_pulled_file_by_file(run, tmp_path, monkeypatch):
    push(str(run), str(tmp_path / "target"))
    asked = []

    class Entry:
        def __init__(self, path):
            self.path = path

        def download(self, root, skip_cache):
            assert skip_cache and not list(Path(root).iterdir()), "a file at a time, not the whole run"
            return shutil.copy(self.path, Path(root) / "file")

    class Api:
        def artifact(self, name):
            asked.append(name)
            return self

        def get_entry(self, path):
            if not (tmp_path / "target" / path).exists():
                raise KeyError(path)
            return Entry(tmp_path / "target" / path)

    monkeypatch.setattr(share_artifact, "require_wandb", lambda: SimpleNamespace(Api=Api))
    monkeypatch.setattr(share_folder, "AT_ONCE", 1)
    pull("wandb://me/project/gemma:v3", str(tmp_path / "pulled"))
    assert contents(tmp_path / "pulled") == contents(run)
    (tmp_path / "target/report.html").unlink()
    with pytest.raises(UserError, match=r"report\.html: not there"):
        pull("wandb://me/project/gemma", str(tmp_path / "again"))
    assert asked == ["me/project/gemma:v3", "me/project/gemma:latest"]


def test_a_push_names_no_version_and_the_package_is_asked_for(run, monkeypatch):
    with pytest.raises(UserError, match="push to 'wandb://me/project/gemma'"):
        push(str(run), "wandb://me/project/gemma:v1")
    with pytest.raises(UserError, match="wandb://ENTITY/PROJECT/NAME"):
        push(str(run), "wandb://gemma")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rayinterp\[wandb\]'"):
        push(str(run), "wandb://me/project/gemma")


# with tables, and from the command line


def test_a_pulled_run_goes_on_with_the_next_stage(planted_run, tmp_path):
    target, folder = str(tmp_path / "target"), tmp_path / "pulled"
    push(planted_run.config.run_dir, target, only_records=True)
    pull(target, str(folder))
    tables = Tables(str(folder))
    assert_tables_equal(planted_run.tables, tables, UPSTREAM_TABLES)
    assert {name for name in SCHEMAS if tables.exists(name)} == set(UPSTREAM_TABLES)
    versions = {name: tables.version(name) for name in UPSTREAM_TABLES}
    run = open_run(planted_config(folder))
    for stage in ("corpus", "harvest", "index", "records", "explain"):
        run_stage(run, stage)
    assert versions == {name: tables.version(name) for name in UPSTREAM_TABLES}, "earlier stages have nothing to do"
    assert_tables_equal(planted_run.tables, tables, ("explanations", "candidates"))
    # What was found here since is not in the way of pulling again, nor is it touched.
    assert pull(target, str(folder)).num_files == 0
    assert tables.count("explanations") == planted_run.tables.count("explanations")


def test_the_command_line_pushes_and_pulls(run, tmp_path):
    def rayinterp(*arguments):
        command = [sys.executable, "-c", "from rayinterp.cli import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=CONFIGS.parent, env=os.environ)

    pushed = rayinterp("push", str(run), str(tmp_path / "target"), "--only-records")
    assert pushed.returncode == 0, pushed.stderr
    assert "Pushed 5 files" in pushed.stdout and "rayinterp pull" in pushed.stdout
    pulled = rayinterp("pull", str(tmp_path / "target"), str(tmp_path / "pulled"))
    assert pulled.returncode == 0 and "Pulled 5 files" in pulled.stdout, pulled.stderr
    wrong = rayinterp("pull", str(tmp_path / "nowhere"), str(tmp_path / "pulled"))
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
