"""The sinks of config.log.to with the real packages, offline: what is there after a run that was killed and went on.

The packages need environments of their own, which only a release makes: `python -m pytest -m release` installs them.
"""

import json
import tomllib

import pytest
from own_environment import ROOT, run_with

from rmjax import config as config_lib
from rmjax.train import sinks

# Writes two starts of one run, and prints what the service has of it.
SCRIPT = """
import json, math, os, sys, time
from pathlib import Path
from ml_collections import ConfigDict
from rmjax.train.writers import Writers

name, workdir = sys.argv[1], Path(sys.argv[2]) / "run"
os.environ |= {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "TRACKIO_DIR": str(workdir / "trackio")}
config = ConfigDict({"log": {"to": name, "project": "rewards"}, "seed": 1, "optim": {"learning_rate": 0.1}})


def start(first, stop):
    writers = Writers.open(workdir, config, first)
    for step in range(first + 1 if first else 0, stop + 1):
        writers.write(step, {"train/loss": math.nan if step == 3 else 1 / (step + 2), "validation/accuracy": step / 8})
        writers.timing(step, {"timing/step_seconds": float(step)})
    return writers


# What a kill leaves depends on the moment: here all that was logged is there, which is where duplicates come from.
start(0, 5).close()
last = start(4, 8)
report = workdir / "report.html"
report.write_text("<html><body>the report</body></html>")
last.keep(report)
last.close()
"""

READ = {
    "mlflow": """
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{workdir / 'mlflow.db'}")
run = client.get_run((workdir / "mlflow_id").read_text())
number = run.info.run_id
values = {name: [(m.step, m.value) for m in client.get_metric_history(number, name)] for name in run.data.metrics}
paths = [x.path for x in client.list_artifacts(number)]
files = {path: Path(client.download_artifacts(number, path)).read_text() for path in paths}
runs = len(client.search_runs([run.info.experiment_id]))
found = {"values": values, "config": run.data.params, "files": files, "runs": runs, "status": run.info.status}
""",
    "trackio": """
import trackio
from trackio.sqlite_storage import SQLiteStorage
(one,) = trackio.Api().runs("rewards")
values = {}
for row in SQLiteStorage.get_logs("rewards", one.name):
    for key in row.keys() - {"step", "timestamp"}:
        values.setdefault(key, []).append((row["step"], row[key]))
kept = [p.read_bytes() for p in (workdir / "trackio").rglob("*") if p.is_file()]
files = {"report.html": "".join(x.decode() for x in kept if x == report.read_bytes())}
found = {"values": values, "config": {k: v for k, v in one.config.items() if not k.startswith("_")}, "files": files}
""",
    "wandb": """
import struct
from wandb.proto import wandb_internal_pb2 as pb
(path,) = (workdir / "wandb" / "latest-run").resolve().glob("*.wandb")  # what `wandb sync` takes
data, at, part, values, settings, artifacts = path.read_bytes(), 7, b"", {}, {}, []
while at < len(data):  # a log of LevelDB's: blocks of 32 KiB, of records with a checksum, a length and a kind
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
    _, length, kind = struct.unpack_from("<IHB", data, at)
    part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
    if kind not in (1, 4):  # whole, or the last part of one
        continue
    record, part = pb.Record.FromString(part), b""
    if record.WhichOneof("record_type") == "history":
        row = {(x.key or "/".join(x.nested_key)): json.loads(x.value_json) for x in record.history.item}
        for key in row.keys() - {"_step", "_runtime", "_timestamp"}:
            values.setdefault(key, []).append((row["_step"], row[key]))
    if record.WhichOneof("record_type") == "run":
        settings = {x.key: json.loads(x.value_json) for x in record.run.config.update}
    for artifact in (record.artifact, record.request.log_artifact.artifact):
        artifacts += [x.path for x in artifact.manifest.contents]
ids = len({place.name.split("-")[3] for place in (workdir / "wandb").glob("offline-run-*")})
config = {key: value for key, value in settings.items() if key != "_wandb"}
found = {"values": values, "config": config, "files": {x: report.read_text() for x in artifacts}, "ids": ids}
""",
    "swanlab": """
newest = max((workdir / "swanlab").glob("run-*"), key=lambda p: (p.stat().st_mtime, p.name))
(path,) = newest.glob("*.swanlab")
data = path.read_bytes()
pages = [p.read_text() for p in newest.rglob("*.html")]
import yaml
settings = yaml.safe_load((newest / "files" / "config.yaml").read_text())
counts = {key: data.count(key.encode()) for key in ("train/loss", "timing/step_seconds")}
ids = len({place.name.rpartition("-")[2] for place in (workdir / "swanlab").glob("run-*")})
found = {"counts": counts, "config": settings, "files": {"report.html": "".join(pages)}, "ids": ids}
""",
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(str(workdir / "tensorboard"))
events.Reload()
values = {tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
found = {"values": values, "files": texts}
""",
}
END = "print(json.dumps(found), flush=True)\nos._exit(0)"  # some packages have last words
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGES = {name: EXTRAS.get(name, [name]) for name in READ}


@pytest.mark.release
@pytest.mark.parametrize("name", PACKAGES)
def test_a_run_that_goes_on_is_one_run_in_each_service(name, tmp_path):
    check(name, run_with(tmp_path, PACKAGES[name], SCRIPT + READ[name] + END, name, tmp_path))


def check(name, found):
    """Every step once, in one run, with the config and the report."""
    if name == "swanlab":  # whose records are not documented
        once = 9 + 1  # the steps, and where the name is explained
        assert found["counts"] == {"train/loss": once, "timing/step_seconds": once}
    else:
        for key, at in (
            *[("train/loss", lambda step: 1 / (step + 2)), ("validation/accuracy", lambda step: step / 8)],
            *[("timing/step_seconds", float)],
        ):
            steps = [step for step, _ in found["values"][key]]
            assert steps == list(range(9)), (key, found["values"][key])
            for step, value in found["values"][key]:
                if (key, step) != ("train/loss", 3):  # NaN, of which each service has its own word
                    assert float(value) == pytest.approx(at(step), rel=1e-6)
    if name != "tensorboard":
        assert "learning_rate" in json.dumps(found["config"])
    assert any("report" in file for file in found["files"]) and "report" in "".join(found["files"].values())
    assert found.get("runs", 1) == found.get("ids", 1) == 1


def test_a_service_that_fails_costs_a_warning_and_not_the_run(caplog):
    said = []

    class Down:
        def write(self, step, values):
            said.append(step)
            if step == 2:
                raise ConnectionError("no route to it")

        def sync(self):
            raise AssertionError("asked after it failed")

        keep = sync

        def close(self):
            said.append("closed")

    service = sinks.Service("mlflow", Down())
    for step in range(4):
        service.write(step, {"a": 1.0})
    service.sync()
    service.keep("report.html")
    service.close()
    assert said == [0, 1, 2, "closed"]
    assert caplog.text.count("mlflow takes no more of this run: ConnectionError: no route to it") == 1


def test_a_run_with_a_start_goes_on_though_its_keys_have_other_names():
    now = config_lib.defaults()
    with now.unlocked():
        now.start = config_lib.defaults("sft")
    old = json.loads(config_lib.to_json(now))
    for part in (old, old["start"]):
        log = part["log"]
        log |= {"tensorboard": "tensorboard" in log.pop("to"), "wandb": ""}
        del log["project"]
    assert config_lib.differences(json.dumps(old), config_lib.to_json(now)) == []


def test_old_runs_are_read_with_the_keys_of_today():
    """`log.tensorboard` and `log.wandb` were what `log.to` and `log.project` are."""
    old = {"log": {"every": "3 steps", "report": False, "tensorboard": True, "wandb": "mine"}, "start": {}}
    new = {"log": {"every": "3 steps", "report": False, "to": "tensorboard,wandb", "project": "mine"}, "start": {}}
    assert config_lib.renamed(old) == new == config_lib.renamed(new)
    assert config_lib.renamed({"start": old})["start"] == new
    assert config_lib.renamed({"log": {"tensorboard": False, "wandb": ""}})["log"] == {"to": "", "project": "rmjax"}
