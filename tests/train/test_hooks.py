"""Hooks are told what happens in a run, in order; one that fails is reported, and ends the run where that is asked."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import small_runs
from small_runs import small

from rmjax.runtime.signals import Stop, Stopped
from rmjax.train import hooks, training


class StopAfter(Stop):
    """Asks to stop once this step is done."""

    def __init__(self, step):
        super().__init__()
        self.after = step

    def agreed(self, step=None):
        return step is not None and step > self.after


@pytest.fixture
def told(monkeypatch):
    """What a hook was told, as (event, values); `told.fail_at` names an event at which it raises."""
    seen = types.SimpleNamespace(events=[], fail_at="")

    def notify(event, values):
        seen.events.append((event, values))
        if event == "save":
            assert Path(values["directory"]).is_dir()
        if event == seen.fail_at:
            raise OSError("no network")

    module = types.ModuleType("my_hooks")
    module.notify = notify
    monkeypatch.setitem(sys.modules, "my_hooks", module)
    return seen


def of(told, event):
    return [values for name, values in told.events if name == event]


@pytest.mark.slow
def test_a_run_tells_its_hooks(tmp_path, told, caplog):
    config = small(tmp_path / "cache", hooks="my_hooks:notify")
    workdir = tmp_path / "run"
    with pytest.raises(Stopped):
        training.run(config, workdir, stop=StopAfter(7))
    assert [name for name, _ in told.events][:2] == ["start", "evaluation"]
    (start,) = of(told, "start")
    assert (start["step"], start["steps"], start["workdir"]) == (0, 20, str(workdir))
    assert start["config"]["optim"]["learning_rate"] == config.optim.learning_rate
    assert [values["step"] for values in of(told, "save")] == [3, 5, 6, 7]
    assert told.events[-1][0] == "end" and told.events[-1][1]["status"] == "stopped"

    told.events.clear()
    told.fail_at = "log"  # and the run goes on
    training.run(config, workdir)
    assert of(told, "start")[0]["step"] == 7
    assert "the hook my_hooks:notify failed at 'log': OSError: no network" in caplog.text
    lines = small_runs.metrics(workdir)
    assert [values["step"] for values in of(told, "log")] == [9, 12, 15, 18, 20]
    for values in of(told, "log") + of(told, "evaluation"):
        name = "train/loss" if "train/loss" in values["metrics"] else "validation/loss"
        (line,) = [line for line in lines if line["step"] == values["step"] and name in line]
        assert values["metrics"] == {key: value for key, value in line.items() if key != "step"}
    assert all(np.isfinite(values["timings"]["timing/step_seconds"]) for values in of(told, "log")[1:])
    assert [name for name, _ in told.events].count("end") == 1
    end = told.events[-1][1]
    assert end["status"] == "finished" and end["export"] == str(workdir / "export") and end["passed"] in (True, False)
    assert "validation/accuracy" in end["metrics"]

    told.events.clear()
    told.fail_at = "evaluation"
    config.on_hook_error = "stop"
    with pytest.raises(hooks.HookError, match=r"my_hooks:notify failed at 'evaluation'.*goes on from its last"):
        training.run(config, tmp_path / "other")
    assert [name for name, _ in told.events] == ["start", "evaluation", "end"]
    assert told.events[-1][1]["status"] == "failed" and "no network" in told.events[-1][1]["message"]


def test_a_hook_that_fails_at_the_end_does_not_hide_why_it_ended(told, caplog):
    told.fail_at = "end"
    of_run = hooks.Hooks(hooks.find("my_hooks:notify, my_hooks:notify"), "stop")
    with pytest.raises(ValueError, match="the run's own"), of_run.told_of_the_end():
        raise ValueError("the run's own")
    assert len(of(told, "end")) == 2 and "failed at 'end'" in caplog.text


def test_a_module_beside_the_user_is_found(tmp_path, monkeypatch):
    (tmp_path / "beside_the_user.py").write_text("def notify(event, values): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert hooks.find("beside_the_user:notify")[0][1].__name__ == "notify" and hooks.find("") == []


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("my_hooks", "expected MODULE:FUNCTION"),
        ("no_such_hooks:notify", "importing no_such_hooks failed: ModuleNotFoundError"),
        ("my_hooks:notfy", "has no function 'notfy'; did you mean 'notify'"),
    ],
)
def test_a_hook_that_cannot_be_found_is_bad_input(told, named, said):
    with pytest.raises(ValueError, match=rf"config\.hooks='{named}': .*{said}"):
        hooks.find(named)
