"""What the site takes from outside docs/: results, examples, the changelog, and the commands' own help.

Pages link to such files as they lie in the tree (`../results/forms.md`), so that the links work there as well; here each link
is turned to the page that the file has become.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
_PICTURE = re.compile(r"!\[[^\]]*\]\((?:docs/)?assets/[\w-]+\.svg(?=\))")
_FENCES = {".py": "python", ".yml": "yaml", ".yaml": "yaml"}
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_WHOLE = ("CHANGELOG.md", "CONTRIBUTING.md", "results/*.md", "results/*.svg", "results/precision/*.svg", "examples/README.md")
_SOURCES = ("action.yml", "examples/*.py", "examples/*.yml", "examples/*.yaml", "recipes/*.yaml")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside docs/."""
    for path in _found(_WHOLE):
        files.append(File.generated(config, page_of(path), abs_src_path=str(ROOT / path)))
    for path in _found(_SOURCES):
        text = (ROOT / path).read_text(encoding="utf-8")
        content = f"# {path}\n\n````{_FENCES[Path(path).suffix]}\n{text}````\n"
        files.append(File.generated(config, page_of(path), content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the tree to the pages that they have become, and show each picture in the page's scheme."""
    if page.file.src_uri == "commands.md":
        return markdown + commands()
    here = posixpath.dirname(page.file.src_uri)
    origin = next((path for path in _found(_WHOLE) if page_of(path) == page.file.src_uri), f"docs/{page.file.src_uri}")

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link[2]))
        if "://" in link[2] or not (ROOT / target).is_file():
            return link[0]
        return f"{link[1]}{posixpath.relpath(page_of(target), here or '.')}{link[3]}"

    # A picture follows the scheme of the page: the theme shows one of the two, and the file looks at its own fragment.
    both = _PICTURE.sub(lambda found: f"{found[0]}#only-light)\n{found[0]}#only-dark", markdown)
    return _LINK.sub(turned, both)


def page_of(path: str) -> str:
    """Return the place in the site of a file of the tree, both relative."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if Path(path).suffix in _FENCES:
        return f"{path}.md"
    return _PAGES.get(path, path)


def commands() -> str:
    """Return the help of every command of the command line, its arguments and options."""
    from tensorrail.cli import app

    lines: list[str] = []
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        every = {name: command} if inner is None else {f"{name} {sub}": one for sub, one in inner.items()}
        for full, one in every.items():
            lines += ["", f"## tensorrail {full}", "", *_command(full, one)]
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> list[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    places = " ".join(_place(one) for one in arguments)
    rows = [(f"`{_place(one)}`", one.help or "") for one in arguments]
    rows += [(", ".join(f"`{text}`" for text in _spelled(one)), (one.help or "") + _default(one)) for one in options]
    table = [f"| {first} | {_cell(second)} |" for first, second in rows]
    help_text = " ".join((command.help or "").split())
    return [
        help_text,
        "",
        f"```\ntensorrail {name} {places} [OPTIONS]\n```",
        "",
        "| argument or option | |",
        "|---|---|",
        *table,
    ]


def _place(argument: Any) -> str:
    text = argument.metavar or argument.name.upper()
    return text if argument.required or text.startswith("[") or "[" in text else f"[{text}]"


def _spelled(option: Any) -> list[str]:
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return [f"{spelling}{value}" for spelling in option.opts]


def _default(option: Any) -> str:
    if option.required:
        return " Required."
    shown = option.default not in (None, False, (), []) and not callable(option.default)
    return f" Default: `{option.default}`." if shown else ""


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|")


def _found(patterns: tuple[str, ...]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]
