"""What mkdocs.yml asks for beyond the pages of docs/.

An API page for each folder of code, README.md as a part of the home page, and links from a page to a file of the repository, which
lead to the API page of that file or to a copy of it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("guided_mt", "latent_mt", "evaluations", "reproduce", "mt_diffusion")
HOME, README = "index.md", "<!-- README -->"  # the line of index.md in whose place README.md stands on the site
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def _folders() -> dict[str, list[str]]:
    """{dotted name of a folder of code: dotted names of its public modules, the folder's own first}."""
    found = {}
    for package in PACKAGES:
        for init in sorted((ROOT / package).rglob("__init__.py")):
            folder = ".".join(init.parent.relative_to(ROOT).parts)
            names = sorted(path.stem for path in init.parent.glob("*.py") if not path.stem.startswith("_"))
            found[folder] = [folder, *(f"{folder}.{name}" for name in names)]
    return found


def on_config(config: MkDocsConfig) -> None:
    """Add the API to the navigation: a section for each package, a page for each of its folders."""
    sections: dict[str, list[dict[str, str]]] = {}
    for folder in _folders():
        sections.setdefault(folder.split(".")[0], []).append({folder: f"api/{folder}.md"})
    assert config.nav is not None
    config.nav.append({"API": [{package: pages} for package, pages in sections.items()]})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the API pages."""
    for folder, modules in _folders().items():
        package = f"::: {modules[0]}\n    options: {{members: false, show_root_heading: false}}\n"
        text = "\n".join([f"# {folder}\n", package, *(f"::: {module}\n" for module in modules[1:])])
        files.append(File.generated(config, f"api/{folder}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put README.md in its place, and send links that leave docs/ to the API or to a copy of the file."""
    source = page.file.src_uri
    if source == HOME:
        markdown = markdown.replace(README, _readme())

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), match[2]))
        if target.startswith("docs/") or not (ROOT / target).exists():
            return match[0]  # of docs/; or broken, which the strict build reports
        address = posixpath.relpath(_on_site(target, files, config), posixpath.dirname(source) or ".")
        return f"{match[1]}{address})" if "#" in address else f"{match[1]}{address}{match[3]}"

    return LINK.sub(moved, markdown)


def _readme() -> str:
    """README.md without its title, its links as seen from docs/."""
    text = (ROOT / "README.md").read_text().partition("\n")[2]
    return LINK.sub(lambda match: f"{match[1]}{posixpath.relpath(match[2], 'docs')}{match[3]}", text)


def _on_site(target: str, files: Files, config: MkDocsConfig) -> str:
    """Where the site shows a file or folder of the repository: an address below its root."""
    if target == "README.md":
        return HOME
    module = target.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    for folder, modules in _folders().items():
        if module in modules:
            return f"api/{folder}.md" + ("" if module == folder else f"#{module}")
    if (ROOT / target).is_dir():
        raise ValueError(f"a page links to {target}, a folder that is no package: link to a file of it")
    copy = f"files/{target}"
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(ROOT / target)))
    return copy
