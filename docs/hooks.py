"""What mkdocs makes of this repository: pages that are files elsewhere, and tables that the code knows."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import rich.text
import typer
from mkdocs.structure.files import File, Files

import fastood

ROOT = Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
SITE = {source: page for page, source in PAGES.items()}


def on_files(files: Files, config: Any) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=linked((ROOT / source).read_text())))
    files.append(File.generated(config, "scores.md", content=scores()))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    return files


def linked(text: str) -> str:
    """With links as a page has them, not a file of the repository."""

    def target(found: re.Match[str]) -> str:
        path = found[1]
        return f"]({SITE.get(path, path.removeprefix('docs/'))})"

    return re.sub(r"\]\(([^)#:]+)\)", target, text)


def scores() -> str:
    """The registry as a table."""
    lines = [
        "# Scores",
        "",
        "`fastood.SCORES`: p = softmax(f / T), f the logits of C classes, h the features. The raw formula is larger",
        "for the rows that the third column names; `fastood.score` turns it: higher is always more in-distribution.",
        "",
        "| method | raw formula, and where it is from | larger for | takes |",
        "|---|---|---|---|",
    ]
    for name, score in fastood.SCORES.items():
        larger = "OOD" if score.higher == "out" else "in-distribution"
        formula = f"{code(score.formula)}<br>{cell(score.source)}"
        lines.append(f"| {code(name)} | {formula} | {larger} | {', '.join(score.needs)} |")
    return "\n".join(lines) + "\n"


def command_line() -> str:
    """What --help says of each command."""
    from fastood.cli import app

    group = typer.main.get_command(app)
    lines = ["# Command line", ""]
    context = typer.Context(group, info_name="fastood")
    for name in group.list_commands(context):  # type: ignore[attr-defined]
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        help = rich.text.Text.from_markup(command.help or "").plain
        lines += [f"## fastood {name}", "", "```text", help, "```", "", "| option | |", "|---|---|"]
        for option in command.params:
            what = ", ".join(option.opts) if option.param_type_name == "option" else option.name.upper()
            lines.append(f"| {code(what)} | {cell(' '.join((getattr(option, 'help', '') or '').split()))} |")
        lines.append("")
    return "\n".join(lines)


def code(text: str) -> str:
    return f"<code>{cell(text)}</code>"


def cell(text: str) -> str:
    """In a table, where a bar would end it."""
    return html.escape(text).replace("|", "&#124;")
