"""The tutorials run with their small parameters, and are committed with their outputs."""

import base64
import pathlib
import re

import pytest

papermill = pytest.importorskip("papermill", reason="needs the extra tutorials: pip install -e '.[tutorials]'")
nbformat = pytest.importorskip("nbformat")
pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
MAX_BYTES = 500_000
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<)])/(?:home|root|tmp|usr|var|work|opt|mnt|Users|private)/\w|\b[A-Z]:\\\\")

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture
def surroundings(data_dir, tmp_path, monkeypatch):
    """Whatever a notebook writes goes to temporary directories, also what it makes with `tempfile`."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    """All sources and all outputs that are text."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from (value for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


def test_there_are_tutorials():
    assert NOTEBOOKS


@notebooks
def test_a_tutorial_runs(path, tmp_path, surroundings):
    parameters = read(path).metadata["tests"]
    executed = papermill.execute_notebook(
        str(path), None, parameters=dict(parameters), cwd=str(tmp_path), kernel_name="python3", progress_bar=False
    )
    assert [cell for cell in code_cells(executed) if cell.execution_count is None] == []


@notebooks
def test_a_tutorial_has_its_parameters_and_format(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assigned = re.findall(r"^(\w+) *=", tagged[0].source, flags=re.MULTILINE)
    assert notebook.metadata["tests"] and set(notebook.metadata["tests"]) <= set(assigned)


@notebooks
def test_a_tutorial_is_committed_with_outputs(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


@notebooks
def test_a_tutorial_is_small_and_knows_no_machine(path):
    assert path.stat().st_size < MAX_BYTES
    found = [match.group() for text in texts(read(path)) for match in ABSOLUTE_PATH.finditer("".join(text))]
    assert found == []


@notebooks
def test_links_of_a_tutorial_exist(path):
    source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", source) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
