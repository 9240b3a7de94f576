"""Imports of gin files: from the working directory too, and a failure says where and why."""

import os
import sys

import gin
import pytest

from moe_peft import errors
from moe_peft.config import gin_files, imports


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("shop"):
            del sys.modules[name]
    gin.clear_config()


def failure(tmp_path, module, **sources):
    """The message where a gin file imports a module; `sources` are those of the folder here."""
    for name, source in sources.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    (tmp_path / "a.gin").write_text(f"\nimport {module}\n")
    imports.add_working_directory()
    with pytest.raises(errors.UserError) as caught:
        gin_files.load(["a.gin"])
    start = f"a.gin:2: cannot import {module}: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def test_the_working_directory_comes_last_and_once(tmp_path):
    before = [*sys.path]
    for _ in range(2):
        imports.add_working_directory()
    assert sys.path == [*before, str(tmp_path)]


def test_a_working_directory_that_was_removed(tmp_path):
    before = [*sys.path]
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    imports.add_working_directory()
    assert sys.path == before


def test_module_that_is_not_there(tmp_path):
    found = failure(tmp_path, "shopp", shop="")
    start = "there is no module 'shopp'. Did you mean 'shop'? Looked in: "
    assert found.startswith(start)
    looked = found.removeprefix(start).rstrip(".").split(", ")
    assert looked[-1] == str(tmp_path)
    assert any(folder.endswith("site-packages") for folder in looked)
    assert os.path.dirname(os.__file__) not in looked  # Python's own


def test_module_that_is_not_in_its_package(tmp_path):
    found = failure(tmp_path, "shop.hamer", **{"shop/__init__": "", "shop/hammer": ""})
    where = f"Looked in: {tmp_path / 'shop'}."
    assert found == f"there is no module 'shop.hamer'. Did you mean 'hammer'? {where}"


def test_module_below_one_that_is_no_package(tmp_path):
    found = failure(tmp_path, "shop.hammer", shop="")
    assert found == "'shop' is a module, not a package, so it holds no 'hammer'."


# what is in shop.py: the reason, where {} is the folder
FAILURES = {
    "\nimport numpyy": "{}/shop.py:2: ModuleNotFoundError: No module named 'numpyy'",
    "\n\nx = 1 / 0": "{}/shop.py:3: ZeroDivisionError: division by zero",
    "x = 1\nx = (": "{}/shop.py:2: SyntaxError: '(' was never closed",
    # The line of the module that was asked for, wherever the error is raised.
    "import json\njson.loads('x')": "{}/shop.py:2: JSONDecodeError: Expecting value: line 1 column "
    "1 (char 0)",
    "raise ImportError(None)": "{}/shop.py:1: ImportError: None",
    "from moe_peft import errors\nraise errors.UserError('Buy nails.')": "{}/shop.py:2: Buy nails.",
    "\nimport shop_cellar": "{}/shop.py:2: NameError: name 'nails' is not defined",
}


@pytest.mark.parametrize("source", FAILURES)
def test_error_inside_the_module(source, tmp_path):
    found = failure(tmp_path, "shop", shop=source, shop_cellar="nails")
    assert found == FAILURES[source].format(tmp_path)


def test_error_inside_the_package_of_the_module(tmp_path):
    found = failure(tmp_path, "shop.hammer", **{"shop/__init__": "\nnails", "shop/hammer": ""})
    assert found == f"{tmp_path}/shop/__init__.py:2: NameError: name 'nails' is not defined"


def test_module_that_python_was_told_not_to_import(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "shop", None)
    found = failure(tmp_path, "shop", shop="")
    assert "import of shop halted" in found or found.startswith("there is no module 'shop'")
