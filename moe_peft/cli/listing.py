"""What there is to choose from: methods, sizes of models, macros, gin files; no model is loaded.

moe-peft methods
moe-peft methods mov
moe-peft models --json
moe-peft macros
"""

import argparse
from collections.abc import Sequence
import inspect
import json
import re
import sys
from typing import Any

from moe_peft import errors
from moe_peft.config import macros as macros_lib

_HELP = {
    "methods": "list the methods that come with the package, or the options of one",
    "models": "list the networks that come with the package, with their sizes",
    "macros": "list the names that packaged gin files agree on, with their meanings",
}


def add_commands(commands: Any) -> None:
    """Adds the commands of this module to the subparsers of the command line."""
    for name, line in _HELP.items():
        sub = commands.add_parser(name, help=line, description=line.capitalize() + ".")
        if name == "methods":
            options = "show the options of this one, their defaults and what its file sets"
            sub.add_argument("method", nargs="?", metavar="NAME", help=options)
        sub.add_argument("--json", action="store_true", help="print JSON")
    files = commands.add_parser("files", help="list the gin files that come with the package")
    files.add_argument("--folder", action="store_true", help="print where they are instead")


def methods(args: argparse.Namespace) -> None:
    """Lists the files of gin/methods with what they say of themselves, or the options of one."""
    from moe_peft.config import packaged

    if args.method is None:
        found = packaged.files("methods")
        _show([{"method": path.stem, "about": packaged.about(path)} for path in found], args.json)
        return
    found = method_options(args.method.removeprefix("methods/").removesuffix(".gin"))
    if args.json:
        _show(found, as_json=True)
        return
    print(f"{found['about']}\nmethods/{found['method']}.gin calls {found['constructor']}.")
    if found["options"]:
        print()
        _show(found["options"], heading=True)


def method_options(name: str) -> dict[str, Any]:
    """Returns what the file of a method calls, and the options of that.

    An option has its name, its default (as Python writes it, or "required"), what the file sets
    and what the docstring says. Raises UserError if there is no such file.
    """
    from moe_peft.config import gin_files, packaged, registry

    files = {path.stem: path for path in packaged.files("methods")}
    errors.check_one_of("The method", name, files)
    gin_files.import_modules(packaged.imports(files[name]))
    bound = packaged.bindings(files[name])
    selector = (bound.get("METHOD") or bound["TARGET_METHOD"]).strip("@()")
    constructor = registry.find(selector).wrapped
    meanings = _meanings(constructor)
    options = [
        {
            "option": each.name,
            "default": "required" if each.default is each.empty else repr(each.default),
            "set": bound.get(f"{selector.rpartition('.')[2]}.{each.name}", ""),
            "meaning": meanings.get(each.name, ""),
        }
        for each in inspect.signature(constructor).parameters.values()
    ]
    about = packaged.about(files[name])
    return {"method": name, "about": about, "constructor": selector, "options": options}


def _meanings(constructor: Any) -> dict[str, str]:
    """What docstrings say of the arguments, those of `methods.arguments_of` included."""
    found: dict[str, str] = {}
    for other in reversed(getattr(constructor, "arguments_of", ())):
        found |= _meanings(other)
    section = (inspect.getdoc(constructor) or "").partition("Args:\n")[2].partition("\n\n")[0]
    lines = re.findall(r"^ +(\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return found | {name: " ".join(text.split()) for name, text in lines}


def models(args: argparse.Namespace) -> None:
    """Lists the files of gin/models with the sizes that they set."""
    from moe_peft.config import packaged

    rows: list[dict[str, Any]] = []
    for path in packaged.files("models"):
        bound = packaged.bindings(path)
        sizes = {name.partition(".")[2]: int(n) for name, n in bound.items() if n.isdecimal()}
        sizes.pop("", None)  # macros
        line = ", ".join(f"{name} {size}" for name, size in sizes.items())
        shown = sizes if args.json else line
        rows.append({"model": path.stem, "about": packaged.about(path), "sizes": shown})
    _show(rows, args.json)


def macros(args: argparse.Namespace) -> None:
    """Lists the macros that the packaged gin files agree on."""
    rows = [{"macro": name, "meaning": text} for name, text in macros_lib.MACROS.items()]
    _show(rows, args.json)


def files(args: argparse.Namespace) -> None:
    """Lists the gin files that come with the package, or prints their folder."""
    from moe_peft.config import gin_files, packaged

    print(gin_files.packaged_folder() if args.folder else "\n".join(packaged.names()))


def _show(rows: Any, as_json: bool = False, heading: bool = False) -> None:
    """Prints rows as a table on a terminal, as aligned text elsewhere, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        from moe_peft.runtime import tables

        table = tables.grid(*rows[0], left=rows[0], overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        tables.wide_console(100).print(table, markup=False)
    else:
        names = dict(zip(rows[0], rows[0]))
        print("\n".join(_aligned([names, *rows] if heading else rows)))


def _aligned(rows: Sequence[dict[str, str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*(row.values() for row in rows))]
    return ["  ".join(map(str.ljust, row.values(), widths)).rstrip() for row in rows]


RUN = {"methods": methods, "models": models, "macros": macros, "files": files}
