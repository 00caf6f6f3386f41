"""What the site takes from the repository: README, benchmarks and notebooks as pages, and docstrings made ready for griffe."""

import inspect
import json
import pathlib
import posixpath
import re
import sys
from html import unescape

import griffe
from latex2mathml.converter import convert as latex_to_mathml

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
PREFIXES = {"dfb": "tfp_dimflows.bijectors", "dfd": "tfp_dimflows.distributions", "dimflows": "tfp_dimflows"}
MARKDOWN_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
PRIVATE_BASES = re.compile(r'<p class="doc doc-class-bases">(?:(?!</p>).)*>_\w+<.*?</p>', re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)
INLINE_CODE = re.compile(r"(<(?:h[1-6]|a|autoref|pre)\b.*?</(?:h[1-6]|a|autoref|pre)>)|<code>([\w.]+)</code>", re.DOTALL)


def on_config(config):
    """Puts the notebooks into the navigation."""
    pages = [{_title(notebook): _page_of(f"tutorials/{notebook.name}")} for notebook in NOTEBOOKS]
    config.nav = [{"Tutorials": pages} if entry == {"Tutorials": []} else entry for entry in config.nav]
    return config


def on_files(files, config):
    """Adds README, the benchmarks' README with its pictures, and the notebooks, at their paths in the repository."""
    from properdocs.structure.files import File

    pages, pictures = {}, {}
    for source in ("README.md", "benchmarks/README.md"):
        pages[source] = (ROOT / source).read_text()
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        pictures[picture.relative_to(ROOT).as_posix()] = picture.read_bytes()
    for notebook in NOTEBOOKS:
        source = f"tutorials/{notebook.name}"
        pages[source], outputs = _convert(notebook)
        pictures.update(outputs)
    for source, content in {**pages, **pictures}.items():
        files.append(File.generated(config, _page_of(source), content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links between files of the repository into links between pages, and links to other files into their text."""

    def link(match):
        target, anchor = re.fullmatch(r"([^#]*)(#.*)?", match[3]).groups(default="")
        if not target or "://" in target:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if files.get_file_from_path(_page_of(target)) is None and (ROOT / target).exists():
            return match[2]
        return f"{match[1]}[{match[2]}]({posixpath.relpath(_page_of(target), folder)}{anchor})"

    source, folder = _source_of(page.file.src_uri), posixpath.dirname(page.file.src_uri) or "."
    return MARKDOWN_LINK.sub(link, markdown)


def on_page_content(html, page, config, files):
    """Links names of the API, such as `dfb.Coupling`, to their entries, leaves out private base classes, typesets formulas."""
    entries = _entries(config)

    def link(match):
        identifier = entries.get(match[2])
        if match[1] or not identifier:
            return match[0]
        return f'<autoref identifier="{identifier}">{match[0]}</autoref>'

    return FORMULA.sub(_typeset, INLINE_CODE.sub(link, PRIVATE_BASES.sub("", html)))


def _typeset(match):
    """MathML, which browsers show by themselves."""
    return latex_to_mathml(unescape(match[3]), display="block" if match[2] == "[" else "inline")


def _title(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.search(r"^# (.+)$", text, flags=re.MULTILINE)[1].replace("`", "")


def _page_of(source):
    """Path of a file of the repository among the site's sources. A README beside an index page has another name."""
    source = re.sub(r"\.ipynb$", ".md", source.removeprefix("tutorials/site/"))
    return "readme.md" if source == "README.md" else source


def _source_of(page):
    """Path in the repository of a page among the site's sources (a notebook's with another suffix)."""
    if page == "readme.md":
        return "README.md"
    return page if page.startswith(("benchmarks/", "tutorials/")) else f"tutorials/site/{page}"


def _convert(notebook):
    """A notebook with its outputs as Markdown, and its pictures by path."""
    from nbconvert import MarkdownExporter

    folder = f"{notebook.stem}_files"
    text, resources = MarkdownExporter().from_filename(str(notebook), {"output_files_dir": folder})
    return text, {f"tutorials/{name}": content for name, content in resources["outputs"].items()}


def _entries(config):
    """Identifiers of the API's entries, by the names under which users know them."""
    names = {}
    for page in sorted((pathlib.Path(config.docs_dir) / "api").glob("*.md")):
        for identifier in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE):
            parts = identifier.split(".")
            if len(parts) > 3 and parts[-1] == parts[-2]:
                del parts[-2]
            public = ".".join(parts)
            for short, long in PREFIXES.items():
                if public.startswith(f"{long}."):
                    names[short + public.removeprefix(long)] = identifier
            names[".".join(parts[1:])] = identifier
    return {name: identifier for name, identifier in names.items() if "." in name}


class Docstrings(griffe.Extension):
    """Doctests as griffe's `Examples:`, and the recipes that are made at run time."""

    def on_instance(self, *, obj, **kwargs):
        """Rewrites the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = _with_examples(obj.docstring.value)

    def on_package(self, *, pkg, **kwargs):
        """Replaces attributes that are functions at run time by what they are."""
        if pkg.name != "tfp_dimflows":
            return
        module = pkg["recipes.lcma"]
        inspected = griffe.inspect(module.path, filepath=module.filepath, import_paths=[ROOT, *sys.path])
        for name, member in inspected.members.items():
            if isinstance(member, griffe.Function) and isinstance(module.members.get(name), griffe.Attribute):
                _shorten(member)
                module.set_member(name, member)


def _shorten(function):
    """Leaves in a signature the parameters that the docstring names, and `**arguments` for the others."""
    named = re.findall(r"^ +(\w+):", function.docstring.value, flags=re.MULTILINE)
    others = griffe.Parameter("arguments", kind=griffe.ParameterKind.var_keyword)
    function.parameters = griffe.Parameters(*(p for p in function.parameters if p.name in named), others)


def _with_examples(text):
    lines = inspect.cleandoc(text).split("\n")
    for start, line in enumerate(lines):
        if re.fullmatch(r"#+ Examples?|Examples?:", line):
            body = inspect.cleandoc("\n".join(["", *lines[start + 1 :]])).split("\n")
        elif line.startswith(">>> "):
            body = lines[start:]
        else:
            continue
        return "\n".join([*lines[:start], "", "Examples:", *("    " + line if line else "" for line in body)])
    return text
