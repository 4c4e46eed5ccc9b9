"""The public names, loaded on first touch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, run_forked

import guided_diffusion as gd

PACKAGE = ROOT / "guided_diffusion"
NAMES = sorted({*gd._HOME, *gd._MODULES})


def test_import_loads_neither_torch_nor_mpi() -> None:
    code = "import sys, guided_diffusion; print([m for m in ('torch', 'numpy', 'mpi4py', 'blobfile', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_name_is_served(name: str) -> None:
    assert getattr(gd, name) is not None
    assert name in dir(gd)


def test_type_checkers_are_told_the_same_names() -> None:
    """The imports under TYPE_CHECKING, as (name, module), are those of the table."""
    block = next(node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    found = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    modules = {name: tuple(place.rsplit(".", 1)) for name, place in gd._MODULES.items()}
    assert found == {**{name: (module, name) for name, module in gd._HOME.items()}, **modules}
    assert (PACKAGE / "py.typed").exists()


def test_what_the_docs_show_is_public() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    shown = {name for page in pages for name in re.findall(r"\bgd\.([A-Za-z_]+)", page.read_text(encoding="utf-8"))}
    assert shown and shown <= set(NAMES)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gd.nothing


def test_respace_is_module_and_function_whatever_came_first() -> None:
    program = """
import guided_diffusion as gd
from guided_diffusion import respace
assert len(gd.respace(gd.make_process([0.1] * 4), [0, 2])) == 2
assert respace.SpacedDiffusion
"""
    run_forked(f"import guided_diffusion.respace\n{program}", program)


def test_a_copy_under_another_package_works(tmp_path: Path) -> None:
    """Many programs carry the package below their own; only relative imports allow that."""
    (tmp_path / "extern").mkdir()
    (tmp_path / "extern" / "guided_diffusion").symlink_to(ROOT / "guided_diffusion")
    run_forked(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import extern.guided_diffusion.script_util as s
assert 'guided_diffusion' not in sys.modules
s.create_gaussian_diffusion()
""")


def test_respace_needs_no_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the 2021 modules deleted the public name still answers."""
    import guided_diffusion
    from guided_diffusion.diffusion import process

    monkeypatch.delitem(vars(guided_diffusion), "respace", raising=False)
    monkeypatch.setitem(sys.modules, "guided_diffusion.respace", None)
    assert guided_diffusion.respace is process.respace
    monkeypatch.delitem(vars(guided_diffusion), "respace", raising=False)
