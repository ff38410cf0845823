"""Nothing of others is deleted or replaced: marked folders, exports beside old ones, locks; and power cuts."""

import json
import os
import shutil
from pathlib import Path

import pytest
import small_runs
from small_runs import metrics

from rmjax.export import from_run
from rmjax.models import hf_export
from rmjax.runtime import ownership, signals
from rmjax.runtime.ownership import MARKER
from rmjax.train import resume, training


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir):
    """A finished run whose checkpoints are in a directory of their own."""
    base = tmp_path_factory.mktemp("finished")
    small_runs.Started(base / "a", cache_dir, **{"checkpoint.dir": str(base / "saved")}).finish()
    return base


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["report/notes.txt", "metrics.jsonl", "evaluation.json", "tensorboard/events.out.x"])
def test_a_folder_that_is_somebody_elses_is_refused_and_untouched(tmp_path, cache_dir, name):
    file = tmp_path / "w" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    for config in (
        lambda: (small_runs.small(cache_dir), tmp_path / "w"),
        lambda: (small_runs.small(cache_dir, checkpoint__dir=str(tmp_path / "w")), tmp_path / "new"),
    ):
        with pytest.raises(ValueError, match=r"is not empty \(.*\) and has no \.rmjax\.json.*empty or a new directory"):
            training.run(*config())
    assert contents(tmp_path) == {file.relative_to(tmp_path): b"precious"}


def test_one_directory_of_checkpoints_is_one_runs(finished, cache_dir, tmp_path):
    """Of a sweep: the second would train nothing and export the first's weights under its own config."""
    before = contents(finished)
    for values in ({"optim.learning_rate": 1e-4}, {}):
        config = small_runs.small(cache_dir, **{"checkpoint.dir": str(finished / "saved"), **values})
        with pytest.raises(
            ValueError, match=r"saved has the checkpoints of another run, whose workdir is .*finished.*/a"
        ):
            training.run(config, tmp_path / "b")
    assert contents(finished) == before and not (tmp_path / "b").exists()


def test_a_config_that_was_changed_is_compared_beside_the_checkpoints(finished, cache_dir, tmp_path):
    base = shutil.copytree(finished, tmp_path / "copy")
    marker = json.loads((base / "saved" / MARKER).read_text())
    ownership.write_marker(
        base / "saved", "checkpoints", marker["run"], workdir=str(base / "b"), config=marker["config"]
    )
    config = small_runs.small(cache_dir, **{"checkpoint.dir": str(base / "saved"), "seed": 1})
    with pytest.raises(ValueError, match=r"config\.seed: 0 before, 1 now"):  # the workdir is new, as on a new machine
        resume.check_workdir(config, base / "b")


def test_a_run_that_holds_its_checkpoints_keeps_others_out(cache_dir, tmp_path):
    config = small_runs.small(cache_dir, checkpoint__dir=str(tmp_path / "saved"))
    with (
        signals.alone(tmp_path / "saved", "config.checkpoint.dir"),
        pytest.raises(ValueError, match=r"another run is in .*saved .*choose another config.checkpoint.dir"),
    ):
        training.run(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_run_of_a_version_without_markers_is_gone_on_with(finished, cache_dir, tmp_path):
    base = shutil.copytree(finished, tmp_path / "old")
    (base / "a" / MARKER).unlink()
    (base / "saved" / MARKER).unlink()
    (base / "a" / "export" / MARKER).unlink()
    values = json.loads((base / "a" / "config.json").read_text())
    values["checkpoint"]["dir"] = str(base / "saved")
    (base / "a" / "config.json").write_text(json.dumps(values))
    config = {"checkpoint.dir": str(base / "saved")}
    assert "nothing is trained, only exported" in small_runs.Started(base / "a", cache_dir, **config).finish()
    assert metrics(base / "a") == metrics(finished / "a")
    assert json.loads((base / "saved" / MARKER).read_text())["steps"] == small_runs.steps(base / "saved")


def test_a_lock_is_no_link_and_nobodys_file(tmp_path):
    (tmp_path / "thesis").write_text("precious")
    os.symlink(tmp_path / "thesis", tmp_path / "lock")
    with pytest.raises(ValueError, match="lock is no lock of rmjax"), signals.alone(tmp_path):
        pass
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").write_text("the combination is 1234")
    with pytest.raises(ValueError, match="lock is no lock of rmjax"), signals.alone(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == "the combination is 1234"
    assert (tmp_path / "thesis").read_text() == "precious"


# Exports


def export(directory, text="weights"):
    with ownership.new_directory(directory, "export", "run") as partial:
        (partial / "model.safetensors").write_text(text)
        (partial / "README.md").write_text(f"card of {text}")


def test_a_new_export_keeps_what_is_not_ours(tmp_path):
    directory = tmp_path / "export"
    export(directory)
    (directory / "notes.txt").write_text("mine")
    (directory / "logs").mkdir()
    (directory / "logs" / "x").write_text("mine")
    (directory / "README.md").write_text("my own card")
    export(directory, "new")
    found = {str(name): data for name, data in contents(directory).items() if str(name) != MARKER}
    assert found == {
        "README.md": b"card of new",
        "README.md.kept": b"my own card",
        "model.safetensors": b"new",
        "notes.txt": b"mine",
        "logs/x": b"mine",
    }
    export(directory, "newer")
    assert (directory / "README.md.kept").read_text() == "my own card"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_a_kill_while_the_marker_of_an_export_is_made_blocks_nothing(tmp_path):
    (tmp_path / ".export.partial").mkdir()
    export(tmp_path / "export")
    (tmp_path / ".export.partial").mkdir()
    (tmp_path / ".export.partial" / f".{MARKER}.rmjax-partial").write_text("{")
    export(tmp_path / "export", "new")
    assert (tmp_path / "export" / "model.safetensors").read_text() == "new"


def test_an_old_export_is_emptied_with_its_marker_last(tmp_path, monkeypatch):
    """Killed at any deletion, the next export brings it to its end."""
    for kill in range(3):
        directory = tmp_path / str(kill) / "export"
        directory.parent.mkdir()
        export(directory)
        (directory / "notes.txt").write_text("mine")
        deletions, unlink = iter(range(9)), Path.unlink

        def dies(path, unlink=unlink, deletions=deletions, kill=kill, **kwargs):
            if path.parent.name == ".export.old" and next(deletions) == kill:
                raise KeyboardInterrupt
            unlink(path, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", dies)
            export(directory, "new")
        export(directory, "newest")
        assert (directory / "notes.txt").read_text() == "mine"
        assert (directory / "model.safetensors").read_text() == "newest"
        assert [path.name for path in directory.parent.iterdir()] == ["export"]


@pytest.mark.parametrize("swapped", [False, True])
def test_an_export_that_was_killed_while_it_took_its_place(tmp_path, swapped):
    """Between the two renames, or after them with the old one not yet emptied."""
    directory = tmp_path / "export"
    export(directory)
    (directory / "notes.txt").write_text("mine")
    directory.rename(tmp_path / ".export.old")
    if swapped:
        export(tmp_path / "other", "new")
        (tmp_path / "other").rename(directory)
    export(directory, "newest")
    assert (directory / "notes.txt").read_text() == "mine"
    assert (directory / "model.safetensors").read_text() == "newest"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_an_export_replaces_no_link_and_nothing_of_others(tmp_path):
    export(tmp_path / "real")
    os.symlink(tmp_path / "real", tmp_path / "link")
    export(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").read_text() == "new"
    for what in ("partial", "old"):
        there = tmp_path / f".real.{what}"
        there.mkdir()
        (there / "README.md").write_text("precious")
        for target in ("real", "gone"):  # an old export is also what a kill leaves without a new one
            there = there.rename(tmp_path / f".{target}.{what}")
            with pytest.raises(ValueError, match=rf"\.{target}\.{what} is in the way and is not rmjax's own; move it"):
                export(tmp_path / target)
            assert (there / "README.md").read_text() == "precious" and not (tmp_path / "gone").exists()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="models is not empty"):
        hf_export.require_replaceable(tmp_path / "models", "--output")


def test_exporting_over_a_run_is_refused(finished, tmp_path):
    from rmjax.export import __main__ as command

    args = command.parser().parse_args([f"--run={finished / 'a'}", f"--output={finished / 'a'}"])
    with pytest.raises(ValueError, match="is a run, which an export would replace"):
        from_run.checked(args)


# Power cuts


def cut(path, how):
    """What a machine that went down can leave of a file whose bytes were not on the disk."""
    data = path.read_bytes()
    kept = data[: len(data) // 2]
    path.write_bytes({"emptied": b"", "halved": kept, "zeroed": kept + bytes(len(data) - len(kept))}[how])


HOW = ("emptied", "halved", "zeroed")


def of_run(base):
    """The files outside the steps of checkpoints (for those: test_checkpoint.py)."""
    found = map(str, contents(base))
    return sorted(x for x in found if x.startswith("a/") or x == f"saved/{MARKER}")


@pytest.fixture(scope="module")
def whole(finished, cache_dir, tmp_path_factory):
    """The run at the place where it is cut, started once more and left alone; and all that it left."""
    base = tmp_path_factory.mktemp("cut") / "cut"
    shutil.copytree(finished, base)
    small_runs.Started(base / "a", cache_dir, **{"checkpoint.dir": str(base / "saved")}).finish()
    return base, contents(base)


def end_alike_or_name_it(whole, cache_dir, name, how):
    """Starts the run again after a power cut that struck one of its files."""
    base, before = whole
    cut(base / name, how)
    code, text = small_runs.Started(base / "a", cache_dir, **{"checkpoint.dir": str(base / "saved")}).end()
    after = contents(base)
    same = lambda x: after.get(Path(x)) == before.get(Path(x))
    unlike = [x for x in of_run(base) if not same(x) and Path(x).name not in OF_EACH_START]
    assert code in (0, 2) and (name in text or (code == 0 and not unlike)), (name, how, code, unlike, text[-2000:])
    for path in after.keys() - before.keys():
        (base / path).unlink()
    for path, data in before.items():
        (base / path).write_bytes(data)


OF_EACH_START = {"timings.jsonl", MARKER}


@pytest.mark.slow
def test_a_power_cut_leaves_a_run_that_ends_alike_or_names_the_file(whole, cache_dir):
    for i, name in enumerate(of_run(whole[0])[::3]):
        end_alike_or_name_it(whole, cache_dir, name, HOW[i % 3])


@pytest.mark.release
def test_every_power_cut_leaves_a_run_that_ends_alike_or_names_the_file(whole, cache_dir):
    for name in of_run(whole[0]):
        for how in HOW:
            end_alike_or_name_it(whole, cache_dir, name, how)
