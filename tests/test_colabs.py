"""The notebooks run from top to bottom on a CPU, one after the other in one folder, and what they draw is there."""

import json
import shutil
from pathlib import Path

import pytest

COLABS = Path(__file__).parents[1] / "colabs"
ORDER = ("train_tiny", "score", "inspect_run", "lora", "train_judge")  # the first trains the demo that others look at


@pytest.mark.slow
def test_notebooks_run_and_draw(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    assert {path.stem for path in COLABS.glob("*.ipynb")} == set(ORDER)
    for name in ORDER:
        notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
        nbclient.NotebookClient(notebook, timeout=420, resources={"metadata": {"path": str(tmp_path)}}).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        assert images and all(len(image) > 5_000 for image in images), name
        text = "".join(output.get("text", "") for output in outputs)
        assert "Traceback" not in text, name
    assert json.loads((tmp_path / "runs/tiny/quality.json").read_text())["passed"]
    assert len(json.loads((tmp_path / "scores.jsonl").read_text())["scores"]) == 6
    assert (tmp_path / "runs/lora/export/adapter_model.safetensors").exists()
    for name, least in (("lora", 0.85), ("judge", 0.88)):
        lines = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        accuracy = [line["validation/accuracy"] for line in lines if "validation/accuracy" in line]
        assert accuracy[0] < least - 0.02 and accuracy[-1] > least, (name, accuracy)
    shutil.rmtree(tmp_path)


def test_notebooks_are_committed_without_outputs():
    for path in COLABS.glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell), path
