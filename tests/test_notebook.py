"""The notebook of docs/ runs, and prints what it did."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / 'docs' / 'use_from_python.ipynb'


@pytest.mark.slow
def test_the_notebook_runs(served_run, monkeypatch):
    monkeypatch.setenv('RUN', str(served_run))
    monkeypatch.setenv('PYTHONPATH', str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, 4)
    shown = [printed(cell) for cell in notebook.cells if cell.cell_type == 'code']
    nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()
    again = [printed(cell) for cell in notebook.cells if cell.cell_type == 'code']
    assert all(shown), 'the notebook stands there without its output'
    for before, now in zip(shown, again, strict=True):
        assert before.count('\n') == now.count('\n')
    assert again[2].split()[-1] == 'True'


def printed(cell):
    return ''.join(one.text for one in cell.outputs if one.get('name') == 'stdout')
