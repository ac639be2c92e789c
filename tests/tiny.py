"""A folder with an experiment of a few cells, for tests that start runs of their own."""
import nbformat


def write_experiment(
    home,              # the folder
    cells,             # sources; the first has the parameters
    text,              # of the parameter file
    file='base',       # its name
    name='tiny',       # of the experiment
):
    "Writes notebook and parameter file; the folder."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in cells])
    nb.cells[0].metadata['tags'] = ['parameters']
    for d in ('nbs/experiments', f'params/{name}', 'params/sweeps'): (home / d).mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, home / f'nbs/experiments/{name}.ipynb')
    (home / f'params/{name}/{file}.yaml').write_text(text)
    return home
