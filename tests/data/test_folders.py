"""Which files of a folder are data; the folders are written as `datasets` 5.2 writes them."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from rmjax.data import sources
from rmjax.runtime import notes


@pytest.fixture
def told(monkeypatch):
    """The lines that were logged."""
    lines: list[str] = []
    monkeypatch.setattr(notes, "tell", lines.append)
    return lines


def write(folder: Path, *names: str) -> None:
    """Arrow or JSON lines files of one row each, which holds the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".arrow"):
            table = pa.table({"n": [name]})
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        else:
            path.write_text(json.dumps({"n": name}) + "\n")


def state(folder: Path, *names: str, **more) -> None:
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **more}))
    (folder / "dataset_info.json").write_text("{}")


def read(spec: object) -> list[str]:
    return [row["n"] for _, row in sources.open_source(str(spec))]


def test_a_set_saved_to_disk_is_what_its_state_says(tmp_path, told):
    """With the results of a map, and the shards of an earlier save, which had more."""
    shards = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    write(tmp_path, *shards, "cache-2d0a802b78a30b76.arrow", *(f"data-{i:05d}-of-00003.arrow" for i in range(3)))
    state(tmp_path, *shards)
    assert read(tmp_path) == read(f"{tmp_path}/*.arrow") == shards
    assert told[0] == (
        f"{tmp_path}: not read: cache-2d0a802b78a30b76.arrow (a result that `datasets` keeps); "
        "data-00000-of-00003.arrow and 2 more (not named in state.json)"
    )
    assert read(tmp_path / "cache-2d0a802b78a30b76.arrow") == ["cache-2d0a802b78a30b76.arrow"]  # who names it gets it
    (tmp_path / shards[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1]}, which its state.json names"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, expected an object"),
        ("{}", "names no data files"),
        (
            '{"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}',
            "a file of indices",
        ),
    ],
)
def test_a_state_that_cannot_be_read(tmp_path, text, message):
    write(tmp_path, "a.arrow")
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_splits_saved_to_disk(tmp_path, told):
    for split in ("helpful", "harmless", "old"):
        write(tmp_path / split, "data-00000-of-00001.arrow")
        state(tmp_path / split, "data-00000-of-00001.arrow")
    names = tmp_path / "dataset_dict.json"
    names.write_text('{"splits": ["helpful", "harmless"]}')
    with pytest.raises(ValueError, match=rf"several splits \(helpful, harmless\); choose one, as {tmp_path}/helpful"):
        read(tmp_path)
    assert len(read(tmp_path / "helpful")) == 1
    names.write_text('{"splits": ["helpful"]}')
    assert len(read(tmp_path)) == 1
    assert told[-1].endswith("and 1 more (of no split that dataset_dict.json names)")
    names.write_text('{"splits": ["other"]}')
    with pytest.raises(ValueError, match=r"lacks the data of 'other', which its dataset_dict\.json names"):
        read(tmp_path)


def test_a_folder_of_the_cache_of_datasets_is_what_its_info_says(tmp_path, told):
    """Shards of an earlier preparation beside those that the info tells of."""
    shards = [f"json-train-{i:05d}-of-{n:05d}.arrow" for n in (2, 3) for i in range(n)]
    write(tmp_path, *shards, "cache-4cb9eda4eeffbac5_00000_of_00002.arrow")
    info = {"splits": {"train": {"name": "train", "shard_lengths": [12, 6]}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert read(tmp_path) == shards[:2]
    assert "json-train-00000-of-00003.arrow and 2 more (not named in dataset_info.json)" in told[0]
    write(tmp_path / "two", "json-en.arrow", "json-de.arrow")
    (tmp_path / "two" / "dataset_info.json").write_text('{"splits": {"en": {}, "de": {}}}')
    with pytest.raises(ValueError, match=r"several splits \(en, de\)"):
        read(tmp_path / "two")
    assert read(f"{tmp_path}/two/*-en.arrow") == ["json-en.arrow"]


def test_hidden_files_and_folders_are_left_out(tmp_path, told):
    hidden = (".ipynb_checkpoints/pairs-checkpoint.jsonl", "._pairs.jsonl", "_temporary/0/part-0.jsonl")
    write(tmp_path, "pairs.jsonl", *hidden)
    for spec in (tmp_path, f"{tmp_path}/*.jsonl", f"{tmp_path}/**/*.jsonl"):
        assert read(spec) == ["pairs.jsonl"]
    assert told[0] == f"{tmp_path}: not read: ._pairs.jsonl and 2 more (hidden)"
    assert read(f"{tmp_path}/.ipynb_checkpoints/*.jsonl") == [hidden[0]]


@pytest.mark.parametrize(
    "names, glob",
    [
        (("pairs.jsonl", "pairs.jsonl.gz"), "*.jsonl"),
        (("a-00000-of-00001.jsonl", "a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"), "*-of-00001.jsonl"),
        (("a.jsonl", "a-00000-of-00001.jsonl"), "a.*"),
        (("a-00000-of-00001-09b74b3ef9c3b56a.jsonl", "a-00000-of-00001-cced8f07e2a1d3b4.jsonl"), "*b56a.jsonl"),
    ],
)
def test_what_is_there_twice_is_refused(tmp_path, names, glob):
    write(tmp_path, *names)
    for spec in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(ValueError, match=r"holds (pairs|a)\.jsonl more than once: .* and .*; keep one of them"):
            read(spec)
    assert len(read(f"{tmp_path}/{glob}")) == 1
    assert len(read(",".join(f"{tmp_path}/{name}" for name in names if name.endswith("l")))) > 0


def test_a_link_to_another_file_of_the_folder_is_refused(tmp_path):
    write(tmp_path, "pairs.jsonl")
    (tmp_path / "latest.jsonl").symlink_to("pairs.jsonl")
    with pytest.raises(ValueError, match=r"holds one file as latest\.jsonl and as pairs\.jsonl; keep one"):
        read(tmp_path)


def test_half_a_set_of_shards_is_refused_unless_a_glob_names_it(tmp_path):
    write(tmp_path, "a-00000-of-00003.jsonl", "a-00002-of-00003.jsonl")
    with pytest.raises(ValueError, match=r"holds 2 of the 3 shards of a\.jsonl, not number 1; get the others"):
        read(tmp_path)
    assert len(read(f"{tmp_path}/*")) == 2
    write(tmp_path / "b", *(f"part_{i}_of_2.jsonl" for i in (1, 2)))
    assert len(read(tmp_path / "b")) == 2
