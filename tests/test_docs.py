"""The pages that show code are run: what stands on them works as it stands."""

import contextlib
import io
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
PYTHON = re.compile(r"```python\n(.*?)```", re.S)
OUTPUT = re.compile(r"<!-- output: (\w+) -->\n```\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def own_models(tmp_path_factory) -> tuple[dict, str]:
    """What the page defines, and prints, in a folder of its own."""
    page, names, printed = (DOCS / "own_models.md").read_text(), {}, io.StringIO()
    blocks = PYTHON.findall(page)
    assert len(blocks) >= 7
    with contextlib.chdir(tmp_path_factory.mktemp("own_models")), contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, "own_models.md", "exec"), names)
    return names, printed.getvalue()


def test_the_page_of_own_models_runs_and_its_posteriors_learnt_something(own_models):
    names, _ = own_models
    rows = names["om"].evaluate(names["dropout"], (names["images"], names["labels"]), "mim", 0.1).rows.set_index("perturbation")
    assert rows.loc["none", "wrong"] < 0.15
    assert rows.loc["mim", "changed"] > rows.loc["random_sign", "changed"] + 0.3
    assert names["laplace"].num_draws is None
    assert names["posterior"].num_draws == 4


def test_what_the_page_shows_as_printed_has_the_lines_and_rows_that_are_printed(own_models):
    shown = dict(OUTPUT.findall((DOCS / "own_models.md").read_text()))
    assert shown.keys() == {"evaluate", "detect"}
    for text in shown.values():
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) > 5
        for line in lines:
            first = re.split(r"\s{2,}|\d", line.strip())[0]  # what stands before the first figure
            assert first in own_models[1], line


def test_the_notebook_runs_and_compares_four_posteriors(tmp_path):
    notebook = nbformat.read(DOCS / "notebooks" / "own_model.ipynb", as_version=4)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    done = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    tables = [output.data["text/plain"] for output in outputs if output.output_type == "execute_result" and "text/plain" in output.data]
    for name in ("point", "dropout", "ensemble", "Laplace"):
        assert any(name in table for table in tables)
    assert any("image/png" in output.get("data", {}) for output in outputs)
