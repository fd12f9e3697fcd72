"""The notebook of docs/ runs, and prints what it did."""

from pathlib import Path

import nbclient
import nbformat
import pytest

from tests import tiny_base, tiny_served

NOTEBOOK = Path(__file__).parents[1] / 'docs' / 'use_from_python.ipynb'


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    base = tmp_path / 'base'
    base.mkdir()
    tiny_served.write(tmp_path / 'run', tiny_base.write(base))
    monkeypatch.setenv('RUN', str(tmp_path / 'run'))
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
