"""The walk-through runs as it stands: its blocks, pasted one after the other, and the assertions in them.

`python -m tests.test_walkthrough` writes the notebook anew from the page.
"""

import json
import re
from pathlib import Path

from grpo.config import known_keys
from grpo.metrics import undocumented
from grpo.objectives import PRESETS

WALKTHROUGH = Path(__file__).parents[1] / "docs" / "walkthrough.md"


def notebook(text: str) -> str:
    """The page as a Jupyter notebook: its blocks are the code cells."""
    cells = []
    for i, part in enumerate(re.split(r"```python\n(.*?)\n```", text, flags=re.DOTALL)):
        code = {"cell_type": "code", "execution_count": None, "outputs": []} if i % 2 else {"cell_type": "markdown"}
        cells.append({**code, "id": f"cell-{i}", "metadata": {}, "source": part.strip().splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1) + "\n"


def test_the_notebook_is_the_page():
    page = WALKTHROUGH.read_text(encoding="utf-8")
    assert WALKTHROUGH.with_suffix(".ipynb").read_text(encoding="utf-8") == notebook(page)


def test_every_block_of_the_walkthrough_runs_and_its_assertions_hold():
    text = WALKTHROUGH.read_text(encoding="utf-8")
    blocks = [(m[1], text.count("\n", 0, m.start()) + 1) for m in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) > 8
    names: dict[str, object] = {}
    for block, line in blocks:
        exec(compile("\n" * line + block, str(WALKTHROUGH), "exec"), names)  # so that errors show the page's own lines


def test_the_troubleshooting_page_names_metrics_settings_and_presets_that_exist():
    text = WALKTHROUGH.with_name("troubleshooting.md").read_text(encoding="utf-8")
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    settings = re.findall(rf"`((?:{'|'.join(sections)})\.\w+)", text)
    assert len(settings) > 20 and not set(settings) - set(known_keys())
    named = set(re.findall(r"`([a-z_/]+)`", text)) - {"clip_low", "top_k", "sequence_mean", "token_mean", "constant"}
    others = {"completions/", "correctness"}
    assert undocumented(named - others - set(PRESETS)) == []


if __name__ == "__main__":
    WALKTHROUGH.with_suffix(".ipynb").write_text(notebook(WALKTHROUGH.read_text(encoding="utf-8")), encoding="utf-8")
