"""The documentation site: built with warnings as errors, complete, properly rendered; the code of its pages runs."""

import html.parser
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import urllib.parse

import numpy as np
import pytest
from test_docs import examples

import tfp_dimflows as dimflows
from tfp_dimflows import recipes

pytest.importorskip("properdocs", reason="needs the extra docs: pip install -e '.[docs]'")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
SOURCES = sorted((TUTORIALS / "site").rglob("*.md"))
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
ENTRY = re.compile(r'<h\d id="(tfp_dimflows[\w.]*)"')


class Page(html.parser.HTMLParser):
    """What the tests look at: identifiers, links, pictures, the text inside and outside of code blocks."""

    def __init__(self, source):
        super().__init__()
        self.ids, self.links, self.assets, self.quotes = set(), [], [], 0
        self.code, self.prose, self._blocks = [], [], 0
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        self.assets += [attrs[name] for name in ("src", "href") if tag != "a" and name in attrs]
        self.quotes += tag == "blockquote"
        if tag == "pre":
            self._blocks += 1
            self.code.append("")

    def handle_endtag(self, tag):
        self._blocks -= tag == "pre"

    def handle_data(self, data):
        if self._blocks:
            self.code[-1] += data
        else:
            self.prose.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: HTML by path."""
    folder = tmp_path_factory.mktemp("site")
    command = ["build", "--strict", "--config-file", str(TUTORIALS / "mkdocs.yml"), "--site-dir", str(folder)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run([sys.executable, "-m", "properdocs", *command], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WARNING -" not in run.stderr + run.stdout
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}, folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(source) for path, source in site[0].items() if path != "404.html"}


@pytest.fixture(scope="module")
def entries(site):
    """The part of the API reference that describes each object, by identifier."""
    found = {}
    for path, source in site[0].items():
        if path.startswith("api/"):
            matches = list(ENTRY.finditer(source))
            ends = [match.start() for match in matches[1:]] + [len(source)]
            found.update({match[1]: source[match.start() : end] for match, end in zip(matches, ends)})
    return found


def resolve(identifier):
    """The object of an identifier; its modules first, since a recipe may have its module's name."""
    parts = identifier.split(".")
    size = max(n for n in range(1, len(parts)) if ".".join(parts[:n]) in sys.modules)
    value = sys.modules[".".join(parts[:size])]
    for part in parts[size:]:
        value = getattr(value, part)
    return value


def exists(identifier):
    """Whether an identifier has an object."""
    try:
        resolve(identifier)
    except AttributeError:
        return False
    return True


def public_names(module):
    """Public names of a module and of the modules that are public names of it, as (full name, object)."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    for name in getattr(module, "__all__", None) or own:
        if name.startswith("_"):
            continue
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            yield from public_names(value)
        else:
            yield f"{module.__name__}.{name}", value


NAMES = dict(public_names(dimflows))


def arguments(docstring):
    """The names under `Args:`."""
    block = re.search(r"^Args:\n((?: +.*\n|\n)+)", inspect.cleandoc(docstring or "") + "\n", flags=re.MULTILINE)
    if block is None:
        return []
    indent = len(block[1]) - len(block[1].lstrip(" "))
    return re.findall(rf"^ {{{indent}}}(\**\w+):", block[1], flags=re.MULTILINE)


def formulas(docstring):
    """First lines of the indented blocks before the first section."""
    text = re.split(r"^\w+:$|^#+ |^>>> ", inspect.cleandoc(docstring or ""), flags=re.MULTILINE)[0]
    return re.findall(r"(?<=\n\n) {4}(\S.*)$", text, flags=re.MULTILINE)


def test_the_api_reference_lists_every_public_name(entries):
    documented = [resolve(identifier) for identifier in entries]
    assert len(NAMES) > 100
    assert [name for name, value in NAMES.items() if not any(value is other for other in documented)] == []


def test_the_api_reference_shows_no_private_names_and_nothing_of_tfp_or_keras(entries):
    assert [name for name in entries if any(part.startswith("_") for part in name.split("."))] == []
    members = [name.rpartition(".") for name in entries if name.rpartition(".")[0] in entries]
    assert len(members) > 20
    for owner, _, name in members:
        cls = next(c for c in inspect.getmro(resolve(owner)) if name in {*vars(c), *vars(c).get("__annotations__", {})})
        assert cls.__module__.startswith("tfp_dimflows"), f"{owner}.{name}"
    bases = [part for source in entries.values() for part in re.findall(r'doc-class-bases">(.*?)</p>', source, flags=re.DOTALL)]
    assert bases
    assert [part for part in bases if re.search(r">_\w+<", part)] == []


def test_docstrings_are_rendered(entries, pages):
    shown = {identifier: (resolve(identifier), Page(source)) for identifier, source in entries.items()}
    lost = []
    for identifier, (value, page) in shown.items():
        if not callable(value):
            continue
        text = "".join(page.prose)
        lost += [(identifier, name) for name in arguments(value.__doc__) if f"<code>{name}</code>" not in entries[identifier]]
        lost += [(identifier, "Parameters:") for _ in arguments(value.__doc__)[:1] if "Parameters:" not in text]
        first = [f">>> {example.source.splitlines()[0]}" for example in examples(value.__doc__)]
        lost += [(identifier, line) for line in first + formulas(value.__doc__) if line not in "\n".join(page.code)]
    assert lost == []
    assert sum(len(formulas(value.__doc__)) for value, _ in shown.values()) > 20
    api = {path: page for path, page in pages.items() if path.startswith("api/")}
    prose = {path: "".join(page.prose) for path, page in api.items()}
    assert [path for path, page in api.items() if page.quotes or ">>>" in prose[path] or "###" in prose[path]] == []


def test_links_lead_somewhere_and_every_page_is_reachable(site, pages):
    _, folder = site
    broken, reached, queue = [], set(), ["index.html"]
    while queue:
        path = queue.pop()
        if path in reached:
            continue
        reached.add(path)
        for link in [*pages[path].links, *pages[path].assets]:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(path), urllib.parse.unquote(url.path))) if url.path else path
            if not (folder / target).exists():
                broken.append((path, link))
            elif target in pages:
                broken += [(path, link)] * (bool(url.fragment) and urllib.parse.unquote(url.fragment) not in pages[target].ids)
                queue.append(target)
    assert broken == []
    assert sorted(pages.keys() - reached) == []


def test_the_site_needs_no_other_server_and_names_no_machine(site, pages):
    texts = {path: path.read_text() for path in site[1].rglob("*") if path.suffix in (".html", ".json", ".xml", ".txt")}
    assert [path for path, text in texts.items() if str(ROOT) in text or str(site[1]) in text] == []
    assert [link for page in pages.values() for link in page.assets if "://" in link] == []


def test_the_search_works_without_a_server(site, pages):
    """A page opened as a file can fetch nothing and start no worker: the index is a script, and the search runs in a frame."""
    index = site[1] / "search" / "search_index.json"
    assert index.with_suffix(".js").read_text() == f"var __index = {index.read_text()}"
    for path, page in pages.items():
        scripts = [os.path.basename(asset).partition(".")[0] for asset in page.assets if asset.endswith(".js")]
        assert scripts == ["iframe-worker", "bundle"], path


def test_the_readmes_are_included(pages):
    for source, path in (("README.md", "readme.html"), ("benchmarks/README.md", "benchmarks/index.html")):
        text = (ROOT / source).read_text()
        prose = " ".join("".join(pages[path].prose).split())
        headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
        assert headings
        assert [heading for heading in headings if heading.replace("`", "") not in prose] == []
        assert len(pages[path].code) == len(FENCE.findall(text))


def test_notebooks_are_rendered_with_their_outputs(pages):
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        page = pages[f"tutorials/{notebook.stem}.html"]
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        outputs = [output for cell in cells for output in cell["outputs"]]
        pictures = [output for output in outputs if "image/png" in output.get("data", {})]
        assert outputs, notebook
        assert len([asset for asset in page.assets if f"{notebook.stem}_files/" in asset]) == len(pictures)
        code = "\n".join(page.code)
        for cell in cells:
            lines = "".join(cell["source"]).strip().splitlines()
            assert not lines or lines[0] in code
        for output in outputs:
            lines = "".join(output.get("text", [])).strip().splitlines()
            assert not lines or lines[0].strip() in code


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(TUTORIALS / "site").as_posix())
def test_code_of_the_pages(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    namespace = {"__name__": path.stem}
    for language, block in FENCE.findall(path.read_text()):
        if language == "python":
            exec(compile(block, str(path), "exec"), namespace)  # later blocks use what earlier ones define
    models = [value for value in namespace.values() if isinstance(value, dimflows.FlowModel)]
    assert all(np.isfinite(w).all() for model in models for w in model.get_weights())


@pytest.mark.parametrize(
    "name", ["index.md", "which_technique.md", "techniques.md", "coming_from.md", "adding_a_bijector.md", "citing.md"]
)
def test_names_on_the_pages_exist(name):
    prefixes = {"dfb": "tfp_dimflows.bijectors", "dfd": "tfp_dimflows.distributions", "dimflows": "tfp_dimflows"}
    text = FENCE.sub("", (TUTORIALS / "site" / name).read_text())
    found = re.findall(r"`(dfb|dfd|dimflows)\.([a-zA-Z_.0-9]*\w)", text)
    assert [f"{prefix}.{rest}" for prefix, rest in found if not exists(f"{prefixes[prefix]}.{rest}")] == []


def test_every_recipe_is_in_the_table():
    text = (TUTORIALS / "site" / "which_technique.md").read_text()
    assert [name for name in recipes.names() if f"`{name}`" not in text] == []


def test_formulas_of_notebooks_are_typeset(site):
    source = site[0]["tutorials/02_log_det_per_dimension.html"]
    assert "<math" in source and "arithmatex" not in source
