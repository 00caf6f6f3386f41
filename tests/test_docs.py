"""The documentation runs: examples of all docstrings, and the README's code."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import slow

import tfp_dimflows as dimflows
from tfp_dimflows import bijectors, data, distributions, networks, plot, recipes, training

README = pathlib.Path(__file__).parents[1] / "README.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
PACKAGES = [
    dimflows,
    bijectors,
    bijectors.masks,
    bijectors.transformers,
    distributions,
    networks,
    recipes,
    training,
    data,
    plot,
]
NAMES = {  # what every example may use without an import
    "np": np,
    "tf": tf,
    "tfp": tfp,
    "tfb": tfp.bijectors,
    "tfd": tfp.distributions,
    "keras": keras,
    "dimflows": dimflows,
    "dfb": bijectors,
    "dfd": distributions,
    "data": data,
}


def public(package):
    """The public classes and functions of a package or module, by name."""
    names = getattr(package, "__all__", None) or [name for name in vars(package) if not name.startswith("_")]
    objects = {name: getattr(package, name) for name in names}
    return {
        name: value
        for name, value in objects.items()
        if callable(value) and getattr(value, "__module__", "").startswith("tfp_dimflows")
    }


def examples(docstring):
    return doctest.DocTestParser().get_examples(inspect.cleandoc(docstring or ""))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture(autouse=True)
def datasets_and_working_directory(data_dir, tmp_path, monkeypatch):
    """Whatever documentation writes goes to temporary directories."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.chdir(tmp_path)


# Their examples make and train models, solve differential equations or draw.
LONG = tuple(f"{dimflows.__name__}.{room}" for room in ("recipes.", "training.", "bijectors.continuous", "plot"))


@pytest.mark.parametrize(
    "module",
    [
        dimflows.__name__,
        *(
            slow(m.name) if m.name.startswith(LONG) else m.name
            for m in pkgutil.walk_packages(dimflows.__path__, f"{dimflows.__name__}.")
        ),
    ],
)
def test_examples_of_docstrings(module):
    report, failed = [], 0
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    for test in doctest.DocTestFinder().find(importlib.import_module(module), globs=dict(NAMES)):
        failed += runner.run(test, out=report.append).failed
    assert failed == 0, "".join(report)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_public_names_have_docstrings(package):
    exported = public(package)
    assert exported
    assert [name for name, value in exported.items() if not inspect.getdoc(value)] == []


@pytest.mark.parametrize(
    "package",
    [bijectors, bijectors.masks, bijectors.transformers, distributions, training],
    ids=lambda package: package.__name__,
)
def test_public_classes_have_examples(package):
    classes = {name: value for name, value in public(package).items() if inspect.isclass(value)}
    assert classes
    assert [name for name, value in classes.items() if not examples(value.__doc__)] == []


LONG_BLOCKS = ("First example", "Your own flow", "Data, conditions and scores", "LCMA", "Codes", "Use a model elsewhere")


def readme_blocks():
    """The README's Python code, by the headings above it; the blocks that take longest are slow."""
    for section in re.split(r"^## ", README.read_text(), flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        for language, block in FENCE.findall(section):
            if language == "python":
                values = slow if heading in LONG_BLOCKS else pytest.param
                yield values(heading, block, id=heading)


@pytest.mark.parametrize("heading, block", readme_blocks())
def test_code_of_the_readme(heading, block):
    namespace = {"__name__": "readme"}  # each block stands alone
    exec(compile(block, f"{README}, {heading}", "exec"), namespace)
    models = [value for value in namespace.values() if isinstance(value, dimflows.FlowModel)]
    assert all(np.isfinite(w).all() for model in models for w in model.get_weights())


def anchors(path):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_names_all_recipes_and_links_to_what_exists():
    text = README.read_text()
    assert [name for name in recipes.names() if f"`{name}`" not in text] == []
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [path for path, _, _ in links if not (README.parent / path).exists()] == []
    fragments = [(README.parent / path if path else README, anchor) for path, _, anchor in links if anchor]
    assert fragments
    assert [(path, anchor) for path, anchor in fragments if anchor not in anchors(path)] == []


def test_the_readme_has_the_sites_citation_of_this_version():
    citation = dict(FENCE.findall(README.read_text()))["bibtex"]
    assert citation in (README.parent / "tutorials" / "site" / "citing.md").read_text()
    assert f"version = {{{dimflows.__version__}}}" in citation
