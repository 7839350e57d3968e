"""Chapters become notebooks: every cell arrives, and a chapter's cells run in order in one process. Chapters 00 to 15.

Jupyter is no dependency: the cells are read from the `.ipynb` and executed in one namespace, as a kernel would do it.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IN_CELLS = [path for path in sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py")) if "\n# %%" in path.read_text()]
RUN_CELLS = """
import json, sys
namespace = {"__name__": "__main__"}
sys.modules["ipykernel"] = sys  # what a chapter asks to know that it is in a notebook
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
"""


def converted(chapter, folder):
    out = folder / f"{chapter.stem}.ipynb"
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "to_notebook.py"), str(chapter), str(out)],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.mark.parametrize("chapter", IN_CELLS, ids=lambda path: path.stem)
def test_a_notebook_has_every_cell_of_its_chapter(chapter):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from to_notebook import cells_of, notebook
    finally:
        sys.path.pop(0)
    text = chapter.read_text(encoding="utf-8")
    cells = cells_of(text)
    kinds = [kind for kind, _ in cells]
    assert kinds.count("markdown") == text.count("\n# %% [markdown]") + 1  # and the docstring
    for kind, source in cells:
        if kind == "code":
            ast.parse(source)
            assert "# %%" not in source and not source.startswith('"""')
        else:
            assert not source.startswith("#  ") and "\n# \n" not in source
    whole = notebook(cells)
    assert whole["nbformat"] == 4 and len({cell["id"] for cell in whole["cells"]}) == len(cells)


@pytest.mark.heavy
@pytest.mark.parametrize("chapter", IN_CELLS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_in_order(chapter, tmp_path):
    done = subprocess.run([sys.executable, "-c", RUN_CELLS, str(converted(chapter, tmp_path))], capture_output=True,
                          text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Next: " in done.stdout


def test_the_cells_of_the_quickest_chapter_run_in_order(tmp_path):
    chapter = ROOT / "tutorials" / "11_the_router.py"
    done = subprocess.run([sys.executable, "-c", RUN_CELLS, str(converted(chapter, tmp_path))], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Next: " in done.stdout


@pytest.mark.parametrize("text, said", [(None, "No such file or directory"),
                                        ("def (:", "invalid syntax (<unknown>, line 1)")])
def test_a_file_that_is_no_chapter_is_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "it.py").write_text(text)
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "to_notebook.py"), "it.py", "out.ipynb"],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == f"error: it.py cannot be read: {said}\n"
