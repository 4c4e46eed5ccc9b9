"""Arrows between rooms point one way. Imports are read from the source, those inside functions too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "guided_diffusion"
DOORS = {
    "dist_util", "fp16_util", "gaussian_diffusion", "image_datasets", "logger", "losses",
    "nn", "resample", "respace", "script_util", "train_util", "unet",
}  # fmt: skip
ROOMS = {"build", "cli", "config", "data", "diffusion", "models", "runtime", "sampling", "training", "weights"}
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "diffusion": set(),
    "models": set(),
    "runtime": set(),
    "data": {"runtime"},
    "build": {"config", "data", "diffusion", "models", "runtime"},
    "weights": {"build", "config", "diffusion", "models", "runtime"},
    "training": {"data", "diffusion", "runtime", "weights"},
    "sampling": {"data", "diffusion", "models", "runtime", "weights"},
    "cli": ROOMS,
    "__init__": ROOMS,
    "__main__": {"cli"},
}
FORBIDDEN_IN_DIFFUSION = {"os", "sys", "logging", "random", "mpi4py", "blobfile", "tqdm", "argparse"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of everything `path` imports, wherever in the file."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, node.module) if node.module else base)
            found.update(f"{stem}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(package[0] + first.value if first.value.startswith(".") else first.value)
    return found


def rooms_imported(path: Path) -> set[str]:
    """Of this package."""
    names = (name.split(".") for name in imported_modules(path))
    return {parts[1] for parts in names if parts[0] == PACKAGE.name and len(parts) > 1}


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room in DOORS:
        return  # a door may open on anything
    imported = rooms_imported(path) & (ROOMS | DOORS)
    assert not imported & DOORS, f"{room} imports the doors {sorted(imported & DOORS)}; nothing in a room may"
    wrong = imported - ALLOWED[room] - {room}
    assert not wrong, f"{room} must not import {sorted(wrong)}"


def test_no_circle_of_files() -> None:
    """Between files, also through imports inside functions, there is an order in which each comes after what it imports."""
    files = {".".join(("guided_diffusion", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in SOURCES}
    names = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        targets = (full if full in names else full.rpartition(".")[0] for full in imported_modules(path))
        # the package's __init__ offers all rooms to users and loads them when touched; nobody inside imports from it
        graph[name] = {target for target in targets if target in names and target not in (name, "guided_diffusion")}
    del graph["guided_diffusion"]
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_source_has_a_room() -> None:
    assert {room_of(p) for p in SOURCES} <= ROOMS | DOORS | {"__init__", "__main__"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "diffusion").glob("*.py")), ids=lambda p: p.name)
def test_mathematics_has_no_input_or_output(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert not roots & FORBIDDEN_IN_DIFFUSION


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_hold_no_global_state(path: Path) -> None:
    if room_of(path) in DOORS:
        return
    lines = [n.lineno for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Global)]
    assert not lines, f"`global` on lines {lines}"


@pytest.mark.parametrize(
    ("folder", "allowed"), [("evaluations", ("data.", "runtime.storage", "runtime.launchers")), ("scripts", ("cli.",))]
)
def test_beside_the_package_little_of_it_is_imported(folder: str, allowed: tuple[str, ...]) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        ours = [name.split(".", 1) for name in imported_modules(path) if name.split(".")[0] == "guided_diffusion"]
        assert all(rest and rest[0].startswith(allowed) for _, *rest in ours), path


def test_the_reader_of_imports_sees_lazy_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: an arrow hidden in a function, or spelled through import_module, is found."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "models").mkdir()
    source = tmp_path / "models" / "bad.py"
    source.write_text("def f():\n    from ..diffusion.process import Process\n    return Process\n")
    assert rooms_imported(source) == {"diffusion"}
    source.write_text("import importlib\n\ndef f():\n    return importlib.import_module('.training.ema')\n")
    assert rooms_imported(source) == {"training"}
    source.write_text("def f():\n    from .. import gaussian_diffusion\n    return gaussian_diffusion\n")
    assert rooms_imported(source) == {"gaussian_diffusion"}
