"""The walk-through runs as it stands: its notebook in a Jupyter kernel, and the assertions in it.

`python -m tests.test_walkthrough` writes the notebook anew from the page.
"""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from grpo.config import known_keys
from grpo.metrics import definition
from grpo.objectives import AGGREGATIONS, PRESETS, SURROGATES

ROOT = Path(__file__).parents[1]
WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
OBJECTIVE_NAMES = {*PRESETS, *AGGREGATIONS, *SURROGATES}
BLOCK = re.compile(r"```python\n(.*?)\n```", re.DOTALL)


def notebook(text: str) -> str:
    """The page as a Jupyter notebook: its blocks are the code cells."""
    cells = []
    for i, part in enumerate(BLOCK.split(text)):
        code = {"cell_type": "code", "execution_count": None, "outputs": []} if i % 2 else {"cell_type": "markdown"}
        cells.append({**code, "id": f"cell-{i}", "metadata": {}, "source": part.strip().splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1) + "\n"


def test_the_notebook_is_the_page():
    page = WALKTHROUGH.read_text(encoding="utf-8")
    assert WALKTHROUGH.with_suffix(".ipynb").read_text(encoding="utf-8") == notebook(page)


def run(cells: str, page: str, home: Path) -> list[nbformat.NotebookNode]:
    """The code cells with what they printed, run as Jupyter runs them: in the notebook's folder.

    An exception of theirs fails the test and shows the line of `page`, which they were made from. home: of IPython.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(home)}  # this checkout, nobody's settings
    made = nbformat.reads(cells, as_version=4)
    client = NotebookClient(made, timeout=200, resources={"metadata": {"path": WALKTHROUGH.parent}})
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        said = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # without colours
        cell, line = map(int, re.search(r"Cell In\[(\d+)\], line (\d+)", said).groups())
        before = page.count("\n", 0, list(BLOCK.finditer(page))[cell - 1].start(1))
        pytest.fail(f"{WALKTHROUGH}:{before + line}: {said}", pytrace=False)
    return code


def test_the_notebook_runs_in_a_kernel_and_its_assertions_hold(tmp_path):
    page = WALKTHROUGH.read_text(encoding="utf-8")
    code = run(WALKTHROUGH.with_suffix(".ipynb").read_text(encoding="utf-8"), page, tmp_path)
    assert len(code) > 8 and [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert "'grad_norm'" in code[-1].outputs[0].text, "the step printed its metrics"


def test_an_error_in_the_notebook_shows_the_line_of_the_page(tmp_path):
    page = "# Title\n\n```python\nx = 1\n```\n\nwords\n\n```python\ny = 2\n\nassert x == y, 'no'\n```\n"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)walkthrough\.md:12: .*AssertionError: no"):
        run(notebook(page), page, tmp_path)


def test_the_troubleshooting_page_names_metrics_settings_and_presets_that_exist():
    text = WALKTHROUGH.with_name("troubleshooting.md").read_text(encoding="utf-8")
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    settings = re.findall(rf"`((?:{'|'.join(sections)})\.(?!py`)\w+)", text)
    assert len(settings) > 20 and not set(settings) - set(known_keys())
    named = set(re.findall(r"`([a-z_/]+)`", text)) - {"clip_low", "top_k"} - OBJECTIVE_NAMES
    others = {"completions/", "state/", "correctness"}
    assert [name for name in named - others if definition(name) is None] == []


if __name__ == "__main__":
    WALKTHROUGH.with_suffix(".ipynb").write_text(notebook(WALKTHROUGH.read_text(encoding="utf-8")), encoding="utf-8")
